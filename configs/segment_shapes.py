"""Semantic segmentation of embedded scenes: nine classes, UPerNet on a small encoder; no data needed.

    python -m beit_jax.main --config=configs/segment_shapes.py

Scenes of 48x48 pixels, 4x4 patches, from scratch; `--config.init_from=...` starts from a backbone of the same shape.
Expected: nothing published. Run here: the tests train a smaller version.
"""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="segment",
      batch_size=16,
      total_steps=1500,
      model=dict(
        variant="tiny",
        width=64,
        depth=4,
        num_heads=2,
        patch_size=4,
        num_classes=9,
        channels=32,
        aux_channels=32,
      ),
      optimizer=dict(learning_rate=1e-3, min_lr=0.0, schedule="poly", warmup_steps=100),
      data=dict(source="shapes", num_examples=4096, render_size=48, image_size=48, threads=2),
      segment=dict(resize=(48, 48), resize_ratio=(0.75, 1.5), stride=32),
      eval=dict(split="test", num_examples=128, batch_size=16),
      checkpoint=dict(every_steps=None),
    )
  )
