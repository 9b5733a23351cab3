"""Runs in a bucket: `gs://BUCKET/RUN` as a workdir, and models that are read from there (docs/scaling.md, "Buckets").

Paths on disk are `pathlib.Path`; the functions here return them unchanged. A path in a bucket is an `etils.epath.Path`,
which Orbax accepts, and through which whole files are read and written. Since an object cannot be appended to, files
that grow (log.txt, metrics.jsonl, TensorBoard) are written to a local folder, `local(path)`, and uploaded by `push`.
"""

import atexit
import base64
import contextlib
import errno
import functools
import hashlib
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_jax.errors import TransientError, UserError

log = logging.getLogger("beit_jax")
SCHEME = "gs://"
# Seconds between two uploads of growing files; besides, they are uploaded before each checkpoint is sealed.
INTERVAL = 30.0
INSTALL = "pip install -e '.[gcs]'"
LOG_IN = (
  "log in with `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS to a service account's key "
  "file, or run on a machine of Google Cloud with a service account"
)
ROLES = "the account needs the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"


def remote(path: Any) -> bool:
  return str(path).startswith(SCHEME)


def path(text: Any) -> Any:
  """Parses a path; a path in a bucket is returned only if the bucket is accessible.

  Raises:
    UserError: the scheme is not gs://, a package or credentials are missing, the bucket does not exist, or access is
      denied.
  """
  text = os.fspath(text)
  text = re.sub("^gs:/+", SCHEME, text)  # `Path` merges the slashes
  scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", text)
  if scheme is None:
    return Path(os.path.expanduser(text))
  if not remote(text):
    raise UserError(f"{text}: {scheme[1]}:// is not supported; expected a folder or {SCHEME}BUCKET/FOLDER")
  name, key = _split(text)
  if not name or not key:
    raise UserError(f"{text}: expected {SCHEME}BUCKET/FOLDER")
  _bucket(name)
  from etils import epath

  return epath.Path(text.rstrip("/"))


def check_local(key: str, value: Any) -> None:
  """Raises a UserError when the value of a config key that names data is in a bucket."""
  if remote(value):
    raise UserError(
      f"config key '{key}': {value!r} is in a bucket, which only init_from and resume can be. Mount the bucket "
      "(gcsfuse BUCKET /mnt/bucket, as launch/tpu_pod.sh and launch/gke/gke.sh do with --bucket) and give that folder"
    )


def absolute(path: Any) -> Any:
  return path if remote(path) else path.absolute()


def _split(path: Any) -> tuple[str, str]:
  """(bucket, key) of a path."""
  name, _, key = str(path).removeprefix(SCHEME).partition("/")
  return name, key.strip("/")


@functools.cache
def _bucket(name: str) -> Any:
  """A bucket of google-cloud-storage; configures all three libraries that reach it to use the same account."""
  emulator = os.environ.get("STORAGE_EMULATOR_HOST")
  os.environ["EPATH_USE_TF"] = "false"  # even where TensorFlow is installed
  if emulator:
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which emulators do not speak
  try:
    import fsspec
    import gcsfs  # noqa: F401  (fsspec needs it)
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY
  except ImportError as error:
    text = f"{SCHEME}{name}: gcsfs and google-cloud-storage are needed ({error}); {INSTALL}"
    raise UserError(text) from None
  # TensorStore and other hosts write there too, so listings are not cached.
  fsspec.config.conf["gcs"] = {"token": "anon" if emulator else "google_default", "use_listings_cache": False}
  try:
    client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    retry = DEFAULT_RETRY.with_timeout(20)
    bucket = client.get_bucket(name, retry=retry)  # Orbax needs the same permission
    list(client.list_blobs(name, max_results=1, retry=retry))
  except GoogleAuthError as error:
    raise UserError(f"{SCHEME}{name}: no usable credentials ({_first(error)}); {LOG_IN}") from None
  except exceptions.NotFound:
    text = f"{SCHEME}{name}: there is no such bucket; `gcloud storage buckets create` creates one"
    raise UserError(text) from None
  except (exceptions.Forbidden, exceptions.Unauthorized) as error:
    raise UserError(f"{SCHEME}{name}: access is denied ({_first(error)}); {ROLES}") from None
  except Exception as error:  # no network, a proxy, an outage
    raise TransientError(f"{SCHEME}{name}: cannot be reached ({_first(error)})") from None
  return bucket


def _blob(path: Any) -> Any:
  """The object at a path, which need not exist."""
  name, key = _split(path)
  return _bucket(name).blob(key)


def _find(path: Any) -> Any:
  """The object at a path with its metadata; None when it does not exist."""
  name, key = _split(path)
  return _bucket(name).get_blob(key)


def _first(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
  """`others`, and the exceptions besides OSError that the libraries raise when a bucket fails; for `except`."""
  if "gcsfs" not in sys.modules:
    return others
  import aiohttp
  import requests
  from gcsfs.retry import HttpError
  from google.api_core.exceptions import GoogleAPIError
  from google.auth.exceptions import GoogleAuthError

  dropped = requests.exceptions.ConnectionError, requests.exceptions.Timeout
  return *others, HttpError, aiohttp.ClientError, GoogleAPIError, GoogleAuthError, *dropped


TRANSIENT_ERRNO = {
  getattr(errno, name) for name in ("EAGAIN", "EINTR", "EBUSY", "EIO", "ETIMEDOUT", "ESTALE", "ECONNRESET")
}
SYSTEM_ERRORS = "No space left on device|Disk quota exceeded|Read-only file system|Permission denied"


def is_transient(error: Exception) -> bool:
  """Whether the same save may succeed a moment later."""
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in TRANSIENT_ERRNO
  if isinstance(error, errors()):
    return getattr(error, "code", None) not in (400, 401, 403, 404)
  number = re.search(r"os_error_code='(\d+)'", str(error))  # in messages of TensorStore
  if number:
    return int(number[1]) in TRANSIENT_ERRNO
  if isinstance(error, ConnectionError | TimeoutError):
    return True
  return re.search("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error)) is not None


def brief(error: Exception) -> str:
  """The first line of a message, after the error of the system, which TensorStore gives only after pages of text."""
  line = _first(error)
  system = re.search(SYSTEM_ERRORS, str(error))
  return line if system is None or system[0] in line else f"{system[0]}: {line}"


def check_writable(folder: Any) -> None:
  """Creates and deletes a test object; raises a UserError when the account has no permission."""
  if not remote(folder):
    return
  blob = _blob(folder / f".beit_jax-test-{uuid.uuid4().hex}")
  try:
    blob.upload_from_string(b"beit_jax\n")
    blob.delete()
  except Exception as error:
    raise UserError(f"{folder}: nothing can be written there ({_first(error)}); {ROLES}") from None


# Growing files live in a local folder, whose changed files are uploaded as whole objects.

_lock = threading.RLock()
_staging: Path | None = None
_temporary: list[Path] = []  # folders to delete when the process ends
_uploaded: dict[
  Path, tuple[int, int]
] = {}  # local file -> its version when it was last uploaded or downloaded
_stop = threading.Event()


def local(path: Any) -> Path:
  """Where to write `path`: itself on disk; for a bucket a local copy of what the bucket has there."""
  global _staging, _stop
  if not remote(path):
    return path
  with _lock:
    if _staging is None:
      _staging, _stop = _temporary_folder(), threading.Event()
      threading.Thread(target=_push_regularly, args=(_stop,), daemon=True).start()
    file = _staging.joinpath(*_split(path))
    if not file.exists():
      file.parent.mkdir(parents=True, exist_ok=True)
      blob = _find(path)
      if blob is not None:
        blob.download_to_filename(str(file))
        _uploaded[file] = _version(file)
    return file


def _temporary_folder() -> Path:
  folder = Path(tempfile.mkdtemp(prefix="beit_jax_"))
  _temporary.append(folder)
  return folder


@atexit.register
def _delete_temporary() -> None:
  while _temporary:
    shutil.rmtree(_temporary.pop(), ignore_errors=True)


def _version(file: Path) -> tuple[int, int]:
  stat = file.stat()
  return stat.st_mtime_ns, stat.st_size


def push() -> None:
  """Uploads the local files that have changed since their last upload; returns at once where there are none."""
  with _lock:
    if _staging is None:
      return
    for file in sorted(_staging.rglob("*")):
      if not file.is_file() or file.suffix == ".tmp" or _uploaded.get(file) == _version(file):
        continue
      version = _version(file)
      blob = _blob(file.relative_to(_staging).as_posix())
      blob.upload_from_string(file.read_bytes(), "application/octet-stream")
      _uploaded[file] = version


def _push_regularly(stop: threading.Event) -> None:
  failing = False
  while not stop.wait(INTERVAL):
    try:
      push()
      failing = False
    except Exception as error:  # the upload before the next checkpoint is sealed must succeed
      if not failing:
        log.warning("log.txt and metrics could not be uploaded (%s); this will be tried again", _first(error))
      failing = True


def close() -> None:
  """Uploads what was written after the last checkpoint; when that fails, the local files are kept."""
  global _staging
  if _staging is not None:
    _stop.set()
    try:
      push()
    except Exception as error:
      log.error(
        "the last lines of log.txt could not be uploaded (%s); they are in %s", _first(error), _staging
      )
      _temporary.remove(_staging)
    with _lock:
      _staging = None
      _uploaded.clear()
  _delete_temporary()


def fetch(path: Any) -> Path:
  """Downloads a file with the JSON files beside it, or the files of a folder; deleted when the process ends."""
  name, key = _split(path)
  target = _temporary_folder()
  parent, _, file_name = key.rpartition("/")
  single = _find(path) is not None
  folder = parent if single else key
  for blob in _bucket(name).list_blobs(prefix=f"{folder}/" if folder else "", delimiter="/"):
    base = blob.name.rpartition("/")[2]
    if base and (not single or blob.name == key or base.endswith(".json")):
      log.info("downloading %s%s/%s", SCHEME, name, blob.name)
      blob.download_to_filename(str(target / base))
  return target / file_name if single else target


# Objects below a folder.


def _objects(folder: Any) -> dict[str, Any]:
  """Path relative to the folder -> object."""
  name, key = _split(folder)
  found = _bucket(name).list_blobs(prefix=key + "/")
  return {blob.name.removeprefix(key + "/"): blob for blob in found if not blob.name.endswith("/")}


def digests(folder: Any, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Sizes and MD5 sums of all objects below a folder, as the store itself states them.

  An object is downloaded where `wanted` has its sha256, or the store has no MD5 (composite objects).
  """
  result = {}
  for name, blob in _objects(folder).items():
    algorithm = "sha256" if "sha256" in wanted.get(name, {}) else "md5"
    if algorithm == "md5" and blob.md5_hash:
      value = base64.b64decode(blob.md5_hash).hex()
    else:
      with blob.open("rb") as file:
        value = hashlib.file_digest(file, algorithm).hexdigest()
    result[name] = {"size": blob.size, algorithm: value}
  return result


def move(folder: Any, target: Any, first: str) -> None:
  """Copies all objects, then deletes the originals, the one named `first` before the others."""
  name, key = _split(target)
  for relative, blob in _objects(folder).items():
    blob.bucket.copy_blob(blob, _bucket(name), f"{key}/{relative}")
  remove(folder, first)


def remove(folder: Any, first: str) -> None:
  """Deletes all objects below a folder, the one named `first` before the others."""
  objects = _objects(folder)
  for name in sorted(objects, key=lambda name: name != first):
    objects[name].delete()


# A single object with a condition on its generation, the number of its version: the basis of a lock.


def read(path: Any) -> tuple[str, int]:
  """(text, generation) of an object; ("", 0) where there is none."""
  from google.api_core.exceptions import NotFound, PreconditionFailed

  while (blob := _find(path)) is not None:
    with contextlib.suppress(NotFound, PreconditionFailed):  # it was replaced or deleted in between
      return blob.download_as_text(if_generation_match=blob.generation), blob.generation
  return "", 0


def write(path: Any, text: str, generation: int) -> int:
  """Replaces exactly this generation, 0 for none; returns the new one, or 0 when another process was faster."""
  from google.api_core.exceptions import PreconditionFailed

  blob = _blob(path)
  try:
    blob.upload_from_string(text, if_generation_match=generation)
  except PreconditionFailed:
    return 0
  return blob.generation


def age(path: Any) -> float:
  """Seconds since an object was written, by the clock of this machine; infinite where there is none."""
  blob = _find(path)
  return math.inf if blob is None else time.time() - blob.updated.timestamp()


def delete(path: Any, generation: int) -> None:
  """Deletes exactly this generation; does nothing when there is another one."""
  from google.api_core.exceptions import NotFound, PreconditionFailed

  with contextlib.suppress(NotFound, PreconditionFailed):
    _blob(path).delete(if_generation_match=generation)
