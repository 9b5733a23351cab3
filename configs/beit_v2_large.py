"""BEiT v2-L on ImageNet-1K: a tokenizer trained from CLIP (VQ-KD), then masked image modeling with patch aggregation.

    python -m beit_jax.main --config=configs/beit_v2_large.py --config.tokenizer.init_from=vqkd.pth

Variants: `1600` epochs (default) and `300`, as in configs/beit_v2_base.py.
Source: unilm beit2/PRETRAINING.md (LayerScale 1e-5, early block 21). Layer scan and rematerialization save memory and
do not change the result.
Expected: 87.3 % top-1 after 1600 epochs and 86.6 % after 300, with configs/finetune_imagenet.py (unilm beit2). Not run
here; its parameter count is tested.
"""

import beit_v2_base
from ml_collections import ConfigDict

VARIANTS = beit_v2_base.VARIANTS


def get_config(epochs="1600"):
  runs = beit_v2_base.stages("large", epochs, 21)
  runs["pretrain"]["model"].update(scan=True, remat=True)
  return ConfigDict(dict(stages=tuple(runs), **runs))
