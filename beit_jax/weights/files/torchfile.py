"""Reads and writes PyTorch's files (`.pth`, `.pt`, `.bin`, pickled modules) without PyTorch, executing nothing.

A file is a pickle (see pickles.py) that refers to raw storages: a zip archive since PyTorch 1.6, a stream before that.
torch/serialization.py defines both formats.
"""

import collections
import functools
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit_jax.errors import UserError
from beit_jax.weights.files.pickles import (
  MAX_NAME,
  STORAGES,
  Global,
  Inert,
  Refused,
  Storage,
  Tensor,
  storage_id,
  unpickle,
)

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream format


def is_torch(path: Path) -> bool:
  """Whether the file starts like a zip archive or a pickle."""
  with path.open("rb") as file:
    start = file.read(4)
  return start == b"PK\x03\x04" or start[:1] == b"\x80"


def load(path: Path) -> Any:
  """The content of a PyTorch file: dicts and lists with `Tensor`s and `Inert` objects in them.

  Raises:
    UserError: the file is damaged, or holds something that weights do not need; the message says what.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # pickletools warns about escapes in invalid strings
      return _load_zip(path) if zipfile.is_zipfile(path) else _load_stream(path)
  except Refused as error:
    raise UserError(f"{path}: refused: {error}") from None
  except (ArithmeticError, EOFError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
    raise UserError(f"{path}: damaged, or not a PyTorch file ({type(error).__name__}: {error})") from None
  except (zipfile.BadZipFile, NotImplementedError, RecursionError) as error:
    raise UserError(f"{path}: damaged, or not a PyTorch file ({error})") from None


class _Entry(NamedTuple):
  """Where the bytes of one file in an archive lie."""

  start: int
  length: int
  crc: int


def _load_zip(path: Path) -> Any:
  entries = _zip_entries(path)
  pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
  if len(pickles) != 1:
    held = ", ".join(list(entries)[:4])[:200]
    raise Refused(
      f"a PyTorch archive has one data.pkl, this one has {len(pickles)}; it holds {held or 'nothing'}"
    )
  root = pickles[0].removesuffix("data.pkl")
  byteorder = entries.get(f"{root}byteorder")
  if byteorder and _read_entry(path, "byteorder", byteorder).tobytes() != b"little":
    raise Refused("its numbers are big-endian")

  def make_storage(pid: Any) -> Storage | Inert:
    dtype, key, count = storage_id(pid)
    if dtype is None:
      return Inert(pid[1].name)
    entry, size = entries.get(f"{root}data/{key}"), count * dtype.itemsize
    if entry is None or entry.length != size:
      found = "is missing" if entry is None else f"has {entry.length}"
      raise Refused(f"storage {key!r} should have {size} bytes, it {found}")
    return Storage(dtype, count, lambda: _read_entry(path, key, entry).view(dtype))

  return unpickle(_read_entry(path, "data.pkl", entries[pickles[0]]).tobytes(), make_storage)


def _zip_entries(path: Path) -> dict[str, _Entry]:
  """The entries of an archive by name; each must be stored uncompressed, inside the file and apart from the others."""
  entries: dict[str, _Entry] = {}
  spans = []
  size = path.stat().st_size
  with path.open("rb") as file, zipfile.ZipFile(file) as archive:
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
      raise Refused("it is a TorchScript program; save its state_dict() with torch.save and load that file")
    for info in archive.infolist():
      header = b""
      if 0 <= info.header_offset < size:
        file.seek(info.header_offset)
        header = file.read(30)
      if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise Refused(f"the entry {info.filename!r} is not where the archive says")
      start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
      if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Refused(f"the entry {info.filename!r} is compressed, which PyTorch never does")
      if start + info.file_size > size:
        raise Refused(f"the entry {info.filename!r} claims {info.file_size} bytes, the file has {size}")
      if info.filename in entries:
        raise Refused(f"the entry {info.filename!r} occurs twice")
      entries[info.filename] = _Entry(start, info.file_size, info.CRC)
      spans.append((info.header_offset, start + info.file_size))
  spans.sort()
  if any(high > low for (_, high), (low, _) in zip(spans, spans[1:], strict=False)):
    raise Refused("entries of the archive overlap")
  return entries


def _read_entry(path: Path, name: str, entry: _Entry) -> np.ndarray:
  data = np.fromfile(path, np.uint8, entry.length, offset=entry.start)
  if zlib.crc32(data.data) != entry.crc:
    raise UserError(f"{path}: damaged: the entry {name!r} does not match its checksum")
  return data


class _BoundedFile:
  """A file whose `read` never asks for more bytes than are left: a pickle may claim any length."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._size, self.readline, self.tell = file, size, file.readline, file.tell

  def read(self, count: int) -> bytes:
    return self._file.read(min(count, self._size - self._file.tell()))


def _load_stream(path: Path) -> Any:
  """Magic number, protocol, system, the pickle, the storages' keys; then for each storage its count and its numbers."""
  storages: dict[str, Storage] = {}

  def refuse_storage(pid: Any) -> None:
    raise Refused("a reference to a storage where none belongs")

  def make_storage(pid: Any) -> Storage | Global:
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
      return pid[1]  # a class with its source code, which stays unread
    dtype, key, count = storage_id(pid)
    if dtype is None or (len(pid) > 5 and pid[5] is not None):
      raise Refused(f"a storage of the type {pid[1].name}, or one that is a view of another")
    found = storages.setdefault(key, Storage(dtype, count))
    if (found.dtype, found.count) != (dtype, count):
      raise Refused(f"storage {key!r} has two sizes")
    return found

  size = path.stat().st_size
  with path.open("rb") as file:
    stream = _BoundedFile(file, size)
    if unpickle(stream, refuse_storage) != MAGIC:
      raise Refused("it is a plain pickle, not one of PyTorch's")
    if unpickle(stream, refuse_storage) != PROTOCOL:
      raise Refused("an unknown version of PyTorch's stream format")
    system = unpickle(stream, refuse_storage)
    if type(system) is not dict or not system.get("little_endian"):
      raise Refused("its numbers are big-endian")
    value = unpickle(stream, make_storage)
    keys = unpickle(stream, refuse_storage)
    are_names = type(keys) is list and all(type(key) is str for key in keys)
    if not are_names or sorted(keys) != sorted(storages):
      raise Refused("the list of storages does not match the pickle")
    for key in keys:
      (count,) = struct.unpack("<q", file.read(8))
      storage = storages[key]
      start, length = file.tell(), storage.count * storage.dtype.itemsize
      if count != storage.count or start + length > size:
        raise Refused(
          f"storage {key!r} should have {storage.count} numbers, the file says {count} and has {size} bytes"
        )
      storage.read = functools.partial(np.fromfile, path, storage.dtype, storage.count, offset=start)
      file.seek(length, 1)
  return value


def type_name(value: Any) -> str:
  """The type of a value of a pickle, for messages."""
  return value.name if isinstance(value, Inert | Global) else type(value).__name__


def module_tensors(module: Inert, seen: set[int] | None = None) -> dict[str, Tensor]:
  """The state dict of a pickled module: its parameters and buffers, under names joined with ".".

  Args:
    module: the module.
    seen: ids of the modules that are read already, to which this one and those in it are added.
  """
  found: dict[str, Tensor] = {}
  seen = set() if seen is None else seen
  waiting: collections.deque[tuple[str, Any]] = collections.deque([("", module)])
  while waiting:
    prefix, node = waiting.popleft()
    if not isinstance(node, Inert) or id(node) in seen:
      continue
    seen.add(id(node))
    for part in ("_parameters", "_buffers"):
      for name, value in _dict_or_empty(node.state.get(part)).items():
        if isinstance(value, Tensor):
          found[_join(prefix, name)] = value
    for name, child in _dict_or_empty(node.state.get("_modules")).items():
      waiting.append((_join(prefix, name) + ".", child))
  return found


def _dict_or_empty(value: Any) -> dict[Any, Any]:
  return value if type(value) is dict else {}


def _join(prefix: str, name: Any) -> str:
  if len(prefix) + len(str(name)) > MAX_NAME:
    raise UserError(f"damaged: the name of a module is longer than {MAX_NAME} characters")
  return f"{prefix}{name}"


def save(
  path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], under: str = "model"
) -> None:
  """Writes `{under: tensors, **facts}` as `torch.save` does; `torch.load(weights_only=True)` reads it.

  Args:
    path: the file.
    tensors: the state dict.
    facts: strings, and lists and dicts of strings and integers.
    under: the key of the state dict.
  """
  pickle = b"\x80\x02}(" + _text(under) + _global("collections", "OrderedDict") + b")R("
  pickle += b"".join(_text(name) + _tensor(str(i), array) for i, (name, array) in enumerate(tensors.items()))
  pickle += b"u" + b"".join(_text(name) + _value(value) for name, value in facts.items()) + b"u."
  with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", pickle)
    archive.writestr("archive/byteorder", "little")
    for i, array in enumerate(tensors.values()):
      _write_aligned(archive, file, f"archive/data/{i}", array)
    archive.writestr("archive/version", "3\n")


# Pieces of a pickle of protocol 2, as bytes.
_STORAGE_NAMES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}


def _global(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
  raw = value.encode()
  return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", value)  # LONG1


def _value(value: Any) -> bytes:
  if isinstance(value, dict):
    return b"}(" + b"".join(_text(key) + _value(entry) for key, entry in value.items()) + b"u"
  if isinstance(value, list | tuple):
    return b"](" + b"".join(map(_value, value)) + b"e"
  return _text(value) if isinstance(value, str) else _number(value)


def _sizes(values: tuple[int, ...]) -> bytes:
  return b"(" + b"".join(map(_number, values)) + b"t"


def _tensor(key: str, array: np.ndarray) -> bytes:
  strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
  dtype = _global("torch", _STORAGE_NAMES[array.dtype])
  storage = b"(" + _text("storage") + dtype + _text(key) + _text("cpu") + _number(array.size) + b"tQ"
  hooks = b"\x89" + _global("collections", "OrderedDict") + b")R"  # no gradient, no hooks
  view = storage + _number(0) + _sizes(array.shape) + _sizes(strides) + hooks
  return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + view + b"tR"


def _write_aligned(archive: zipfile.ZipFile, file: BinaryIO, name: str, array: np.ndarray) -> None:
  """Writes one storage at a multiple of 64 bytes, as PyTorch does, so that the file can be mapped into memory."""
  info = zipfile.ZipInfo(name)
  info.file_size = array.nbytes
  large = array.nbytes > zipfile.ZIP64_LIMIT // 2
  header = 30 + len(name) + (20 if large else 0)
  padding = -(file.tell() + header + 4) % 64
  info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
  with archive.open(info, "w", force_zip64=large) as entry:
    entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
