"""Table 8 of the BEiT paper, extended: which tokenizer gives the visual tokens.

    python -m beit_jax.main --config=configs/table8.py:shapes     # embedded scenes, three seeds
    python -m beit_jax.main --config=configs/table8.py:cifar10    # real images, three seeds
    python -m beit_jax.main --config=configs/table8.py:imagenet   # the paper's size, one seed

Rows: the discrete VAE; the same with random weights, whose tokens are random functions of the image; VQ-KD, the
tokenizer of BEiT v2, whose teacher is a DINO trained here. Everything else is as in configs/table4.py.
Source: BEiT paper, Table 8 (82.86 with OpenAI's tokenizer, 82.70 with one trained on ImageNet-1K, both after 300
epochs). Expected at the paper's size: the numbers in the column "paper". Run here: docs/results.md.
"""

import table4
from ml_collections import ConfigDict

VARIANTS = table4.VARIANTS
# Row -> (label, the paper's accuracy on ImageNet and mIoU on ADE20K)
ROWS = {
  "dvae": ("discrete VAE", ("82.70", "")),
  "random": ("discrete VAE, random weights", ("", "")),
  "vqkd": ("VQ-KD, its teacher a DINO trained here", ("", "")),
}


def get_config(variant="shapes"):
  size = table4.size_of(variant)
  frozen = {"learning_rate": 0.0, "min_lr": 0.0, "warmup_steps": 0, "warmup_epochs": None}
  one_step = {"total_steps": 1, "total_epochs": None, "optimizer": frozen}
  untrained = table4.changed(size["tokenizer"], one_step)
  stages = dict(
    dvae=size["tokenizer"],
    random=untrained,
    teacher=size["dino"],
    vqkd=table4.changed(size["vqkd"], {"teacher": {"init_from": "stage:teacher"}}),
  )
  for seed in size["seeds"]:
    for name in ROWS:
      changes = {"tokenizer": {"init_from": f"stage:{name}"}}
      if name == "vqkd":
        changes["data"] = {
          key: size["vqkd"]["data"][key] for key in ("token_image_size", "token_interpolation")
        }
      stages[f"pretrain_{name}_{seed}"] = {**table4.changed(size["pretrain"], changes), "seed": seed}
      stages |= table4.transferred(size, name, seed, f"stage:pretrain_{name}_{seed}")
  table = table4.comparison("BEiT, Table 8", size, ROWS)
  return ConfigDict(dict(stages=tuple(stages), **stages, comparison=table))
