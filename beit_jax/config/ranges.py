"""Which values a config key may have: tables of rules, applied to every complete config.

`parse.py` checks types first. Values that must fit the data, the model or the machine are checked where those are
known. Rules for an objective's own sections stand beside that objective.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from beit_jax.errors import UserError
from beit_jax.models.beit import POOLS
from beit_jax.models.layers import ACTIVATIONS
from beit_jax.optim import CLIPS, OPTIMIZERS

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what the message says otherwise
Table = Sequence[tuple[str, Rule]]  # (regular expression of dotted keys, rule)

MAX_STEPS = 2**31 - 1  # the step counter is an int32
MAX_PROFILED_STEPS = 100
MAX_TEXT = 4096
MAX_FLOAT = 1e38  # about the largest float32
DTYPES = ("float32", "bfloat16", "float16")
FINITE = f"must be finite numbers, or text of up to {MAX_TEXT:,} characters without null"


def show(value: Any, limit: int = 200) -> str:
  """`repr` for a message, shortened to `limit` characters; never raises."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):
    return f"something of type {type(value).__name__} that is too large to be shown"
  return text if len(text) <= limit else f"{text[:limit]}..."


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_FLOAT <= value <= MAX_FLOAT


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: int) -> Rule:
  """An integer in [low, high]."""
  return lambda n: _is_integer(n) and low <= n <= high, f"must be a whole number from {low:,} to {high:,}"


def fraction(*, zero: bool = True, one: bool = True) -> Rule:
  """A number between 0 and 1; `zero` and `one` tell whether the ends are allowed."""

  def allowed(x: Any) -> bool:
    return _is_number(x) and (0 < x < 1 or (zero and x == 0) or (one and x == 1))

  return allowed, f"must lie in {'[' if zero else '('}0, 1{']' if one else ')'}"


def number(low: float, high: float = MAX_FLOAT) -> Rule:
  """A finite number in [low, high]."""
  text = (
    f"must be a finite number, {low:g} or more" if high == MAX_FLOAT else f"must lie in [{low:g}, {high:g}]"
  )
  return lambda x: _is_number(x) and low <= x <= high, text


def positive() -> Rule:
  """A finite number above 0."""
  return lambda x: _is_number(x) and x > 0, "must be a finite number above 0"


def one_of(*choices: str) -> Rule:
  """One of several words."""
  return lambda x: x in choices, f"must be one of {', '.join(choices)}"


def tuple_of(count: int | None, each: Rule, text: str, *, ascending: bool = False) -> Rule:
  """A tuple of `count` values (None: one or more) that all satisfy the rule `each`."""

  def allowed(values: Any) -> bool:
    return (
      isinstance(values, tuple)
      and (len(values) == count if count else len(values) > 0)
      and all(map(each[0], values))
      and (not ascending or list(values) == sorted(values))
    )

  return allowed, f"must be {text}{', the smaller one first' if ascending else ''}"


def block_numbers() -> Rule:
  """Numbers of transformer blocks."""
  return lambda values: all(map(_is_integer, values)), "must be numbers of blocks, counted from 0"


def _value_range() -> Rule:
  pair, text = tuple_of(2, number(-MAX_FLOAT), "two numbers (low, high), the smaller one first")
  return lambda values: pair(values) and values[0] < values[1], text


def sides(low: int, high: int) -> Rule:
  """A number of pixels, or (height, width)."""
  side, _ = integer(low, high)

  def allowed(size: Any) -> bool:
    return side(size) or (isinstance(size, tuple) and len(size) == 2 and all(map(side, size)))

  return allowed, f"must be a whole number from {low:,} to {high:,}, or (height, width) of such"


def _profiled_steps() -> Rule:
  """() or (first, last). A trace of many steps fills the disk and no viewer opens it."""
  step, _ = integer(1, MAX_STEPS)

  def allowed(steps: Any) -> bool:
    if steps == ():
      return True
    return len(steps) == 2 and all(map(step, steps)) and 0 <= steps[1] - steps[0] < MAX_PROFILED_STEPS

  return allowed, f"must be (), or (first, last) of at most {MAX_PROFILED_STEPS} steps, counted from 1"


def _patterns() -> Rule:
  def is_pattern(text: Any) -> bool:
    try:
      return isinstance(text, str) and re.compile(text) is not None
    except (re.error, OverflowError, RecursionError):
      return False

  return lambda v: all(map(is_pattern, v)), "must be regular expressions that Python's re understands"


COMMON: Table = (
  ("seed", integer(0, 2**32 - 1)),
  (r"(eval\.)?batch_size|microbatches", integer(1, 2**20)),
  (r"total_steps|log_every_steps|(eval|checkpoint)\.every_steps", integer(1, MAX_STEPS)),
  ("total_epochs", positive()),
  ("profile_steps", _profiled_steps()),
  (
    r"optimizer\.(learning_rate|min_lr|weight_decay|weight_decay_end|clip_norm|power|warmup_epochs)",
    number(0),
  ),
  (r"optimizer\.warmup_steps", integer(0, MAX_STEPS)),
  (r"optimizer\.name", one_of(*OPTIMIZERS)),
  (r"optimizer\.clip", one_of(*CLIPS)),
  (r"optimizer\.momentum", fraction(one=False)),
  (r"optimizer\.schedule", one_of("cosine", "poly")),
  (r"optimizer\.betas", tuple_of(2, fraction(one=False), "two numbers in [0, 1)", ascending=True)),
  (r"optimizer\.eps", number(1e-30, 1)),
  (r"optimizer\.layer_decay", fraction(zero=False)),
  (r"optimizer\.ema_decay", fraction(one=False)),
  (r"optimizer\.max_skipped|checkpoint\.keep", integer(1, 10**9)),
  (r"optimizer\.(no_)?decay", _patterns()),
  (r"(data|eval)\.num_examples", integer(1, 2**24)),
  (r"data\.render_size", integer(1, 512)),
  (r"data\.num_classes", integer(1, 2**20)),
  (r"data\.(token_)?image_size", sides(1, 8192)),
  (r"data\.crop_scale", tuple_of(2, fraction(zero=False), "two numbers in (0, 1]", ascending=True)),
  (r"data\.crop_ratio", tuple_of(2, number(1e-3, 1e3), "two numbers in [0.001, 1000]", ascending=True)),
  (r"data\.color_jitter", number(0, 100)),
  (r"data\.(random_erasing|max_bad)", fraction()),
  (r"data\.mean", tuple_of(None, fraction(), "numbers in [0, 1], one for each channel")),
  (r"data\.std", tuple_of(None, number(1e-6, 1e6), "numbers from 1e-6 to 1e6, one for each channel")),
  (r"data\.value_range", _value_range()),
  (r"data\.crop_pct", number(0.1, 1)),
  (r"data\.workers", integer(0, 1024)),
  (r"data\.threads", integer(1, 1024)),
  (r"eval\.fraction", fraction(zero=False)),
)

# Fields of the modules in `beit_jax/models`; also applied to the description of a checkpoint that is loaded.
MODEL: Table = (
  (r"model\.num_classes", integer(1, 2**20)),
  (r"model\.out_indices", block_numbers()),
  (r"model\.width", integer(1, 2**14)),
  (r"model\.depth", integer(1, 64)),
  (r"model\.(num_heads|patch_size|in_channels)", integer(1, 1024)),
  (r"model\.mlp_ratio", number(0.01, 64)),
  (r"model\.(layer_scale_init|head_init_scale)", number(0)),
  (r"model\.drop_path_rate", fraction(one=False)),
  (r"model\.norm_eps", number(1e-30, 1)),
  (r"model\.(dtype|residual_dtype)", one_of(*DTYPES)),
  (r"model\.attention", one_of("auto", "xla", "cudnn")),
  (r"model\.preset", one_of("plus", "paper")),
  (r"model\.rel_pos", one_of("shared", "per_block", "none")),
  (r"model\.pool", one_of(*POOLS)),
  (r"model\.activation", one_of(*ACTIVATIONS)),
  (r"model\.(register_tokens|early_block|head_blocks)", integer(0, 64)),
  (r"model\.vocab_size", integer(2, 2**20)),
  (r"model\.(outputs|hidden|bottleneck)", integer(1, 2**20)),
  (r"model\.n_hid", integer(4, 8192)),
  (r"model\.(n_init|channels|aux_channels)", integer(1, 8192)),
  (r"model\.n_blk_per_group", integer(1, 8)),
  (r"model\.group_count", integer(1, 6)),
  (r"model\.decoder_depth", integer(1, 64)),
  (r"model\.pixel_depth", integer(0, 64)),
  (r"model\.(code|teacher)_dim", integer(1, 2**14)),
)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _is_finite(value: Any) -> bool:
  """No infinity, no NaN, and no text that the operating system would cut off or that is longer than a path can be."""
  if isinstance(value, tuple | list):
    return all(map(_is_finite, value))
  if isinstance(value, str):
    return len(value) <= MAX_TEXT and "\0" not in value
  return not isinstance(value, float) or math.isfinite(value)


def check(run: dict[str, Any], stage: str = "", *, table: Table = ()) -> None:
  """Checks every value of a complete config. None is allowed for every key that accepts it.

  Args:
    run: the config as nested dicts.
    stage: the stage's name, for messages.
    table: rules besides `COMMON` and `MODEL`.

  Raises:
    UserError: a value is out of its range; names the key, the value and the rule.
  """
  for key, value in _leaves(run):
    if value is None:
      continue
    rules = [rule for pattern, rule in (*COMMON, *MODEL, *table) if re.fullmatch(pattern, key)]
    for allowed, text in (*rules, (_is_finite, FINITE)):
      if not allowed(value):
        raise UserError(f"config key '{stage + '.' if stage else ''}{key}': {show(value)} {text}")


def check_summary(rows: Any) -> None:
  """Checks the rows of a staged config's summary table before the first stage trains.

  Raises:
    UserError: a row is not (label, reference, format).
  """
  for row in rows if isinstance(rows, tuple | list) else [rows]:
    valid = isinstance(row, tuple | list) and len(row) == 3 and all(isinstance(text, str) for text in row)
    try:
      valid = valid and bool(format(1.0, row[2]))
    except (ValueError, OverflowError, MemoryError):
      valid = False
    if not valid:
      raise UserError(
        f"config key 'summary': found {show(row)}; expected (label, reference, format) such as "
        "('accuracy', 'finetune.eval.acc1', '.1%')"
      )
