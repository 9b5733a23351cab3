"""The protocol of an objective: what the training loop and the commands ask of it.

Objectives are the only layer that knows model, mask and loss together. Every metric is a sum with its count
(`Metric`), which can be added over microbatches, evaluation steps and processes and is divided last.
"""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax import Array
from ml_collections import ConfigDict

from beit_jax import augment, trees
from beit_jax.config import parse, ranges
from beit_jax.data import examples, views
from beit_jax.data.images import ViewSizes
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import variable_shapes
from beit_jax.weights.pretrained import Pretrained

MAX_PARAMETERS = 2**35  # 128 GiB of float32; a larger value is almost certainly a typo

PyTree = Any
Variables = dict[str, Any]  # Linen variables: "params" and other collections
Batch = dict[str, Array]
Loader = Callable[[str], Pretrained]


class Metric(NamedTuple):
  """A sum over examples and their number, both float32 scalars (or arrays of one shape)."""

  total: Array
  n: Array


Metrics = dict[str, Metric]


class LossOutput(NamedTuple):
  """Result of `Objective.loss`.

  Attributes:
    metrics: sums over the batch. The total of "loss" is differentiated.
    collections: the Linen collections besides "params" after this step, such as running statistics. Over microbatches
      they are averaged. Those that are left out stay as they are.
    statistics: sums for `Objective.after_update`. Over microbatches they are added.
  """

  metrics: Metrics
  collections: Variables = {}
  statistics: PyTree = {}


class EvalOutput(NamedTuple):
  """Result of `Objective.eval_step`.

  Attributes:
    metrics: sums over the valid examples of the batch.
    rows: arrays [B, ...] that cannot be added up, such as predictions. Those of the whole evaluation set reach
      `summarize_rows` and `report` in the order of the data, without padding.
  """

  metrics: Metrics
  rows: dict[str, Array] = {}


class Objective(abc.ABC):
  """Base class of everything that can be trained or evaluated.

  A subclass must give the class attribute `kind`, and `config_section`, `views`, `init`, `loss`, `eval_step` and
  `describe`. The remaining attributes and methods have defaults.

  Args:
    config: the run's complete config.
    source: the training data.
    load: replaces `beit_jax.load` for frozen parts: path -> model, whose parameters may be shapes.

  Attributes:
    kind: what a checkpoint of this objective holds: a row of `weights.kinds.KINDS`, which several objectives may
      share, or a name of its own if only this objective reads it.
    eval_metrics: names of the metrics of an evaluation.
    augmentations: which of `augment.AUGMENTATIONS` are used in training.
    trains: False if there is nothing to optimize; the run is then an evaluation.
    labels: what the objective needs of each example besides the image: "none", "class" or "map".
    frozen_sections: config sections whose `init_from` names a frozen model.
    import_replaces_run: with `init_from`, a stage is not trained; the named model takes the place of its result.
    value_ranges: rules for values of the objective's own config sections.
  """

  kind: ClassVar[str]
  eval_metrics: tuple[str, ...] = ("loss",)
  augmentations: ClassVar[tuple[str, ...]] = ()
  trains: ClassVar[bool] = True
  labels: ClassVar[str] = "none"
  frozen_sections: ClassVar[tuple[str, ...]] = ()
  import_replaces_run: ClassVar[bool] = False
  value_ranges: ClassVar[ranges.Table] = ()

  module: Any  # a Linen module: what is trained

  def __init__(self, config: ConfigDict, source: Any, load: Loader | None = None) -> None:
    self.config, self.source = config, source
    self.load_frozen = load or weights_io.load
    self.image_size = parse.pair(config.data.image_size, "data.image_size")
    self.channels = _check_channels(config)
    self.token_image_size = parse.pair(config.data.token_image_size, "data.token_image_size")

  # What every objective gives.

  @classmethod
  @abc.abstractmethod
  def config_section(cls) -> dict[str, Any]:
    """The config sections of this objective with their defaults, `model` among them."""

  @abc.abstractmethod
  def views(self) -> ViewSizes:
    """The images that the objective uses of each example: name -> ((H, W), interpolation)."""

  @abc.abstractmethod
  def init(self, key: Array) -> Variables:
    """Fresh Linen variables. Pure."""

  @abc.abstractmethod
  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    """The loss of a training batch. Pure.

    Args:
      variables: Linen variables.
      frozen: result of `frozen_params`, on the device.
      batch: see `batch_shapes`.
      key: for dropout and the like; it depends on the seed, the step and the microbatch.
      step: int32 scalar, for temperatures and weights that change.
    """

  @abc.abstractmethod
  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    """The metrics of an evaluation batch, over the examples where batch["valid"] (bool [B]). Pure."""

  @abc.abstractmethod
  def describe(self) -> dict[str, Any]:
    """What a checkpoint says of its model: kind, module fields, preprocessing."""

  # What an objective may give.

  @classmethod
  def variant(cls, config: ConfigDict) -> "type[Objective]":
    """The class that a run of this config uses; another one where a key of the config decides facts of the class."""
    del config
    return cls

  @classmethod
  def expected_result(cls, config: ConfigDict) -> Pretrained:
    """The model that a run of this config will save, with shapes in place of parameters, for planning later stages.

    Raises:
      UserError: no later stage can use a run of this objective.
    """
    raise UserError(f"objective {config.objective!r}: no other stage can use the result of such a run")

  @property
  def depth(self) -> int:
    """Number of encoder blocks, for layer-wise learning rates; 0 where there is no encoder."""
    return 0

  @property
  def delayed(self) -> dict[str, int]:
    """Regex of parameters -> the step from which on they are trained; see `optim.make_optimizer`."""
    return {}

  def reader(self) -> Any:
    """How examples become arrays: see `data.views.ViewReader`."""
    return views.ViewReader(self.views(), self.config.data.to_dict())

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global training batch."""
    images = {name: ((*size, self.channels), jnp.uint8) for name, (size, _) in self.views().items()}
    return with_common_arrays(images, batch_size)

  def frozen_params(self, mesh: jax.sharding.Mesh) -> PyTree:
    """Host side: arrays that take part in the loss but are not trained; {} for none."""
    del mesh
    return {}

  def after_update(
    self, params: PyTree, collections: Variables, statistics: PyTree, step: Array
  ) -> Variables:
    """The collections after an optimizer update, such as moving averages of the new parameters. Pure.

    Args:
      params: parameters after the update.
      collections: those before the step, replaced by those of `LossOutput`, averaged over microbatches.
      statistics: those of `LossOutput`, summed over microbatches.
      step: int32 scalar, before it is increased.
    """
    del params, statistics, step
    return collections

  # An objective whose collections depend on the data makes them from the first batch of a fresh run, before the first
  # update: (variables, frozen, batch) -> collections. Pure; with the same result for every number of microbatches.
  collections_from_batch: Callable[[Variables, PyTree, Batch], Variables] | None = None

  # An objective whose images differ in size evaluates them itself: (variables, source, mesh) -> (metrics, rows).
  evaluate_images: Callable[[Variables, Any, jax.sharding.Mesh], tuple[dict, dict]] | None = None

  def summarize(self, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Host side: the sums of a whole evaluation set -> metrics."""
    return {name: float(total / count) if count else math.nan for name, (total, count) in sums.items()}

  def summarize_rows(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Host side: metrics that need every example at once."""
    del rows
    return {}

  def report(self, rows: dict[str, np.ndarray], metrics: dict[str, float], folder: Path) -> list[Path]:
    """Host side, with `eval_only`: writes files about the evaluation into a folder and returns their paths."""
    del rows, metrics, folder
    return []

  def check_eval(self, step: int, metrics: dict[str, float]) -> None:
    """Host side, after each evaluation: may warn, or raise a UserError to stop the run."""
    del step, metrics

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Host side: name -> uint8 image [H, W, 3] that shows what the model does on one batch."""
    del variables, frozen, batch
    return {}

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    """The parameters of a checkpoint that replace fresh ones, by flat name. Default: the same tree of parameters.

    Raises:
      UserError: the checkpoint does not fit.
    """
    if pretrained.kind != self.kind:
      raise UserError(f"init_from: the checkpoint is a {pretrained.kind}, this run trains a {self.kind}")
    found, wanted = trees.flatten(pretrained.params), trees.flatten(shapes)

    def shape(tree: dict[str, Any], name: str) -> tuple[int, ...] | str:
      return tuple(tree[name].shape) if name in tree else "nothing"

    lines = [
      f"{name}: found {shape(found, name)}, expected {shape(wanted, name)}"
      for name in sorted(found.keys() | wanted.keys())
      if shape(found, name) != shape(wanted, name)
    ]
    if lines:
      raise UserError("init_from: the checkpoint does not fit the model:\n  " + "\n  ".join(lines))
    return found

  def load_start(self, path: str, *, ema: bool = False) -> Pretrained:
    """The checkpoint that a run starts from, for `adapt` and `adapt_collections`."""
    return weights_io.load(path, ema=ema)

  def adapt_collections(self, pretrained: Pretrained, params: PyTree, collections: Variables) -> Variables:
    """The collections of a run that starts from a checkpoint.

    Args:
      pretrained: the checkpoint.
      params: the run's parameters, those of the checkpoint among them.
      collections: fresh ones.
    """
    del pretrained, params
    return collections

  def check_source(self, source: Any) -> None:
    """Host side: looks at the data before the run begins, so that a mistake does not appear after hours.

    Raises:
      UserError: an example lacks what the objective needs, such as a label that is one of the classes.
    """
    if self.labels != "none":
      examples.check_first(source, self.reader())

  def load_params(self, path: str, shapes: PyTree) -> tuple[dict[str, Any], str]:
    """Loads every parameter for an evaluation; see `fit_params`."""
    return self.fit_params(self.load_start(path, ema=self.config.eval.ema), shapes)

  def fit_params(self, pretrained: Pretrained, shapes: PyTree) -> tuple[dict[str, Any], str]:
    """Takes every parameter for an evaluation from a checkpoint.

    Returns:
      (parameters by flat name, path of the checkpoint).

    Raises:
      UserError: not all of them are there.
    """
    path = str(pretrained.description.get("path"))
    stated = {"model.in_channels": len(pretrained.preprocessing["mean"])}
    stated["data.value_range"] = pretrained.preprocessing.get("value_range") or self.config.data.value_range
    ours = {"model.in_channels": self.channels, "data.value_range": self.config.data.value_range}
    for key, value in stated.items():
      if value != ours[key]:
        raise UserError(f"eval_only: {path} was trained with {key}={value!r}, this run has {ours[key]!r}")
    found = self.adapt(pretrained, shapes)
    missing = [name for name in trees.flatten(shapes) if name not in found]
    if missing:
      raise UserError(
        f"eval_only: {path} has no fitting {', '.join(missing)}; set the keys of `model` to the checkpoint's "
        f"(model.num_classes: the data has {self.source.num_classes} classes), or fine-tune first"
      )
    return found, path

  def load_collections(self, path: str) -> Variables:
    """Loads the Linen collections besides the parameters, from the checkpoint that `load_params` named."""
    del path
    return {}

  def augmented(self, views: dict[str, Array], batch: Batch, *, normalized: bool = False) -> dict[str, Array]:
    """Applies the augmentations on the device that the objective uses and the config switches on.

    Args:
      views: float32 [B, H, W, 3] each; all views of an example get the same augmentation.
      batch: the batch, for its `example_key`.
      normalized: whether the views are normalized pixels, for which other augmentations are made than for [0, 1].
    """
    return augment.augment_views(
      views,
      batch["example_key"],
      seed=self.config.seed,
      data=self.config.data,
      names=self.augmentations,
      normalized=normalized,
    )

  def image_preprocessing(self) -> dict[str, Any]:
    """`preprocessing` of a description, as the config's `data` section says."""
    return image_preprocessing(self.config.data, self.image_size)

  def _init_module(self, key: Array, size: tuple[int, int]) -> Variables:
    """Variables of `module` for images of `size`."""
    with user_errors_of_model():
      return self.module.init(key, jnp.zeros((1, *size, self.channels)))


def image_preprocessing(data: ConfigDict, image_size: tuple[int, int]) -> dict[str, Any]:
  """How images become input of a model: see `Pretrained.preprocessing`."""
  return dict(
    mean=tuple(data.mean),
    std=tuple(data.std),
    image_size=image_size,
    crop_pct=data.crop_pct,
    interpolation=data.interpolation,
    resize=data.resize,
    **value_range(data),
  )


def value_range(data: ConfigDict) -> dict[str, Any]:
  """The entry `value_range` of a preprocessing; only where the config sets it."""
  return {} if data.value_range is None else {"value_range": tuple(data.value_range)}


def _check_channels(config: ConfigDict) -> int:
  """The number of channels of the images.

  Raises:
    UserError: mean and standard deviation are those of another number of channels.
  """
  data, channels = config.data, config.model.in_channels
  for key in ("mean", "std"):
    if len(data[key]) != channels:
      raise UserError(
        f"config key 'data.{key}': {len(data[key])} numbers, but model.in_channels={channels}; give one "
        "number for each channel"
      )
  names = [name for name, augmentation in augment.AUGMENTATIONS.items() if augmentation.colors]
  color = {f"data.{key}": data[key] for key in (*names, "rand_augment")}
  color["segment.photometric"] = config.get("segment", {}).get("photometric")
  active = [key for key, value in color.items() if value]
  if channels != 3 and active:
    log.info("images of %d channels have no colors: %s not applied", channels, ", ".join(active))
  return channels


def with_common_arrays(
  shapes: Mapping[str, tuple[tuple[int, ...], Any]], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Adds the arrays that every batch has to an objective's own: name -> (shape of one example, dtype)."""
  common = {"example_key": ((2,), jnp.uint32), "valid": ((), jnp.bool_)}
  return {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    for name, (shape, dtype) in {**shapes, **common}.items()
  }


@contextlib.contextmanager
def user_errors_of_model() -> Iterator[None]:
  """Turns errors of building a module from the config's `model` section into UserErrors."""
  try:
    yield
  except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, FlaxError) as error:
    reason = f"{type(error).__name__}: {ranges.show(str(error))[1:-1]}"
    raise UserError(f"config section 'model': no model can be built from it ({reason})") from error


def check_size(shapes: PyTree) -> None:
  """Refuses a model that cannot fit in any memory.

  Raises:
    UserError: it has more than `MAX_PARAMETERS` parameters.
  """
  count = trees.num_params(shapes)
  if count > MAX_PARAMETERS:
    raise UserError(f"config section 'model': {count:,} parameters are more than {MAX_PARAMETERS:,}")


def module_fields(module: type, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
  """The fields of a Linen module with their defaults: the schema of a config section."""
  skip = {"parent", "name", *without}
  return {f.name: f.default for f in dataclasses.fields(module) if f.name not in skip}


def abstract_model(
  kind: str, module: nn.Module, image_size: tuple[int, int], preprocessing: dict[str, Any]
) -> Pretrained:
  """A model with shapes in place of parameters: see `Objective.expected_result`."""
  with user_errors_of_model():
    shapes = variable_shapes(module, image_size)
  params = shapes.pop("params")
  return Pretrained(kind, params, module, {**preprocessing, "image_size": image_size}, collections=shapes)


def field_values(module: nn.Module) -> dict[str, Any]:
  """The fields of a Linen module with their values, for `describe`."""
  return {name: getattr(module, name) for name in module_fields(type(module))}
