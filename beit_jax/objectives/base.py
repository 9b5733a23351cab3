"""What an objective is: the only layer that knows model, mask and loss together.

Sums: every metric is a pair (sum, count), so that it can be added over microbatches, eval steps and processes and
divided last. The first of a training step is "loss"; its sum is what is differentiated.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from ml_collections import ConfigDict

from beit_jax import trees
from beit_jax.config import parse as config_lib
from beit_jax.config import ranges
from beit_jax.data.images import ViewSizes
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained

MAX_PARAMETERS = 2**35  # 128 GiB of float32: more is a slip of the pen
Sums = dict[str, tuple[jax.Array, jax.Array]]
Variables = dict[str, Any]


class Objective:
  """Base class; a subclass sets `kind`, builds `self.module` and fills in `views`, `loss`, `eval_step`.

  Args of the constructor:
    config: the run's complete config.
    source: the training data (for the number of classes).
    load: instead of `weights_io.load`, path of a frozen part -> `Pretrained`, whose parameters may be shapes.
  """

  kind: str
  eval_metrics: tuple[str, ...] = ("loss",)  # the names that an evaluation gives
  augmentations: tuple[str, ...] = ()  # of those on the device: "color_jitter", "random_erasing"
  trains = True  # otherwise there is nothing to optimise: the run is an evaluation

  def __init__(self, config: ConfigDict, source: Any, load: Callable[[str], Pretrained] | None = None):
    self.config, self.source = config, source
    self.load_frozen = load or weights_io.load
    data = config.data
    self.image_size = config_lib.pair(data.image_size, "data.image_size")
    self.token_image_size = config_lib.pair(data.token_image_size, "data.token_image_size")

  @classmethod
  def model_fields(cls) -> dict[str, Any]:
    """The keys of the config's `model` section with their defaults."""
    raise NotImplementedError

  @property
  def depth(self) -> int:
    """Blocks of the encoder, for layer-wise lr decay; 0 where there is none."""
    return 0

  def views(self) -> ViewSizes:
    """The pictures this objective wants of each example: name -> ((H, W), interpolation)."""
    raise NotImplementedError

  def reader(self) -> Any:
    """How examples become arrays: see `ViewReader`."""
    return ViewReader(self.views(), self.config.data.to_dict())

  def init(self, key: jax.Array) -> Variables:
    """Fresh Linen variables. Pure."""
    raise NotImplementedError

  def frozen_params(self, mesh: jax.sharding.Mesh) -> Any:
    """Host side: arrays that take part but are not trained; {} for none."""
    del mesh
    return {}

  def loss(self, variables: Variables, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> tuple:
    """Train mode, pure: (sum of the loss, (Sums, new collections)). `step` drives temperatures and weights."""
    raise NotImplementedError

  def eval_step(self, variables: Variables, frozen: Any, batch: Any) -> Sums:
    """Eval mode, pure; honours batch["valid"] (bool [B]).

    Under the name "rows" there may be a dict of arrays [B, ...], with `valid`: what cannot be added up. The valid
    rows of the whole set come back in `summarize_rows` and `report`, in the order of the data.
    """
    raise NotImplementedError

  # An objective whose images differ in size evaluates them itself: (variables, source, mesh) -> (metrics, rows).
  evaluate_images: Callable[[Variables, Any, Any], tuple[dict, dict]] | None = None

  def summarize(self, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Host side: the sums of a whole eval set -> metrics."""
    return {name: float(total / max(count, 1)) for name, (total, count) in sums.items()}

  def summarize_rows(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Host side: metrics that need every example at once."""
    del rows
    return {}

  def report(self, rows: dict[str, np.ndarray], metrics: dict[str, float], folder: Path) -> list[Path]:
    """Host side, `eval_only`: writes files about the evaluation to a folder and returns their paths."""
    del rows, metrics, folder
    return []

  def check_eval(self, step: int, metrics: dict[str, float]) -> None:
    """Host side, after each evaluation: may warn, or raise a UserError to stop the run."""

  def figures(self, variables: Variables, frozen: Any, batch: Any) -> dict[str, np.ndarray]:
    """Host side: name -> uint8 picture [H, W, 3] of what the model does on one batch."""
    return {}

  def adapt(self, pretrained: Pretrained, shapes: Any) -> dict[str, Any]:
    """Flat names and values out of a checkpoint that replace fresh parameters. Default: exactly the same tree."""
    if pretrained.kind != self.kind:
      raise UserError(f"init_from: the checkpoint is a {pretrained.kind}, this run trains a {self.kind}")
    found, wanted = trees.flatten(pretrained.params), trees.flatten(shapes)
    names = sorted(found.keys() | wanted.keys())
    shape = lambda tree, n: tuple(tree[n].shape) if n in tree else "nothing"  # noqa: E731
    lines = [
      f"{n}: found {shape(found, n)}, expected {shape(wanted, n)}"
      for n in names
      if shape(found, n) != shape(wanted, n)
    ]
    if lines:
      raise UserError("init_from: the checkpoint does not fit the model:\n  " + "\n  ".join(lines))
    return found

  def describe(self) -> dict[str, Any]:
    """What a checkpoint says of the model: kind, module fields, preprocessing."""
    raise NotImplementedError

  def image_preprocessing(self) -> dict[str, Any]:
    data = self.config.data
    return dict(
      mean=tuple(data.mean),
      std=tuple(data.std),
      image_size=self.image_size,
      crop_pct=data.crop_pct,
      interpolation=data.interpolation,
      resize=data.resize,
    )

  def load_params(self, path: str, shapes: Any) -> tuple[dict[str, Any], str]:
    """For evaluation: every parameter, flat, out of a checkpoint, and the checkpoint's path.

    Raises:
      UserError: not all of them are there.
    """
    pretrained = weights_io.load(path, ema=self.config.eval.ema)
    found = self.adapt(pretrained, shapes)
    missing = [name for name in trees.flatten(shapes) if name not in found]
    if missing:
      raise UserError(
        f"eval_only: {path} has no fitting {', '.join(missing)}; the data has {self.source.num_classes} classes, so "
        "set model.num_classes to the checkpoint's, or fine-tune first"
      )
    return found, str(pretrained.description.get("path"))

  def load_collections(self, path: str) -> Variables:
    """For evaluation: the Linen collections besides the parameters, out of the checkpoint that `load_params` named."""
    del path
    return {}


@contextlib.contextmanager
def building() -> Iterator[None]:
  """Around the initialisation of a module whose fields are the config's: what it raises becomes a UserError."""
  try:
    yield
  except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, FlaxError) as error:
    reason = f"{type(error).__name__}: {ranges.show(str(error))[1:-1]}"
    raise UserError(f"config section 'model': no model can be built as it says ({reason})") from error


def check_size(shapes: Any) -> None:
  """Refuses a tree of parameters that nobody has the memory for."""
  count = trees.num_params(shapes)
  if count > MAX_PARAMETERS:
    raise UserError(f"config section 'model': {count:,} parameters are more than {MAX_PARAMETERS:,}")


def module_fields(module: type, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
  """Linen dataclass fields with their defaults: the schema of a config section."""
  skip = {"parent", "name", *without}
  return {f.name: f.default for f in dataclasses.fields(module) if f.name not in skip}
