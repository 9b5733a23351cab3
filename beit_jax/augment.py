"""Pixels on the device: uint8 -> float, colour jitter, normalisation, random erasing, mixup and cutmix.

Keys come from the example, not the step; only mixup and cutmix, which pair the rows of a batch, take the step's.
"""

import jax
import jax.numpy as jnp
import numpy as np

PURPOSES = {"mask": 0, "jitter": 1, "erase": 2}
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's convert("L")


def example_keys(seed: int, example_key: jax.Array, purpose: str) -> jax.Array:
  """One key per example, a function of (seed, epoch, index, purpose). example_key: uint32 [B, 2] -> keys [B]."""
  root = jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])
  return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1]))(example_key)


def to_float(image: jax.Array) -> jax.Array:
  """uint8 -> float32 in [0, 1]."""
  return image.astype(jnp.float32) / 255.0


def normalize(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """[0, 1] -> (x - mean) / std, per channel."""
  return (image - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def color_jitter(keys: jax.Array, views: list[jax.Array], strength: float) -> list[jax.Array]:
  """Brightness, contrast and saturation, each by a factor in [1 - s, 1 + s], in random order per example.

  All views of an example get the same function of a pixel: the factors, the order and the mean grey that
  contrast turns around are those of the first view. (unilm: torchvision ColorJitter(0.4, 0.4, 0.4); there it
  is applied before the crop, so its mean grey is the whole image's: docs/conflicts.md.)

  Args:
    keys: [B] keys.
    views: float [B, H, W, 3] in [0, 1]; sizes may differ.
  """

  def one(key, images):
    factor_key, order_key = jax.random.split(key)
    low = max(0.0, 1.0 - strength)
    factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=1.0 + strength)

    def apply(which, images):
      grey = (images[0] @ GREY).mean()
      pivots = [(jnp.zeros(()), grey, (image @ GREY)[..., None]) for image in images]

      def blend(image, pivot):
        pivot = jnp.where(which == 0, pivot[0], jnp.where(which == 1, pivot[1], pivot[2]))
        return jnp.clip(pivot + factors[which] * (image - pivot), 0.0, 1.0)

      return [blend(image, pivot) for image, pivot in zip(images, pivots, strict=True)]

    order = jax.random.permutation(order_key, 3)
    for step in range(3):
      images = apply(order[step], images)
    return images

  return jax.vmap(one)(keys, views)


ERASE_AREA, ERASE_ASPECT, ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


def erase_box(key: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
  """(top, left, h, w) of the first of ten random boxes that fits strictly inside; h = w = 0 when none does.

  Area uniform in 2 % to a third of the image, aspect log-uniform in 0.3 to 1/0.3 (timm RandomErasing).
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  area = (
    height * width * jax.random.uniform(area_key, (ERASE_TRIES,), minval=ERASE_AREA[0], maxval=ERASE_AREA[1])
  )
  log_aspect = np.log(ERASE_ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASE_TRIES,), minval=log_aspect[0], maxval=log_aspect[1]))
  h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits)
  h, w = (jnp.where(fits.any(), side[first], 0).astype(jnp.int32) for side in (h, w))
  place = jax.random.uniform(place_key, (2,))
  top = jnp.floor(place[0] * (height - h + 1)).astype(jnp.int32)
  left = jnp.floor(place[1] * (width - w + 1)).astype(jnp.int32)
  return top, left, h, w


def random_erasing(keys: jax.Array, image: jax.Array, probability: float) -> jax.Array:
  """With `probability` one box of an image becomes noise, N(0, 1) per value; image [B, H, W, 3], normalised."""

  def one(key, image):
    happens_key, box_key, noise_key = jax.random.split(key, 3)
    top, left, h, w = erase_box(box_key, *image.shape[:2])
    y, x = jnp.arange(image.shape[0])[:, None, None], jnp.arange(image.shape[1])[None, :, None]
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    inside &= jax.random.uniform(happens_key) < probability
    return jnp.where(inside, jax.random.normal(noise_key, image.shape, image.dtype), image)

  return jax.vmap(one)(keys, image)


def cutmix_box(
  centre: tuple[jax.Array, jax.Array], lam: jax.Array, height: int, width: int
) -> tuple[jax.Array, ...]:
  """Rows top:bottom and columns left:right of a box with about 1 - lam of the area, cut off at the border."""
  edges = []
  for middle, size in zip(centre, (height, width), strict=True):
    side = jnp.floor(size * jnp.sqrt(1.0 - lam)).astype(jnp.int32)
    edges += [jnp.clip(middle - side // 2, 0, size), jnp.clip(middle + (side + 1) // 2, 0, size)]
  return tuple(edges)


def mix(image: jax.Array, target: jax.Array, lam: jax.Array, box: tuple[jax.Array, ...] | None) -> tuple:
  """Row i of the batch with row B - 1 - i: a blend (mixup), or a box of the other (cutmix).

  Args:
    image: [B, H, W, 3]; target: [B, C], smoothed already; lam: scalar, the share of the own image (mixup).
    box: (top, bottom, left, right); the share is then 1 - its area.

  Returns:
    (image, target), mixed alike.
  """
  other = image[::-1]
  if box is None:
    mixed = lam * image + (1.0 - lam) * other
  else:
    top, bottom, left, right = box
    height, width = image.shape[1:3]
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    mixed = jnp.where((y >= top) & (y < bottom) & (x >= left) & (x < right), other, image)
    lam = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
  return mixed, lam * target + (1.0 - lam) * target[::-1]


def random_mix(
  key: jax.Array, image: jax.Array, target: jax.Array, *,
  mixup_alpha: float, cutmix_alpha: float, prob: float, switch_prob: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Mixup or cutmix of a whole batch with one lam ~ Beta(alpha, alpha) (timm Mixup, batch mode).

  Args:
    mixup_alpha, cutmix_alpha: 0 turns one off; with both on, `switch_prob` is the chance of cutmix.
    prob: chance that the batch is mixed at all.
  """
  happens_key, switch_key, lam_key, centre_key = jax.random.split(key, 4)
  happens = jax.random.uniform(happens_key) < prob
  choose_cutmix = jax.random.uniform(switch_key) < switch_prob if mixup_alpha else jnp.ones((), bool)
  choose_cutmix &= cutmix_alpha > 0
  alpha = jnp.where(choose_cutmix, cutmix_alpha, mixup_alpha)
  lam = jnp.where(happens, jax.random.beta(lam_key, alpha, alpha), 1.0)
  height, width = image.shape[1:3]
  y_key, x_key = jax.random.split(centre_key)
  centre = jax.random.randint(y_key, (), 0, height), jax.random.randint(x_key, (), 0, width)
  cut = mix(image, target, lam, cutmix_box(centre, lam, height, width))
  blended = mix(image, target, lam, None)
  return tuple(jnp.where(choose_cutmix, a, b) for a, b in zip(cut, blended, strict=True))
