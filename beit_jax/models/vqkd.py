"""The tokenizer of BEiT v2 (VQ-KD): image -> visual tokens -> features of a teacher, and as an option pixels.

Follows unilm `beit2/modeling_vqkd.py` and `beit2/norm_ema_quantizer.py`. The encoder and the decoders are `Beit`
modules. Their norm acts on every token for itself, so that `norm` is the reference's `fc_norm` of patch tokens. The two
task layers and the quantizer compute in float32 on every platform, so that an image has the same tokens
everywhere as far as the encoder's dtype allows it.

The codebook is the Linen collection `codebook`. Gradients do not change it: `update_codebook` does.
Shapes: B = batch size, h, w = token grid (image size / patch size), N = h * w, V = vocabulary size, C = code size,
D = width, F = size of the teacher's features.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beit_jax.models.beit import Beit
from beit_jax.models.layers import INITS

HIGHEST = jax.lax.Precision.HIGHEST
MEAN = STD = 0.5  # of the encoder's input: pixels in [0, 1] become [-1, 1]
KMEANS_ITERATIONS = 10

Codebook = dict[str, jax.Array]


def normalize(image: jax.Array) -> jax.Array:
  """Pixels in [0, 1] -> the encoder's input, in [-1, 1]."""
  return (image - MEAN) / STD


def l2_normalize(x: jax.Array) -> jax.Array:
  """x / max(|x|, 1e-12) along the last axis (torch.nn.functional.normalize)."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def distances(z: jax.Array, words: jax.Array) -> jax.Array:
  """Squared distances of normalized vectors [..., C] to the words [V, C]: [..., V]."""
  products = jnp.einsum("...c,vc->...v", z, words, precision=HIGHEST)
  return (z * z).sum(-1, keepdims=True) + (words * words).sum(-1) - 2 * products


def quantize(z: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Replaces vectors by the nearest words.

  Args:
    z: Normalized vectors float32 [..., C].
    words: [V, C].

  Returns:
    Indices int32 [...], and the words [..., C], whose gradient goes to `z` (straight through).
  """
  ids = distances(z, words).argmin(-1).astype(jnp.int32)
  return ids, z + jax.lax.stop_gradient(jnp.take(words, ids, 0) - z)


def commitment(z: jax.Array, codes: jax.Array) -> jax.Array:
  """Mean squared difference of vectors and their words, [..., C] each; its gradient goes to `z` only: [...]."""
  return ((jax.lax.stop_gradient(codes) - z) ** 2).mean(-1)


def code_sums(z: jax.Array, ids: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
  """What `update_codebook` needs of a batch; may be added over parts of it.

  Args:
    z: Normalized vectors [..., C].
    ids: Their words, int32 [...].
    vocab_size: V.

  Returns:
    Number of vectors of each word, float32 [V], and the sum of these vectors, [V, C].
  """
  one_hot = jax.nn.one_hot(ids.reshape(-1), vocab_size)
  vectors = z.reshape(len(one_hot), -1)
  return one_hot.sum(0), jnp.einsum("nv,nc->vc", one_hot, vectors, precision=HIGHEST)


def update_codebook(codebook: Codebook, counts: jax.Array, sums: jax.Array, decay: float) -> Codebook:
  """Moves each word towards the mean of its vectors, and keeps it on the unit sphere.

  Args:
    codebook: The collection `codebook`.
    counts: float32 [V]; see `code_sums`.
    sums: [V, C].
    decay: Of the moving averages. Words without a vector keep their direction.
  """
  words = codebook["weight"]
  means = l2_normalize(sums / jnp.maximum(counts, 1.0)[:, None])
  means = jnp.where(counts[:, None] > 0, means, words)
  return {
    **codebook,
    "weight": l2_normalize(decay * words + (1 - decay) * means),
    "cluster_size": decay * codebook["cluster_size"] + (1 - decay) * counts,
  }


def replace_unused(codebook: Codebook, below: float, key: jax.Array) -> Codebook:
  """Puts rarely used words beside frequent ones, which then share their vectors.

  The new place depends on the codebook and the key only, not on how the batch is spread over devices.

  Args:
    codebook: The collection `codebook`.
    below: Words are replaced whose `cluster_size` is less than this share of the mean.
    key: Of the choice among the other words, in proportion to their `cluster_size`, and of a small displacement.
  """
  words, size = codebook["weight"], codebook["cluster_size"]
  unused = size < below * size.mean()
  choice_key, noise_key = jax.random.split(key)
  chances = jnp.where(unused, -jnp.inf, jnp.log(jnp.maximum(size, 1e-30)))
  source = jax.random.categorical(choice_key, chances, shape=size.shape)
  noise = 0.1 * l2_normalize(jax.random.normal(noise_key, words.shape))
  moved = l2_normalize(words[source] + noise)
  return {
    **codebook,
    "weight": jnp.where(unused[:, None], moved, words),
    "cluster_size": jnp.where(unused, size.mean(), size),
  }


def kmeans(
  samples: jax.Array, centers: jax.Array, iterations: int = KMEANS_ITERATIONS
) -> tuple[jax.Array, jax.Array]:
  """Clusters unit vectors by their cosine.

  Args:
    samples: Normalized vectors [S, C].
    centers: The first centers [V, C]. A cluster that becomes empty keeps its center.
    iterations: Number of iterations, 1 or more.

  Returns:
    Centers [V, C], and the sizes of the clusters in the last assignment, float32 [V].
  """

  def iterate(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    centers, _ = state
    ids = jnp.einsum("sc,vc->sv", samples, centers, precision=HIGHEST).argmax(-1)
    counts, sums = code_sums(samples, ids, len(centers))
    means = l2_normalize(sums / jnp.maximum(counts, 1.0)[:, None])
    return jnp.where(counts[:, None] > 0, means, centers), counts

  return jax.lax.fori_loop(0, iterations, iterate, (centers, jnp.zeros(len(centers))))


def initial_codebook(codebook: Codebook, samples: jax.Array, key: jax.Array) -> Codebook:
  """The words as the centers of clusters of samples [S, C], normalized; a codebook that has words stays as it is."""

  def initialize() -> Codebook:
    vocab_size = len(codebook["weight"])
    enough = len(samples) >= vocab_size
    first = jax.random.choice(key, len(samples), (vocab_size,), replace=not enough)
    centers, counts = kmeans(samples, samples[first])
    initialized = jnp.ones_like(codebook["initialized"])
    return {**codebook, "weight": centers, "initial_cluster_size": counts, "initialized": initialized}

  return jax.lax.cond(codebook["initialized"][0] > 0, lambda: codebook, initialize)


class TaskLayer(nn.Module):
  """Linear, tanh, linear, in float32: [..., D] -> [..., features]."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    init: Any = INITS["finetune"]
    x = nn.Dense(x.shape[-1], precision=HIGHEST, kernel_init=init, name="fc1")(x)
    return nn.Dense(self.features, precision=HIGHEST, kernel_init=init, name="fc2")(nn.tanh(x))


class Vqkd(nn.Module):
  """Encoder, quantizer, decoder to the teacher's features, and a decoder to pixels if `pixel_depth` is set.

  The two decoders are `Beit` modules of the encoder's width on the grid of tokens, with patches of one token.
  """

  encoder: dict[str, Any]  # the fields of `Beit`
  vocab_size: int = 8192
  code_dim: int = 32
  decoder_depth: int = 3
  teacher_dim: int = 768  # of the teacher's features
  pixel_depth: int = 0  # blocks of the decoder to pixels; 0: none

  @property
  def stride(self) -> int:
    """Pixels per token, in each direction."""
    return self.encoder["patch_size"]

  @property
  def in_channels(self) -> int:
    """Channels of the images."""
    return self.encoder["in_channels"]

  @property
  def dtype(self) -> str:
    """Of products in the encoder and the decoders."""
    return self.encoder["dtype"]

  @property
  def residual_dtype(self) -> str:
    """Of the sums between their blocks."""
    return self.encoder["residual_dtype"]

  @property
  def grid_size(self) -> tuple[int, int]:
    """(h, w) in tokens."""
    height, width = self.encoder["image_size"]
    return height // self.stride, width // self.stride

  def with_dtype(self, dtype: str) -> "Vqkd":
    """The same tokenizer with the encoder's products in another dtype."""
    return self.clone(encoder={**self.encoder, "dtype": dtype})

  def setup(self) -> None:
    fields = {**self.encoder, "use_mask_token": False, "final_norm": True, "weight_init": "finetune"}
    on_tokens = {**fields, "image_size": self.grid_size, "patch_size": 1, "in_channels": self.code_dim}
    on_tokens["drop_path_rate"] = 0.0
    self.vit = Beit(**fields, name="encoder")
    self.encode_task_layer = TaskLayer(self.code_dim)
    self.decoder = Beit(**{**on_tokens, "depth": self.decoder_depth})
    self.decode_task_layer = TaskLayer(self.teacher_dim)
    if self.pixel_depth:
      self.pixel_decoder = Beit(**{**on_tokens, "depth": self.pixel_depth})
      self.pixel_head = TaskLayer(self.stride**2 * self.in_channels)
    self.words = self.variable("codebook", "weight", self._random_words)
    sizes = functools.partial(jnp.zeros, self.vocab_size)
    # Moving average of the number of vectors of each word; whether the words have been trained or clustered.
    self.variable("codebook", "cluster_size", sizes)
    self.variable("codebook", "initialized", jnp.zeros, 1)
    # When the words were made. Nothing reads these; unilm's files have them.
    self.variable("codebook", "initial_cluster_size", sizes)
    self.variable("codebook", "initial_weight", lambda: self.words.value)

  def _random_words(self) -> jax.Array:
    return l2_normalize(jax.random.normal(self.make_rng("params"), (self.vocab_size, self.code_dim)))

  def encode(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Images float32 [B, H, W, 3] in [-1, 1] -> what the quantizer gets, not normalized, float32 [B, N, C]."""
    return self.encode_task_layer(self.vit(x, train=train)[0][:, 1:])

  def logits(self, x: jax.Array) -> jax.Array:
    """Images float32 [B, H, W, 3] in [-1, 1] -> negative squared distances to the words, float32 [B, h, w, V]."""
    z = l2_normalize(self.encode(x))
    return -distances(z, self.words.value).reshape(len(x), *self.grid_size, -1)

  def tokenize(self, token_image: jax.Array) -> jax.Array:
    """Pixels in [0, 1], [B, H, W, 3] -> visual tokens int32 [B, N] in row-major order."""
    logits = self.logits(normalize(token_image))
    return logits.argmax(-1).astype(jnp.int32).reshape(len(logits), -1)

  def decode_features(self, codes: jax.Array) -> jax.Array:
    """Words float32 [B, N, C] -> the teacher's features, float32 [B, N, F]."""
    x, _ = self.decoder(codes.reshape(len(codes), *self.grid_size, -1))
    return self.decode_task_layer(x[:, 1:])

  def decode_pixels(self, codes: jax.Array) -> jax.Array:
    """Words float32 [B, N, C] -> pixels [B, H, W, 3] in [0, 1] up to the model's error, not clipped."""
    (h, w), p = self.grid_size, self.stride
    x, _ = self.pixel_decoder(codes.reshape(len(codes), h, w, -1))
    x = self.pixel_head(x[:, 1:]).reshape(len(codes), h, w, p, p, self.in_channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(codes), h * p, w * p, -1) * STD + MEAN

  def decode(self, ids: jax.Array, grid_size: tuple[int, int]) -> jax.Array:
    """Visual tokens int32 [B, N] -> image float32 [B, H, W, 3] in [0, 1].

    Raises:
      ValueError: There is no decoder to pixels, or the grid is not that of the model.
    """
    if not self.pixel_depth or tuple(grid_size) != self.grid_size:
      raise ValueError(f"no decoder to pixels (pixel_depth={self.pixel_depth}) on a grid of {grid_size}")
    return jnp.clip(self.decode_pixels(jnp.take(self.words.value, ids.reshape(len(ids), -1), 0)), 0, 1)

  def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
    """Runs encoder, quantizer and decoders.

    Args:
      x: Images float32 [B, H, W, 3] in [-1, 1].
      train: Turns on stochastic depth in the encoder, which draws from the "drop_path" rng.

    Returns:
      `z` [B, N, C], normalized; `ids` int32 [B, N]; `codes` [B, N, C], the words with a straight-through gradient;
      `features` [B, N, F]; and `pixels` [B, H, W, 3], whose gradient does not reach the codes, if there is a decoder.
    """
    z = l2_normalize(self.encode(x, train=train))
    ids, codes = quantize(z, self.words.value)
    out = {"z": z, "ids": ids, "codes": codes, "features": self.decode_features(codes)}
    if self.pixel_depth:
      out["pixels"] = self.decode_pixels(jax.lax.stop_gradient(codes))
    return out
