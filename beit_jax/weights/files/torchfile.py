"""PyTorch's files without PyTorch: `.pth`, `.pt`, `.bin`, whole pickled modules. Reading one executes nothing.

A file is a pickle (see pickles.py) that refers to raw storages: a zip since PyTorch 1.6, before that everything in one
stream. Formats: torch/serialization.py.
"""

import collections
import math
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from beit_jax.errors import UserError
from beit_jax.weights.files.pickles import (
  MAX_NAME,
  STORAGES,
  Inert,
  Name,
  Refused,
  Storage,
  Tensor,
  storage_id,
  unpickle,
)

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream form


def is_torch(path: Path) -> bool:
  with path.open("rb") as file:
    start = file.read(4)
  return start == b"PK\x03\x04" or start[:1] == b"\x80"


def load(path: Path) -> Any:
  """The content of a PyTorch file: dicts and lists with `Tensor`s and `Inert` objects in them.

  Raises:
    UserError: the file is damaged, or holds something that weights have no need of; says what.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of pickletools, about escapes in broken texts
      return _load_zip(path) if zipfile.is_zipfile(path) else _load_stream(path)
  except Refused as error:
    raise UserError(f"{path}: refused: {error}") from None
  except (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
  ) as error:
    raise UserError(f"{path}: damaged, or not a PyTorch file ({type(error).__name__}: {error})") from None
  except (zipfile.BadZipFile, NotImplementedError, RecursionError) as error:
    raise UserError(f"{path}: damaged, or not a PyTorch file ({error})") from None


def _load_zip(path: Path) -> Any:
  """Entries are stored, not compressed; where each lies is checked against the file before anything is read."""
  size, entries, spans = path.stat().st_size, {}, []
  with path.open("rb") as file, zipfile.ZipFile(file) as archive:
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
      entries[info.filename] = (start, info.file_size, info.CRC)
      spans.append((info.header_offset, start + info.file_size))
  spans.sort()
  if any(high > low for (_, high), (low, _) in zip(spans, spans[1:], strict=False)):
    raise Refused("entries of the archive overlap")

  def read(name: str) -> np.ndarray:
    start, length, crc = entries[name]
    data = np.fromfile(path, np.uint8, length, offset=start)
    if zlib.crc32(data) != crc:
      raise UserError(f"{path}: damaged: the entry {name!r} does not match its checksum")
    return data

  pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
  if len(pickles) != 1:
    raise Refused(f"a PyTorch archive has one data.pkl, this one {len(pickles)}")
  root = pickles[0].removesuffix("data.pkl")
  if f"{root}byteorder" in entries and read(f"{root}byteorder").tobytes() != b"little":
    raise Refused("its numbers are big-endian")

  def storage(pid):
    dtype, key, count = storage_id(pid)
    name = f"{root}data/{key}"
    if name not in entries or entries[name][1] != count * dtype.itemsize:
      found = entries[name][1] if name in entries else "missing"
      raise Refused(f"storage {key!r} should have {count * dtype.itemsize} bytes, it is {found}")
    return Storage(dtype, count, lambda: read(name).view(dtype))

  return unpickle(read(pickles[0]).tobytes(), storage)


class _Bounded:
  """A file whose `read` never asks for more bytes than are left: a pickle may claim any length."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._size, self.readline, self.tell = file, size, file.readline, file.tell

  def read(self, count: int) -> bytes:
    return self._file.read(min(count, self._size - self._file.tell()))


def _load_stream(path: Path) -> Any:
  """Magic number, protocol, system, the pickle, the storages' keys, then for each: count (int64) and numbers."""
  storages: dict[str, Storage] = {}

  def nothing(pid):
    raise Refused("a reference to a storage where none belongs")

  def storage(pid):
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
      return pid[1]  # a class with its source code, which stays unread
    dtype, key, count = storage_id(pid)
    if len(pid) > 5 and pid[5] is not None:
      raise Refused("a storage that is a view of another")
    found = storages.setdefault(key, Storage(dtype, count))
    if (found.dtype, found.count) != (dtype, count):
      raise Refused(f"storage {key!r} has two sizes")
    return found

  def reader(start, dtype, count):
    return lambda: np.fromfile(path, dtype, count, offset=start)

  size = path.stat().st_size
  with path.open("rb") as file:
    stream = _Bounded(file, size)
    if unpickle(stream, nothing) != MAGIC:
      raise Refused("it is a plain pickle, not one of PyTorch's")
    if unpickle(stream, nothing) != PROTOCOL:
      raise Refused("an unknown version of PyTorch's stream format")
    system = unpickle(stream, nothing)
    if type(system) is not dict or not system.get("little_endian"):
      raise Refused("its numbers are big-endian")
    value = unpickle(stream, storage)
    keys = unpickle(stream, nothing)
    named = type(keys) is list and all(type(key) is str for key in keys)
    if not named or sorted(keys) != sorted(storages):
      raise Refused("the list of storages does not match the pickle")
    for key in keys:
      (count,) = struct.unpack("<q", file.read(8))
      entry = storages[key]
      start, length = file.tell(), entry.count * entry.dtype.itemsize
      if count != entry.count or start + length > size:
        raise Refused(
          f"storage {key!r} should have {entry.count} numbers, the file says {count} and has {size} bytes"
        )
      entry.read = reader(start, entry.dtype, entry.count)
      file.seek(length, 1)
  return value


def module_tensors(module: Inert) -> dict[str, Tensor]:
  """The state dict of a pickled module: names joined with ".", parameters and buffers."""
  found, seen, waiting = {}, set(), collections.deque([("", module)])
  while waiting:
    prefix, node = waiting.popleft()
    if not isinstance(node, Inert) or id(node) in seen:
      continue
    seen.add(id(node))
    for part in ("_parameters", "_buffers"):
      values = node.state.get(part)
      for name, value in (values if type(values) is dict else {}).items():
        if isinstance(value, Tensor):
          found[_joined(prefix, name)] = value
    children = node.state.get("_modules")
    for name, child in (children if type(children) is dict else {}).items():
      waiting.append((_joined(prefix, name) + ".", child))
  return found


def _joined(prefix: str, name: Any) -> str:
  if len(prefix) + len(str(name)) > MAX_NAME:
    raise UserError(f"damaged: the name of a module is longer than {MAX_NAME} letters")
  return f"{prefix}{name}"


def save(path: Path, tensors: dict[str, np.ndarray], texts: dict[str, Any], under: str = "model") -> None:
  """Writes `{under: tensors, **texts}` as `torch.save` would; `torch.load(weights_only=True)` reads it.

  Args:
    texts: texts, and lists and tables of texts and whole numbers.
  """
  names = {np.dtype(dtype): name for name, dtype in STORAGES.items()}

  def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw

  def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1

  def plain(value):
    if isinstance(value, dict):
      return b"}(" + b"".join(text(key) + plain(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list | tuple):
      return b"](" + b"".join(map(plain, value)) + b"e"
    return text(value) if isinstance(value, str) else number(value)

  def sizes(values):
    return b"(" + b"".join(map(number, values)) + b"t"

  def tensor(key, array):
    strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    reference = (
      text("storage") + _global("torch", names[array.dtype]) + text(key) + text("cpu") + number(array.size)
    )
    view = (
      number(0)
      + sizes(array.shape)
      + sizes(strides)
      + b"\x89"
      + _global("collections", "OrderedDict")
      + b")R"
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + b"((" + reference + b"tQ" + view + b"tR"

  pickle = b"\x80\x02}(" + text(under) + _global("collections", "OrderedDict") + b")R("
  pickle += b"".join(text(n) + tensor(str(i), array) for i, (n, array) in enumerate(tensors.items())) + b"u"
  pickle += b"".join(text(n) + plain(value) for n, value in texts.items()) + b"u."
  with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", pickle)
    archive.writestr("archive/byteorder", "little")
    for i, array in enumerate(tensors.values()):
      _write_aligned(archive, file, f"archive/data/{i}", array)
    archive.writestr("archive/version", "3\n")


def _global(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def _write_aligned(archive: zipfile.ZipFile, file: BinaryIO, name: str, array: np.ndarray) -> None:
  """One storage, beginning at a multiple of 64 bytes as PyTorch's own, for memory mapping."""
  info = zipfile.ZipInfo(name)
  info.file_size = array.nbytes
  large = array.nbytes > zipfile.ZIP64_LIMIT // 2
  header = 30 + len(name) + (20 if large else 0)
  padding = -(file.tell() + header + 4) % 64
  info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
  with archive.open(info, "w", force_zip64=large) as entry:
    entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
