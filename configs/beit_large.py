"""BEiT-L on ImageNet-1K: a tokenizer, then 800 epochs of masked image modeling.

    python -m beit_jax.main --config=configs/beit_large.py --config.mesh.fsdp=4 --workdir=runs/beit_large

Variants: `plus` (default) and `paper`, as in configs/beit_base.py.
Source: BEiT paper, Table 12 (clip 1.0); unilm beit/README.md (LayerScale 1e-5). Layer scan and rematerialization save
memory and do not change the result.
Expected: 85.2 % top-1 after fine-tuning (paper, Table 1). Not run here; its parameter count is tested.
"""

import beit_base
import dvae
from ml_collections import ConfigDict

VARIANTS = beit_base.VARIANTS


def get_config(preset="plus"):
  if preset not in VARIANTS:
    raise ValueError(f"variant {preset!r} is unknown; there are {VARIANTS}")
  pretrain = beit_base.pretrain("large", preset, 1.0)
  pretrain["model"].update(scan=True, remat=True)
  stages = dict(tokenizer=dvae.get_config().to_dict(), pretrain=pretrain)
  return ConfigDict(dict(stages=tuple(stages), **stages))
