"""The pickle inside PyTorch's files, interpreted without executing anything.

`pickletools.genops` splits a pickle into opcodes; the interpreter here can build numbers, texts, lists, dicts,
`Tensor`s and `Inert` containers, and nothing else. It knows the names in `CALLS`, `INERT`, `VALUES` and `STORAGES`; any
other is refused by name. Sizes are checked before anything is made of them.
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

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
# Elements of containers that calls may copy, in all: one is small in the file, many thousand copies are not.
MAX_COPIED = 2_000_000


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


class Name:
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
  if not isinstance(function, Name) or type(args) is not tuple:
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
      stack.append(Name(".".join(arg.split(" ", 1))))
    elif op == "STACK_GLOBAL":
      name, module = stack.pop(), stack.pop()
      stack.append(Name(f"{module}.{name}"))
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


def storage_id(pid: Any) -> tuple[np.dtype, str, int]:
  if type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Name):
    _, name, key, _, count = pid[:5]
    if name.dtype is not None and type(key) is str and type(count) is int and count >= 0:
      return np.dtype(name.dtype), key, count
  raise Refused("an unknown reference")
