"""Self-distillation without labels (DINO): the projection head, and a student with its teacher.

Follows facebookresearch/dino `vision_transformer.py` and `utils.MultiCropWrapper`.
Shapes: B = batch size, V = views of an image, D = width, K = outputs of the head.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beit_jax.models.beit import Beit
from beit_jax.models.constrain import constrain_batch
from beit_jax.models.layers import ACTIVATIONS, INITS, Dense, uniform_init
from beit_jax.models.resampling import bicubic_matrix

OFFSET = 0.1  # facebookresearch/dino resizes positions with a scale of (patches + 0.1) / patches of the table
HEAD_LAYERS = 3


def _unit(x: jax.Array, axis: int) -> jax.Array:
  """Vectors along an axis, divided by their length."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis, keepdims=True), 1e-24))


class UnitDense(nn.Module):
  """Products with the kernel's columns, each of length 1: float32 [..., D] -> [..., features].

  It is PyTorch's weight normalization with a gain that stays 1. The products are float32: a temperature of 0.04 makes
  an error of bfloat16 25 times as large.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", uniform_init(x.shape[-1]), (x.shape[-1], self.features))
    return jnp.matmul(x, _unit(kernel, 0), precision="highest")


class DinoHead(nn.Module):
  """Three layers with GELU, division by the length, and weight-normalized outputs: [..., D] -> float32 [..., K]."""

  outputs: int
  hidden: int
  bottleneck: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(HEAD_LAYERS):
      features = self.hidden if i < HEAD_LAYERS - 1 else self.bottleneck
      x = ACTIVATIONS["gelu"](x) if i else x
      x = Dense(features, INITS["finetune"], self.dtype, name=f"mlp_{i}")(x)
    return UnitDense(self.outputs, name="last_layer")(_unit(x.astype(jnp.float32), -1))


class Dino(nn.Module):
  """An encoder with a projection head, the student, and the collection "teacher".

  The collection holds `params`, of the same tree as the student's, and `center`, float32 [K]. They start as a copy of
  the student, and as zeros.
  """

  encoder: dict[str, Any]
  outputs: int = 65_536
  hidden: int = 2048
  bottleneck: int = 256

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """The student's outputs, float32 [B, K], for normalized images [B, H, W, C] of the encoder's size."""
    tokens, _ = Beit(**self.encoder, name="encoder")(image, train=train)
    head = DinoHead(**self._head_fields(), name="head")
    output = head(tokens[:, 0])
    if self.is_initializing():
      self.variable("teacher", "params", lambda: jax.tree.map(jnp.copy, dict(self.variables["params"])))
      self.variable("teacher", "center", jnp.zeros, (self.outputs,))
    return output

  def _head_fields(self) -> dict[str, Any]:
    dtype = jnp.dtype(self.encoder.get("dtype", Beit.dtype))
    return dict(outputs=self.outputs, hidden=self.hidden, bottleneck=self.bottleneck, dtype=dtype)

  @nn.nowrap
  def project(self, params: Any, crops: Sequence[jax.Array], key: jax.Array | None = None) -> jax.Array:
    """Outputs for several views of each image. Pure.

    Args:
      params: of the student or of the teacher.
      crops: normalized views [B, V, H, W, C]; those of one array have one size. The patch size divides it.
      key: of stochastic depth; None turns it off.

    Returns:
      float32 [B, sum of V, K], in the order of the views.
    """
    features = []
    for i, views in enumerate(crops):
      image = views.reshape(-1, *views.shape[2:])  # [B * V, H, W, C]: the rows of a device stay there
      fold = None if key is None else jax.random.fold_in(key, i)
      cls = encode(self.encoder, params["encoder"], image, fold)[:, 0]
      features.append(cls.reshape(*views.shape[:2], -1))
    head = DinoHead(**self._head_fields(), parent=None)
    x = constrain_batch(jnp.concatenate(features, 1))
    output: Any = head.apply({"params": params["head"]}, x)
    return constrain_batch(output)


def encode(fields: dict[str, Any], params: Any, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
  """Encodes images of another size than the encoder was built for, with interpolated positions.

  Args:
    fields: of `Beit`, with absolute positions only.
    params: of the encoder.
    image: normalized [B, H, W, C].
    key: of stochastic depth; None turns it off.

  Returns:
    Tokens [B, 1 + N, D], cls token first.
  """
  size = (image.shape[1], image.shape[2])
  encoder = Beit(**{**fields, "image_size": size}, parent=None)
  source = Beit(**fields, parent=None).grid_size
  params = {**params, "pos_embed": interpolate_positions(params["pos_embed"], source, encoder.grid_size)}
  rngs = {} if key is None else {"drop_path": key}
  output: Any = encoder.apply({"params": params}, image, train=key is not None, rngs=rngs)
  tokens: jax.Array = output[0]
  return tokens


def interpolate_positions(
  pos_embed: jax.Array, source: tuple[int, int], target: tuple[int, int]
) -> jax.Array:
  """Positions for another grid, as facebookresearch/dino's `interpolate_pos_encoding`; differentiable.

  Args:
    pos_embed: [1, 1 + h * w, D], the cls token first.
    source: (h, w) of the table.
    target: (h, w) of the result.
  """
  if source == target:
    return pos_embed
  rows, columns = (
    jnp.asarray(bicubic_matrix(*sides, OFFSET), pos_embed.dtype) for sides in zip(source, target, strict=True)
  )
  patches = pos_embed[0, 1:].reshape(*source, -1)
  patches = jnp.einsum("yi,xj,ijk->yxk", rows, columns, patches, precision="highest")
  return jnp.concatenate([pos_embed[:, :1], patches.reshape(1, target[0] * target[1], -1)], 1)
