"""Runs in a bucket: `gs://BUCKET/RUN` as a workdir, and models read from there (docs/scaling.md, "Buckets").

Paths on disk are `pathlib.Path` and pass through here untouched. A path in a bucket is an `etils.epath.Path`: Orbax
takes it, and whole files are read and written through it. An object cannot be appended to, so what grows (log.txt,
metrics.jsonl, TensorBoard) is written to a local folder, `local(path)`, and `push` uploads what has changed there.
"""

import atexit
import base64
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
INTERVAL = (
  30.0  # seconds between two uploads of what has grown, besides those before each checkpoint is sealed
)
INSTALL = "pip install -e '.[gcs]'"
LOG_IN = (
  "log in with `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS to a service account's key "
  "file, or run on a machine of Google Cloud with a service account"
)
ROLES = "the account needs the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"


def remote(path: Any) -> bool:
  return str(path).startswith(SCHEME)


def path(text: Any) -> Any:
  """A `Path`, or the path of something in a bucket that was found to be accessible.

  Raises:
    UserError: a package is missing, nobody is logged in, there is no such bucket or no access to it, or the scheme
      is not gs://.
  """
  text = os.fspath(text)
  text = re.sub("^gs:/+", SCHEME, text)  # what `Path` makes of it
  scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", text)
  if scheme is None:
    return Path(os.path.expanduser(text))
  if not remote(text):
    raise UserError(
      f"{text}: nothing is known of {scheme[1]}://; there are folders and {SCHEME}BUCKET/FOLDER"
    )
  bucket, key = _split(text)
  if not bucket or not key:
    raise UserError(f"{text}: expected {SCHEME}BUCKET/FOLDER")
  _bucket(bucket)
  from etils import epath

  return epath.Path(text.rstrip("/"))


def refuse(key: str, value: Any) -> None:
  """Raises a UserError when the value of a config key that names data is in a bucket."""
  if remote(value):
    raise UserError(
      f"config key '{key}': {value!r} is in a bucket; only init_from and resume may be. Mount the bucket (gcsfuse "
      "BUCKET /mnt/bucket, as launch/tpu_pod.sh and launch/gke/gke.sh do with --bucket) and name the folder there"
    )


def absolute(path: Any) -> Any:
  return path if remote(path) else path.absolute()


def _split(path: Any) -> tuple[str, str]:
  bucket, _, key = str(path).removeprefix(SCHEME).partition("/")
  return bucket, key.strip("/")


@functools.cache
def _bucket(name: str) -> Any:
  """The bucket for google-cloud-storage; sets up the three libraries that reach it, all with the same account."""
  emulator = os.environ.get("STORAGE_EMULATOR_HOST")
  os.environ["EPATH_USE_TF"] = "false"  # also where TensorFlow is installed
  if emulator:
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which emulators do not speak
  try:
    import fsspec
    import gcsfs  # noqa: F401
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY
  except ImportError as error:
    raise UserError(
      f"{SCHEME}{name}: gcsfs and google-cloud-storage are needed ({error}); {INSTALL}"
    ) from None
  # TensorStore and other hosts write there too, so listings are never remembered.
  fsspec.config.conf["gcs"] = {"token": "anon" if emulator else "google_default", "use_listings_cache": False}
  try:
    client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    patience = DEFAULT_RETRY.with_timeout(20)
    bucket = client.get_bucket(name, retry=patience)  # Orbax asks for the same
    list(client.list_blobs(name, max_results=1, retry=patience))
  except GoogleAuthError as error:
    raise UserError(f"{SCHEME}{name}: no usable credentials ({_first(error)}); {LOG_IN}") from None
  except exceptions.NotFound:
    raise UserError(
      f"{SCHEME}{name}: there is no such bucket; `gcloud storage buckets create` makes one"
    ) from None
  except (exceptions.Forbidden, exceptions.Unauthorized) as error:
    raise UserError(f"{SCHEME}{name}: access is denied ({_first(error)}); {ROLES}") from None
  except Exception as error:  # no network, a proxy, an outage
    raise TransientError(f"{SCHEME}{name}: cannot be reached ({_first(error)})") from None
  return bucket


def _first(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def errors() -> tuple[type[Exception], ...]:
  """What the libraries raise, besides OSError, when a bucket fails; for an `except`."""
  if "gcsfs" not in sys.modules:
    return ()
  import aiohttp
  import requests
  from gcsfs.retry import HttpError
  from google.api_core.exceptions import GoogleAPIError
  from google.auth.exceptions import GoogleAuthError

  dropped = requests.exceptions.ConnectionError, requests.exceptions.Timeout
  return HttpError, aiohttp.ClientError, GoogleAPIError, GoogleAuthError, *dropped


PASSING = {
  getattr(errno, name) for name in ("EAGAIN", "EINTR", "EBUSY", "EIO", "ETIMEDOUT", "ESTALE", "ECONNRESET")
}


def is_transient(error: Exception) -> bool:
  """Whether the same save may succeed a moment later."""
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in PASSING
  if isinstance(error, errors()):
    return getattr(error, "code", None) not in (400, 401, 403, 404)
  number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's way to say what the system said
  if number:
    return int(number[1]) in PASSING
  return isinstance(error, ConnectionError | TimeoutError) or bool(
    re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error))
  )


def brief(error: Exception) -> str:
  """What the system says, then the first line; TensorStore's errors are pages long and say it last."""
  text = str(error).strip() or type(error).__name__
  line = text.splitlines()[0]
  line = line if len(line) <= 300 else f"{line[:300]}..."
  said = re.search(
    r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied", text
  )
  return line if said is None or said[0] in line else f"{said[0]}: {line}"


def check_writable(folder: Any) -> None:
  """Writes and deletes a trial object.

  Raises:
    UserError: the account may not.
  """
  if not remote(folder):
    return
  bucket, key = _split(folder)
  blob = _bucket(bucket).blob(f"{key}/.beit_jax-trial-{uuid.uuid4().hex}")
  try:
    blob.upload_from_string(b"beit_jax\n")
    blob.delete()
  except Exception as error:
    raise UserError(f"{folder}: nothing can be written there ({_first(error)}); {ROLES}") from None


# What grows: a local folder, mirrored up.

_lock = threading.RLock()
_staging: Path | None = None
_temporary: list[Path] = []
_seen: dict[Path, tuple[int, int]] = {}  # local file -> its time and size when it was uploaded, or fetched
_stop = threading.Event()


def local(path: Any) -> Path:
  """Where to write `path`: itself on disk; for a bucket a local place, filled with what the bucket has there."""
  if not remote(path):
    return path
  with _lock:
    place = _folder().joinpath(*_split(path))
    if not place.exists():
      place.parent.mkdir(parents=True, exist_ok=True)
      bucket, key = _split(path)
      blob = _bucket(bucket).get_blob(key)
      if blob is not None:
        blob.download_to_filename(str(place))
        _seen[place] = _state(place)
    return place


def _folder() -> Path:
  global _staging, _stop
  if _staging is None:
    _staging, _stop = Path(tempfile.mkdtemp(prefix="beit_jax_")), threading.Event()
    threading.Thread(target=_push_often, args=(_stop,), daemon=True).start()
    _temporary.append(_staging)
  return _staging


@atexit.register
def _tidy() -> None:
  while _temporary:
    shutil.rmtree(_temporary.pop(), ignore_errors=True)


def _state(place: Path) -> tuple[int, int]:
  stat = place.stat()
  return stat.st_mtime_ns, stat.st_size


def push() -> None:
  """Uploads the local files that have changed since they were uploaded last; returns at once where there are none."""
  with _lock:
    files = [place for place in sorted(_staging.rglob("*")) if place.is_file()] if _staging else []
    for place in (place for place in files if place.suffix != ".tmp"):
      state = _state(place)
      if _seen.get(place) != state:
        bucket, *parts = place.relative_to(_staging).parts
        _bucket(bucket).blob("/".join(parts)).upload_from_string(
          place.read_bytes(), "application/octet-stream"
        )
        _seen[place] = state


def _push_often(stop: threading.Event) -> None:
  said = False
  while not stop.wait(INTERVAL):
    try:
      push()
      said = False
    except Exception as error:  # tried again; before the next checkpoint is sealed it must succeed
      if not said:
        log.warning("log.txt and metrics could not be uploaded (%s); it will be tried again", _first(error))
      said = True


def close() -> None:
  """The last upload, of what has been said since the last checkpoint; where it fails the local files are kept."""
  global _staging
  if _staging is None:
    _tidy()
    return
  _stop.set()
  place = _staging
  _temporary.remove(place)
  try:
    push()
    shutil.rmtree(place, ignore_errors=True)
  except Exception as error:
    log.error("the newest lines of log.txt could not be uploaded (%s); they are in %s", _first(error), place)
  finally:
    with _lock:
      _staging = None
      _seen.clear()
    _tidy()


def fetch(path: Any) -> Path:
  """A local copy of a file with the JSON files beside it, or of the files in a folder; gone when the process ends."""
  bucket, key = _split(path)
  place = Path(tempfile.mkdtemp(prefix="beit_jax_"))
  _temporary.append(place)
  single = _bucket(bucket).get_blob(key) is not None
  folder = key.rpartition("/")[0] if single else key
  for blob in _bucket(bucket).list_blobs(prefix=f"{folder}/" if folder else "", delimiter="/"):
    name = blob.name.rpartition("/")[2]
    if name and (not single or blob.name == key or name.endswith(".json")):
      log.info("fetching %s%s/%s", SCHEME, bucket, blob.name)
      blob.download_to_filename(str(place / name))
  return place / key.rpartition("/")[2] if single else place


# Objects below a folder.


def _objects(folder: Any) -> dict[str, Any]:
  bucket, key = _split(folder)
  found = _bucket(bucket).list_blobs(prefix=key + "/")
  return {blob.name.removeprefix(key + "/"): blob for blob in found if not blob.name.endswith("/")}


def digests(folder: Any, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Size and MD5 of all objects below a folder as the store itself states them.

  Where `wanted` has a sha256, and where the store has no MD5 (composite objects), the object is read.
  """
  result = {}
  for name, blob in _objects(folder).items():
    kind = "sha256" if "sha256" in wanted.get(name, {}) else "md5"
    if kind == "md5" and blob.md5_hash:
      value = base64.b64decode(blob.md5_hash).hex()
    else:
      with blob.open("rb") as file:
        value = hashlib.file_digest(file, kind).hexdigest()
    result[name] = {"size": blob.size, kind: value}
  return result


def move(folder: Any, target: Any, first: str) -> None:
  """Copies all objects, then deletes the old ones, that named `first` before the others."""
  bucket, key = _split(target)
  objects = _objects(folder)
  for name, blob in objects.items():
    _bucket(bucket).copy_blob(blob, _bucket(bucket), f"{key}/{name}")
  for name in sorted(objects, key=lambda name: name != first):
    objects[name].delete()


def remove(folder: Any, first: str) -> None:
  """Deletes all objects below a folder, the one named `first` before the others."""
  objects = _objects(folder)
  for name in sorted(objects, key=lambda name: name != first):
    objects[name].delete()


# One object, with a condition on its generation: what a lock is made of.


def read(path: Any) -> tuple[str, int]:
  """(text, generation) of an object, ("", 0) where there is none."""
  from google.api_core.exceptions import NotFound, PreconditionFailed

  bucket, key = _split(path)
  while True:
    blob = _bucket(bucket).get_blob(key)
    if blob is None:
      return "", 0
    try:
      return blob.download_as_text(if_generation_match=blob.generation), blob.generation
    except (NotFound, PreconditionFailed):  # it was replaced or deleted in between
      continue


def write(path: Any, text: str, generation: int) -> int:
  """Replaces exactly this generation, 0 for none; returns the new one, or 0 where another writer was faster."""
  from google.api_core.exceptions import PreconditionFailed

  bucket, key = _split(path)
  blob = _bucket(bucket).blob(key)
  try:
    blob.upload_from_string(text, if_generation_match=generation)
  except PreconditionFailed:
    return 0
  return blob.generation


def age(path: Any) -> float:
  """Seconds since an object was written, by the clock of this machine; infinite where there is none."""
  bucket, key = _split(path)
  blob = _bucket(bucket).get_blob(key)
  return math.inf if blob is None else time.time() - blob.updated.timestamp()


def delete(path: Any, generation: int) -> None:
  """Deletes exactly this generation; nothing where another one is there."""
  from google.api_core.exceptions import NotFound, PreconditionFailed

  bucket, key = _split(path)
  try:
    _bucket(bucket).blob(key).delete(if_generation_match=generation)
  except (NotFound, PreconditionFailed):
    pass
