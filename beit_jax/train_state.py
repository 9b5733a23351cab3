"""What changes from step to step, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from beit_jax import sharding


@flax.struct.dataclass
class TrainState:
  """`step` is the only clock: schedules, randomness and the data position are functions of it."""

  step: jax.Array  # int32 scalar, the number of updates made
  params: Any
  collections: Any  # other Linen collections; {} for BEiT
  opt_state: optax.OptState


def create(init, tx: optax.GradientTransformation, mesh) -> tuple[TrainState, Any, Any]:
  """Makes the state directly on its devices: nothing is ever materialised unsharded.

  Args:
    init: () -> Linen variables, pure.

  Returns:
    (state, its shapes, its shardings).
  """

  def make():
    variables = dict(init())
    params = variables.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params))

  shapes = jax.eval_shape(make)
  shardings = sharding.param_shardings(mesh, shapes)
  return jax.jit(make, out_shardings=shardings)(), shapes, shardings
