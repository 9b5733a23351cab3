"""BEiT in JAX: tokenizer training, masked image modelling, fine-tuning."""

__version__ = "0.1.0"


def load(path, *, num_heads=None, image_size=None, step=None, ema=False, out_indices=None):
  """Loads a model with its weights; see `beit_jax.convert.load`."""
  from beit_jax import convert  # here: `import beit_jax` alone costs nothing

  options = dict(num_heads=num_heads, image_size=image_size, step=step, ema=ema, out_indices=out_indices)
  return convert.load(path, **options)


def save(pretrained, path, *, format):
  """Writes a model as "orbax", "unilm", "timm" or "hf"; see `beit_jax.convert.save`."""
  from beit_jax import convert

  convert.save(pretrained, path, format=format)
