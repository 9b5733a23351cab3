"""Quickstart: tokenizer -> pre-training -> fine-tuning, and the same network from scratch, on embedded data.

python -m beit_jax.main --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

DATA = dict(
  source="shapes",
  num_examples=4096,
  render_size=32,
  image_size=32,
  token_image_size=16,
  token_interpolation="bicubic",
  crop_scale=(0.5, 1.0),
  crop_pct=1.0,
  threads=2,
)
MODEL = dict(variant="tiny", width=64, depth=4, num_heads=2, patch_size=4)


def get_config():
  tokenizer = dict(
    objective="dvae",
    batch_size=32,
    total_steps=600,
    model=dict(n_hid=32, n_init=32, n_blk_per_group=1, group_count=2, vocab_size=128),
    optimizer=dict(learning_rate=6e-3, min_lr=1e-4, warmup_steps=20, weight_decay=0.0),
    loss=dict(kl_weight=0.08, kl_warmup_steps=300, temperature_steps=450),
    data=DATA,
    eval=dict(split="test", num_examples=512),
  )
  pretrain = dict(
    objective="beit",
    tokenizer=dict(init_from="stage:tokenizer"),
    batch_size=128,
    total_steps=260,
    model=dict(preset="plus", drop_path_rate=0.0, **MODEL),
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=2e-3, warmup_steps=30, weight_decay=0.05, clip_norm=3.0, betas=(0.9, 0.98)),
    data=DATA,
    eval=dict(split="test", num_examples=512),
  )
  finetune = dict(
    objective="classify",
    init_from="stage:pretrain",
    batch_size=64,
    total_steps=160,
    model=dict(preset="plus", drop_path_rate=0.0, **MODEL),
    optimizer=dict(learning_rate=2e-3, warmup_steps=20, weight_decay=0.05, layer_decay=0.75),
    data={**DATA, "fraction": 0.125, "crop": "pad"},
    eval=dict(split="test", num_examples=1024),
  )
  scratch = {**finetune, "init_from": "", "optimizer": {**finetune["optimizer"], "layer_decay": 1.0}}
  return ConfigDict(
    dict(
      stages=("tokenizer", "pretrain", "finetune", "scratch"),
      tokenizer=tokenizer,
      pretrain=pretrain,
      finetune=finetune,
      scratch=scratch,
      summary=(
        ("tokenizer: reconstruction error (mean absolute)", "tokenizer.eval.mae", ".4f"),
        ("tokenizer: share of the codebook in use", "tokenizer.eval.codebook_usage", ".1%"),
        ("pre-training: loss at the first step", "pretrain.first.loss", ".3f"),
        ("pre-training: loss at the last step", "pretrain.last.loss", ".3f"),
        ("pre-training: accuracy on masked tokens (test)", "pretrain.eval.mim_acc", ".1%"),
        ("fine-tuned accuracy (test)", "finetune.eval.acc1", ".1%"),
        ("from scratch, same budget (test)", "scratch.eval.acc1", ".1%"),
      ),
    )
  )
