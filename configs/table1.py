"""Tables 1 and 3 of the BEiT paper: BEiT against training from scratch, with labels, and DINO.

    python -m beit_jax.main --config=configs/table1.py:shapes     # embedded scenes, three seeds
    python -m beit_jax.main --config=configs/table1.py:cifar10    # real images, three seeds
    python -m beit_jax.main --config=configs/table1.py:imagenet   # the paper's size, one seed

Rows: the network from scratch; pre-trained with labels; DINO; BEiT; BEiT with intermediate fine-tuning on labels; BEiT
v2 (tokens of a VQ-KD that learned from the DINO trained here, patch aggregation). All rows have the same network, with
absolute positions. At the small sizes "labels" are those of all training images, of which fine-tuning sees few, so that
rows with labels are upper bounds. At the paper's size they are those of ImageNet-22K, and the row pre-trained with
labels starts from published weights: --config.finetune_supervised_0.init_from=FILE, the same for segment_supervised_0.
Source: BEiT paper, Tables 1 and 3 (ViT-B, 800 epochs, here 300; SETR-PUP on ADE20K).
Expected at the paper's size: the numbers in the columns "paper". Run here: docs/results.md.
"""

import table4
from ml_collections import ConfigDict

VARIANTS = table4.VARIANTS
# Row -> (label, the paper's accuracy on ImageNet and mIoU on ADE20K)
ROWS = {
  "scratch": ("from scratch", ("81.8", "")),
  "supervised": ("pre-trained with labels", ("84.0", "45.3")),
  "dino": ("DINO", ("82.8", "44.1")),
  "beit": ("BEiT", ("83.2", "45.6")),
  "beit-labels": ("BEiT, intermediate fine-tuning", ("", "47.7")),
  "beit-v2": ("BEiT v2", ("", "")),
}
STARTS = {
  "scratch": "",
  "supervised": "path/to/vit_base_in22k.pth",
}  # of rows without a stage of pre-training


def pretraining(size: dict, row: str, seed: int) -> dict:
  """The stages before fine-tuning. The backbone of a row is the stage pretrain_ROW_SEED."""
  name, runs = f"pretrain_{row}_{seed}", {}
  if row == "supervised" and "labels" in size:
    runs[name] = size["labels"]
  elif row == "beit-labels":
    runs[name] = {**size.get("intermediate", size.get("labels")), "init_from": f"stage:pretrain_beit_{seed}"}
  elif row == "beit-v2":
    runs[name] = table4.changed(size["pretrain_v2"], {"tokenizer": {"init_from": "stage:vqkd"}})
  elif row in ("dino", "beit"):
    runs[name] = size[{"dino": "dino", "beit": "pretrain"}[row]]
  return {name: {**run, "seed": seed} for name, run in runs.items()}


def get_config(variant="shapes"):
  size = table4.size_of(variant)
  stages = dict(tokenizer=size["tokenizer"])
  for seed in size["seeds"]:
    stages |= pretraining(size, "dino", seed)
  stages["vqkd"] = table4.changed(size["vqkd"], {"teacher": {"init_from": "stage:pretrain_dino_0"}})
  for seed in size["seeds"]:
    for row in ROWS:
      stages |= pretraining(size, row, seed)
      start = f"stage:pretrain_{row}_{seed}" if f"pretrain_{row}_{seed}" in stages else STARTS[row]
      tasks = table4.transferred(size, row, seed, start)
      if row == "scratch" and "scratch" in size:
        tasks[f"finetune_{row}_{seed}"] = {**size["scratch"], "seed": seed}
      stages |= tasks
  table = table4.comparison("BEiT, Tables 1 and 3", size, ROWS)
  return ConfigDict(dict(stages=tuple(stages), **stages, comparison=table))
