"""Reads and writes our own format: the checkpoints of a run, and folders with one model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.weights.kinds import KINDS, make_module, variable_shapes
from beit_jax.weights.pretrained import Pretrained, fingerprint

MAX_SIDE = 8192  # pixels


def load(path: Path, *, step: int | None = None, ema: bool = False, whole: bool = False) -> Pretrained:
  """Loads a checkpoint and checks every tensor against the module that its description names.

  Args:
    path: a run, a checkpoint of one, or a folder that `save` wrote.
    step: the checkpoint of a run; None: the newest valid one.
    ema: load the averaged weights.
    whole: of a model with a teacher, everything instead of the teacher's backbone.

  Raises:
    UserError: there is no such checkpoint, or it does not hold what it describes.
  """
  item = "ema" if ema else "params"
  folder = checkpoint.find(path, step, [item])
  description = checkpoint.read_description(folder)
  kind, preprocessing = description["kind"], description["preprocessing"]
  module = make_module(kind, description["module"])
  height, width = preprocessing["image_size"]
  if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in (height, width)):
    raise UserError(f"{folder}: its description states images of {height}x{width} pixels")
  if ema and not (folder / "ema").is_dir():
    raise UserError(
      f"{folder} has no averaged weights (optimizer.ema_decay was 0); call load without ema=True"
    )
  params = checkpoint.load_params(folder, item)
  collections = load_collections(folder) if KINDS[kind].has_collections else {}
  expected = variable_shapes(module, (height, width))
  problems = _differences({"params": params, **collections}, expected)
  if problems:
    raise UserError(f"{folder} does not hold what it describes:\n  " + "\n  ".join(problems))
  model = Pretrained(kind, params, module, preprocessing, description, collections)
  model = model if whole else model.loaded
  facts = {"path": str(folder), "sha256": fingerprint(model.params, model.collections)}
  return dataclasses.replace(model, description={**model.description, **facts})


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  """One line for every tensor whose shape differs; parameters are named without their collection."""

  def shapes(variables: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    flat = {name.removeprefix("params/"): leaf for name, leaf in trees.flatten(variables).items()}
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}

  have, want = shapes(found), shapes(expected)
  return [
    f"{name}: found {have.get(name, 'nothing')}, expected {want.get(name, 'nothing')}"
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]


def load_collections(folder: Path) -> dict[str, Any]:
  """The Linen collections besides the parameters: in the state of a run's checkpoint, or as `save` writes them."""
  folder = checkpoint.find(folder, items=["rest", "collections"])
  if (folder / "rest").is_dir():
    return checkpoint.load_params(folder, "rest")["collections"]
  return checkpoint.load_params(folder, "collections") if (folder / "collections").is_dir() else {}


def save(pretrained: Pretrained, path: Path) -> None:
  """Writes a folder that `load` and `init_from` read: parameters, collections, description.json, digest.json."""
  if pretrained.collections:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(path.absolute() / "collections", jax.tree.map(np.asarray, pretrained.collections))
  checkpoint.write_model(path, pretrained.params, pretrained.describe())
