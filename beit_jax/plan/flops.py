"""FLOPs of matrix products and convolutions, counted by hand: 2 for every multiplication and addition.

Two ways that check each other: closed formulas of the parts of a model, and a walk over a traced program, which knows
the shapes before anything is spread over devices, and how often a loop runs. Element-wise work is left out, as usual.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def encoder(fields: dict[str, Any]) -> dict[str, int]:
  """Forward FLOPs per image of a BEiT encoder: embedding, attention (with its projections), mlp."""
  patch, width, depth = fields["patch_size"], fields["width"], fields["depth"]
  patches = math.prod(side // patch for side in fields["image_size"])
  tokens, hidden = patches + 1, int(width * fields["mlp_ratio"])
  return {
    "embedding": 2 * patches * patch * patch * 3 * width,
    "attention": depth * (2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width),
    "mlp": depth * 2 * 2 * tokens * width * hidden,
  }


def vocabulary_head(width: int, positions: int, vocab_size: int) -> int:
  """Forward FLOPs per image of the head over the masked positions."""
  return 2 * positions * width * vocab_size


def tokenizer(fields: dict[str, Any], image_size: tuple[int, int]) -> int:
  """Forward FLOPs per image of the encoder of the discrete VAE."""
  pixels, hidden, groups = math.prod(image_size), fields["n_hid"], fields["group_count"]
  total, before = 2 * pixels * 7 * 7 * 3 * hidden, hidden
  for group in range(groups):
    width = hidden * 2**group
    inner = width // 4
    for _ in range(fields["n_blk_per_group"]):
      kernels = 9 * before * inner + 9 * inner * inner + 9 * inner * inner + inner * width
      total += 2 * pixels * (kernels + (before * width if before != width else 0))
      before = width
    pixels //= 4 if group < groups - 1 else 1
  return total + 2 * pixels * before * fields["vocab_size"]


def count(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of one call; args may be shapes."""
  return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> int:
  """FLOPs of one run of a traced program. A loop of unknown length is counted once."""
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      total += _product(eqn)
    elif name == "conv_general_dilated":
      total += _convolution(eqn)
    else:
      inner = sum(count_jaxpr(inner) for value in eqn.params.values() for inner in _jaxprs(value))
      total += inner * (
        eqn.params["length"] if name == "scan" else _devices(eqn) if name == "shard_map" else 1
      )
  return total


def _devices(eqn: Any) -> int:
  """A mapped function is traced for the rows of one device."""
  return eqn.params["mesh"].size


def _jaxprs(value: Any) -> list[Any]:
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  return [inner for each in value for inner in _jaxprs(each)] if isinstance(value, tuple | list) else []


def _product(eqn: Any) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
  """Every tap at every output counts, padding too; none of our convolutions is dilated."""
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  numbers = eqn.params["dimension_numbers"]
  return 2 * math.prod(out) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
