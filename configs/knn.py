"""k-NN on ImageNet-1K with the features of a frozen encoder; nothing is trained.

    python -m beit_jax.main --config=configs/knn.py --config.encoder.init_from=runs/beit_base/pretrain

The features of the training images stay on the device: 1.28 million x 1,536 x 4 bytes = 7.9 GB per block. So the
config uses one block, the 9th (the best one of base in the paper's Table 9; number 8 here, counted from 0).
Source: DINO eval_knn.py (k 20, temperature 0.07, cosine). Expected: nothing published for BEiT. Not run here; built
and traced in the tests. A small version that was run: configs/probe_cifar10.py.
"""

from beit_base import LABELED
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="knn",
      encoder=dict(init_from="runs/beit_base/pretrain"),
      model=dict(dtype="bfloat16"),
      knn=dict(k=20, temperature=0.07, blocks=(8,)),
      data=LABELED,
      eval=dict(split="validation", batch_size=512),
    )
  )
