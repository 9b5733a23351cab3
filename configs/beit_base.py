"""BEiT-B on ImageNet-1K: a tokenizer, then 800 epochs of masked image modeling.

    python -m beit_jax.main --config=configs/beit_base.py --workdir=runs/beit_base
    python -m beit_jax.main --config=configs/beit_base.py --config.tokenizer.init_from=runs/dvae/...  # own tokenizer
    python -m beit_jax.main --config=configs/beit_base.py:paper                                       # Table 1

Variants: `plus` (default) has a shared relative-position bias and LayerScale, as the model that unilm released;
`paper` has absolute positions and neither of these, as the model of the paper's Table 1.
Source: BEiT paper, Table 12; unilm beit/README.md. 500,000 steps of 2,048 images.
Expected: loss 6.30 and mim_acc 5.0 % at the end of 300 epochs with OpenAI's tokenizer (unilm#383), 83.2 % top-1 after
fine-tuning with configs/finetune_imagenet.py (paper, Table 1). An accuracy of a few percent is normal: the vocabulary
has 8,192 words, and many of them look alike. Run here: a few steps at full size on one CPU (docs/results.md).
"""

import dvae
from ml_collections import ConfigDict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # unilm --imagenet_default_mean_and_std
# ImageNet-1K for all configs that use labels
LABELED = dict(
  source="tfds",
  name="imagenet2012",
  num_classes=1000,
  image_size=224,
  mean=MEAN,
  std=STD,
  workers=8,
  threads=8,
)


def pretrain(variant: str, preset: str, clip_norm: float) -> dict:
  return dict(
    objective="beit",
    tokenizer=dict(init_from="stage:tokenizer", dtype="bfloat16"),
    batch_size=2048,
    total_epochs=800.0,
    model=dict(variant=variant, preset=preset, drop_path_rate=0.1, dtype="bfloat16"),
    mask=dict(kind="block", num_masked=75, min_block_patches=16),
    optimizer=dict(
      learning_rate=1.5e-3,
      min_lr=1e-5,
      warmup_epochs=10.0,
      weight_decay=0.05,
      clip_norm=clip_norm,
      betas=(0.9, 0.999),
    ),
    data={**dvae.IMAGENET, "color_jitter": 0.4, "crop_scale": (0.08, 1.0), "mean": MEAN, "std": STD},
    eval=dict(split="validation", fraction=0.1, batch_size=512, every_steps=12_500),
    checkpoint=dict(every_steps=2500),
  )


VARIANTS = ("plus", "paper")


def get_config(preset="plus"):
  if preset not in VARIANTS:
    raise ValueError(f"variant {preset!r} is unknown; there are {VARIANTS}")
  stages = dict(tokenizer=dvae.get_config().to_dict(), pretrain=pretrain("base", preset, 3.0))
  return ConfigDict(dict(stages=tuple(stages), **stages))
