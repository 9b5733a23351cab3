"""Where activations live on the mesh. Without a mesh all of this does nothing."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the mesh axes over which the batch is spread


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def constrain_batch(x: jax.Array) -> jax.Array:
  """States that axis 0 of an activation is spread over the whole mesh.

  Left to itself XLA replicates activations under FSDP (23.9 GiB instead of 0.6 GiB of temporaries per
  chip for the large model on 16 chips).
  """
  return _constrain(x, PartitionSpec(BATCH_AXES))


def constrain_replicated(x: jax.Array) -> jax.Array:
  """States that every device holds all of `x`."""
  return _constrain(x, PartitionSpec())
