"""Sharding constraints on activations. They have no effect without a mesh."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")  # mesh axes over which the batch is sharded


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def constrain_batch(x: jax.Array) -> jax.Array:
  """Shards axis 0 of an activation over the whole mesh.

  Without this constraint XLA replicates activations under FSDP: the large model on 16 chips then needs 23.9 GiB of
  temporaries per chip instead of 0.6 GiB. Logits and what they are compared with need it as well: a head whose kernel
  is sharded over its outputs would otherwise leave each device a part of the vocabulary.
  """
  return _constrain(x, PartitionSpec(BATCH_AXES))


def constrain_replicated(x: jax.Array) -> jax.Array:
  """Replicates `x` on every device."""
  return _constrain(x, PartitionSpec())
