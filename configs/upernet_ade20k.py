"""Semantic segmentation of ADE20K with UPerNet, as released.

    python -m beit_jax.main --config=configs/upernet_ade20k.py:base_pt22k_512 --config.data.root=ADEChallengeData2016 \
      --config.init_from=beit_base_patch16_224_pt22k.pth

Variants are SIZE_START_CROP: START is pt22k (pre-trained only) or pt22k_ft22k (then fine-tuned on the labels), for BEiT
v2 "v2" or "v2_ft21k"; CROP is 512 or 640. Data: SceneParse150 (ADEChallengeData2016) with 150 classes, where 0 in a
label map means no class; the full ADE20K is a different data set.
Source: semantic_segmentation configs of unilm beit and beit2. Expected mIoU, single scale: 53.6 for
base_pt22k_ft22k_640, 56.7 for large_pt22k_ft22k_640 (paper, Table 7); 53.1 and 53.5 for base_v2_512 and
base_v2_ft21k_512, 56.7 and 57.5 for the same with large (BEiT v2 paper, 1600 epochs). Not run here; built and traced
in the tests.
"""

from beit_base import MEAN, STD
from ml_collections import ConfigDict

# learning rate, layer decay, drop path, LayerScale init, iterations, warm-up
ROWS = {
  "base_pt22k_512": (7e-4, 0.65, 0.1, 0.1, 160_000, 1500),
  "base_pt22k_ft22k_512": (3e-5, 0.9, 0.1, 0.1, 160_000, 1500),
  "base_pt22k_ft22k_640": (3e-5, 0.9, 0.1, 0.1, 160_000, 1500),
  "large_pt22k_ft22k_512": (2e-5, 0.95, 0.2, 1e-6, 160_000, 1500),
  "large_pt22k_ft22k_640": (2e-5, 0.95, 0.2, 1e-6, 320_000, 3000),
  "base_v2_512": (5e-5, 0.75, 0.15, 0.1, 160_000, 1500),
  "base_v2_ft21k_512": (5e-5, 0.85, 0.15, 0.1, 160_000, 1500),
  "large_v2_512": (4e-5, 0.9, 0.2, 1e-6, 160_000, 1500),
  "large_v2_ft21k_512": (3e-5, 0.9, 0.2, 1e-6, 160_000, 1500),
}
VARIANTS = tuple(ROWS)
STRIDES = {512: 341, 640: 426}


def data(side: int) -> dict:
  return dict(
    source="pairs",
    root="ADEChallengeData2016",
    split="training",
    num_classes=150,
    image_size=side,
    mean=MEAN,
    std=STD,
    interpolation="bilinear",
    workers=8,
    threads=8,
  )


def segment(side: int) -> dict:
  return dict(reduce_zero_label=True, resize=(4 * side, side), stride=STRIDES[side])


def get_config(variant="base_pt22k_512"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
  learning_rate, layer_decay, drop_path_rate, layer_scale, steps, warmup = ROWS[variant]
  size, side = variant.split("_")[0], int(variant.split("_")[-1])
  model = dict(variant=size, drop_path_rate=drop_path_rate, layer_scale_init=layer_scale, dtype="bfloat16")
  return ConfigDict(
    dict(
      objective="segment",
      init_from="",
      batch_size=16,
      total_steps=steps,
      model=model,
      optimizer=dict(
        learning_rate=learning_rate,
        min_lr=0.0,
        schedule="poly",
        power=1.0,
        warmup_steps=warmup,
        weight_decay=0.05,
        layer_decay=layer_decay,
      ),
      data=data(side),
      segment=segment(side),
      eval=dict(split="validation", batch_size=16, every_steps=16_000),
      checkpoint=dict(every_steps=4000, best="mIoU"),
    )
  )
