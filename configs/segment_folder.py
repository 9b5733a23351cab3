"""A class for every pixel from your own images and label maps, on the backbone of configs/own_images.py.

    python -m beit_jax.main --config=configs/segment_folder.py --config.data.root=/path/to/pairs \
      --config.data.class_file=classes.csv --workdir=runs/mine_seg

The folder has images/train/NAME.* and label maps annotations/train/NAME.png; classes.csv has a row `name` or
`name,red,green,blue` for each class in the order of the numbers in the label maps. A tenth of the images is not
trained on but evaluated; if there are folders `val`, add `--config.data.split=train --config.eval.split=val`. The start
is runs/mine/pretrain, with the model of configs/own_images.py; `--config.init_from=` trains from scratch. Images are
resized to a short side of 128 pixels, crops and windows are 64x64.
Expected: nothing published. Run here: a few steps, in the tests.
"""

import own_images
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="segment",
      init_from="runs/mine/pretrain",
      batch_size=8,
      total_steps=1500,
      model={**own_images.MODEL, "channels": 32, "aux_channels": 32},
      optimizer=dict(learning_rate=1e-3, min_lr=0.0, schedule="poly", warmup_steps=100, layer_decay=0.9),
      data={**own_images.DATA, "source": "pairs", "interpolation": "bilinear"},
      segment=dict(resize=(512, 128), stride=32),
      eval=dict(split="train[:10%]", batch_size=8),
      checkpoint=dict(every_steps=500),
    )
  )
