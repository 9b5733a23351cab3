"""BEiT in JAX: tokenizer training, masked image modeling, fine-tuning and segmentation.

`load` and `save` read and write models in every supported format. `python -m beit_jax.main` trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from beit_jax.weights.pretrained import Pretrained

__version__ = "0.1.0"


def load(
  path: str | Path,
  *,
  num_heads: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  step: int | None = None,
  ema: bool = False,
  out_indices: tuple[int, ...] | None = None,
  pool: str | None = None,
  activation: str | None = None,
) -> Pretrained:
  """Loads a model with its weights. The format is detected, and nothing in the file is executed.

  Args:
    path: one of
      - a run of `beit_jax.main`, one of its checkpoints, or a folder that `save` wrote,
      - a `.pth`, `.ckpt`, `.bin` or `.safetensors` file of unilm, OpenMMLab, timm and others (docs/weights.md has a
        table of the forms),
      - a model folder of timm or Hugging Face transformers,
      - OpenAI's `encoder.pkl`, or a folder with `encoder.pkl` and `decoder.pkl`.
      A run may lie in a bucket (`gs://...`).
    num_heads: number of attention heads, if a foreign file does not determine it.
    image_size: pixels, one number or (height, width), if a foreign file does not determine it.
    step: the checkpoint of a run; None: the newest one.
    ema: load the averaged weights, if both are kept.
    out_indices: the four blocks, counted from 0, that the decoder of a foreign segmentation model taps, instead of
      those that its file states. With `(3, 5, 7, 11)` a base model of transformers gets unilm's blocks
      (docs/weights.md).
    pool: what the head of a ViT's classifier sees, if its file does not say it: "cls", "mean" or another of
      `models.beit.POOLS`.
    activation: "gelu", "quick_gelu" or "gelu_tanh", if the file of a ViT does not say it.

  Returns:
    The model. `model(images)` prepares images (`preprocess`) and runs it (`forward`). `features`, `attention` and
    `attention_map` show what its blocks compute; `at` changes the image size; `tokenize` and `decode` are those of a
    tokenizer. `params`, `module` and `collections` are the Flax parts; `preprocessing` and `description` are what
    the checkpoint says of itself. `help(type(model))` has all of it.

  Raises:
    UserError: there is nothing usable at `path`; the file contradicts an argument; or tensors are missing, unexpected
      or mis-shaped, all of which are listed.

  Example:
    >>> model = beit_jax.load("beit_base_patch16_224_pt22k_ft22kto1k.pth")
    >>> logits = model(images)  # uint8 [B, H, W, 3], any size
    >>> tokens = model.features(images, blocks=-1)  # [B, 1 + N, D]
    >>> print(model)  # what it is, what it takes, where it comes from
  """
  from beit_jax.weights import io as weights_io

  return weights_io.load(
    path,
    num_heads=num_heads,
    image_size=image_size,
    step=step,
    ema=ema,
    out_indices=out_indices,
    pool=pool,
    activation=activation,
  )


def save(pretrained: Pretrained, path: str | Path, *, format: str) -> None:
  """Saves a model. The file or folder appears when it is complete.

  Args:
    pretrained: the model, as `load` returns it.
    path: must not exist. A folder for "orbax" and "hf". A file for "unilm" and "timm": in safetensors format if it ends
      in `.safetensors`, otherwise in PyTorch's format. For "timm", a name without a suffix is a folder that
      `timm.create_model("local-dir:...")` reads.
      "openmmlab" is always PyTorch's format.
    format: "orbax" (ours), "unilm", "timm", "hf" (Hugging Face transformers) or "openmmlab" (mmpretrain and
      mmsegmentation 1).

  Raises:
    UserError: the format has no such kind of model, `path` exists, or it cannot be written.
  """
  from beit_jax.weights import io as weights_io

  weights_io.save(pretrained, path, format=format)
