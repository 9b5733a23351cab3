"""Our own format: the checkpoints of a run, and folders with one model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.weights.pretrained import Pretrained, fingerprint, make_module


def load(path: Path, *, step: int | None = None, ema: bool = False) -> Pretrained:
  """The newest good checkpoint of a run, or that of `step`; every tensor is checked against the module."""
  folder = checkpoint.find(path, step)
  description = checkpoint.read_description(folder)
  module = make_module(description["kind"], description["module"])
  height, width = description["preprocessing"]["image_size"]
  if not all(isinstance(side, int) and 0 < side <= 8192 for side in (height, width)):
    raise UserError(f"{folder}: its description has images of {height}x{width} pixels")
  if ema and not (folder / "ema").is_dir():
    raise UserError(
      f"{folder} has no averaged weights (optimizer.ema_decay was 0); call load without ema=True"
    )
  params = checkpoint.load_params(folder, "ema" if ema else "params")
  collections = load_collections(folder) if description["kind"] == "segmenter" else {}
  shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}  # noqa: E731
  variables = dict(_shapes(module, description))
  found, wanted = shapes(params), shapes(variables.pop("params"))
  found, wanted = found | shapes(collections), wanted | shapes(variables)
  if found != wanted:
    names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    lines = [f"{n}: found {found.get(n, 'nothing')}, expected {wanted.get(n, 'nothing')}" for n in names]
    raise UserError(f"{folder} does not hold what it describes:\n  " + "\n  ".join(lines))
  preprocessing = {
    **description["preprocessing"],
    "image_size": tuple(description["preprocessing"]["image_size"]),
  }
  description = {**description, "path": str(folder), "sha256": fingerprint(params, collections)}
  return Pretrained(description["kind"], params, module, preprocessing, description, collections)


def _shapes(module, description):
  height, width = description["preprocessing"]["image_size"]
  image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), image)


def load_collections(folder: Path) -> dict[str, Any]:
  """The Linen collections beside the parameters of one checkpoint: of a run's state, or as `save` writes them."""
  if (folder / "rest").is_dir():
    return checkpoint.load_params(folder, "rest")["collections"]
  return checkpoint.load_params(folder, "collections") if (folder / "collections").is_dir() else {}


def save(pretrained: Pretrained, path: Path) -> None:
  """A folder that `load` and `init_from` read: parameters, collections, description.json, digest.json."""
  if pretrained.collections:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(path.absolute() / "collections", jax.tree.map(np.asarray, pretrained.collections))
  checkpoint.write_model(path, pretrained.params, pretrained.describe())
