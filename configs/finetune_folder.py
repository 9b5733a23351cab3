"""A classifier from your own labeled images, on the backbone of configs/own_images.py.

    python -m beit_jax.main --config=configs/finetune_folder.py --config.data.root=/path/to/labelled \
      --workdir=runs/mine_ft

The folder has a subfolder for each class. A tenth of the images is not trained on but evaluated; if there are folders
`train` and `val`, add `--config.data.split=train --config.eval.split=val`. The start is runs/mine/pretrain, with the
model and image size of configs/own_images.py; `--config.init_from=` trains from scratch. Crops and flips are the only
augmentation, which suits few labels.
Expected: nothing published. Run here: a few steps, in the tests.
"""

import own_images
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="classify",
      init_from="runs/mine/pretrain",
      batch_size=32,
      total_epochs=30.0,
      model=own_images.MODEL,
      optimizer=dict(learning_rate=1e-3, min_lr=1e-6, warmup_epochs=3.0, layer_decay=0.75),
      loss=dict(label_smoothing=0.1, mixup_alpha=0.0, cutmix_alpha=0.0),
      data={**own_images.DATA, "label_key": "label"},
      eval=dict(split="train[:10%]", batch_size=64),
      checkpoint=dict(every_steps=500),
    )
  )
