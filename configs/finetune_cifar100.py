"""Fine-tuning on CIFAR-100 at 224x224.

    python -m beit_jax.main --config=configs/finetune_cifar100.py --config.init_from=runs/beit_base/pretrain

Source: BEiT paper, Tables 11 and 13: batch 512, 150 epochs, weight decay 0.3, no random erasing. The paper sweeps the
peak learning rate over 2e-3 to 5e-3; here it is 4e-3.
Expected: 90.1 % after pre-training on ImageNet-1K, 91.8 % with intermediate fine-tuning (paper, Table 11). Not run
here; built and traced in the tests.
"""

from beit_base import LABELED
from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    dict(
      objective="classify",
      init_from="",
      batch_size=512,
      total_epochs=150.0,
      model=dict(variant="base", preset="plus", drop_path_rate=0.1, dtype="bfloat16"),
      optimizer=dict(learning_rate=4e-3, min_lr=1e-6, warmup_epochs=20.0, weight_decay=0.3, layer_decay=0.65),
      loss=dict(label_smoothing=0.1, mixup_alpha=0.8, cutmix_alpha=1.0),
      data={**LABELED, "name": "cifar100", "num_classes": 100, "rand_augment": "rand-m9-mstd0.5-inc1"},
      eval=dict(split="test", batch_size=512, every_steps=1000),
      checkpoint=dict(every_steps=1000, best="acc1"),
    )
  )
