"""Losses, as sums and counts that are added over devices, microbatches and evaluation steps and divided last.

Logits are cast to float32 first. Shapes: B = batch size, M = masked patches, V = vocabulary size, C = classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def masked_cross_entropy(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
  """Cross-entropy of visual tokens at masked positions (BEiT paper, section 2.3; unilm engine_for_pretraining.py).

  Args:
    logits: [B, M, V].
    targets: int32 [B, M], visual tokens; an out-of-range token yields NaN.
    weight: [B, M], 1 for a masked patch, 0 for an unused slot.

  Returns:
    float32 scalars (sum of losses, number of correct predictions, sum of weights). The loss is the first divided by the
    last, so that every masked patch of the global batch has the same weight.
  """
  logits = logits.astype(jnp.float32)
  # A masked sum instead of a gather, whose gradient would be a scatter into the logits. Neither copies them.
  hit = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
  target = jnp.where(hit.any(-1), jnp.where(hit, logits, 0.0).sum(-1), jnp.nan)
  nll = jax.nn.logsumexp(logits, -1) - target  # [B, M]
  correct = (logits.argmax(-1) == targets).astype(jnp.float32)
  return (nll * weight).sum(), (correct * weight).sum(), weight.sum()


PIXEL_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"l1": jnp.abs, "l2": jnp.square}


def pixel_loss(
  predicted: jax.Array, targets: jax.Array, weight: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
  """Distance of predicted pixels, averaged over the values of a patch.

  Args:
    predicted: [B, M, P * P * C].
    targets: the same shape.
    weight: [B, M], 1 for a patch that counts.
    kind: a key of `PIXEL_LOSSES`.

  Returns:
    float32 scalars (sum over patches, sum of weights).
  """
  distance = PIXEL_LOSSES[kind](predicted.astype(jnp.float32) - targets.astype(jnp.float32))
  return (distance.mean(-1) * weight).sum(), weight.sum()


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
  """Smoothed one-hot labels: int [B] -> float32 [B, C], off value s/C and on value 1 - s + s/C (timm)."""
  one_hot = jax.nn.one_hot(labels, num_classes)
  return one_hot * (1.0 - smoothing) + smoothing / num_classes


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-sum(targets * log softmax(logits)) per example.

  Args:
    logits: [B, C].
    targets: [B, C], rows that sum to 1.

  Returns:
    float32 [B].
  """
  return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Binary cross-entropy for several labels per image, averaged over classes.

  Args:
    logits: [B, C].
    targets: [B, C], in [0, 1].
    smoothing: moves the targets towards 1/2.

  Returns:
    float32 [B].
  """
  logits = logits.astype(jnp.float32)
  targets = targets * (1.0 - smoothing) + 0.5 * smoothing
  return (jax.nn.softplus(logits) - targets * logits).mean(-1)


def logit_laplace(mean: jax.Array, log_scale: jax.Array, target: jax.Array) -> jax.Array:
  """Negative log-likelihood of the logit-Laplace distribution, elementwise (DALL-E paper, appendix A.3).

  density(x) = exp(-|logit(x) - mean| / b) / (2 b x (1 - x)), b = exp(log_scale), for x in (0, 1). For this reason
  `map_pixels` keeps pixels inside [0.1, 0.9].
  """
  distance = jnp.abs(jnp.log(target) - jnp.log1p(-target) - mean)
  return jnp.log(2.0 * target * (1.0 - target)) + log_scale + distance * jnp.exp(-log_scale)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
  """KL(softmax(logits) || uniform) over the last axis, in nats: float32 in [0, log V]."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return (jnp.exp(log_probs) * log_probs).sum(-1) + jnp.log(logits.shape[-1])


def segmentation_cross_entropy(
  logits: jax.Array, label: jax.Array, ignore: int = 255
) -> tuple[jax.Array, ...]:
  """Cross-entropy of pixels.

  Args:
    logits: [B, H, W, C], at the size of the label.
    label: integers [B, H, W]; an out-of-range label yields NaN.
    ignore: pixels with this label do not count.

  Returns:
    float32 scalars (sum of losses, number of valid pixels, number of correct predictions). The loss is the sum divided
    by the number of valid pixels; mmseg divides by the number of all pixels.
  """
  logits, label = logits.astype(jnp.float32), label.astype(jnp.int32)
  valid = label != ignore
  hit = label[..., None] == jnp.arange(logits.shape[-1])
  # A masked sum instead of a gather, whose gradient would be a scatter into the largest array of the step.
  target = jnp.where(hit.any(-1) | ~valid, jnp.where(hit, logits, 0.0).sum(-1), jnp.nan)
  nll = jnp.where(valid, jax.nn.logsumexp(logits, -1) - target, 0.0)
  correct = (logits.argmax(-1) == label) & valid
  return nll.sum(), valid.sum(dtype=jnp.float32), correct.sum(dtype=jnp.float32)


def self_distillation(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy between distributions of the teacher and of the student for different views (DINO).

  Args:
    student: logits [B, V, K]; the first views are those of the teacher.
    teacher: logits [B, G, K], centered and divided by its temperature.

  Returns:
    float32 [B]: the mean of the cross-entropies of all pairs of two different views, and the mean entropy of the
    teacher's distributions.

  References:
    facebookresearch/dino `main_dino.py` DINOLoss.
  """
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  target = jax.nn.softmax(teacher)
  # -sum(q * log softmax(s)) = logsumexp(s) - <q, s>, without a [B, G, V, K] array.
  product = jnp.einsum("bgk,bvk->bgv", target, student, precision="highest")
  pairs = jax.nn.logsumexp(student, -1)[:, None] - product
  views, of_both = student.shape[1], teacher.shape[1]
  other = 1.0 - jnp.eye(of_both, views)
  entropy = -(target * jax.nn.log_softmax(teacher)).sum(-1)
  return (pairs * other).sum((1, 2)) / other.sum(), entropy.mean(1)


def cosine_distance(x: jax.Array, y: jax.Array) -> jax.Array:
  """1 - the cosine of the angle between vectors [..., D], in float32: [...]."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  squares = jnp.maximum((x * x).sum(-1) * (y * y).sum(-1), 1e-24)
  return 1 - (x * y).sum(-1) * jax.lax.rsqrt(squares)
