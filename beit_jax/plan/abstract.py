"""The training step of a run as shapes and shardings; it needs no data, no tokenizer and no chips."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import train
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.objectives import objective_of, stages
from beit_jax.objectives.base import PyTree
from beit_jax.objectives.stages import Stage
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.step import make_train_step

# Examples and classes of the training split of the data sets that the recipes name; 0 classes: label maps.
KNOWN: dict[str, tuple[int, int]] = {
  "imagenet2012": (1_281_167, 1000),
  "imagenet21k": (14_197_122, 21_843),
  "cifar10": (50_000, 10),
  "cifar100": (50_000, 100),
  "ade20k": (20_210, 0),
  "camvid": (367, 0),
}


class PlannedSource(sources.Source):
  """Stands in for data that is not here: it has a length and classes, but no images."""

  def __init__(self, examples: int, num_classes: int, has_labels: bool):
    self.num_classes, self.has_labels = num_classes, has_labels
    self.class_names = tuple(map(str, range(num_classes)))
    self.description = {"source": "none", "num_examples": examples}
    self._examples = examples

  def __len__(self) -> int:
    return self._examples

  def __getitem__(self, index: int) -> sources.Example:
    raise IndexError(f"example {index} of data that is not here")


def make_source(config: ConfigDict, examples: int | None) -> sources.Source:
  """Returns the training data of a run, or a stand-in for it.

  Args:
    config: the run.
    examples: the number of examples; None asks the data or, if it is not here, `KNOWN`.

  Raises:
    UserError: the number of examples is not known.
  """
  data = config.data
  name = re.split("[/:]", data.name)[0].lower()
  known, classes = KNOWN.get(name, (0, 0))
  if examples is None:
    try:
      return sources.make_source(data.to_dict())
    except (UserError, OSError, ImportError) as error:
      if not known or data.split != "train":
        reason = str(error)[:200]
        raise UserError(
          f"the data is not here; give its number of examples: --examples=N ({reason})"
        ) from None
      examples = max(round(known * data.fraction), 1)
  labels = objective_of(config).labels if data.label_key else "none"
  classes = data.num_classes or config.model.get("num_classes") or classes or 1000
  return PlannedSource(examples, classes if labels == "class" else 0, labels != "none")


class Step(NamedTuple):
  """A jitted training step, and its arguments as shapes with shardings."""

  function: Any  # the very function that `train.run` jits
  state: train_state.TrainState
  frozen: PyTree  # arrays that take part but are not trained
  batch: dict[str, jax.ShapeDtypeStruct]  # the global batch
  plan: train.Plan
  mesh: jax.sharding.Mesh

  def trace(self) -> Any:
    with jax.set_mesh(self.mesh):
      return self.function.trace(self.state, self.frozen, self.batch)


def make_step(stage: Stage, devices: list[Any], examples: int | None = None) -> Step:
  """Builds the training step of one run for devices that need not exist.

  Args:
    stage: the run.
    devices: of the slice.
    examples: see `make_source`.

  Raises:
    UserError: see `train.prepare`.
  """
  config = stage.config
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  root = jax.random.key(config.seed)  # outside the mesh, whose devices cannot hold arrays
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    data = train.Data(make_source(config, examples), None)
    plan = train.prepare(config, mesh, data, stages.loader(stage.uses.values()))
    objective, decay = plan.objective, config.optimizer.ema_decay
    init = functools.partial(objective.init, jax.random.fold_in(root, 0))
    _, shapes, shardings = train_state.abstract(init, plan.tx, mesh, ema=decay > 0)
    frozen = jax.eval_shape(lambda: _zeros(objective.frozen_params(mesh)))
  everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  batch = objective.batch_shapes(config.batch_size)
  return Step(
    make_train_step(objective, plan.tx, config.microbatches, root, shardings, decay),
    jax.tree.map(_place, shapes, shardings),
    jax.tree.map(lambda leaf: _place(leaf, everywhere), frozen),
    jax.tree.map(lambda leaf: _place(leaf, rows), batch),
    plan,
    mesh,
  )


def _zeros(tree: PyTree) -> PyTree:
  """Arrays in place of shapes, which `eval_shape` does not accept as results; it does not allocate them."""
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _place(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
