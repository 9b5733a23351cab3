"""Quickstart on embedded data: tokenizer, pre-training, fine-tuning, and the same network from scratch.

    python -m beit_jax.main --config=configs/quickstart.py

Scenes of 24x24 pixels with one large shape, cut into 6x6 patches; a tokenizer with 128 words sees the same crop at
12x12. Takes minutes on two CPU cores. The batches are small on purpose: with few images the number of updates matters
most.
Expected: the pre-trained network beats the one from scratch. Run here: README.md and docs/results.md.
"""

from ml_collections import ConfigDict

DATA = dict(
  source="shapes",
  num_examples=8192,
  render_size=24,
  image_size=24,
  token_image_size=12,
  token_interpolation="bicubic",
  crop_scale=(0.5, 1.0),
  crop_pct=1.0,
  threads=2,
)
MODEL = dict(variant="tiny", preset="plus", width=64, depth=4, num_heads=2, patch_size=4)
EVAL = dict(split="test", num_examples=1024)


def get_config():
  tokenizer = dict(
    objective="dvae",
    batch_size=32,
    total_steps=800,
    model=dict(n_hid=32, n_init=32, n_blk_per_group=1, group_count=2, vocab_size=128),
    optimizer=dict(learning_rate=6e-3, min_lr=1e-4, warmup_steps=20, weight_decay=0.0),
    # 12*12*3 values share 36 tokens: 1/12 is the weight of the evidence lower bound.
    loss=dict(kl_weight=1 / 12, kl_warmup_steps=300, temperature_steps=600),
    data=DATA,
    eval=EVAL,
  )
  pretrain = dict(
    objective="beit",
    tokenizer=dict(init_from="stage:tokenizer"),
    batch_size=32,
    total_steps=2000,
    model=MODEL,
    mask=dict(num_masked=14, min_block_patches=4),
    optimizer=dict(learning_rate=1.5e-3, warmup_steps=60, clip_norm=3.0, betas=(0.9, 0.98)),
    data=DATA,
    eval=EVAL,
  )
  finetune = dict(
    objective="classify",
    init_from="stage:pretrain",
    batch_size=32,
    total_steps=240,
    model=MODEL,
    optimizer=dict(learning_rate=2e-3, warmup_steps=20),
    data={**DATA, "fraction": 1 / 32, "crop": "pad"},  # 256 labels
    eval=EVAL,
  )
  stages = dict(
    tokenizer=tokenizer, pretrain=pretrain, finetune=finetune, scratch={**finetune, "init_from": ""}
  )
  summary = (
    ("tokenizer: reconstruction error (mean absolute)", "tokenizer.eval.mae", ".4f"),
    ("tokenizer: share of the codebook in use", "tokenizer.eval.codebook_usage", ".1%"),
    ("pre-training: loss at the first step", "pretrain.first.loss", ".3f"),
    ("pre-training: loss at the last step", "pretrain.last.loss", ".3f"),
    ("pre-training: accuracy on masked tokens (test)", "pretrain.eval.mim_acc", ".1%"),
    ("fine-tuned accuracy (test)", "finetune.eval.acc1", ".1%"),
    ("from scratch, same budget (test)", "scratch.eval.acc1", ".1%"),
  )
  return ConfigDict(dict(stages=tuple(stages), **stages, summary=summary))
