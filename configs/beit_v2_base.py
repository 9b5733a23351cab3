"""BEiT v2-B on ImageNet-1K: a tokenizer trained from CLIP (VQ-KD), then masked image modeling with patch aggregation.

    python -m beit_jax.main --config=configs/beit_v2_base.py --config.tokenizer.teacher.init_from=clip-vit-base-patch16
    python -m beit_jax.main --config=configs/beit_v2_base.py --config.tokenizer.init_from=vqkd.pth   # a trained one

Patch aggregation adds a second loss: two blocks see the cls token of the last block and the patch tokens of an earlier
one, and predict the same tokens. These blocks are dropped when another run starts from the result.
Variants: `1600` epochs (default) and `300`, which has the smaller beta and no stochastic depth.
Source: BEiT v2 paper (arXiv 2208.06366); unilm beit2/PRETRAINING.md.
Expected: 85.5 % top-1 after 1600 epochs and 85.0 % after 300, with configs/finetune_imagenet.py (unilm beit2). Not run
here at this size; its parameter count, and its losses and gradients at a small size, are tested.
"""

import beit_base
import vqkd
from ml_collections import ConfigDict

VARIANTS = ("1600", "300")


def stages(variant: str, epochs: str, early_block: int) -> dict:
  """The tokenizer and the pre-training; everything that this does not set is as in BEiT."""
  if epochs not in VARIANTS:
    raise ValueError(f"variant {epochs!r} is unknown; there are {VARIANTS}")
  run, long = beit_base.pretrain(variant, "plus", 3.0), epochs == "1600"
  run["total_epochs"] = float(epochs)
  run["model"].update(early_block=early_block, head_blocks=2, drop_path_rate=0.1 if long else 0.0)
  run["optimizer"]["betas"] = (0.9, 0.999 if long else 0.98)
  run["data"].update(crop_scale=(0.2, 1.0), token_image_size=224, token_interpolation="bicubic")
  return dict(tokenizer=vqkd.get_config("clip").to_dict(), pretrain=run)


def get_config(epochs="1600"):
  runs = stages("base", epochs, 9)
  return ConfigDict(dict(stages=tuple(runs), **runs))
