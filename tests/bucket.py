"""A small stand-in for Cloud Storage: one bucket in memory, with the JSON API on the loopback address.

It implements what TensorStore, gcsfs and google-cloud-storage use in a run: bucket and object metadata, listings,
ranges, the three kinds of upload, deletion, copies, preconditions on generations. There is no authentication.

    python -m tests.bucket --port=9000      # then export the variables that it prints
"""

import argparse
import base64
import email.parser
import email.policy
import hashlib
import http.server
import itertools
import json
import re
import socket
import threading
import time
import urllib.parse

API = re.compile(
  r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]*)(?:/(rewriteTo|copyTo)/b/([^/]+)/o/(.*))?)?)?"
)


class Bucket:
  """A context manager that serves the bucket `name`.

  Attributes:
    objects: name -> (bytes, generation, time of the last change).
    requests: (method, path) of all requests so far.
    refuse: if set, a function (method, path) -> HTTP status to answer with, or None.
  """

  def __init__(self, name: str = "bucket", port: int = 0):
    self.name, self.objects, self.requests, self.refuse = name, {}, [], None
    self.lock, self.generations, self.sessions = threading.RLock(), itertools.count(1000), {}
    self._server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"bucket": self}))
    self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

  @property
  def environment(self) -> dict[str, str]:
    """Variables for clients; with a token for TensorStore, which would request one over the network otherwise."""
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    return {**dict.fromkeys(names, self.url), "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token"}

  def __enter__(self) -> "Bucket":
    self._thread = threading.Thread(
      target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

  def read(self, name: str) -> bytes | None:
    with self.lock:
      return self.objects[name][0] if name in self.objects else None

  def write(self, name: str, data: bytes) -> None:
    with self.lock:
      self.objects[name] = (bytes(data), next(self.generations), time.time())

  def names(self, prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  bucket: Bucket

  def setup(self):
    super().setup()
    self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def log_message(self, *_):
    pass

  def handle(self):
    try:
      super().handle()
    except (ConnectionError, TimeoutError):  # the client was killed
      pass

  def _answer(self):
    parts = urllib.parse.urlsplit(self.path)
    self.query = {
      key: value[0] for key, value in urllib.parse.parse_qs(parts.query, keep_blank_values=True).items()
    }
    self.body = self._read()
    store = self.bucket
    store.requests.append((self.command, self.path))
    status = store.refuse and store.refuse(self.command, self.path)
    if status:
      return self._send(status, {"error": {"code": status, "message": "refused by the test"}})
    with store.lock:
      match = API.fullmatch(parts.path)
      if match is None:
        return self._send(404, {"error": {"code": 404, "message": f"no such method {self.path}"}})
      self._call(parts.path, *(urllib.parse.unquote(part) if part else part for part in match.groups()))

  do_GET = do_POST = do_PUT = do_DELETE = _answer

  def _read(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    chunks = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(chunks)

  def _send(self, status: int, content=b"", **headers):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(data)))
    self.send_header("Content-Type", "application/octet-stream" if data is content else "application/json")
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.end_headers()
    if status not in (204, 304):
      self.wfile.write(data)

  def _error(self, status: int, message: str):
    self._send(status, {"error": {"code": status, "message": message, "errors": [{"message": message}]}})

  def _call(self, path, bucket, name, action, other, target):
    if bucket != self.bucket.name or other not in (None, self.bucket.name):
      return self._error(404, "The specified bucket does not exist.")
    if path.startswith("/upload"):
      return self._upload()
    if name is None:
      whole = {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"}
      return self._list() if path.endswith("/o") else self._send(200, whole)
    if name not in self.bucket.objects:
      if self.query.get("ifGenerationMatch", "0") != "0":
        return self._error(412, "At least one of the pre-conditions you specified did not hold.")
      return self._error(404, f"No such object: {bucket}/{name}")
    data, generation, _ = self.bucket.objects[name]
    if not self._holds(name):
      return
    if action:
      self.bucket.write(target, data)
      resource = self._resource(target)
      if action == "rewriteTo":
        count = str(len(data))
        resource = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
        resource |= {"totalBytesRewritten": count, "objectSize": count}
      return self._send(200, resource)
    if self.command == "DELETE":
      del self.bucket.objects[name]
      return self._send(204)
    if self.query.get("alt") != "media":
      return self._send(200, self._resource(name))
    headers = {
      "x_goog_generation": str(generation),
      "x_goog_hash": f"md5={_md5(data)}",
      "ETag": f'"{generation}"',
    }
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if span is None:
      return self._send(200, data, **headers)
    first, last = span.groups()
    begin = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if begin >= len(data):
      return self._send(416, b"", Content_Range=f"bytes */{len(data)}")
    self._send(206, data[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(data)}", **headers)

  def _holds(self, name: str) -> bool:
    """Whether the preconditions hold; if not, sends the answer."""
    now = self.bucket.objects[name][1] if name in self.bucket.objects else 0
    match, differ = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
    if match is not None and int(match) != now:
      self._error(412, "At least one of the pre-conditions you specified did not hold.")
      return False
    if differ is not None and int(differ) == now:
      self._send(304) if self.command == "GET" else self._error(412, "not modified")
      return False
    return True

  def _resource(self, name: str) -> dict:
    data, generation, changed = self.bucket.objects[name]
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(changed)) + f".{int(changed % 1 * 1000):03d}Z"
    return {
      "kind": "storage#object",
      "bucket": self.bucket.name,
      "name": name,
      "id": f"{self.bucket.name}/{name}/{generation}",
      "size": str(len(data)),
      "md5Hash": _md5(data),
      "generation": str(generation),
      "metageneration": "1",
      "updated": stamp,
      "timeCreated": stamp,
      "etag": str(generation),
    }

  def _list(self):
    prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
    start, end = self.query.get("startOffset", ""), self.query.get("endOffset", "\U0010ffff")
    limit, after = int(self.query.get("maxResults", 1000)), self.query.get("pageToken", "")
    entries = {}  # name of an object or of a folder -> whether it is a folder, in order
    for name in sorted(n for n in self.bucket.objects if n.startswith(prefix) and start <= n < end):
      cut = name.find(delimiter, len(prefix)) if delimiter else -1
      entry = name if cut < 0 else name[: cut + len(delimiter)]
      if entry > after:
        entries[entry] = cut >= 0
    page = list(entries)[:limit]  # folders count as objects do
    items = [self._resource(name) for name in page if not entries[name]]
    prefixes = [name for name in page if entries[name]]
    more = {"nextPageToken": page[-1]} if len(entries) > limit else {}
    self._send(200, {"kind": "storage#objects", "items": items, "prefixes": prefixes, **more})

  def _upload(self):
    kind, session = self.query["uploadType"], self.query.get("upload_id")
    if session is not None:
      return self._resume(session)
    name, data = self.query.get("name"), self.body
    if kind == "multipart":
      head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
      message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + data)
      boundary = message.get_boundary().encode()
      _, first, second = data.split(b"--" + boundary)[:3]
      name = json.loads(first.partition(b"\r\n\r\n")[2]).get("name", name)
      data = second.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
    elif kind == "resumable":
      name = json.loads(self.body or b"{}").get("name", name)
      session = str(next(self.bucket.generations))
      self.bucket.sessions[session] = (name, bytearray(), self.query)
      return self._send(
        200,
        {},
        Location=f"{self.bucket.url}{self.path.split('?')[0]}?uploadType=resumable&upload_id={session}",
      )
    self._store(name, data)

  def _resume(self, session: str):
    name, data, self.query = self.bucket.sessions[session]
    begin, total = re.fullmatch(r"bytes (?:\*|(\d+)-\d+)/(\*|\d+)", self.headers["Content-Range"]).groups()
    if begin is not None:
      del data[int(begin) :]
    data += self.body
    if total == "*" or len(data) < int(total):
      return self._send(308, **({"Range": f"bytes=0-{len(data) - 1}"} if data else {}))
    self._store(name, bytes(data))

  def _store(self, name: str, data: bytes):
    if self._holds(name):
      self.bucket.write(name, data)
      self._send(200, self._resource(name))


def _md5(data: bytes) -> str:
  return base64.b64encode(hashlib.md5(data).digest()).decode()


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--name", default="bucket")
  parser.add_argument("--port", type=int, default=0)
  with Bucket(**vars(parser.parse_args())) as served:
    print("\n".join(f"export {key}={value}" for key, value in served.environment.items()), flush=True)
    threading.Event().wait()
