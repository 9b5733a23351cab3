"""DINO with a ViT-B/16 on ImageNet-1K: the strongest self-supervised baseline of BEiT's Table 1.

    python -m beit_jax.main --config=configs/dino_base.py --workdir=runs/dino_base
    python -m beit_jax.main --config=configs/dino_base.py --config.init_from=dino_vitbase16_pretrain_full_checkpoint.pth
    python -m beit_jax.main --config=configs/finetune_imagenet.py:base_dino --config.init_from=runs/dino_base

Variants: `published` (default) is the recipe of the released ViT-B/16, 400 epochs (BEiT paper, Table 10). Its other
values stand in `args.txt` beside the released weights, which was not at hand: those marked below are not verified.
`released` is the command of the reference's README, 100 epochs with the default of every flag, which was verified.
Source: Caron et al. (arXiv 2104.14294); facebookresearch/dino README.md and main_dino.py. Batches of 1,024 images.
Expected: 82.8 % top-1 after fine-tuning (BEiT paper, Table 1). Not run here at this size; built and traced in the
tests.
"""

import beit_base
from ml_collections import ConfigDict

VARIANTS = ("published", "released")


def get_config(variant="published"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {VARIANTS}")
  published = variant == "published"
  return ConfigDict(
    dict(
      objective="dino",
      batch_size=1024,
      total_epochs=400.0 if published else 100.0,
      model=dict(variant="base", preset="paper", drop_path_rate=0.1, dtype="bfloat16"),
      local=dict(
        count=10 if published else 8,  # not verified
        image_size=96,
        crop_scale=(0.05, 0.25) if published else (0.05, 0.4),  # not verified
      ),
      loss=dict(
        teacher_temperature=0.07 if published else 0.04,  # not verified
        warmup_teacher_temperature=0.04,
        temperature_warmup_epochs=50 if published else 0,  # not verified
        teacher_momentum=0.996,
        freeze_last_layer_epochs=3 if published else 1,  # not verified
      ),
      optimizer=dict(
        learning_rate=(0.00075 if published else 0.0005) * 1024 / 256,  # not verified
        min_lr=2e-6 if published else 1e-6,  # not verified
        warmup_epochs=10.0,
        weight_decay=0.04,
        weight_decay_end=0.4,
        decay=("cls_token$", "pos_embed$"),
        clip="tensor",
        clip_norm=0.3 if published else 3.0,  # not verified
      ),
      data=dict(
        source="tfds",
        name="imagenet2012",
        image_size=224,
        crop_scale=(0.25, 1.0) if published else (0.4, 1.0),  # not verified
        mean=beit_base.MEAN,
        std=beit_base.STD,
        workers=8,
        threads=8,
      ),
      eval=dict(split="validation", fraction=0.1, batch_size=512, every_steps=12_500),
      checkpoint=dict(every_steps=2500),
    )
  )
