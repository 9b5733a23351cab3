"""Reads a compiled program, XLA's text form: what its collectives move and how many FLOPs each device does.

XLA's own count takes a loop's body once; here it counts as often as the loop runs, where the text says how often.
"""

import dataclasses
import math
import re

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
PART = re.compile(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\](?:\{[^}]*\})?")  # with its layout
ON_CHIP = re.compile(r"S\([1-9]")
SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(
  r"(?:calls|to_apply|condition|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  opcode: str
  rest: str  # operands and attributes
  is_root: bool


@dataclasses.dataclass
class Moved:
  """Of one kind of collective: how many run in a step; bytes that a device puts in (of a gather: gets out)."""

  count: int = 0
  bytes: float = 0.0
  unknown: int = 0  # of `count`, those in a loop of unknown length: counted once


@dataclasses.dataclass
class Program:
  """Of one device in a step. `flops`: products and convolutions; `loops`: trip counts of the loops that have some.

  `traffic`: bytes read from and written to main memory; what TPUs keep on the chip (memory space 1) is left out.
  """

  collectives: dict[str, Moved]
  flops: int
  traffic: float
  loops: tuple[int, ...]


def size(shape: str) -> float:
  """Bytes of a shape in text form, of all parts of a tuple."""
  return sum(_width(kind) * math.prod(_sides(sides)) for kind, sides in SHAPE.findall(shape))


def _sides(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


def _width(kind: str) -> float:
  if kind in BYTES:
    return BYTES[kind]
  bits = re.match(r"[a-z]+(\d+)", kind)
  return int(bits.group(1)) / 8 if bits else 0


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
  """(name of the entry, computations by name)."""
  entry, name, computations = "", "", {}
  for line in text.splitlines():
    if line and not line[0].isspace():
      head = COMPUTATION.match(line)
      name = head.group(2) if head else ""
      if head:
        computations[name] = []
        entry = name if head.group(1) else entry
      continue
    found = INSTRUCTION.match(line) if name else None
    if found:
      root, own, shape, opcode, rest = found.groups()
      computations[name].append(Instruction(own, shape, opcode, rest, bool(root)))
  return entry, computations


def read(text: str) -> Program:
  """The collectives and the FLOPs of one step of one device, out of `compiled.as_text()`."""
  entry, computations = parse(text)
  moved: dict[str, Moved] = {}
  pieces: dict[str, tuple[int, bool, str, float]] = {}  # times, known, kind, bytes of each collective
  loops: set[int] = set()
  flops: dict[str, int] = {}
  traffic: dict[str, float] = {}

  def work(name: str) -> int:
    """FLOPs of one call of a computation."""
    if name not in flops:
      flops[name] = 0  # XLA's call graph has no cycles
      shapes = {i.name: i.shape for i in computations.get(name, ())}
      total = 0
      for i in computations.get(name, ()):
        if i.opcode in ("dot", "convolution"):
          total += _product(i, shapes) if i.opcode == "dot" else _convolution(i, shapes)
        inner = sum(map(work, _called(i)))
        trips = _trips(i, computations) if i.opcode == "while" else 1
        if i.opcode == "while" and inner:
          loops.add(trips or 0)
        total += inner * (trips or 1)
      flops[name] = total
    return flops[name]

  def move(name: str, times: int, known: bool) -> None:
    shapes = {i.name: i.shape for i in computations.get(name, ())}
    for i in computations.get(name, ()):
      kind = next((k for k in KINDS if i.opcode in (k, f"{k}-start")), None)
      if kind is not None:
        channel = re.search(r"channel_id=(\d+)", i.rest)
        piece = (times, known, _kind(kind, name, i), _bytes(kind, i, shapes))
        # A TPU runs one in pieces, among fusions that compute meanwhile, and some of these in a loop that it outlasts.
        key = channel.group(1) if channel else f"{name} {i.name}"
        pieces[key] = min(pieces.get(key, piece), piece)
        continue
      trips = _trips(i, computations) if i.opcode == "while" else 1
      for called in _called(i):
        move(called, times * (trips or 1), known and trips is not None)

  def touch(name: str) -> float:
    """Main memory traffic of one call of a computation."""
    if name not in traffic:
      shapes = {i.name: i.shape for i in computations.get(name, ())}
      total = 0.0
      for i in computations.get(name, ()):
        if i.opcode in ("while", "call", "conditional"):
          total += sum(map(touch, _called(i))) * (_trips(i, computations) or 1 if i.opcode == "while" else 1)
        else:
          total += _traffic(i, shapes, computations)
      traffic[name] = total
    return traffic[name]

  total = work(entry)
  move(entry, 1, True)
  for times, known, kind, each in pieces.values():
    one = moved.setdefault(kind, Moved())
    one.count += times
    one.unknown += 0 if known else times
    one.bytes += times * each
  return Program(dict(sorted(moved.items())), total, touch(entry), tuple(sorted(loops)))


def _called(i: Instruction) -> list[str]:
  """Computations that an instruction runs; not those of a reduction, which work on single numbers."""
  if i.opcode in ("reduce", "reduce-window", "sort", "scatter", "map", "select-and-scatter", *KINDS):
    return []
  names = [group or one for group, one in CALLED.findall(i.rest)]
  return [name.strip().lstrip("%") for group in names for name in group.split(",") if name.strip()]


def _trips(i: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
  """How often a loop runs; None where that depends on data."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
  if known:
    return int(known.group(1))
  # Loops that XLA makes of its own, of products with what is yet on its way: a counter from 0, nothing said of it.
  condition, body = (
    {j.name: j for j in computations.get(name.group(1), ())} if name else {}
    for name in (re.search(rf"{role}=%?([\w.\-]+)", i.rest) for role in ("condition", "body"))
  )
  test = next((j for j in condition.values() if j.is_root and j.opcode == "compare"), None)
  end = next((j for j in body.values() if j.is_root and j.opcode == "tuple"), None)
  if test is None or end is None or "direction=LT" not in test.rest:
    return None
  counter, limit = (condition.get(name) for name in _operands(test))
  place = (
    re.search(r"index=(\d+)", counter.rest) if counter and counter.opcode == "get-tuple-element" else None
  )
  if place is None or _number(limit) is None:
    return None
  last = body.get(_operands(end)[int(place.group(1))])
  steps = [_number(body.get(name)) for name in _operands(last)] if last and last.opcode == "add" else []
  step = next((n for n in steps if n), None)
  return -(-_number(limit) // step) if step else None


def _number(i: Instruction | None) -> int | None:
  found = re.match(r"(\d+)\)", i.rest) if i and i.opcode == "constant" else None
  return int(found.group(1)) if found else None


def _kind(kind: str, computation: str, i: Instruction) -> str:
  """TPUs have a reduce-scatter as an all-reduce whose result is cut up within one fusion."""
  return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _operands(i: Instruction) -> list[str]:
  depth, end = 1, len(i.rest)
  for at, letter in enumerate(i.rest):
    depth += (letter in "({[") - (letter in ")}]")
    if depth == 0:
      end = at
      break
  return re.findall(r"%([\w.\-]+)", i.rest[:end])


def _bytes(kind: str, i: Instruction, shapes: dict[str, str]) -> float:
  """What one device puts in; of an all-gather what it gets out, the larger of the two."""
  given = sum(size(shapes.get(name, "")) for name in _operands(i))
  if kind == "all-gather":
    return size(i.shape) - (given if i.opcode.endswith("-start") else 0)  # a start's shape has both
  return given


def _product(i: Instruction, shapes: dict[str, str]) -> int:
  left = _shape(shapes[_operands(i)[0]])
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
  return 2 * math.prod(_shape(i.shape)) * math.prod(left[n] for n in _sides(axes.group(1) if axes else ""))


def _shape(text: str) -> list[int]:
  return _sides(SHAPE.search(text).group(2))


def _convolution(i: Instruction, shapes: dict[str, str]) -> int:
  """As XLA counts: taps on padding and on the zeros of a dilation are no work (TPUs write batched products so)."""
  image, kernel = (_shape(shapes[name]) for name in _operands(i)[:2])
  out = _shape(i.shape)
  numbers = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]))
  total = 2 * out[numbers[2].index("b")] * out[numbers[2].index("f")] * kernel[numbers[1].index("i")]
  for axis in range(len(out) - 2):
    place = lambda labels, axis=axis: labels.index(str(axis))
    get = lambda key, default, axis=axis: window[key].split("x")[axis] if key in window else default
    total *= valid_positions(
      image[place(numbers[0])],
      kernel[place(numbers[1])],
      out[place(numbers[2])],
      stride=int(get("stride", 1)),
      low=int(get("pad", "0_0").split("_")[0]),
      dilation=int(get("lhs_dilate", 1)),
      tap_dilation=int(get("rhs_dilate", 1)),
    )
  return total


FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "iota")


def _traffic(i: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]) -> float:
  """Bytes that one instruction reads from and writes to main memory; of what is sliced, the slice."""
  operands = _operands(i)
  if i.opcode in FREE or i.opcode.endswith("-done"):
    return 0.0
  if i.opcode in ("copy-start", "slice-start"):  # from memory to chip, or back
    parts = SHAPE.findall(i.shape)
    moved = size("{}[{}]".format(*parts[0 if i.opcode == "copy-start" else -2]))
    inside = any(ON_CHIP.search(part) for part in (i.shape, shapes.get(operands[0], "")))
    return moved if inside else 2 * moved
  given = [_in_memory(shapes.get(name, "")) for name in operands]
  made = _in_memory(i.shape)
  if i.opcode == "dynamic-slice":
    return 2 * made
  if i.opcode == "dynamic-update-slice":
    return 2 * given[1]
  if i.opcode == "fusion":
    for called in _called(i):
      given, made = _of_fusion(computations.get(called, []), given, made)
  return sum(given) + made


def _of_fusion(body: list[Instruction], given: list[float], made: float) -> tuple[list[float], float]:
  """Operands of which a fusion reads slices only, and a result of which it writes one, in place."""
  given = list(given)
  shapes = {i.name: i.shape for i in body}
  users: dict[str, list[Instruction]] = {}
  for i in body:
    for name in _operands(i):
      users.setdefault(name, []).append(i)
  for i in body:
    number = re.match(r"(\d+)\)", i.rest) if i.opcode == "parameter" else None
    uses = users.get(i.name, [])
    first = [use for use in uses if _operands(use)[0] == i.name]
    if number and uses == first and uses and given[int(number.group(1))]:
      if all(use.opcode == "dynamic-slice" for use in uses):
        given[int(number.group(1))] = sum(size(use.shape) for use in uses)
      elif all(use.opcode == "dynamic-update-slice" for use in uses):
        given[int(number.group(1))] = 0.0
  root = next((i for i in body if i.is_root), None)
  if root is not None and root.opcode == "dynamic-update-slice" and made:
    made = size(shapes.get(_operands(root)[1], ""))
  return given, made


def _in_memory(shape: str) -> float:
  """Bytes of the parts of a shape that lie in main memory."""
  return sum(size(part) for part in PART.findall(shape) if not ON_CHIP.search(part))


def valid_positions(
  side: int, taps: int, places: int, *, stride: int, low: int, dilation: int = 1, tap_dilation: int = 1
) -> int:
  """Pairs of an output place and a tap that meet a real input, along one axis of a convolution."""
  total = 0
  for tap in range(taps):
    first = tap * tap_dilation - low
    for place in range(places):
      where = place * stride + first
      total += 0 <= where <= (side - 1) * dilation and where % dilation == 0
  return total
