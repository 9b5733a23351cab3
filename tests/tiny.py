"""Configs that train in seconds: 16x16 scenes, 2x2 patches, encoders of width 32."""

from ml_collections import ConfigDict

from beit_jax import objectives
from beit_jax.config import parse

DATA = dict(
  source="shapes",
  num_examples=96,
  render_size=16,
  image_size=16,
  token_image_size=16,
  crop_scale=(0.5, 1.0),
  crop_pct=1.0,
  threads=1,
)
MODEL = dict(variant="tiny", width=32, depth=2, num_heads=2, patch_size=2)
RUNS = {
  "dvae": dict(
    batch_size=16,
    total_steps=6,
    model=dict(n_hid=8, n_init=8, n_blk_per_group=1, group_count=2, vocab_size=16),
    optimizer=dict(learning_rate=3e-3, weight_decay=0.0),
    loss=dict(kl_weight=0.001, temperature_steps=6),
  ),
  "vqkd": dict(  # needs a teacher of 8x8 patches
    batch_size=16,
    total_steps=6,
    model=dict(vocab_size=16, code_dim=8, decoder_depth=1, **MODEL),
    optimizer=dict(learning_rate=1e-3, weight_decay=1e-4),
  ),
  "beit": dict(
    batch_size=16,
    total_steps=10,
    model=dict(drop_path_rate=0.1, **MODEL),
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=1e-3, warmup_steps=3, clip_norm=3.0),
    data=dict(color_jitter=0.4),
  ),
  "dino": dict(
    batch_size=16,
    total_steps=7,  # of 6 steps an epoch: the last layer is frozen in all but one
    model=dict(drop_path_rate=0.1, outputs=40, hidden=32, bottleneck=16, **MODEL),
    local=dict(count=2, image_size=8),
    optimizer=dict(learning_rate=1e-3, weight_decay_end=0.4, clip="tensor", clip_norm=0.3),
  ),
  "beit_v2": dict(
    objective="beit",
    batch_size=16,
    total_steps=6,
    model=dict(drop_path_rate=0.1, early_block=1, head_blocks=2, **MODEL),
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=1e-3, warmup_steps=3, betas=(0.9, 0.98)),
  ),
  "beit_pixels": dict(
    objective="beit",
    target="pixels",
    batch_size=16,
    total_steps=6,
    model=dict(drop_path_rate=0.1, normalize_patches=True, **MODEL),
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=1e-3, warmup_steps=3),
    data=dict(color_jitter=0.4),
  ),
  "classify": dict(
    batch_size=16,
    total_steps=6,
    model=dict(drop_path_rate=0.1, **MODEL),
    optimizer=dict(learning_rate=1e-3, layer_decay=0.65),
  ),
  "linear_probe": dict(batch_size=16, total_steps=6, model=MODEL, optimizer=dict(learning_rate=4e-3)),
  "segment": dict(
    batch_size=8,
    total_steps=3,
    model=dict(
      num_classes=9,
      channels=16,
      aux_channels=16,
      variant="tiny",
      width=32,
      depth=4,
      num_heads=2,
      patch_size=4,
    ),
    segment=dict(resize=(24, 24), stride=8),
    optimizer=dict(learning_rate=1e-3, schedule="poly", min_lr=0.0),
  ),
  "knn": dict(model=MODEL, knn=dict(k=5)),
}


def raw(name: str, **changes) -> ConfigDict:
  """Returns a config of `RUNS` as its file gives it, with dotted changes: `raw("beit", **{"mask.kind": "random"})`."""
  run = {
    "objective": name,
    "log_every_steps": 1,
    "mesh": dict(data=1, fsdp=1),
    "eval": dict(split="test", num_examples=20, batch_size=16),
    "figures": False,
    **RUNS[name],
    "data": {**DATA, **RUNS[name].get("data", {})},
  }
  run = ConfigDict(run)
  for key, value in changes.items():
    *parents, last = key.split(".")
    node = run
    for parent in parents:
      if parent not in node:
        node[parent] = ConfigDict()
      node = node[parent]
    node[last] = value
  return run


def config(name: str, **changes) -> ConfigDict:
  """Returns the config `raw` completed with the defaults."""
  return parse.complete(raw(name, **changes), objectives.schemas())
