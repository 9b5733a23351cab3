"""Pixels on the device: uint8 -> float, colour jitter, normalisation. Keys come from the example, not the step."""

import jax
import jax.numpy as jnp
import numpy as np

PURPOSES = {"mask": 0, "jitter": 1}
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
