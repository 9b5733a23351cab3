"""The mesh of devices, the sharding of parameters, and global arrays from the batches of each host.

The mesh has the axes "data" and "fsdp". The batch is sharded over both, parameters over "fsdp" only. The axis types are
Auto, since Linen does not work with JAX's default, Explicit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

AXES = ("data", "fsdp")
MIN_FSDP_SIZE = 2**14  # smaller parameters are cheaper to copy than to gather

# The first regular expression that is found in a parameter's path wins. Paths of Adam's moments have the same ends.
PARAM_RULES = (
  (r"(kernel|relative_position_bias_table|pos_embed)$", "fsdp"),
  (r".*", "replicate"),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """Creates a mesh of shape (data, fsdp).

  Args:
    data: size of the axis "data"; -1 means as many as the devices allow.
    fsdp: size of the axis "fsdp".
    devices: the devices to use; default: all.

  Raises:
    UserError: the sizes do not fit the devices, or a process would have no device in the mesh.
  """
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or len(devices) % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} does not divide the number of devices, {len(devices)}")
  data = len(devices) // fsdp if data == -1 else data
  if not 0 < data * fsdp <= len(devices):
    raise UserError(
      f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, there are {len(devices)}"
    )
  used = {device.process_index for device in devices[: data * fsdp]}
  if len(used) < jax.process_count():
    raise UserError(
      f"a mesh of data={data} x fsdp={fsdp} uses devices of {len(used)} of the {jax.process_count()} processes; every "
      "process needs at least one (mesh.data=-1 uses all)"
    )
  return _mesh(_arrange(devices[: data * fsdp], data, fsdp))


def local_mesh() -> Mesh:
  """A mesh of one device of this process, for work that a process does alone."""
  return _mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1))


def _mesh(devices: np.ndarray) -> Mesh:
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: Sequence[Any], data: int, fsdp: int) -> np.ndarray:
  """[data, fsdp] devices; on TPUs, those of a row are neighbors in one slice. Elsewhere the order is JAX's own."""
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  try:
    if slices > 1 and data % slices == 0:
      shapes = (data // slices, fsdp), (slices, 1)
      return mesh_utils.create_hybrid_device_mesh(*shapes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
  except (
    AssertionError,
    NotImplementedError,
    ValueError,
  ) as error:  # such as a part of a slice that is no box
    log.info("mesh: the devices keep their order (%s)", error)
    return np.asarray(devices).reshape(data, fsdp)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Shards axis 0 over all devices of the mesh."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
  """A NamedSharding for each leaf of a tree of shapes.

  `PARAM_RULES` decide whether a leaf is sharded; then its largest axis that "fsdp" divides is.
  """
  fsdp = mesh.shape["fsdp"]

  def leaf_sharding(name: str, leaf: Any) -> NamedSharding:
    rule = trees.first_match(PARAM_RULES, name)
    axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
    if rule == "replicate" or fsdp == 1 or math.prod(leaf.shape) < MIN_FSDP_SIZE or not axes:
      return replicated(mesh)
    axis = max(axes, key=lambda i: (leaf.shape[i], i))
    names = ["fsdp" if i == axis else None for i in range(leaf.ndim)]
    return NamedSharding(mesh, PartitionSpec(*names))

  return trees.named_map(leaf_sharding, shapes)


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """Runs a function of arrays [B, ...] on every device with the device's own rows; without a mesh, as it is.

  Some functions treat rows independently, but XLA does not see that: a loop that runs until the last row is ready
  would synchronize all devices in each iteration, and `top_k` would gather the whole batch.
  """

  def run(*args: jax.Array) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
      return function(*args)
    rows = PartitionSpec(AXES)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*args)

  return run


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that the devices of this process hold: sorted int64 indices."""
  if batch_size % mesh.size:
    raise UserError(f"batch_size={batch_size} must be a multiple of the {mesh.size} devices of the mesh")
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
  """Makes global arrays, axis 0 sharded over the mesh, from this process's rows of a global batch."""
  sharding = batch_sharding(mesh)
  row_of = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

  def put(local: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      return local[row_of[start] : row_of[stop - 1] + 1]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

  return {name: put(local) for name, local in batch.items()}


def local_part(array: jax.Array) -> np.ndarray:
  """The rows of a global array that this process holds, in order."""
  shards = {}
  for shard in array.addressable_shards:
    start = shard.index[0].start if shard.index else 0
    shards[start or 0] = shard.data
  return np.concatenate([np.atleast_1d(np.asarray(shards[start])) for start in sorted(shards)])
