"""PyTorch's files without PyTorch: `.pth`, `.pt`, `.bin`, whole pickled modules. Reading one executes nothing.

A file is a pickle that refers to raw storages: a zip since PyTorch 1.6, before that everything in one stream. The
pickle is interpreted here, opcode by opcode (`pickletools.genops` splits it): the interpreter can build numbers, texts,
lists, dicts, `Tensor`s and `Inert` containers, and nothing else. It knows the few names in `KNOWN`; any other is
refused by name. Formats: torch/serialization.py.
"""

import collections
import math
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from beit_jax.errors import UserError

STORAGES: dict[str, Any] = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# What becomes an `Inert` container: arguments that unilm saves with the weights, and the modules of DALL-E's pickles.
INERT = {
  "argparse.Namespace",
  "torch.device",
  "functools.partial",
  "__builtin__.set",
  "builtins.set",
  "pathlib.PosixPath",
  "pathlib.PurePosixPath",
  "pathlib.WindowsPath",
  "pathlib._local.PosixPath",
  "numpy.dtype",
  "numpy.core.multiarray.scalar",
  "numpy._core.multiarray.scalar",
  "_codecs.encode",
  "dall_e.encoder.Encoder",
  "dall_e.encoder.EncoderBlock",
  "dall_e.decoder.Decoder",
  "dall_e.decoder.DecoderBlock",
  "dall_e.utils.Conv2d",
  "torch.nn.modules.container.Sequential",
  "torch.nn.modules.linear.Identity",
  "torch.nn.modules.activation.ReLU",
  "torch.nn.modules.pooling.MaxPool2d",
  "torch.nn.modules.upsampling.Upsample",
}
VALUES = {f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64", "int64", "uint8")}
MAX_AXES, MAX_NUMBER, MAX_NAME = 8, 2**48, 512
MAX_COPIED = (
  2_000_000  # elements of containers that calls may copy, in all: each is small in the file, many are not
)
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream form


class Refused(Exception):
  """Why a file is not read; `load` turns it into a UserError with the file's name."""


class Inert:
  """Stands for an object that we do not make: its type's name, and the state it would have got."""

  def __init__(self, name: str):
    self.name, self.state = name, {}


class Storage:
  """A run of numbers in the file; `read` returns all of them, flat."""

  def __init__(self, dtype: np.dtype, count: int, read: Callable[[], np.ndarray] | None = None):
    self.dtype, self.count, self.read = np.dtype(dtype), count, read


class Tensor:
  """A view into a storage; nothing is read before `read()`."""

  def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any):
    sized = type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_AXES
    numbers = [offset, *shape, *stride] if sized else [None]
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
      raise Refused("a tensor whose sizes are no numbers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else 0
    if count > storage.count or (count and last >= storage.count):
      raise Refused(f"a tensor of shape {shape} in a storage of {storage.count} numbers")
    self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
    self.dtype = storage.dtype

  def read(self) -> np.ndarray:
    flat = self.storage.read()[self.offset :]
    strides = tuple(s * self.dtype.itemsize for s in self.stride)
    return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class _Name:
  """A global that the pickle mentions; what may be done with it is in `_call`."""

  def __init__(self, name: str):
    short = name.removeprefix("torch.")
    self.name, self.dtype = name, STORAGES.get(short) if name != short else None
    if self.dtype is None and name not in INERT | VALUES | set(CALLS):
      raise Refused(
        f"it refers to {name}, which has no place in a file of weights; nothing was executed. If you trust the file, "
        "save the plain state dict with PyTorch and load that"
      )


def _ordered(*args):
  pairs = args[0] if args else []
  return dict(_pair(p) for p in pairs)


def _pair(pair):
  key, value = pair
  return _key(key), value


def _key(key):
  if type(key) is not str and not (type(key) in (int, bool) and abs(key) < MAX_NUMBER):
    raise Refused(f"a table with a key of type {type(key).__name__}")
  return key


def _rebuild(storage, offset, shape, stride, *rest):
  return Tensor(storage, offset, shape, stride)


CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _ordered,
  "torch._utils._rebuild_tensor": _rebuild,
  "torch._utils._rebuild_tensor_v2": _rebuild,
  "torch._utils._rebuild_parameter": lambda data, *rest: data,
  "torch.Size": lambda sizes: tuple(sizes[:MAX_AXES]),
}


def _call(function: Any, args: Any) -> Any:
  if not isinstance(function, _Name) or type(args) is not tuple:
    raise Refused("it calls something that is no name")
  if function.name in CALLS:
    return CALLS[function.name](*args)
  if function.name in INERT:
    return Inert(function.name)
  raise Refused(f"it calls {function.name}")


_MARK = object()
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {
  *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
  *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
  *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(stream: Any, storage: Callable[[Any], Any]) -> Any:
  """The value of one pickle: bytes, or a file that is left behind the pickle's end.

  Args:
    storage: makes the value of a persistent id.

  Raises:
    Refused: an opcode, a global or a shape of things that weights have no need of.
  """
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  copied = 0

  def marked():
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def put(items):
    if type(stack[-1]) is not dict or len(items) % 2:
      raise Refused("it sets items of something that is no table")
    stack[-1].update(_pair(p) for p in zip(items[::2], items[1::2], strict=True))

  def extend(items):
    if type(stack[-1]) is not list:
      raise Refused("it appends to something that is no list")
    stack[-1].extend(items)

  for opcode, arg, _ in pickletools.genops(stream):
    op = opcode.name
    if op in ("PROTO", "FRAME"):
      pass
    elif op in _ARGUMENTS:
      stack.append(arg)
    elif op in _LITERALS:
      stack.append(_LITERALS[op])
    elif op in _EMPTY:
      stack.append(_EMPTY[op]())
    elif op in _TUPLES:
      items = [stack.pop() for _ in range(_TUPLES[op])]
      stack.append(tuple(items[::-1]))
    elif op == "TUPLE":
      stack.append(tuple(marked()))
    elif op == "LIST":
      stack.append(marked())
    elif op == "DICT":
      items = marked()
      stack.append({})
      put(items)
    elif op == "MARK":
      stack.append(_MARK)
    elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
      memo[arg] = stack[-1]
    elif op == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif op in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(memo[arg])
    elif op == "POP":
      stack.pop()
    elif op == "SETITEM":
      value, key = stack.pop(), stack.pop()
      put([key, value])
    elif op == "SETITEMS":
      put(marked())
    elif op == "APPEND":
      extend([stack.pop()])
    elif op == "APPENDS":
      extend(marked())
    elif op == "GLOBAL":
      stack.append(_Name(".".join(arg.split(" ", 1))))
    elif op == "STACK_GLOBAL":
      name, module = stack.pop(), stack.pop()
      stack.append(_Name(f"{module}.{name}"))
    elif op in ("REDUCE", "NEWOBJ"):
      args, function = stack.pop(), stack.pop()
      if type(args) is tuple:
        copied += sum(len(a) for a in args if type(a) in (list, tuple, dict, str, bytes))
      if copied > MAX_COPIED:
        raise Refused("it makes far more of its lists than it holds")
      stack.append(_call(function, args))
    elif op == "BUILD":
      state, target = stack.pop(), stack[-1]
      if isinstance(target, Inert):
        target.state = state if type(state) is dict else {}
      elif type(target) is not dict:  # of an ordered dict: attributes such as `_metadata`, not needed
        raise Refused("it changes something other than a module")
    elif op == "BINPERSID":
      stack.append(storage(stack.pop()))
    elif op == "STOP":
      value = stack.pop()
      if stack:
        raise Refused("something is left over at the end of the pickle")
      return value
    else:
      raise Refused(f"it uses the pickle instruction {op}")
  raise Refused("the pickle has no end")


def _storage_id(pid: Any) -> tuple[np.dtype, str, int]:
  if type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Name):
    _, name, key, _, count = pid[:5]
    if name.dtype is not None and type(key) is str and type(count) is int and count >= 0:
      return np.dtype(name.dtype), key, count
  raise Refused("an unknown reference")


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
    dtype, key, count = _storage_id(pid)
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
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], _Name):
      return pid[1]  # a class with its source code, which stays unread
    dtype, key, count = _storage_id(pid)
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


def save(path: Path, tensors: dict[str, np.ndarray], texts: dict[str, str]) -> None:
  """Writes `{"model": tensors, **texts}` as `torch.save` would; `torch.load(weights_only=True)` reads it."""
  names = {np.dtype(dtype): name for name, dtype in STORAGES.items()}

  def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw

  def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1

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

  pickle = b"\x80\x02}(" + text("model") + _global("collections", "OrderedDict") + b")R("
  pickle += b"".join(text(n) + tensor(str(i), array) for i, (n, array) in enumerate(tensors.items())) + b"u"
  pickle += b"".join(text(n) + text(value) for n, value in texts.items()) + b"u."
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
