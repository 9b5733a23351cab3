"""CamVid, road scenes: UPerNet on a small backbone, pre-trained against from scratch; runs on two CPU cores.

    python -m beit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10       # first: tokenizer and backbone
    python -m beit_jax.main --config=configs/upernet_camvid.py --workdir=runs/camvid

The stage `adapt` continues masked image modeling with the backbone of CIFAR-10 on crops of the 367 road scenes,
without their labels. Then, for three seeds, UPerNet is trained from that backbone and from a random one with the same
budget. Images are resized to 96x128 pixels, crops are 64x64, patches 4x4. The metrics are those of the 233 test
images at full size, 11 classes. Data: the SegNet split of CamVid as a TFDS data set `camvid` with `image` and
`segmentation_mask`.
Expected: nothing published at this size. Run here: docs/results.md.
"""

import cifar10
from ml_collections import ConfigDict

SEEDS = (0, 1, 2)
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
DATA = dict(source="tfds", name="camvid", image_size=64, interpolation="bilinear", threads=2)


def get_config():
  adapt = dict(
    objective="beit",
    init_from="runs/cifar10/pretrain",
    tokenizer=dict(init_from="runs/cifar10/tokenizer"),
    batch_size=16,
    total_steps=500,
    model=cifar10.MODEL,
    mask=dict(num_masked=100, min_block_patches=16),
    optimizer=dict(learning_rate=1e-3, warmup_steps=50, clip_norm=3.0, betas=(0.9, 0.98)),
    data={
      **DATA,
      "label_key": "",
      "token_image_size": 64,
      "token_interpolation": "bicubic",
      "crop_scale": (0.1, 0.6),
    },
    eval=dict(split="validation"),
    checkpoint=dict(every_steps=500),
  )
  finetune = dict(
    objective="segment",
    init_from="stage:adapt",
    batch_size=8,
    total_steps=400,
    model={**cifar10.MODEL, "channels": 32, "aux_channels": 32},
    optimizer=dict(learning_rate=3e-3, min_lr=0.0, schedule="poly", warmup_steps=50, layer_decay=0.9),
    data={**DATA, "label_key": "segmentation_mask", "num_classes": 11},
    segment=dict(
      ignore_label=11,
      resize=(128, 96),
      resize_ratio=(0.75, 1.5),
      stride=32,
      class_names=tuple(CLASSES.split()),
      palette="camvid",
    ),
    eval=dict(split="test"),
    checkpoint=dict(every_steps=None),
  )
  scratch = {**finetune, "init_from": "", "optimizer": {**finetune["optimizer"], "layer_decay": 1.0}}
  stages = dict(adapt=adapt)
  for seed in SEEDS:
    stages[f"finetune_{seed}"] = {**finetune, "seed": seed}
    stages[f"scratch_{seed}"] = {**scratch, "seed": seed}
  summary = (
    ("accuracy on masked tokens (validation)", "adapt.eval.mim_acc", ".1%"),
    ("mIoU, pre-trained (test)", "finetune_*.eval.mIoU", ".1%"),
    ("mIoU, from scratch, same budget (test)", "scratch_*.eval.mIoU", ".1%"),
    ("pixel accuracy, pre-trained (test)", "finetune_*.eval.aAcc", ".1%"),
    ("pixel accuracy, from scratch (test)", "scratch_*.eval.aAcc", ".1%"),
  )
  return ConfigDict(dict(stages=tuple(stages), **stages, summary=summary))
