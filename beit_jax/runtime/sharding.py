"""The mesh, where parameters live on it, and how a host batch becomes a global array.

Axes: "data" and "fsdp". The batch is spread over both, parameters over "fsdp" only. Written for `jax.jit` +
`NamedSharding`; axis types are Auto, since Linen does not work with JAX's default, Explicit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax import trees
from beit_jax.errors import UserError

AXES = ("data", "fsdp")
MIN_FSDP_SIZE = 2**14  # smaller parameters are cheaper to copy than to gather

# First match wins; searched in parameter paths, and so in those of the Adam moments, which end alike.
PARAM_RULES = (
  (r"(kernel|relative_position_bias_table|pos_embed)$", "fsdp"),
  (r".*", "replicate"),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """Mesh of shape (data, fsdp) over all devices, or those given; -1 for `data` means all that are left."""
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or len(devices) % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices there are")
  data = len(devices) // fsdp if data == -1 else data
  if not 0 < data * fsdp <= len(devices):
    raise UserError(
      f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, there are {len(devices)}"
    )
  used = {device.process_index for device in devices[: data * fsdp]}
  if len(used) < jax.process_count():
    raise UserError(
      f"a mesh of data={data} x fsdp={fsdp} uses devices of {len(used)} of the {jax.process_count()} processes; every "
      "process needs one in it (mesh.data=-1 uses all)"
    )
  devices = np.asarray(devices[: data * fsdp]).reshape(data, fsdp)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
  """A mesh of one device of this process: for what a process does by itself."""
  devices = np.asarray(jax.local_devices()[:1]).reshape(1, 1)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 over every device of the mesh."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
  """A NamedSharding per leaf of a tree of shapes: `PARAM_RULES`, then the largest axis that "fsdp" divides."""
  fsdp = mesh.shape["fsdp"]

  def leaf_sharding(name, leaf):
    rule = trees.first_match(PARAM_RULES, name)
    axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
    if rule == "replicate" or fsdp == 1 or math.prod(leaf.shape) < MIN_FSDP_SIZE or not axes:
      return replicated(mesh)
    axis = max(axes, key=lambda i: (leaf.shape[i], i))
    return NamedSharding(mesh, PartitionSpec(*(["fsdp" if i == axis else None for i in range(leaf.ndim)])))

  return trees.named_map(leaf_sharding, shapes)


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of arrays [B, ...], run by every device on its own rows; without a mesh it is `function`.

  For what treats rows apart but XLA would not: a loop that goes on until the last row is ready asks all devices each
  time round, and `top_k` gathers the whole batch.
  """

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
      return function(*args)
    rows = PartitionSpec(AXES)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*args)

  return run


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a global batch the devices of this process hold: sorted int64 indices."""
  if batch_size % mesh.size:
    raise UserError(f"batch_size={batch_size} must be a multiple of the {mesh.size} devices of the mesh")
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
  """This process's rows of a global batch -> global arrays, axis 0 spread over the mesh."""
  sharding = batch_sharding(mesh)
  row_of = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

  def put(local):
    def shard(index):
      start, stop, _ = index[0].indices(batch_size)
      return local[row_of[start] : row_of[stop - 1] + 1]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

  return {name: put(local) for name, local in batch.items()}


def local_part(array: jax.Array) -> np.ndarray:
  """The rows of a batch that this process holds, in order."""
  shards = {
    (shard.index[0].start or 0) if shard.index else 0: shard.data for shard in array.addressable_shards
  }
  return np.concatenate([np.atleast_1d(np.asarray(shards[start])) for start in sorted(shards)])
