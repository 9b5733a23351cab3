"""Makes views of an image: crops of fixed sizes, for training and for evaluation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from beit_jax.data import images, randaugment, resize
from beit_jax.data.examples import HostBatch
from beit_jax.data.labels import check_label
from beit_jax.data.sources import Example
from beit_jax.errors import UserError


class ViewReader:
  """Makes views of one box of an image: the reader of all objectives but segmentation (see `examples.Reader`).

  Args:
    views: name -> ((H, W), interpolation).
    options: the config's `data` section.
    num_classes: if given, every example must have a label, which is checked; see `labels.check_label`.
    multi_label: whether that is a vector of 0 and 1.

  Raises:
    UserError: an option is invalid, or `rand_augment` is set although there are several views, which would then differ.
  """

  def __init__(
    self,
    views: images.ViewSizes,
    options: dict[str, Any],
    num_classes: int | None = None,
    multi_label: bool = False,
  ):
    self._views, self._options = views, options
    self._num_classes, self._multi_label = num_classes, multi_label
    choices = [("resize", options["resize"], images.RESIZES), ("crop", options["crop"], images.CROPS)]
    choices += [(f"interpolation of {name}", how, tuple(resize.RESAMPLE)) for name, (_, how) in views.items()]
    for key, value, names in choices:
      if value not in names:
        raise UserError(f"config key 'data.{key}': {value!r} is unknown; there are {', '.join(names)}")
    if not 0 < options["crop_pct"] <= 1:
      raise UserError(f"config key 'data.crop_pct': {options['crop_pct']} must lie in (0, 1]")
    resize.check()
    if options["rand_augment"]:
      randaugment.parse(options["rand_augment"])
      if len(views) > 1:
        raise UserError(
          "config key 'data.rand_augment': only for fine-tuning; it would make the views of an example differ"
        )

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    o = self._options
    rng = np.random.default_rng((*key, 2))
    options = dict(crop=o["crop"], scale=o["crop_scale"], ratio=o["crop_ratio"], flip=o["flip"])
    views = images.train_views(image, rng, self._views, scaled=o["scaled_decode"], **options)
    if o["rand_augment"] and all(view.shape[2] == 3 for view in views.values()):
      rng, fill = np.random.default_rng((*key, 3)), randaugment.fill_color(o["mean"])
      views = {
        name: np.asarray(randaugment.rand_augment(Image.fromarray(view), rng, o["rand_augment"], fill))
        for name, view in views.items()
      }
    return {**views, **self._label(example, key[-1])}

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    o = self._options
    views = images.eval_views(image, self._views, crop_pct=o["crop_pct"], resize=o["resize"])
    return {**views, **self._label(example, 0)}

  def _label(self, example: Example, index: int) -> HostBatch:
    if self._num_classes is not None:
      index = example.get("index", index)
      return {"label": check_label(example, self._num_classes, self._multi_label, index)}
    if "label" not in example:
      return {}
    found = example["label"]
    label = np.asarray(
      -1 if found is None else found
    )  # a class id; with several labels a float32 vector of 0 and 1
    return {"label": label if label.ndim else label.astype(np.int32)}


class Crops(NamedTuple):
  """Crops of one size: how many, their (height, width), and their areas as fractions of the image."""

  number: int
  size: tuple[int, int]
  scale: tuple[float, float]


class MultiCropReader:
  """Makes arrays of crops of an image; each crop has its own box and flip.

  Crops for evaluation are random too, but a function of the example alone. The image is decoded once and at its full
  resolution, whatever `scaled_decode` says.

  Args:
    crops: name of the array -> its crops. Their order is that of the random numbers.
    options: the config's `data` section.

  Raises:
    UserError: an option is of no use here.
  """

  def __init__(self, crops: Mapping[str, Crops], options: dict[str, Any]):
    self._crops, self._options = dict(crops), options
    for key, needed in (("crop", "random_resized"), ("rand_augment", "")):
      if options[key] != needed:
        raise UserError(
          f"config key 'data.{key}': {options[key]!r}, but with several crops of an image it must be {needed!r}"
        )
    if options["interpolation"] not in resize.RESAMPLE:
      raise UserError(
        f"config key 'data.interpolation': {options['interpolation']!r} is unknown; there are "
        + ", ".join(resize.RESAMPLE)
      )
    resize.check()

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    del example
    o, rng = self._options, np.random.default_rng((*key, 2))
    decoded = image.decoded()

    def crop(crops: Crops) -> np.ndarray:
      views = {"crop": (crops.size, o["interpolation"])}
      options = dict(crop="random_resized", scale=crops.scale, ratio=o["crop_ratio"], flip=o["flip"])
      return images.train_views(decoded, rng, views, **options)["crop"]

    return {name: np.stack([crop(crops) for _ in range(crops.number)]) for name, crops in self._crops.items()}

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    return self.train(image, example, (0, 0, example.get("index", 0)))
