"""CIFAR-10, fine-tuning with the full recipe of the paper's Table 13 at a small size, or without augmentation.

    python -m beit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10       # first: the backbone
    python -m beit_jax.main --config=configs/finetune_cifar10.py:full
    python -m beit_jax.main --config=configs/finetune_cifar10.py:plain

500 labels, 60 epochs; three seeds fine-tuned from runs/cifar10/pretrain and three from scratch. Variants: `full`
(default) has RandAugment, random erasing, mixup and cutmix, label smoothing, stochastic depth, layer decay and
averaged weights; `plain` has crops and flips only. Learning rate, epochs and batch size are the same in all.
Source: BEiT paper, Table 13, with the sizes of configs/cifar10.py. Expected: nothing published. Run here:
docs/results.md.
"""

import cifar10
from ml_collections import ConfigDict

FULL = dict(
  loss=dict(label_smoothing=0.1, mixup_alpha=0.8, cutmix_alpha=1.0),
  data=dict(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25),
  optimizer=dict(ema_decay=0.99),
  model=dict(drop_path_rate=0.1),
)
PLAIN = dict(loss=dict(label_smoothing=0.0), data={}, optimizer={}, model={})
VARIANTS = {"full": FULL, "plain": PLAIN}


def get_config(variant="full"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {sorted(VARIANTS)}")
  recipe = VARIANTS[variant]

  def run(init_from: str, layer_decay: float, seed: int) -> dict:
    optimizer = dict(learning_rate=1e-3, min_lr=1e-6, warmup_epochs=5.0, weight_decay=0.05)
    return dict(
      objective="classify",
      init_from=init_from,
      seed=seed,
      batch_size=32,
      total_epochs=60.0,
      model={**cifar10.MODEL, **recipe["model"]},
      optimizer={**optimizer, "layer_decay": layer_decay, **recipe["optimizer"]},
      loss=recipe["loss"],
      data={**cifar10.DATA, "fraction": 0.01, "crop": "pad", **recipe["data"]},
      eval=dict(split="test"),
      checkpoint=dict(every_steps=None),
    )

  stages = {}
  for seed in cifar10.SEEDS:
    stages[f"finetune_{seed}"] = run("runs/cifar10/pretrain", 0.9, seed)
  for seed in cifar10.SEEDS:
    stages[f"scratch_{seed}"] = run("", 1.0, seed)
  rows = [
    (f"{text}{average} (test)", f"{stage}_*.eval.{prefix}acc1", ".1%")
    for stage, text in (("finetune", "fine-tuned accuracy"), ("scratch", "from scratch"))
    for prefix, average in (("", ""), ("ema_", ", averaged weights"))
  ]
  rows += [
    (f"training loss, last step: {stage}", f"{stage}_*.last.loss", ".3f") for stage in ("finetune", "scratch")
  ]
  return ConfigDict(dict(stages=tuple(stages), **stages, summary=tuple(rows)))
