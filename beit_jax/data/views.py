"""Views of an image: crops of fixed sizes, for training and for evaluation."""

from typing import Any

import numpy as np
from PIL import Image

from beit_jax.data import images, randaugment, resize
from beit_jax.data.examples import HostBatch
from beit_jax.errors import UserError


class ViewReader:
  """Reads an example as pictures of fixed sizes, all of one box: what every objective but segmentation wants.

  Args:
    views: name -> ((H, W), interpolation).
    options: the config's `data` section (crop, crop_scale, crop_ratio, flip, rand_augment, mean, crop_pct, resize).

  Raises:
    UserError: a rand_augment that is not understood, or one with more than one view, which would then differ.
  """

  def __init__(self, views: images.ViewSizes, options: dict[str, Any]):
    self._views, self._options = views, options
    known = {"resize": images.RESIZES, "crop": images.CROPS}
    checked = [(key, options[key], names) for key, names in known.items()]
    checked += [(f"interpolation of {name}", how, tuple(images.RESAMPLE)) for name, (_, how) in views.items()]
    for key, value, names in checked:
      if value not in names:
        raise UserError(f"config key 'data.{key}': {value!r} is unknown; there are {', '.join(names)}")
    if not 0 < options["crop_pct"] <= 1:
      raise UserError(f"config key 'data.crop_pct': {options['crop_pct']} must lie in (0, 1]")
    resize.check()
    if options["rand_augment"]:
      randaugment.parse(options["rand_augment"])
      if len(views) > 1:
        raise UserError(
          "config key 'data.rand_augment': the views of an example would no longer show the same; it is for fine-tuning"
        )

  def train(self, image: images.LazyImage, example: dict[str, Any], key: tuple[int, ...]) -> HostBatch:
    """`key`, (seed, epoch, index of the row), is all the randomness there is.

    Raises:
      BadImage: the picture turns out to be damaged.
    """
    o = self._options
    rng = np.random.default_rng((*key, 2))
    options = dict(crop=o["crop"], scale=o["crop_scale"], ratio=o["crop_ratio"], flip=o["flip"])
    views = images.train_views(image, rng, self._views, scaled=o.get("scaled_decode", False), **options)
    if o["rand_augment"]:
      rng, fill = np.random.default_rng((*key, 3)), randaugment.fill_colour(o["mean"])
      augment = lambda view: randaugment.rand_augment(Image.fromarray(view), rng, o["rand_augment"], fill)  # noqa: E731
      views = {name: np.asarray(augment(view)) for name, view in views.items()}
    return {**views, **self._label(example)}

  def eval(self, image: images.LazyImage, example: dict[str, Any]) -> HostBatch:
    o = self._options
    views = images.eval_views(image, self._views, crop_pct=o["crop_pct"], resize=o["resize"])
    return {**views, **self._label(example)}

  def _label(self, example):
    if "label" not in example:
      return {}
    label = np.asarray(example["label"])  # a class, or 0 and 1 for every class (multi-label, float32)
    return {"label": label if label.ndim else label.astype(np.int32)}
