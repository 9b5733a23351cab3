"""The index of a tar file: where each member lies in it. It is made once and kept beside the file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tarfile
import uuid
from pathlib import Path

from beit_jax.data.listing import HIDDEN, SPECIAL, Listing, is_metadata
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

VERSION = 1
ENDING = ".index.json"
BLOCK = 512  # bytes; tar files consist of such blocks and end with two of zeros
MAX_TEXT = 64  # bytes of a class number


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in a tar file.

  Attributes:
    name: its path, without a leading "./".
    offset: of its first byte in the tar file.
    size: in bytes.
    text: the content of a file `.cls`; "" of others.
  """

  name: str
  offset: int
  size: int
  text: str = ""


def read_index(path: Path) -> list[Member]:
  """Returns the files in a tar file, in their order, from its index or, if that is missing or old, from the file.

  The index holds the size and the time of the last change of the tar file. It lies beside the file, or, where that
  folder cannot be written, in `$XDG_CACHE_HOME/beit_jax` (default: ~/.cache).

  Raises:
    UserError: the file is cut off, damaged, compressed, or no tar file; names the place.
  """
  status = path.stat()
  key = [VERSION, status.st_size, status.st_mtime_ns]
  places = [path.with_name(path.name + ENDING), _in_cache(path)]
  for place in places:
    try:
      stored = json.loads(place.read_text())
      if stored["key"] == key:
        return [Member(*row) for row in stored["members"]]
    except (OSError, ValueError, KeyError, TypeError):
      continue
  members = _scan(path)
  text = json.dumps({"key": key, "members": [dataclasses.astuple(member) for member in members]})
  if not any(_write(place, text) for place in places):
    log.warning("%s: its index cannot be kept beside it nor in %s; each start makes it anew", path, places[1])
  return members


def _in_cache(path: Path) -> Path:
  folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "beit_jax"
  digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
  return folder / f"{path.name}.{digest[:16]}{ENDING}"


def _write(place: Path, text: str) -> bool:
  """Replaces a file at once, since several processes may do so; returns whether that was possible."""
  temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text)
    os.replace(temporary, place)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()
    return False
  return True


def _scan(path: Path) -> list[Member]:
  log.info("%s: making the index of its members", path)
  left_out = Listing(str(path))
  members: dict[str, Member] = {}
  try:
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
      for info in tar:
        name = os.path.normpath(info.name)
        if info.isdir():
          continue
        if any(map(is_metadata, name.split("/"))):
          left_out.leave_out(HIDDEN, os.path.basename(name))
        elif not info.isreg() or info.issparse():
          left_out.leave_out(SPECIAL, name)
        elif name in members:
          raise UserError(
            f"{path}: holds {name!r} twice, at bytes {members[name].offset} and {info.offset_data}"
          )
        else:
          is_class = name.lower().endswith(".cls") and info.size <= MAX_TEXT
          text = os.pread(file.fileno(), info.size, info.offset_data) if is_class else b""
          members[name] = Member(name, info.offset_data, info.size, text.decode(errors="replace").strip())
      end = tar.offset  # of the first block that is no header
  except tarfile.TarError as error:
    raise _damaged(path, members, str(error)) from None
  _check_end(path, members, end)
  left_out.log_report()
  return list(members.values())


def _check_end(path: Path, members: dict[str, Member], end: int) -> None:
  """Checks that a tar file ends with blocks of zeros after its last member, and that nothing follows."""
  with path.open("rb") as file:
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK or any(block):
      raise _damaged(
        path, members, "a header is damaged" if len(block) == BLOCK else "the end mark is missing", end
      )
    while block := file.read(1 << 20):
      if any(block):
        raise UserError(
          f"{path}: data follow the end mark at byte {end} (several tar files were joined?); unpack it with "
          "`tar --ignore-zeros` and pack it anew, or keep the parts as files of their own"
        )


def _damaged(path: Path, members: dict[str, Member], reason: str, place: int | None = None) -> UserError:
  last = next(reversed(members.values()), None)
  place = place if place is not None else last.offset + last.size if last else 0
  after = f"after the member {last.name!r}" if last else "before the first member"
  return UserError(
    f"{path}: expected a complete tar file without compression, found {path.stat().st_size} bytes, where at byte "
    f"{place}, {after}, {reason}; if it is cut off, copy it again; if it is compressed, unpack it with gunzip"
  )
