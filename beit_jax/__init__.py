"""BEiT in JAX: tokenizer training, masked image modelling, fine-tuning."""

__version__ = "0.1.0"


def load(path, *, num_heads=None, image_size=None, step=None, ema=False, out_indices=None):
  """Loads a model with its weights; see `beit_jax.weights.io.load`."""
  from beit_jax.weights import io as weights_io

  options = dict(num_heads=num_heads, image_size=image_size, step=step, ema=ema, out_indices=out_indices)
  return weights_io.load(path, **options)


def save(pretrained, path, *, format):
  """Writes a model as "orbax", "unilm", "timm" or "hf"; see `beit_jax.weights.io.save`."""
  from beit_jax.weights import io as weights_io

  weights_io.save(pretrained, path, format=format)
