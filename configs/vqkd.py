"""The tokenizer of BEiT v2 (VQ-KD) at full size, on ImageNet-1K at 224x224 (14x14 tokens, 8,192 words).

    python -m beit_jax.main --config=configs/vqkd.py --config.teacher.init_from=clip-vit-base-patch16
    python -m beit_jax.main --config=configs/vqkd.py:dino --config.teacher.init_from=dino_vitbase16_pretrain.pth
    python -m beit_jax.main --config=configs/vqkd.py:pixels --config.init_from=runs/vqkd

Variants: `clip` (default) and `dino` name the teacher, which sets the depth of the decoder. The teacher may be any
backbone with 14x14 patches. `pixels` trains a decoder to pixels for a finished tokenizer, which it does not change;
`--config.model.pixel_depth=4` trains one beside the tokenizer instead.
Pre-train with it: tokenizer.init_from=runs/vqkd and data.token_image_size=224, data.token_interpolation=bicubic.
Source: unilm beit2/TOKENIZER.md, run_vqkd_training.py (learning rate 5e-5 for 128 images).
Expected: 97 % of the words in use with CLIP and three blocks in the decoder, 100 % with DINO and one (TOKENIZER.md).
Not run here at this size; built and traced in the tests.
"""

import dvae
from ml_collections import ConfigDict

VARIANTS = ("clip", "dino", "pixels")
OPTIMIZER = dict(learning_rate=2e-4, min_lr=1e-5, warmup_epochs=10.0, weight_decay=1e-4, betas=(0.9, 0.99))


def get_config(variant="clip"):
  if variant not in VARIANTS:
    raise ValueError(f"variant {variant!r} is unknown; there are {VARIANTS}")
  config = ConfigDict(
    dict(
      objective="vqkd",
      batch_size=512,
      total_epochs=100.0,
      teacher=dict(init_from=f"path/to/{variant}"),
      model=dict(variant="base", decoder_depth=1 if variant == "dino" else 3, dtype="bfloat16"),
      optimizer=OPTIMIZER,
      data={
        **dvae.IMAGENET,
        "token_image_size": 224,
        "token_interpolation": "bicubic",
        "crop_scale": (0.08, 1.0),
      },
      eval=dict(split="validation", fraction=0.1, batch_size=512, every_steps=12_500),
      checkpoint=dict(every_steps=2500),
    )
  )
  if variant == "pixels":
    config.init_from, config.teacher.init_from = "path/to/vqkd.pth", ""
    config.total_epochs, config.optimizer.warmup_epochs, config.optimizer.weight_decay = 10.0, 1.0, 0.0
    config.model.update(
      pixel_depth=4, teacher_dim=768
    )  # of a teacher of base size; 512: of unilm's files for CLIP
  return config
