"""Fine-tuning on ImageNet-1K at 224x224.

    python -m beit_jax.main --config=configs/finetune_imagenet.py:base --config.init_from=runs/beit_base/pretrain

Variants: `base` (default), `large`. Source: BEiT paper, Table 13; unilm get_started_for_image_classification.md.
Expected: 83.2 % (base), 85.2 % (large) after 800 epochs of pre-training on ImageNet-1K (paper, Table 1).
Still missing against the recipe: RandAugment, mixup, cutmix and random erasing; without them expect less.
Not run here.
"""

from beit_base import MEAN, STD
from ml_collections import ConfigDict

RECIPES = {  # batch size, lr, warm-up epochs, epochs, layer decay, drop path
  "base": (1024, 4e-3, 20.0, 100.0, 0.65, 0.1),
  "large": (1024, 1e-3, 5.0, 50.0, 0.75, 0.2),
}


def get_config(variant="base"):
  if variant not in RECIPES:
    raise ValueError(f"variant {variant!r} is unknown; there are {sorted(RECIPES)}")
  batch_size, learning_rate, warmup, epochs, layer_decay, drop_path_rate = RECIPES[variant]
  return ConfigDict(
    dict(
      objective="classify",
      init_from="",
      batch_size=batch_size,
      total_epochs=epochs,
      model=dict(variant=variant, preset="plus", drop_path_rate=drop_path_rate, dtype="bfloat16"),
      optimizer=dict(
        learning_rate=learning_rate,
        min_lr=1e-6,
        warmup_epochs=warmup,
        weight_decay=0.05,
        layer_decay=layer_decay,
      ),
      loss=dict(label_smoothing=0.1),
      data=dict(source="tfds", name="imagenet2012", image_size=224, mean=MEAN, std=STD, workers=8, threads=8),
      eval=dict(split="validation", batch_size=512, every_steps=2500),
      checkpoint=dict(every_steps=2500),
    )
  )
