"""Linear probe on ImageNet-1K: a linear classifier on every block of a frozen encoder, all in one pass.

    python -m beit_jax.main --config=configs/linear_probe.py --config.encoder.init_from=runs/beit_base/pretrain

The best block is not the last one: the 9th of 12 for base, the 14th of 24 for large (paper, Table 9).
Source: unilm beit/run_linear_eval.py and README (AdamW 4e-3, weight decay 1e-4, batch 1024); 50 epochs as in the
paper's Table 9. Expected: 56.7 % (base), 73.5 % (large) (paper, Table 9, on average-pooled features).
Not run here; built and traced in the tests. A small version that was run: configs/probe_cifar10.py.
"""

from beit_base import LABELED
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="linear_probe",
      encoder=dict(init_from="runs/beit_base/pretrain"),
      batch_size=1024,
      total_epochs=50.0,
      model=dict(dtype="bfloat16"),
      optimizer=dict(learning_rate=4e-3, min_lr=0.0, weight_decay=1e-4),
      data=LABELED,
      eval=dict(split="validation", batch_size=512, every_steps=6250),
      checkpoint=dict(every_steps=6250, best="acc1"),
    )
  )
