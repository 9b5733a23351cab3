"""Heads on frozen features."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def block_features(out: dict[str, jax.Array]) -> jax.Array:
  """The encoder's residual stream after each block -> concat(cls, mean of the patches): float32 [L, B, 2D].

  Not normalised (unilm run_linear_eval.py).
  """
  tokens = [out[name].astype(jnp.float32) for name in sorted(out)]
  return jnp.stack([jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], -1) for x in tokens])


class LinearProbes(nn.Module):
  """One linear classifier per block: features [L, B, 2D] -> logits float32 [L, B, C]. Kernels start at N(0, 0.01)."""

  num_classes: int

  @nn.compact
  def __call__(self, features):
    init = nn.initializers.normal(0.01)
    heads = [nn.Dense(self.num_classes, kernel_init=init, name=f"head_{i:02d}") for i in range(len(features))]
    return jnp.stack([head(x) for head, x in zip(heads, features, strict=True)])
