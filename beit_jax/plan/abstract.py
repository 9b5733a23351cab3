"""A run's training step with nothing behind it: no data, no tokenizer, no chips; shapes and shardings only."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import train
from beit_jax.config import parse as config_lib
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.models.dvae import Dvae
from beit_jax.objectives import Objective
from beit_jax.objectives.base import module_fields
from beit_jax.objectives.encoder import encoder_fields
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.step import make_train_step
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained, make_module

# (examples, classes) of the training split of data sets that recipes name; classes 0: label maps.
KNOWN: dict[str, tuple[int, int]] = {
  "imagenet2012": (1_281_167, 1000),
  "imagenet21k": (14_197_122, 21_843),
  "cifar10": (50_000, 10),
  "cifar100": (50_000, 100),
  "ade20k": (20_210, 0),
  "camvid": (367, 0),
}


class Source(sources.Source):
  """Stands in for data that is not here: so many examples and classes, and no images."""

  def __init__(self, examples: int, num_classes: int, has_labels: bool):
    self.num_classes, self.has_labels = num_classes, has_labels
    self.class_names = tuple(map(str, range(num_classes)))
    self.description = {"source": "none", "num_examples": examples}
    self._examples = examples

  def __len__(self) -> int:
    return self._examples

  def __getitem__(self, index: int) -> sources.Example:
    raise NotImplementedError("a plan reads no examples")


def make_source(config: ConfigDict, examples: int | None) -> Source:
  """The stand-in for a run's training data: `examples`, else the data where it is prepared, else `KNOWN`.

  Raises:
    UserError: nobody knows how many examples there are.
  """
  data, classes, found = config.data, 0, examples
  if examples is None:
    try:
      real = sources.make_source(data.to_dict())
      return Source(len(real), real.num_classes, real.has_labels)
    except (UserError, OSError, ImportError) as error:
      name = data.name.split("/")[0].split(":")[0].lower()
      if name not in KNOWN or data.split != "train":
        raise UserError(
          f"the data is not here, so say how many examples it has: --examples=N ({str(error)[:200]})"
        ) from None
      found, classes = KNOWN[name]
      found = max(round(found * data.fraction), 1)
  else:
    classes = KNOWN.get(data.name.split("/")[0], (0, 0))[1]
  classes = data.num_classes or config.model.get("num_classes") or classes or 1000
  labelled = config.objective != "beit" and config.objective != "dvae" and bool(data.label_key)
  return Source(found, 0 if config.objective == "segment" or not labelled else classes, labelled)


def _stand_in(config: ConfigDict, stages: dict[str, ConfigDict], path: str) -> Pretrained:
  """The frozen part that another stage will have made: its module, and shapes for its parameters."""
  stage = stages.get(path.removeprefix("stage:")) if path.startswith("stage:") else None
  if path.startswith("stage:") and stage is None:
    raise UserError(f"{path!r} names no stage; there are {', '.join(stages)}")
  data = config.data
  if stage is None or stage.objective == "dvae":
    if stage is not None and stage.init_from:
      return weights_io.load(stage.init_from)
    fields = {name: stage.model[name] for name in module_fields(Dvae)} if stage else {}
    kind, size = "tokenizer", config_lib.pair(data.token_image_size, "data.token_image_size")
  else:
    size = config_lib.pair(data.image_size, "data.image_size")
    kind, fields = "mim", dict(encoder=encoder_fields(stage.model, size, pretrain=True))
  module = make_module(kind, fields)
  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
  look = {name: data[name] for name in ("mean", "std", "crop_pct", "interpolation", "resize")}
  return Pretrained(kind, params, module, look | {"image_size": size}, {"path": path})


def batch_shapes(objective: Objective, source: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The global batch of a training step, as `data.pipeline` makes it."""
  shape = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
  common = {"example_key": shape((2,), jnp.uint32), "valid": shape((), bool)}
  if objective.kind == "segmenter":
    image, label = shape((*objective.image_size, 3), jnp.uint8), shape(objective.image_size, jnp.uint8)
    return {"image": image, "label_map": label, **common}
  views = {name: shape((*size, 3), jnp.uint8) for name, (size, _) in objective.views().items()}
  if objective.kind == "mim" and objective.config.tokenizer.cache:
    del views["token_image"]
    views["targets"] = shape((math.prod(objective.grid_size),), jnp.uint16)
  return views | common | ({"label": shape((), jnp.int32)} if source.num_classes else {})


class Step(NamedTuple):
  """A jitted training step and its arguments as shapes with shardings; `frozen`: what takes part untrained."""

  function: Any
  state: Any
  frozen: Any
  batch: dict[str, jax.ShapeDtypeStruct]
  plan: train.Plan
  mesh: jax.sharding.Mesh

  def trace(self) -> Any:
    with jax.set_mesh(self.mesh):
      return self.function.trace(self.state, self.frozen, self.batch)


def make_step(
  config: ConfigDict, stages: dict[str, ConfigDict], devices: list[Any], examples: int | None = None
) -> Step:
  """The training step of one run, the very function that `train.run` jits, for devices that need not exist.

  Args:
    config: the run; `stages`: the others of its config by name, for the frozen parts that they make.

  Raises:
    UserError: as `train.prepare`.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  root = jax.random.key(config.seed)  # outside of the mesh, whose devices cannot hold it
  load = lambda path: _stand_in(config, stages, path) if path.startswith("stage:") else weights_io.load(path)
  if config.get("tokenizer") and config.tokenizer.init_from.startswith("stage:"):
    name = config.tokenizer.init_from
    config = config.copy_and_resolve_references()
    config.tokenizer.init_from = f"result of {name}"
    load = lambda path: _stand_in(config, stages, name)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    plan = train.prepare(config, mesh, make_source(config, examples), load)
    objective, decay = plan.objective, config.optimizer.ema_decay
    init = functools.partial(objective.init, jax.random.fold_in(root, 0))
    _, shapes, shardings = train_state.abstract(init, plan.tx, mesh, ema=decay > 0)
    frozen = _frozen(objective, mesh)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  return Step(
    make_train_step(objective, plan.tx, config.microbatches, root, shardings, decay),
    jax.tree.map(place, shapes, shardings),
    jax.tree.map(lambda leaf: place(leaf, everywhere), frozen),
    {
      name: place(leaf, rows)
      for name, leaf in batch_shapes(objective, plan.source, config.batch_size).items()
    },
    plan,
    mesh,
  )


def _frozen(objective: Objective, mesh: jax.sharding.Mesh) -> Any:
  if getattr(objective, "_loaded", 0) is None:  # a probe's random encoder
    return {"encoder": jax.eval_shape(objective._init_encoder)}
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), objective.frozen_params(mesh))
