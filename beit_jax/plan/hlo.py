"""Reads the text of a compiled program (HLO): its collectives, its FLOPs and its main memory traffic.

The compiler's own figures (`cost_analysis`) are not enough: they count the body of a loop once and do not list
collectives. Here a body counts as often as the loop runs, where the text tells the trip count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

REDUCTIONS = ("all-reduce", "reduce-scatter")
COLLECTIVES = (*REDUCTIONS, "all-gather", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
CONTROL_FLOW = ("while", "call", "conditional")
ELEMENT_WISE = ("reduce", "reduce-window", "sort", "scatter", "map", "select-and-scatter", *REDUCTIONS)
# Opcodes without main memory traffic.
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "iota")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\s*$(.*?)^\}", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
SHAPE_AND_LAYOUT = re.compile(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\](?:\{[^}]*\})?")
ON_CHIP = re.compile(r"S\([1-9]")  # a memory space other than main memory, part of a layout
CALLED = re.compile(
  r"(?:calls|to_apply|condition|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; `rest` holds everything after the opening parenthesis: operands, then attributes."""

  name: str
  shape: str
  opcode: str
  rest: str
  is_root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    """The names of the operands."""
    return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

  @property
  def called(self) -> list[str]:
    """The computations that this instruction runs, apart from those on single numbers, whose cost does not count."""
    if self.opcode in ELEMENT_WISE:
      return []
    names = ",".join(group or single for group, single in CALLED.findall(self.rest))
    return [name.strip().lstrip("%") for name in names.split(",") if name.strip()]

  @property
  def collective(self) -> str | None:
    """The kind of collective that this instruction runs or starts."""
    return next((kind for kind in COLLECTIVES if self.opcode in (kind, f"{kind}-start")), None)


Computation = dict[str, Instruction]  # by the instruction's name, in the order of the text


@dataclasses.dataclass
class Moved:
  """The collectives of one kind in one step of one device."""

  count: int = 0
  bytes: float = 0.0  # what the device puts in (for an all-gather: what it gets out)
  unknown: int = 0  # of `count`, those in a loop of unknown length, which count once


@dataclasses.dataclass
class Program:
  """One step of one device."""

  collectives: dict[str, Moved]  # by kind
  flops: int  # of matrix products and convolutions
  traffic: float  # bytes from and to main memory, without what TPUs keep on the chip (memory space 1)
  loops: tuple[int, ...]  # trip counts of the loops that contain matrix products; 0 if unknown


def read(text: str) -> Program:
  """Counts what one device does in one step.

  Args:
    text: the result of `compiled.as_text()`.
  """
  entry, computations = parse(text)
  flops, traffic = 0, 0.0
  trip_counts: set[int] = set()
  # Key -> (times it runs, all loops around it have a known length, kind, bytes).
  collectives: dict[str, tuple[int, bool, str, float]] = {}
  for name, instruction, loops, in_fusion in _walk(entry, computations):
    computation, times = computations[name], math.prod(trips or 1 for trips in loops)
    if work := _flops(instruction, computation):
      flops += times * work
      trip_counts.update(loops)
    if not in_fusion and instruction.opcode not in CONTROL_FLOW:
      traffic += times * _traffic(instruction, computation, computations)
    if instruction.collective is not None:
      # A TPU runs a collective in pieces that share a channel, between fusions that compute, some of them in a loop.
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      key = channel.group(1) if channel else f"{name} {instruction.name}"
      piece = (times, all(loops), _collective(instruction, name), _bytes(instruction, computation))
      collectives[key] = min(collectives.get(key, piece), piece)
  moved: dict[str, Moved] = {}
  for times, known, kind, each in collectives.values():
    total = moved.setdefault(kind, Moved())
    total.count += times
    total.bytes += times * each
    total.unknown += 0 if known else times
  return Program(dict(sorted(moved.items())), flops, traffic, tuple(sorted(trip_counts)))


def parse(text: str) -> tuple[str, dict[str, Computation]]:
  """Returns the name of the entry computation, and all computations by name."""
  entry, computations = "", {}
  for is_entry, name, body in COMPUTATION.findall(text):
    entry = name if is_entry else entry
    computations[name] = {
      own: Instruction(own, shape, opcode, rest, bool(root))
      for root, own, shape, opcode, rest in INSTRUCTION.findall(body)
    }
  return entry, computations


def _walk(
  name: str, computations: dict[str, Computation], loops: tuple[int, ...] = (), in_fusion: bool = False
) -> Iterator[tuple[str, Instruction, tuple[int, ...], bool]]:
  """Yields every instruction of a computation and of those it calls; the call graph of HLO has no cycles.

  With each comes the name of its computation, the trip counts of the loops around it (0 if unknown), and whether it is
  part of a fusion, whose intermediate results do not reach main memory.
  """
  for instruction in computations.get(name, {}).values():
    yield name, instruction, loops, in_fusion
    inner = (*loops, _trip_count(instruction, computations)) if instruction.opcode == "while" else loops
    for called in instruction.called:
      yield from _walk(called, computations, inner, in_fusion or instruction.opcode not in CONTROL_FLOW)


def _trip_count(loop: Instruction, computations: dict[str, Computation]) -> int:
  """How often a loop runs; 0 where that depends on data."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known.group(1))
  # Loops that the compiler adds, to overlap products with communication, have a counter from 0 and no annotation.
  names = (re.search(rf"{role}=%?([\w.\-]+)", loop.rest) for role in ("condition", "body"))
  condition, body = (computations.get(name.group(1), {}) if name else {} for name in names)
  test, result = _root(condition), _root(body)
  if test is None or result is None or "direction=LT" not in test.rest or result.opcode != "tuple":
    return 0
  counter, limit = (condition.get(name) for name in test.operands)
  index = re.search(r"index=(\d+)", counter.rest) if counter else None
  update = body.get(result.operands[int(index.group(1))]) if index else None
  if update is None or update.opcode != "add":
    return 0
  step = max(_constant(body.get(name)) for name in update.operands)
  return -(-_constant(limit) // step) if step else 0


def _root(computation: Computation) -> Instruction | None:
  return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _constant(instruction: Instruction | None) -> int:
  """The value of an integer constant, 0 for anything else."""
  if instruction is None or instruction.opcode != "constant":
    return 0
  value = re.match(r"(\d+)\)", instruction.rest)
  return int(value.group(1)) if value else 0


def size(shape: str) -> float:
  """Bytes of a shape in text form; of a tuple, the sum over its parts."""
  return sum(_item_size(dtype) * math.prod(_integers(sides)) for dtype, sides in SHAPE.findall(shape))


def _item_size(dtype: str) -> float:
  if dtype in BYTES:
    return BYTES[dtype]
  bits = re.match(r"[a-z]+(\d+)", dtype)
  return int(bits.group(1)) / 8 if bits else 0


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _sides(shape: str) -> list[int]:
  found = SHAPE.search(shape)
  return _integers(found.group(2)) if found else []


def _shape(name: str, computation: Computation) -> str:
  return computation[name].shape if name in computation else ""


# Collectives.


def _collective(instruction: Instruction, computation_name: str) -> str:
  """TPUs write a reduce-scatter as an all-reduce and a slice of its result, within one fusion."""
  name = instruction.collective or ""
  return "reduce-scatter" if name == "all-reduce" and "all-reduce-scatter" in computation_name else name


def _bytes(instruction: Instruction, computation: Computation) -> float:
  """What one device puts in; for an all-gather what it gets out, which is more."""
  inputs = sum(size(_shape(name, computation)) for name in instruction.operands)
  if instruction.collective == "all-gather":
    # The shape of a start holds its inputs as well as its outputs.
    return size(instruction.shape) - (inputs if instruction.opcode.endswith("-start") else 0)
  return inputs


# FLOPs.


def _flops(instruction: Instruction, computation: Computation) -> int:
  if instruction.opcode == "dot":
    return _product(instruction, computation)
  return _convolution(instruction, computation) if instruction.opcode == "convolution" else 0


def _product(dot: Instruction, computation: Computation) -> int:
  left = _sides(_shape(dot.operands[0], computation))
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
  contracted = (left[axis] for axis in _integers(axes.group(1) if axes else ""))
  return 2 * math.prod(_sides(dot.shape)) * math.prod(contracted)


def _convolution(convolution: Instruction, computation: Computation) -> int:
  """Counts as XLA does: taps on padding and on the zeros of a dilation are no work.

  TPUs write batched products as such convolutions.
  """
  labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)[0]
  operands = (_shape(name, computation) for name in convolution.operands[:2])
  shapes = map(_sides, (*operands, convolution.shape))
  image, kernel, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True))
  options = re.search(r"window=\{([^}]*)\}", convolution.rest)
  window = re.findall(r"(\w+)=([\dx_\-]+)", options.group(1) if options else "")
  total = 2 * out["b"] * out["f"] * kernel["i"]
  for axis in range(len(out) - 2):
    option = {name: value.split("x")[axis].split("_")[0] for name, value in window}
    total *= valid_positions(
      image[str(axis)],
      kernel[str(axis)],
      out[str(axis)],
      stride=int(option.get("stride", 1)),
      low=int(option.get("pad", 0)),
      dilation=int(option.get("lhs_dilate", 1)),
      tap_dilation=int(option.get("rhs_dilate", 1)),
    )
  return total


def valid_positions(
  side: int, taps: int, places: int, *, stride: int, low: int, dilation: int = 1, tap_dilation: int = 1
) -> int:
  """Counts the pairs of an output place and a kernel tap that meet a real input, along one axis of a convolution."""
  starts, offsets = np.arange(places) * stride - low, np.arange(taps) * tap_dilation
  positions = starts[:, None] + offsets
  is_input = (positions >= 0) & (positions <= (side - 1) * dilation) & (positions % dilation == 0)
  return int(is_input.sum())


# Main memory traffic.


def _traffic(
  instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
  """Bytes that one instruction reads from and writes to main memory; of an operand that is sliced, the slice."""
  opcode, operands = instruction.opcode, instruction.operands
  if opcode in FREE or opcode.endswith("-done"):
    return 0.0
  if opcode in ("copy-start", "slice-start"):  # from main memory to the chip, or back
    parts = SHAPE.findall(instruction.shape)
    moved = size("{}[{}]".format(*parts[0 if opcode == "copy-start" else -2]))
    ends = (instruction.shape, _shape(operands[0], computation))
    return moved if any(ON_CHIP.search(shape) for shape in ends) else 2 * moved
  inputs = [_in_main_memory(_shape(name, computation)) for name in operands]
  output = _in_main_memory(instruction.shape)
  if opcode == "dynamic-slice":
    return 2 * output
  if opcode == "dynamic-update-slice":
    return 2 * inputs[1]
  if opcode == "fusion":
    for called in instruction.called:
      inputs, output = _fusion_traffic(computations.get(called, {}), inputs, output)
  return sum(inputs) + output


def _fusion_traffic(body: Computation, inputs: list[float], output: float) -> tuple[list[float], float]:
  """Corrects the bytes of inputs of which a fusion reads only slices, and of an output that it updates in place."""
  inputs = list(inputs)
  users: dict[str, list[Instruction]] = {}
  for instruction in body.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  for parameter in (i for i in body.values() if i.opcode == "parameter"):
    number, uses = int(parameter.rest.split(")")[0]), users.get(parameter.name, [])
    if not uses or not inputs[number] or any(use.operands[0] != parameter.name for use in uses):
      continue
    if all(use.opcode == "dynamic-slice" for use in uses):
      inputs[number] = sum(size(use.shape) for use in uses)
    elif all(use.opcode == "dynamic-update-slice" for use in uses):
      inputs[number] = 0.0
  root = _root(body)
  if root is not None and root.opcode == "dynamic-update-slice" and output:
    output = size(_shape(root.operands[1], body))
  return inputs, output


def _in_main_memory(shape: str) -> float:
  """Bytes of those parts of a shape that are in main memory."""
  return sum(size(part) for part in SHAPE_AND_LAYOUT.findall(shape) if not ON_CHIP.search(part))
