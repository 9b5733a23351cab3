"""ImageNet-1K from scratch with labels: DeiT's baseline, on the same training loop.

    python -m beit_jax.main --config=configs/scratch_imagenet.py:base

Variants: `tiny`, `small`, `base` (default), `large`. Absolute positions, no LayerScale, classification from the cls
token.
Source: DeiT (arXiv 2012.12877), Table 9: batch 1024, learning rate 1e-3, 300 epochs. Its repeated augmentation is not
implemented (docs/conflicts.md). Expected: 81.8 % for base (BEiT paper, Table 1). Not run here; built and traced in
the tests.
"""

from beit_base import LABELED
from ml_collections import ConfigDict

VARIANTS = ("tiny", "small", "base", "large")


def get_config(variant="base"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
  return ConfigDict(
    dict(
      objective="classify",
      batch_size=1024,
      total_epochs=300.0,
      model=dict(
        variant=variant,
        preset="paper",
        pool="cls",
        head_init_scale=1.0,
        drop_path_rate=0.1,
        dtype="bfloat16",
      ),
      optimizer=dict(learning_rate=1e-3, min_lr=1e-5, warmup_epochs=5.0, weight_decay=0.05),
      loss=dict(label_smoothing=0.1, mixup_alpha=0.8, cutmix_alpha=1.0),
      data={**LABELED, "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25},
      eval=dict(split="validation", batch_size=512, every_steps=5000),
      checkpoint=dict(every_steps=2500, best="acc1"),
    )
  )
