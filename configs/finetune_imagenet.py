"""Fine-tuning on ImageNet-1K: every row of the paper and of the released recipes, and the baselines.

    python -m beit_jax.main --config=configs/finetune_imagenet.py:base_pt1k --config.init_from=runs/beit_base/pretrain
    python -m beit_jax.main --config=configs/finetune_imagenet.py:base_ft22k,384 --config.init_from=beit_base_ft22k.pth

A variant is SIZE_START or SIZE_START,RESOLUTION; the default resolution is 224. The starts, with the published
accuracy that is expected:
  pt1k         pre-trained on ImageNet-1K without labels; 83.2 (base) and 85.2 (large), at 384 84.6 and 86.3 (paper,
               Table 1, its own model: pre-trained with beit_base.py:paper, and --config.model.preset=paper here)
  pt22k        pre-trained on ImageNet-22K without labels (released weights); 83.7 and 86.0 (unilm README)
  ft22k        then fine-tuned on its labels; 85.2 and 87.4, at 384 86.8 and 88.4, large at 512 88.6 (unilm README)
  supervised   a ViT trained with labels on ImageNet-22K (84.0 base, 85.2 large, at 384: paper, Table 1)
  dino         DINO's ViT-B/16; 82.8 (paper, Table 1)
  v2_300       BEiT v2, pre-trained for 300 epochs; 85.0 and 86.6 (unilm beit2, at 224 only)
  v2_1600      BEiT v2, pre-trained for 1600 epochs; 85.5 and 87.3
  v2_ft21k     then fine-tuned on the labels of ImageNet-21K; 86.5 and 88.4
pt1k and pt22k at 384 or 512 start from the result at 224 and train 10 more epochs (paper, Table 13). The paper leaves
learning rate and mixup open there; we use those of the ft22k rows (no mixup).
Source: BEiT paper, Table 13; unilm get_started_for_image_classification.md of beit and beit2. The latter leaves the
warm-up of large_v2_300 and large_v2_1600 open; we use that of large_v2_ft21k. Not run here at this size; each variant
is built and traced in the tests. docs/recipes.md shows them side by side.
"""

import beit_base
from ml_collections import ConfigDict

HALF = (0.5, 0.5, 0.5)
# batch, learning rate, warm-up epochs, epochs, layer decay, drop path, weight decay, mixup, cutmix
ROWS = {
  ("base", "pt"): (1024, 4e-3, 20.0, 100.0, 0.65, 0.1, 0.05, 0.8, 1.0),
  ("large", "pt"): (1024, 1e-3, 5.0, 50.0, 0.75, 0.2, 0.05, 0.8, 1.0),
  ("base", "longer"): (512, 2e-5, 1.0, 10.0, 0.85, 0.1, 1e-8, 0.0, 0.0),
  ("large", "longer"): (512, 2e-5, 1.0, 10.0, 0.9, 0.4, 1e-8, 0.0, 0.0),
  ("base", "ft"): (512, 2e-5, 5.0, 30.0, 0.85, 0.1, 1e-8, 0.0, 0.0),
  ("large", "ft"): (512, 2e-5, 5.0, 30.0, 0.9, 0.4, 1e-8, 0.0, 0.0),
  ("base", "v2_300"): (1024, 5e-4, 20.0, 100.0, 0.65, 0.1, 0.05, 0.8, 1.0),
  ("base", "v2_1600"): (1024, 5e-4, 20.0, 100.0, 0.6, 0.2, 0.05, 0.8, 1.0),
  ("base", "v2_ft21k"): (1024, 5e-5, 20.0, 30.0, 0.75, 0.1, 0.05, 0.0, 0.0),
  ("large", "v2_300"): (1024, 5e-4, 5.0, 50.0, 0.8, 0.2, 0.05, 0.8, 1.0),
  ("large", "v2_1600"): (1024, 2e-4, 5.0, 50.0, 0.8, 0.2, 0.05, 0.8, 1.0),
  ("large", "v2_ft21k"): (1024, 7e-5, 5.0, 20.0, 0.8, 0.25, 0.05, 0.0, 0.0),
}
# row at 224, row above 224 ("": none is published), (pixel mean, standard deviation), preset
STARTS = {
  "pt1k": ("pt", "longer", (beit_base.MEAN, beit_base.STD), "plus"),
  "pt22k": ("pt", "longer", (HALF, HALF), "plus"),
  "ft22k": ("ft", "ft", (HALF, HALF), "plus"),
  "supervised": ("pt", "longer", (HALF, HALF), "paper"),
  "dino": ("pt", "longer", (beit_base.MEAN, beit_base.STD), "paper"),
  **{v2: (v2, "", (beit_base.MEAN, beit_base.STD), "plus") for v2 in ("v2_300", "v2_1600", "v2_ft21k")},
}
VARIANTS = tuple(
  f"{size}_{start}" + (f",{side}" if side > 224 else "")
  for size in ("base", "large")
  for start in STARTS
  for side in (224, 384, 512)
  if (size, start) != ("large", "dino")  # DINO has no ViT-L
  and (side == 224 or STARTS[start][1])
)


def get_config(variant="base_pt1k"):
  variant = variant.removesuffix(",224")
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
  name, _, side = variant.partition(",")
  size, _, start = name.partition("_")
  at_224, above, (mean, std), preset = STARTS[start]
  side = int(side or 224)
  row = ROWS[size, at_224 if side == 224 else above]
  batch_size, learning_rate, warmup, epochs, layer_decay, drop_path_rate, weight_decay, mixup, cutmix = row
  return ConfigDict(
    dict(
      objective="classify",
      init_from="",
      batch_size=batch_size,
      total_epochs=epochs,
      model=dict(variant=size, preset=preset, drop_path_rate=drop_path_rate, dtype="bfloat16"),
      optimizer=dict(
        learning_rate=learning_rate,
        min_lr=1e-6,
        warmup_epochs=warmup,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
      ),
      loss=dict(label_smoothing=0.1, mixup_alpha=mixup, cutmix_alpha=cutmix),
      data=dict(
        beit_base.LABELED,
        image_size=side,
        mean=mean,
        std=std,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        crop_pct=0.875 if side < 384 else 1.0,
      ),
      eval=dict(split="validation", batch_size=512, every_steps=2500),
      checkpoint=dict(every_steps=2500, best="acc1"),
    )
  )
