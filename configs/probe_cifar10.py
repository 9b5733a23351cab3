"""CIFAR-10, frozen features: a linear probe and k-NN on every block, pre-trained and random.

    python -m beit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10       # first: the backbone
    python -m beit_jax.main --config=configs/probe_cifar10.py

10,000 labels; three seeds, except for k-NN on the pre-trained encoder, which does not depend on a seed.
Source: unilm run_linear_eval.py (AdamW, weight decay 1e-4, concat(cls, mean of patches), all blocks at once), DINO's
eval_knn.py (k 20, temperature 0.07). The learning rate, for 780 small steps instead of 62,500 large ones, was chosen
among 4e-3, 2e-2 and 0.1 on 2,000 held-out training images. Expected: nothing published. Run here: docs/results.md.
"""

import cifar10
from ml_collections import ConfigDict

BACKBONE = "runs/cifar10/pretrain"


def get_config():
  data = {**cifar10.DATA, "crop": "center", "flip": False, "fraction": 0.2}
  common = dict(model=cifar10.MODEL, data=data, eval=dict(split="test"), checkpoint=dict(every_steps=None))

  def probe(init_from: str, seed: int) -> dict:
    return dict(
      objective="linear_probe",
      encoder=dict(init_from=init_from),
      seed=seed,
      batch_size=64,
      total_epochs=5.0,
      optimizer=dict(learning_rate=0.1, min_lr=0.0, weight_decay=1e-4),
      **common,
    )

  def knn(init_from: str, seed: int) -> dict:
    return dict(objective="knn", encoder=dict(init_from=init_from), seed=seed, **common)

  stages = {}
  for seed in cifar10.SEEDS:
    stages[f"probe_{seed}"] = probe(BACKBONE, seed)
    stages[f"probe_random_{seed}"] = probe("", seed)
    stages[f"knn_random_{seed}"] = knn("", seed)
  stages["knn"] = knn(BACKBONE, 0)
  rows = []
  for pattern, text in (
    ("probe_[0-9]", "linear probe"),
    ("probe_random_*", "linear probe, random encoder"),
    ("knn", "k-NN"),
    ("knn_random_*", "k-NN, random encoder"),
  ):
    rows += [
      (f"{text}, block {i}", f"{pattern}.eval.acc1_{i:02d}", ".1%") for i in range(cifar10.MODEL["depth"])
    ]
  return ConfigDict(dict(stages=tuple(stages), **stages, summary=tuple(rows)))
