"""CIFAR-10, the whole chain on real images: 32x32 pixels, patch size 4, a small network, fine-tuned with 2,500 labels.

    python -m beit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Trains a tokenizer and then masked image modeling on all 50,000 images without labels. For three seeds it fine-tunes
on a fixed 5 % of the labels, and trains the same network from scratch with the same budget. `tfds build cifar10
--file_format=array_record` prepares the data once. The batches are small on purpose: with few images the number of
updates matters most (docs/results.md).
Expected: nothing published at this size. Run here: docs/results.md.
"""

from ml_collections import ConfigDict

SEEDS = (0, 1, 2)
DATA = dict(
  source="tfds",
  name="cifar10",
  image_size=32,
  token_image_size=32,
  token_interpolation="bicubic",
  crop_pct=1.0,
  threads=2,
)
MODEL = dict(variant="tiny", preset="plus", width=64, depth=6, num_heads=2, patch_size=4)


def get_config():
  tokenizer = dict(
    objective="dvae",
    batch_size=32,
    total_epochs=1.0,
    model=dict(n_hid=32, n_init=32, n_blk_per_group=1, group_count=3, vocab_size=512),
    optimizer=dict(learning_rate=6e-3, min_lr=1e-4, warmup_steps=50, weight_decay=0.0),
    # 32*32*3 values share 64 tokens: a weight of 1/48 would be the evidence lower bound.
    loss=dict(kl_weight=0.03, kl_warmup_steps=500, temperature_steps=1200),
    data={**DATA, "crop_scale": (0.5, 1.0)},
    eval=dict(split="test", fraction=0.2),
    checkpoint=dict(every_steps=500),
  )
  pretrain = dict(
    objective="beit",
    tokenizer=dict(init_from="stage:tokenizer"),
    batch_size=64,
    total_epochs=4.0,
    model=MODEL,
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=1.5e-3, warmup_steps=150, clip_norm=3.0, betas=(0.9, 0.98)),
    data={**DATA, "crop_scale": (0.4, 1.0)},
    eval=dict(split="test", fraction=0.2),
    checkpoint=dict(every_steps=500),
  )
  finetune = dict(
    objective="classify",
    init_from="stage:pretrain",
    batch_size=32,
    total_epochs=4.0,
    model=MODEL,
    optimizer=dict(learning_rate=1e-3, warmup_steps=100, layer_decay=0.9),
    data={**DATA, "fraction": 0.05, "crop": "pad"},
    eval=dict(split="test"),
    checkpoint=dict(every_steps=None),
  )
  scratch = {**finetune, "init_from": "", "optimizer": {**finetune["optimizer"], "layer_decay": 1.0}}
  stages = dict(tokenizer=tokenizer, pretrain=pretrain)
  for seed in SEEDS:
    stages[f"finetune_{seed}"] = {**finetune, "seed": seed}
    stages[f"scratch_{seed}"] = {**scratch, "seed": seed}
  summary = (
    ("tokenizer: reconstruction error (mean absolute)", "tokenizer.eval.mae", ".4f"),
    ("tokenizer: share of the codebook in use", "tokenizer.eval.codebook_usage", ".1%"),
    ("pre-training: loss at the first step", "pretrain.first.loss", ".3f"),
    ("pre-training: loss at the last step", "pretrain.last.loss", ".3f"),
    ("pre-training: accuracy on masked tokens (test)", "pretrain.eval.mim_acc", ".1%"),
    ("fine-tuned accuracy (test)", "finetune_*.eval.acc1", ".1%"),
    ("from scratch, same budget (test)", "scratch_*.eval.acc1", ".1%"),
  )
  return ConfigDict(dict(stages=tuple(stages), **stages, summary=summary))
