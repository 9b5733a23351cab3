"""An objective's eval_step over a whole eval set, padding masked out: sums first, divide last."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def evaluate(
  eval_step: Callable[[Any, Any, Any], Any],
  summarize: Callable[[dict], dict[str, float]],
  variables: Any,
  frozen: Any,
  batches: Iterable[Any],
) -> dict[str, float]:
  """Adds the (sum, count) pairs of every batch on the device, fetches them once, and lets the objective divide.

  Returns:
    The objective's metrics as floats.
  """
  total = None
  for batch in batches:
    sums = eval_step(variables, frozen, batch)
    total = jax.block_until_ready(sums if total is None else jax.tree.map(jnp.add, total, sums))
  return summarize(jax.device_get(total))
