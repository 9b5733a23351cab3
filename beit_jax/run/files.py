"""Crash-safe file writes, on disk and in a bucket, and digests of files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from beit_jax.runtime import bucket

Digests = dict[str, dict[str, Any]]  # file name -> {"size": bytes, "sha256" or "md5": hexadecimal}


def write_atomic(path: Path, text: str) -> None:
  """Replaces a file in one step: after a kill or a power cut it holds either its old content or all of `text`."""
  if bucket.remote(path):  # A store creates an object completely or not at all.
    path.write_text(text)
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  sync(path.parent)


def write_json(path: Path, value: Any) -> None:
  write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def sync(path: Path) -> None:
  """Flushes a file or a folder to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:
    if path.is_file():  # Some file systems can flush files only.
      raise
  finally:
    os.close(descriptor)


def sync_tree(folder: Path) -> None:
  """Flushes a folder and everything in it to the disk. A bucket needs no flush."""
  if not bucket.remote(folder):
    for path in (*folder.rglob("*"), folder, folder.parent):
      sync(path)


def digests(
  folder: Path,
  *,
  exclude: str,
  like: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
  parts: Collection[str] | None = None,
) -> Digests:
  """Computes the digests of all files below a folder.

  Args:
    folder: On disk, where the hash is SHA-256 by default, or in a bucket, where it is the MD5 that the store states.
    exclude: The name of a file to leave out.
    like: Digests to compare with. Their kind of hash is used, so that a run can be verified after it was copied
      between a disk and a bucket.
    parts: On disk, only these files and subfolders are hashed; of others, the result has the size. None: all.
  """
  if bucket.remote(folder):
    return {name: row for name, row in bucket.digests(folder, like).items() if name != exclude}
  paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
  found: Digests = {}
  for name in sorted(paths.keys() - {exclude}):
    found[name] = {"size": paths[name].stat().st_size}
    if parts is None or name.split("/")[0] in parts:
      kind = "md5" if "md5" in like.get(name, {}) else "sha256"
      found[name][kind] = hash_file(paths[name], kind)
  return found


def hash_file(path: Path, kind: str) -> str:
  """Returns the hash of a file in hexadecimal; `kind` is a name of hashlib."""
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, kind).hexdigest()
  except OSError as error:
    error.filename = str(path)  # An error of `read` does not name the file.
    raise


def total_size(folder: Path) -> int:
  """Bytes in all files below a folder."""
  if bucket.remote(folder):
    return sum(row["size"] for row in bucket.digests(folder, {}).values())
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Reads the objects of a JSON Lines file; [] if there is no file. Lines that a kill cut off are skipped."""
  try:
    lines = path.read_text(errors="replace").splitlines()
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(ValueError):
      rows.append(json.loads(line))
  return [row for row in rows if isinstance(row, dict)]
