"""Semantic segmentation of ADE20K with SETR-PUP: the paper's Table 3.

    python -m beit_jax.main --config=configs/setr_ade20k.py --config.data.root=ADEChallengeData2016 \
      --config.init_from=runs/beit_base/pretrain

Source: BEiT paper, Table 14 (learning rate 1e-3, 160,000 iterations of 16, layer decay 0.65, crops of 512); decoder
of mmseg's SETR-PUP. Absolute positions, no LayerScale (the paper's model). Expected mIoU: 45.6 after 800 epochs of
pre-training on ImageNet-1K, 47.7 with intermediate fine-tuning (paper, Table 3). Not run here; traced in the tests.
"""

from ml_collections import ConfigDict
from upernet_ade20k import data, segment


def get_config():
  return ConfigDict(
    dict(
      objective="segment",
      init_from="",
      batch_size=16,
      total_steps=160_000,
      model=dict(variant="base", preset="paper", head="setr_pup", drop_path_rate=0.1, dtype="bfloat16"),
      optimizer=dict(
        learning_rate=1e-3,
        min_lr=0.0,
        schedule="poly",
        power=1.0,
        warmup_steps=1500,
        weight_decay=0.05,
        layer_decay=0.65,
      ),
      data=data(512),
      segment=segment(512),
      eval=dict(split="validation", batch_size=16, every_steps=16_000),
      checkpoint=dict(every_steps=4000, best="mIoU"),
    )
  )
