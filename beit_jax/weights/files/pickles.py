"""Interprets the pickles inside PyTorch's files without executing anything.

`pickletools.genops` splits a pickle into opcodes. The interpreter in this module builds numbers, strings, lists, dicts,
`Tensor`s and `Inert` objects, and nothing else. It knows the globals in `CALLS` and `STORAGES`. Every other global is a
name and no more: a call of it gives an `Inert` object, which ignores everything that the pickle does to it. A global in
`ATTACKS` is not run either, but a file that names it tries to run a program and is refused. The interpreter
checks sizes before it allocates.
"""

import math
import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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
# Functions that run programs, load code or delete files.
ATTACKS = re.compile(
  r"(os|posix|nt)\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork\w*|remove|unlink|rmdir|rename)"
  r"|(subprocess|pty|runpy|code|ctypes|shutil|socket|webbrowser)\..*|importlib\.import_module"
  r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__|open|input|breakpoint)"
)
MAX_AXES, MAX_NUMBER, MAX_NAME = 8, 2**48, 512
# Number of elements that all calls together may copy: a small file can ask for thousands of copies of one list.
MAX_COPIED = 2_000_000


class Refused(Exception):
  """The reason why a file is not read; `torchfile.load` turns it into a UserError that names the file."""


class Inert:
  """Stands for an object that is not created; items that the pickle puts into it are dropped.

  Attributes:
    name: its type.
    state: the attributes that the pickle gives it.
  """

  def __init__(self, name: str):
    self.name = name
    self.state: dict[Any, Any] = {}


def _not_loaded() -> NoReturn:
  raise Refused("a storage that is not in the file")


class Storage:
  """A flat array of `count` numbers in the file; `read` returns it."""

  def __init__(self, dtype: np.dtype, count: int, read: Callable[[], np.ndarray] = _not_loaded):
    self.dtype, self.count, self.read = np.dtype(dtype), count, read


class Tensor:
  """A view into a storage; `read` reads it from the file."""

  def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any):
    is_sized = type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_AXES
    numbers = [offset, *shape, *stride] if is_sized else [None]
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
      raise Refused("a tensor whose sizes are not valid numbers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else 0
    if count > storage.count or (count and last >= storage.count):
      raise Refused(f"a tensor of shape {shape} in a storage of {storage.count} numbers")
    self.storage, self.offset, self.stride = storage, offset, stride
    self.shape: tuple[int, ...] = shape
    self.dtype = storage.dtype

  def read(self) -> np.ndarray:
    """The values, as a read-only view."""
    flat = self.storage.read()[self.offset :]
    strides = tuple(s * self.dtype.itemsize for s in self.stride)
    return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class Global:
  """A global name that the pickle mentions, which is never imported; `_call` says what may be done with it."""

  def __init__(self, name: str):
    if len(name) > MAX_NAME:
      raise Refused(f"a global name of more than {MAX_NAME} characters")
    if ATTACKS.fullmatch(name):
      raise Refused(
        f"it refers to {name}, which no file of weights needs; nothing was executed. Do not trust it"
      )
    short = name.removeprefix("torch.")
    self.name, self.dtype = name, STORAGES.get(short) if name != short else None


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
  return _make_dict([part for key, value in pairs for part in (key, value)])


def _make_dict(items: Sequence[Any]) -> dict[Any, Any]:
  """The dict of alternating keys and values.

  Keys are strings and small integers, which hash quickly. Entries with other keys are dropped; no state dict
  has them.
  """
  pairs = zip(items[::2], items[1::2], strict=True)
  return {k: v for k, v in pairs if type(k) is str or (type(k) in (int, bool) and abs(k) < MAX_NUMBER)}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
  del rest
  return Tensor(storage, offset, shape, stride)


CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _ordered_dict,
  "collections.defaultdict": lambda *_: {},
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_parameter": lambda data, *rest: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
  "torch.Size": lambda sizes: tuple(sizes[:MAX_AXES]),
}


def _call(function: Any, args: tuple[Any, ...]) -> Any:
  if not isinstance(function, Global | Inert):
    raise Refused("it calls something that is not a global name")
  if function.name not in CALLS or isinstance(function, Inert) or any(isinstance(arg, Inert) for arg in args):
    return Inert(function.name)
  return CALLS[function.name](*args)


_MARK = object()


class _Interpreter:
  """The stack and the memo of one pickle, and the instructions that need more than one line."""

  def __init__(self, make_storage: Callable[[Any], Any]):
    self.make_storage = make_storage
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.copied = 0

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def pop(self, count: int) -> list[Any]:
    """Removes the last values; returns them in the order in which they were pushed."""
    return [self.stack.pop() for _ in range(count)][::-1]

  def pop_to_mark(self) -> list[Any]:
    items: list[Any] = []
    while (item := self.stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def set_items(self, items: list[Any]) -> None:
    if isinstance(self.stack[-1], Inert):
      return
    if type(self.stack[-1]) is not dict or len(items) % 2:
      raise Refused("it sets items of something that is not a dict")
    self.stack[-1].update(_make_dict(items))

  def extend(self, items: list[Any]) -> None:
    if isinstance(self.stack[-1], Inert):
      return
    if type(self.stack[-1]) is not list:
      raise Refused("it appends to something that is not a list")
    self.stack[-1].extend(items)

  def push_global(self, module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str:
      raise Refused("a global name that is no text")
    self.push(Global(f"{module}.{name}"))

  def call(self) -> None:
    function, args = self.pop(2)
    if type(args) is not tuple:
      raise Refused("it calls something without arguments")
    if isinstance(function, Global) and function.name in CALLS:
      self.copied += sum(len(a) for a in args if type(a) in (list, tuple, dict, str, bytes))
    if self.copied > MAX_COPIED:
      raise Refused("it copies far more elements than it holds")
    self.push(_call(function, args))

  def call_with_keywords(self) -> None:
    self.pop(1)
    self.call()

  def set_state(self) -> None:
    target, state = self.stack[-2], self.pop(1)[0]
    if isinstance(target, Inert):
      target.state = state if type(state) is dict else {}
    elif (
      type(target) is not dict
    ):  # the state of an ordered dict is attributes such as `_metadata`, not needed
      raise Refused("it sets the state of something other than a module")


_NUMBERS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_STRINGS = (
  "BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
  "BYTEARRAY8"
)
# Instruction -> what it does, given the interpreter and the instruction's argument. Every other one is refused.
_INSTRUCTIONS: dict[str, Callable[[_Interpreter, Any], object]] = {
  **dict.fromkeys(("PROTO", "FRAME"), lambda vm, arg: None),
  **dict.fromkeys(_NUMBERS.split() + _STRINGS.split(), _Interpreter.push),
  "NONE": lambda vm, _: vm.push(None),
  "NEWTRUE": lambda vm, _: vm.push(True),
  "NEWFALSE": lambda vm, _: vm.push(False),
  "EMPTY_LIST": lambda vm, _: vm.push([]),
  "EMPTY_DICT": lambda vm, _: vm.push({}),
  "EMPTY_TUPLE": lambda vm, _: vm.push(()),
  "TUPLE1": lambda vm, _: vm.push(tuple(vm.pop(1))),
  "TUPLE2": lambda vm, _: vm.push(tuple(vm.pop(2))),
  "TUPLE3": lambda vm, _: vm.push(tuple(vm.pop(3))),
  "TUPLE": lambda vm, _: vm.push(tuple(vm.pop_to_mark())),
  "LIST": lambda vm, _: vm.push(vm.pop_to_mark()),
  "DICT": lambda vm, _: vm.push(_make_dict(vm.pop_to_mark())),
  "MARK": lambda vm, _: vm.push(_MARK),
  "POP": lambda vm, _: vm.pop(1),
  **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda vm, key: vm.memo.update({key: vm.stack[-1]})),
  "MEMOIZE": lambda vm, _: vm.memo.update({len(vm.memo): vm.stack[-1]}),
  **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda vm, key: vm.push(vm.memo[key])),
  "SETITEM": lambda vm, _: vm.set_items(vm.pop(2)),
  "SETITEMS": lambda vm, _: vm.set_items(vm.pop_to_mark()),
  "APPEND": lambda vm, _: vm.extend(vm.pop(1)),
  "APPENDS": lambda vm, _: vm.extend(vm.pop_to_mark()),
  "EMPTY_SET": lambda vm, _: vm.push(Inert("set")),
  "ADDITEMS": lambda vm, _: vm.extend(vm.pop_to_mark()),
  "FROZENSET": lambda vm, _: vm.push(Inert(f"frozenset of {len(vm.pop_to_mark())}")),
  "GLOBAL": lambda vm, name: vm.push_global(*name.split(" ", 1)),
  "STACK_GLOBAL": lambda vm, _: vm.push_global(*vm.pop(2)),
  **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda vm, _: vm.call()),
  "NEWOBJ_EX": lambda vm, _: vm.call_with_keywords(),
  "BUILD": lambda vm, _: vm.set_state(),
  "BINPERSID": lambda vm, _: vm.push(vm.make_storage(vm.pop(1)[0])),
}


def unpickle(stream: Any, make_storage: Callable[[Any], Any]) -> Any:
  """Interprets one pickle.

  Args:
    stream: bytes, or a file, which is left at the end of the pickle.
    make_storage: gives the value of a persistent id.

  Raises:
    Refused: the pickle has an instruction, a global or a shape that weights do not need.
  """
  interpreter = _Interpreter(make_storage)
  for opcode, argument, _ in pickletools.genops(stream):
    if opcode.name == "STOP":
      (value,) = interpreter.pop(1)
      if interpreter.stack:
        raise Refused("something is left over at the end of the pickle")
      return value
    if opcode.name not in _INSTRUCTIONS:
      raise Refused(f"it uses the pickle instruction {opcode.name}")
    _INSTRUCTIONS[opcode.name](interpreter, argument)
  raise Refused("the pickle has no end")


def storage_id(pid: Any) -> tuple[np.dtype | None, str, int]:
  """(dtype, key, number of elements) out of a persistent id that refers to a storage; dtype None if it is unknown."""
  if type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Global):
    _, name, key, _, count = pid[:5]
    if type(key) is str and type(count) is int and count >= 0:
      return None if name.dtype is None else np.dtype(name.dtype), key, count
  raise Refused("an unknown reference")
