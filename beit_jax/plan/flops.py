"""Counts the FLOPs of a traced program: 2 for every multiplication and addition of products and convolutions.

The trace knows the shapes before anything is spread over devices, and how often a `scan` runs. Element-wise operations
are left out, as is usual.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable[..., Any], *args: Any) -> int:
  """Counts the FLOPs of one call; the arguments may be shapes."""
  return of(jax.jit(function).trace(*args)).total()


def of(traced: Any) -> Counter[str]:
  """Counts the FLOPs of a traced function; the body of a loop of unknown length counts once.

  Returns:
    Named scope -> FLOPs. Linen makes a scope of each module's path, such as "Beit/block_00/attn/qkv".
  """
  jaxpr = traced.jaxpr.jaxpr
  # The compiler drops what no result needs, such as the gradient of the images that `layers.product` offers.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _by_scope(jaxpr, "")


def _by_scope(jaxpr: Any, scope: str) -> Counter[str]:
  total: Counter[str] = Counter()
  for eqn in jaxpr.eqns:
    name, inside = eqn.primitive.name, f"{scope}/{eqn.source_info.name_stack}".strip("/")
    if name == "dot_general":
      total[inside] += _product(eqn)
    elif name == "conv_general_dilated":
      total[inside] += _convolution(eqn)
    for inner in _jaxprs(tuple(eqn.params.values())):
      for key, flops in _by_scope(inner, inside).items():
        total[key] += flops * _repetitions(eqn)
  return total


def _repetitions(eqn: Any) -> int:
  if eqn.primitive.name == "shard_map":  # it is traced for the rows of one device
    return eqn.params["mesh"].size
  return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _jaxprs(value: Any) -> Iterator[Any]:
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for part in value:
      yield from _jaxprs(part)


def _product(eqn: Any) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
  """Counts every tap at every output, padding included; none of our convolutions is dilated."""
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  numbers = eqn.params["dimension_numbers"]
  return 2 * math.prod(out) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
