"""Intermediate fine-tuning on the labels of ImageNet-22K, between pre-training and ImageNet-1K.

    python -m beit_jax.main --config=configs/finetune_imagenet22k.py:base --config.data.root=/data/imagenet22k \
      --config.init_from=beit_base_patch16_224_pt22k.pth

Variants: `base`, `large` (21,841 classes, folders named by class; 50,000 images are held out for evaluation), and
`base_p`, `large_p` for ImageNet-21K-P (11,221 classes of the fall release, with a `val` folder). Data with another
number of classes is refused. Continue with configs/finetune_imagenet.py:base_ft22k.
Source: unilm beit/README.md (batch, learning rate, 90 epochs, warm-up 5, layer decay, drop path, clipping). It does
not state mixup and label smoothing; here they are 0 and 0.1. Expected after ImageNet-1K: 85.2 % (base), 87.4 %
(large) at 224 (unilm README). Not run here; built and traced in the tests.
"""

from ml_collections import ConfigDict

HELD_OUT = ("train[50000:]", "train[:50000]")  # of 14 million images without a split for evaluation
# size, classes, batch, learning rate, layer decay, clipping norm, splits of training and evaluation
VARIANTS = {
  "base": ("base", 21841, 4096, 3e-3, 0.65, 3.0, HELD_OUT),
  "large": ("large", 21841, 2048, 2e-3, 0.75, 1.0, HELD_OUT),
  "base_p": ("base", 11221, 4096, 3e-3, 0.65, 3.0, ("train", "val")),
  "large_p": ("large", 11221, 2048, 2e-3, 0.75, 1.0, ("train", "val")),
}


def get_config(variant="base"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
  size, classes, batch_size, learning_rate, layer_decay, clip_norm, (split, eval_split) = VARIANTS[variant]
  return ConfigDict(
    dict(
      objective="classify",
      init_from="",
      batch_size=batch_size,
      total_epochs=90.0,
      model=dict(variant=size, preset="plus", drop_path_rate=0.2, dtype="bfloat16"),
      optimizer=dict(
        learning_rate=learning_rate,
        min_lr=1e-6,
        warmup_epochs=5.0,
        weight_decay=0.05,
        layer_decay=layer_decay,
        clip_norm=clip_norm,
      ),
      loss=dict(label_smoothing=0.1),
      data=dict(
        source="folder",
        root="imagenet22k",
        split=split,
        num_classes=classes,
        image_size=224,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        workers=8,
        threads=8,
      ),
      eval=dict(split=eval_split, batch_size=512, every_steps=10_000),
      checkpoint=dict(every_steps=2500),
    )
  )
