"""Prepares pixels on the device: uint8 to float, augmentation of single images, normalization, mixup and cutmix.

The random key of an augmentation is a function of the example. Only mixup and cutmix, which combine rows of a batch,
use the key of the step.

To add an augmentation, write a function `(keys, views, strength) -> views`, give it a line in `AUGMENTATIONS` and a
number in `PURPOSES`, and add a key of the same name to the config's `data` section (`config/defaults.py`, with 0 = off)
and to `config/ranges.py`. Objectives, token caches and warnings follow the table.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's convert("L")
# Uses of an example's random numbers. Give a new one a new number; the existing numbers define the results of runs.
PURPOSES = {
  "mask": 0,
  "color_jitter": 1,
  "random_erasing": 2,
  "crop_color_jitter": 3,
  "crop_grayscale": 4,
  "crop_gaussian_blur": 5,
  "crop_solarize": 6,
}


def example_keys(seed: int, example_key: Array, purpose: str) -> Array:
  """Makes one random key per example, a function of (seed, epoch, index, purpose).

  Args:
    seed: of the run.
    example_key: uint32 [B, 2], (epoch, index).
    purpose: a name in `PURPOSES`.

  Returns:
    Keys [B].
  """
  root = jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])
  return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1]))(example_key)


def to_float(image: Array) -> Array:
  """Converts uint8 to float32 in [0, 1]."""
  return image.astype(jnp.float32) / 255.0


def normalize(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """Computes (image - mean) / std per channel."""
  return (image - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def color_jitter(keys: Array, views: list[Array], strength: float) -> list[Array]:
  """Changes brightness, contrast and saturation, each by a factor in [1 - s, 1 + s], in random order per example.

  Equal pixels of an example's views stay equal: the views share the factors, the order, and the mean gray that contrast
  needs, which is that of the first view. unilm applies torchvision's ColorJitter(0.4, 0.4, 0.4) before the crop, with
  the mean gray of the full image (docs/conflicts.md).

  Args:
    keys: [B] keys.
    views: float [B, H, W, 3] in [0, 1]; sizes may differ.
    strength: s.

  Returns:
    The views, clipped to [0, 1].
  """

  def jitter_example(key: Array, images: list[Array]) -> list[Array]:
    factor_key, order_key = jax.random.split(key)
    low = max(0.0, 1.0 - strength)
    factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=1.0 + strength)

    def apply(operation: Array, images: list[Array]) -> list[Array]:
      mean_gray = (images[0] @ GRAY).mean()

      def blend(image: Array) -> Array:
        gray = (image @ GRAY)[..., None]
        pivot = jnp.where(operation == 0, jnp.zeros(()), jnp.where(operation == 1, mean_gray, gray))
        return jnp.clip(pivot + factors[operation] * (image - pivot), 0.0, 1.0)

      return [blend(image) for image in images]

    order = jax.random.permutation(order_key, 3)
    for position in range(3):
      images = apply(order[position], images)
    return images

  return jax.vmap(jitter_example)(keys, views)


ERASE_AREA, ERASE_ASPECT, ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


def erase_box(key: Array, height: int, width: int) -> tuple[Array, Array, Array, Array]:
  """Draws the box of timm's RandomErasing: the first of ten that is strictly smaller than the image.

  The area is uniform between 2 % and a third of the image; the aspect ratio is log-uniform between 0.3 and 1/0.3.

  Returns:
    (top, left, height, width) of the box; height and width are 0 if no box fits.
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  share = jax.random.uniform(area_key, (ERASE_TRIES,), minval=ERASE_AREA[0], maxval=ERASE_AREA[1])
  area = height * width * share
  low, high = np.log(ERASE_ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASE_TRIES,), minval=low, maxval=high))
  h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits)
  h, w = (jnp.where(fits.any(), side[first], 0).astype(jnp.int32) for side in (h, w))
  place = jax.random.uniform(place_key, (2,))
  top = jnp.floor(place[0] * (height - h + 1)).astype(jnp.int32)
  left = jnp.floor(place[1] * (width - w + 1)).astype(jnp.int32)
  return top, left, h, w


def _inside(height: int, width: int, top: Array, bottom: Array, left: Array, right: Array) -> Array:
  """bool [height, width, 1]: whether a pixel lies inside a box."""
  y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
  return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def random_erasing(keys: Array, image: Array, probability: float) -> Array:
  """Replaces one box of an image by noise, N(0, 1) per value, with `probability`.

  Args:
    keys: [B] keys.
    image: [B, H, W, 3], normalized.
    probability: in [0, 1].
  """

  def erase_example(key: Array, image: Array) -> Array:
    happens_key, box_key, noise_key = jax.random.split(key, 3)
    height, width, _ = image.shape
    top, left, h, w = erase_box(box_key, height, width)
    erased = _inside(height, width, top, top + h, left, left + w)
    erased &= jax.random.uniform(happens_key) < probability
    return jnp.where(erased, jax.random.normal(noise_key, image.shape, image.dtype), image)

  return jax.vmap(erase_example)(keys, image)


class Augmentation(NamedTuple):
  """An augmentation of single images on the device.

  Attributes:
    apply: (keys [B], views, strength) -> views; a view is float32 [B, H, W, 3].
    normalized: whether it is applied to normalized pixels instead of pixels in [0, 1].
    colors: whether it needs RGB; other images are left as they are.
    replaced_by_rand_augment: whether it is off if `data.rand_augment` is set, as in timm.
  """

  apply: Callable[[Array, list[Array], float], list[Array]]
  normalized: bool = False
  colors: bool = False
  replaced_by_rand_augment: bool = False


# Key of the config's `data` section that holds the strength (0 = off) -> augmentation, in the order of application.
AUGMENTATIONS = {
  "color_jitter": Augmentation(color_jitter, colors=True, replaced_by_rand_augment=True),
  "random_erasing": Augmentation(
    lambda keys, views, probability: [random_erasing(keys, view, probability) for view in views],
    normalized=True,
  ),
}
# Those of pixels in [0, 1]: the only ones that suit objectives whose targets are pixels or visual tokens.
ON_PIXELS = tuple(name for name, augmentation in AUGMENTATIONS.items() if not augmentation.normalized)


def augment_views(
  views: dict[str, Array],
  example_key: Array,
  *,
  seed: int,
  data: Mapping[str, Any],
  names: Iterable[str],
  normalized: bool = False,
) -> dict[str, Array]:
  """Applies the augmentations that the config's `data` section switches on.

  Args:
    views: float32 [B, H, W, 3] each; all views of an example get the same augmentation.
    example_key: uint32 [B, 2], (epoch, index).
    seed: of the run.
    data: the `data` section.
    names: which of `AUGMENTATIONS` to use.
    normalized: whether the views are normalized; augmentations for which `normalized` differs are skipped.

  Returns:
    The views, with the same names.
  """
  for name, augmentation in AUGMENTATIONS.items():
    is_replaced = augmentation.replaced_by_rand_augment and data.get("rand_augment")
    if augmentation.colors and any(view.shape[-1] != 3 for view in views.values()):
      continue
    if name in names and data[name] and augmentation.normalized == normalized and not is_replaced:
      keys = example_keys(seed, example_key, name)
      views = dict(zip(views, augmentation.apply(keys, list(views.values()), data[name]), strict=True))
  return views


# Augmentations of crops that are drawn for each crop on its own, as DINO's. A function of one key and one image, float
# [H, W, C] in [0, 1], gives the image again.

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue (facebookresearch/dino main_dino.py)
BLUR_STD = (0.1, 2.0)  # pixels
BLUR_RADIUS = 8


def shift_hue(image: Array, shift: Array) -> Array:
  """Adds a shift, in turns of the color wheel, to the hue of HSV.

  Args:
    image: [..., 3] in [0, 1].
    shift: scalar.
  """
  value, low = image.max(-1), image.min(-1)
  chroma = value - low
  red, green, blue = jnp.moveaxis(image, -1, 0)
  safe = jnp.where(chroma > 0, chroma, 1.0)
  sector = jnp.where(
    value == red,
    (green - blue) / safe,
    jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
  )
  hue = 6.0 * shift + sector
  # Each channel falls from `value` to `low` with the distance of its own hue from that of the pixel.
  steps = (hue[..., None] + jnp.array([5.0, 3.0, 1.0])) % 6.0
  return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(steps, 4.0 - steps), 0.0, 1.0)


def crop_color_jitter(key: Array, image: Array) -> Array:
  """Changes brightness, contrast, saturation and hue by up to `JITTER`, in random order (torchvision's ColorJitter)."""
  factor_key, hue_key, order_key = jax.random.split(key, 3)
  spread = jnp.array(JITTER[:3])
  factors = 1.0 + spread * jax.random.uniform(factor_key, (3,), minval=-1.0)
  shift = jax.random.uniform(hue_key, minval=-JITTER[3], maxval=JITTER[3])

  def apply(operation: Array, image: Array) -> Array:
    gray = (image @ GRAY)[..., None]
    pivot = jnp.where(operation == 0, 0.0, jnp.where(operation == 1, gray.mean(), gray))
    blended = jnp.clip(pivot + factors[jnp.minimum(operation, 2)] * (image - pivot), 0.0, 1.0)
    return jnp.where(operation == 3, shift_hue(image, shift), blended)

  order = jax.random.permutation(order_key, 4)
  for position in range(4):
    image = apply(order[position], image)
  return image


def crop_grayscale(key: Array, image: Array) -> Array:
  """The luminance in all channels."""
  del key
  return jnp.broadcast_to((image @ GRAY)[..., None], image.shape)


def blur_matrix(size: int, std: Array) -> Array:
  """Weights [size, size] of a Gaussian along one axis, cut off at `BLUR_RADIUS`; border pixels are repeated."""
  position = np.arange(-BLUR_RADIUS, size + BLUR_RADIUS)
  inside = np.clip(position, 0, size - 1)[:, None] == np.arange(size)
  distance = position - np.arange(size)[:, None]
  weights = jnp.where(np.abs(distance) <= BLUR_RADIUS, jnp.exp(-0.5 * jnp.square(distance / std)), 0.0)
  return (weights / weights.sum(1, keepdims=True)) @ inside.astype(np.float32)


def crop_gaussian_blur(key: Array, image: Array) -> Array:
  """Convolution with a Gaussian whose standard deviation is uniform in `BLUR_STD`.

  Pillow's filter, which the reference calls, approximates it by three box filters.
  """
  std = jax.random.uniform(key, minval=BLUR_STD[0], maxval=BLUR_STD[1])
  rows, columns = (blur_matrix(size, std) for size in image.shape[:2])
  return jnp.einsum("yi,xj,ijc->yxc", rows, columns, image)


def crop_solarize(key: Array, image: Array) -> Array:
  """Inverts the values from 0.5 on, which are 128 to 255 of uint8."""
  del key
  return jnp.where(image >= 0.5, 1.0 - image, image)


class CropAugmentation(NamedTuple):
  """An augmentation of one crop: (key, image) -> image, and whether it needs RGB."""

  apply: Callable[[Array, Array], Array]
  colors: bool = False


# Key of the config's `augment` section, which holds probabilities -> augmentation, in the order of application.
CROP_AUGMENTATIONS = {
  "color_jitter": CropAugmentation(crop_color_jitter, colors=True),
  "grayscale": CropAugmentation(crop_grayscale, colors=True),
  "gaussian_blur": CropAugmentation(crop_gaussian_blur),
  "solarize": CropAugmentation(crop_solarize),
}


def augment_crops(
  crops: Array,
  example_key: Array,
  *,
  seed: int,
  first: int,
  probabilities: Mapping[str, tuple[float, ...]],
) -> Array:
  """Augments every crop on its own: all randomness is a function of (seed, epoch, index, number of the crop).

  Args:
    crops: float32 [B, V, H, W, C] in [0, 1].
    example_key: uint32 [B, 2], (epoch, index).
    seed: of the run.
    first: number of the first of these crops among all of an example.
    probabilities: key of `CROP_AUGMENTATIONS` -> the probability for each of the V crops.

  Returns:
    The crops, in [0, 1].
  """
  batch, count = crops.shape[:2]
  images = crops.reshape(-1, *crops.shape[2:])
  numbers = jnp.arange(first, first + count)
  for name, augmentation in CROP_AUGMENTATIONS.items():
    if not any(probabilities[name]) or (augmentation.colors and crops.shape[-1] != 3):
      continue
    keys = example_keys(seed, example_key, f"crop_{name}")
    keys = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers))(keys).reshape(-1)
    chance = jnp.tile(jnp.asarray(probabilities[name], jnp.float32), batch)

    def augment(key: Array, image: Array, chance: Array, apply: Any = augmentation.apply) -> Array:
      happens_key, key = jax.random.split(key)
      return jnp.where(jax.random.uniform(happens_key) < chance, apply(key, image), image)

    images = jax.vmap(augment)(keys, images, chance)
  return images.reshape(crops.shape)


def cutmix_box(
  center: tuple[Array, Array], lam: Array, height: int, width: int
) -> tuple[Array, Array, Array, Array]:
  """Returns a box of about 1 - lam of the image's area, clipped at the border.

  Args:
    center: (y, x) of the box before clipping.
    lam: scalar in [0, 1].
    height: of the image.
    width: of the image.

  Returns:
    (top, bottom, left, right), ends exclusive.
  """
  edges = []
  for middle, size in zip(center, (height, width), strict=True):
    side = jnp.floor(size * jnp.sqrt(1.0 - lam)).astype(jnp.int32)
    edges += [jnp.clip(middle - side // 2, 0, size), jnp.clip(middle + (side + 1) // 2, 0, size)]
  top, bottom, left, right = edges
  return top, bottom, left, right


def mix(
  image: Array, target: Array, lam: Array, box: tuple[Array, Array, Array, Array] | None
) -> tuple[Array, Array]:
  """Mixes row i of the batch with row B - 1 - i: blends them (mixup), or copies a box of the other image (cutmix).

  Args:
    image: [B, H, W, 3].
    target: [B, C], already smoothed.
    lam: scalar, the weight of the row's own image in mixup.
    box: the box of cutmix (see `cutmix_box`), or None for mixup. The weight is then 1 - its share of the area.

  Returns:
    (image, target), mixed with the same weight.
  """
  other = image[::-1]
  if box is None:
    mixed = lam * image + (1.0 - lam) * other
  else:
    top, bottom, left, right = box
    height, width = image.shape[1:3]
    mixed = jnp.where(_inside(height, width, top, bottom, left, right), other, image)
    lam = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
  return mixed, lam * target + (1.0 - lam) * target[::-1]


def random_mix(
  key: Array,
  image: Array,
  target: Array,
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  prob: float,
  switch_prob: float,
) -> tuple[Array, Array]:
  """Applies mixup or cutmix to a batch with one lam ~ Beta(alpha, alpha), as timm's Mixup does in batch mode.

  Args:
    key: of the step.
    image: [B, H, W, 3].
    target: [B, C], already smoothed.
    mixup_alpha: 0 turns mixup off.
    cutmix_alpha: 0 turns cutmix off.
    prob: probability that the batch is mixed.
    switch_prob: probability of cutmix rather than mixup, if both are on.

  Returns:
    (image, target).
  """
  happens_key, switch_key, lam_key, center_key = jax.random.split(key, 4)
  happens = jax.random.uniform(happens_key) < prob
  choose_cutmix = jax.random.uniform(switch_key) < switch_prob if mixup_alpha else jnp.ones((), bool)
  choose_cutmix &= cutmix_alpha > 0
  alpha = jnp.where(choose_cutmix, cutmix_alpha, mixup_alpha)
  lam = jnp.where(happens, jax.random.beta(lam_key, alpha, alpha), 1.0)
  height, width = image.shape[1:3]
  y_key, x_key = jax.random.split(center_key)
  center = jax.random.randint(y_key, (), 0, height), jax.random.randint(x_key, (), 0, width)
  cut_image, cut_target = mix(image, target, lam, cutmix_box(center, lam, height, width))
  blended_image, blended_target = mix(image, target, lam, None)
  return (
    jnp.where(choose_cutmix, cut_image, blended_image),
    jnp.where(choose_cutmix, cut_target, blended_target),
  )
