"""The config of tests/kills.py: a small classifier of the generated scenes, with every feature that keeps state.

The variant "stages" trains it twice, the second time from the result of the first.
"""

from ml_collections import ConfigDict


def get_config(variant=""):
  run = dict(
    objective="classify",
    batch_size=16,
    total_steps=150,
    log_every_steps=1,
    mesh=dict(data=1),
    model=dict(variant="tiny", width=32, depth=2, num_heads=2, patch_size=4, drop_path_rate=0.1),
    optimizer=dict(learning_rate=1e-3, warmup_steps=5, layer_decay=0.9, ema_decay=0.9),
    loss=dict(mixup_alpha=0.8),
    data=dict(source="shapes", num_examples=200, render_size=16, image_size=16, workers=2, threads=1),
    eval=dict(split="test", num_examples=40, batch_size=16, every_steps=50),
    checkpoint=dict(every_steps=10, keep=2, best="loss"),
    figures=False,
  )
  if variant == "stages":
    second = {**run, "init_from": "stage:one", "seed": 1}
    return ConfigDict(dict(stages=("one", "two"), one=run, two=second))
  return ConfigDict(run)
