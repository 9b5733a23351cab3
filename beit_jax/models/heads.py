"""Classification heads on frozen features."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def block_features(out: dict[str, jax.Array]) -> jax.Array:
  """Concatenates the cls token and the mean of the patch tokens after each block, as unilm's run_linear_eval.py.

  Args:
    out: Residual stream after each of L blocks, [B, 1 + N, D] each; the second output of `Beit`.

  Returns:
    float32 [L, B, 2D], not normalized.
  """
  tokens = [out[name].astype(jnp.float32) for name in sorted(out)]
  return jnp.stack([jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], -1) for x in tokens])


class LinearProbes(nn.Module):
  """One linear classifier per block: features [L, B, 2D] -> logits float32 [L, B, C], in float32 on every platform.

  Initial kernels are drawn from a normal distribution of standard deviation 0.01.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.01)
    heads = [
      nn.Dense(self.num_classes, precision="highest", kernel_init=init, name=f"head_{i:02d}")
      for i in range(len(features))
    ]
    return jnp.stack([head(x) for head, x in zip(heads, features, strict=True)])
