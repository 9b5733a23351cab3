"""What the values of a config may be: one table, applied to every completed run (config.py has seen to the types).

Where a value has to fit the data, the model or the machine, whoever knows these checks it.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from beit_jax.errors import UserError
from beit_jax.optim import OPTIMIZERS

Rule = tuple[Callable[[Any], bool], str]  # is a value good, and what it must be or do otherwise
STEPS = 2**31 - 1  # the step is an int32
PROFILED = 100
MAX_TEXT = 4096
FINITE = f"must be finite numbers, or text of up to {MAX_TEXT:,} characters without null"
LARGEST = 1e38  # of float32, nearly
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "xla", "cudnn")


def show(value: Any, limit: int = 200) -> str:
  """`repr` for a message: of any length, and of numbers that Python refuses to print."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):
    return f"something of type {type(value).__name__} that is too large to be shown"
  return text if len(text) <= limit else f"{text[:limit]}..."


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: int) -> Rule:
  return lambda n: _is_whole(n) and low <= n <= high, f"must be a whole number from {low:,} to {high:,}"


def fraction(*, zero: bool = True, one: bool = True) -> Rule:
  good = lambda x: _is_number(x) and (0 < x < 1 or zero and x == 0 or one and x == 1)
  return good, f"must lie in {'[' if zero else '('}0, 1{']' if one else ')'}"


def number(low: float, high: float = LARGEST) -> Rule:
  text = (
    f"must be a finite number, {low:g} or more" if high == LARGEST else f"must lie in [{low:g}, {high:g}]"
  )
  return lambda x: _is_number(x) and low <= x <= high, text


def positive() -> Rule:
  return lambda x: _is_number(x) and x > 0, "must be a finite number above 0"


def tuple_of(count: int | None, each: Rule, what: str, *, rising: bool = False) -> Rule:
  """A tuple of `count` values, any number but none for None; `rising`: none smaller than the one before."""

  def good(values):
    return (
      isinstance(values, tuple)
      and (len(values) == count if count else len(values) > 0)
      and all(map(each[0], values))
      and (not rising or list(values) == sorted(values))
    )

  return good, f"must be {what}{', the smaller one first' if rising else ''}"


def _sides(low: int, high: int) -> Rule:
  side, _ = integer(low, high)
  good = lambda size: side(size) or isinstance(size, tuple) and len(size) == 2 and all(map(side, size))
  return good, f"must be a whole number from {low:,} to {high:,}, or (height, width) of such"


def _is_span(steps: Any) -> bool:
  """() or (first, last); a trace of many steps fills the disk and no viewer opens it."""
  step, _ = integer(1, STEPS)
  return steps == () or len(steps) == 2 and all(map(step, steps)) and 0 <= steps[1] - steps[0] < PROFILED


def _is_pattern(text: Any) -> bool:
  try:
    return isinstance(text, str) and re.compile(text) is not None
  except (re.error, OverflowError, RecursionError):
    return False


TABLE: tuple[tuple[str, Rule], ...] = (
  ("seed", integer(0, 2**32 - 1)),
  (r"(eval\.)?batch_size|microbatches", integer(1, 2**20)),
  (r"total_steps|log_every_steps|(eval|checkpoint)\.every_steps", integer(1, STEPS)),
  ("total_epochs", positive()),
  ("profile_steps", (_is_span, f"must be (), or (first, last) of at most {PROFILED} steps, counted from 1")),
  (
    r"optimizer\.(learning_rate|min_lr|weight_decay|weight_decay_end|clip_norm|power|warmup_epochs)",
    number(0),
  ),
  (r"optimizer\.warmup_steps|loss\.(kl_warmup|temperature)_steps|collapse\.after_steps", integer(0, STEPS)),
  (
    r"optimizer\.betas",
    tuple_of(2, fraction(one=False), "two numbers in [0, 1)", rising=True),
  ),
  (r"optimizer\.name", (lambda name: name in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}")),
  (r"optimizer\.momentum", fraction(one=False)),
  (r"optimizer\.eps", number(1e-30, 1)),
  (r"optimizer\.layer_decay", fraction(zero=False)),
  (r"optimizer\.ema_decay", fraction(one=False)),
  (r"optimizer\.max_skipped|checkpoint\.keep", integer(1, 10**9)),
  (
    r"optimizer\.no_decay",
    (lambda v: all(map(_is_pattern, v)), "must be regular expressions that Python's re understands"),
  ),
  (r"(data|eval)\.num_examples", integer(1, 2**24)),
  (r"data\.render_size", integer(1, 512)),
  (r"(data|model)\.num_classes", integer(1, 2**20)),
  (r"data\.(token_)?image_size", _sides(1, 8192)),
  (r"data\.crop_scale", tuple_of(2, fraction(zero=False), "two numbers in (0, 1]", rising=True)),
  (r"data\.crop_ratio", tuple_of(2, number(1e-3, 1e3), "two numbers in [0.001, 1000]", rising=True)),
  (r"data\.color_jitter", number(0, 100)),
  (r"data\.(random_erasing|max_bad)|collapse\.min_usage", fraction()),
  (r"data\.mean", tuple_of(3, fraction(), "three numbers in [0, 1]")),
  (r"data\.std", tuple_of(3, number(1e-6, 1e6), "three numbers above 0 (from 1e-6 to 1e6)")),
  (r"data\.crop_pct", number(0.1, 1)),
  (r"data\.workers", integer(0, 1024)),
  (r"data\.threads", integer(1, 1024)),
  (r"eval\.fraction", fraction(zero=False)),
  (r"loss\.(kl_weight|mixup_alpha|cutmix_alpha)|segment\.aux_weight", number(0)),
  (r"loss\.temperature(_end)?", number(1e-4, 1e4)),
  (r"loss\.(label_smoothing|mix_prob|mix_switch_prob)", fraction()),
  (r"mask\.(min|max)_block_patches", integer(1, 2**20)),
  (r"segment\.resize", tuple_of(2, number(1, 8192), "(long, short), two numbers from 1 to 8,192")),
  (r"segment\.resize_ratio", tuple_of(2, number(0.01, 10), "two numbers in [0.01, 10]", rising=True)),
  (r"segment\.cat_max_ratio", positive()),
  (r"segment\.stride", integer(1, 8192)),
  (r"segment\.scales", tuple_of(None, number(0.01, 10), "one or more numbers in [0.01, 10]")),
  (r"segment\.programs", integer(1, 1000)),
  (r"knn\.temperature", number(0.02, 1000)),  # exp(1 / temperature) has to be a float32
  (
    r"model\.out_indices|knn\.blocks",
    (lambda v: all(map(_is_whole, v)), "must be numbers of blocks, counted from 0"),
  ),
  (r"model\.width", integer(1, 2**14)),
  (r"model\.depth", integer(1, 64)),
  (r"model\.(num_heads|patch_size)", integer(1, 1024)),
  (r"model\.mlp_ratio", number(0.01, 64)),
  (r"model\.(layer_scale_init|head_init_scale)", number(0)),
  (r"model\.drop_path_rate", fraction(one=False)),
  (r"model\.norm_eps", number(1e-30, 1)),
  (r"model\.dtype", (lambda name: name in DTYPES, f"must be one of {', '.join(DTYPES)}")),
  (r"model\.attention", (lambda name: name in ATTENTIONS, f"must be one of {', '.join(ATTENTIONS)}")),
  (r"model\.vocab_size", integer(2, 2**20)),
  (r"model\.n_hid", integer(4, 8192)),
  (r"model\.(n_init|channels|aux_channels)", integer(1, 8192)),
  (r"model\.n_blk_per_group", integer(1, 8)),
  (r"model\.group_count", integer(1, 6)),
)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _is_sound(value: Any) -> bool:
  """No infinity, no NaN, no text that the system would cut off, none longer than a path can be."""
  if isinstance(value, tuple | list):
    return all(map(_is_sound, value))
  if isinstance(value, str):
    return len(value) <= MAX_TEXT and "\0" not in value
  return not isinstance(value, float) or math.isfinite(value)


def check(run: dict[str, Any], where: str = "") -> None:
  """A completed run as nested dicts; `where`: its stage, for the message. None, where a key takes it, is good.

  Raises:
    UserError: a value is out of its range; names the key, what was found, and what it must be.
  """
  for key, value in _leaves(run):
    if value is None:
      continue
    rules = [rule for pattern, rule in TABLE if re.fullmatch(pattern, key)]
    for good, text in (*rules, (_is_sound, FINITE)):
      if not good(value):
        raise UserError(f"config key '{where + '.' if where else ''}{key}': {show(value)} {text}")


def check_summary(rows: Any) -> None:
  """Of a staged config, the table at the end: better now than after days of training.

  Raises:
    UserError: a row that is no (label, reference, format).
  """
  for row in rows if isinstance(rows, tuple | list) else [rows]:
    good = isinstance(row, tuple | list) and len(row) == 3 and all(isinstance(text, str) for text in row)
    try:
      good = good and bool(format(1.0, row[2]))
    except (ValueError, OverflowError, MemoryError):
      good = False
    if not good:
      raise UserError(
        f"config key 'summary': found {show(row)}; expected (label, reference, format) such as "
        "('accuracy', 'finetune.eval.acc1', '.1%')"
      )
