"""The tokenizer: DALL-E's discrete VAE at full size, on ImageNet-1K at 112x112 (14x14 tokens, 8,192 words).

    python -m beit_jax.main --config=configs/dvae.py --workdir=runs/dvae

Source: DALL-E paper (arXiv 2102.12092), section 2.1 and appendix A.2: logit-Laplace likelihood, KL weight 6.6 per
256x256x3 elements (= 6.6/192 for our means per token and per pixel; 112x112x3 / 196 is 192 too), temperature 1 ->
1/16 over 150,000 updates on a cosine. DALL-E's 3 million updates on 64 GPUs are far more than 112x112 ImageNet needs.
The authors of BEiT trained a tokenizer on ImageNet-1K with a reconstruction error of 0.0880; it cost 0.16 points
after fine-tuning (BEiT paper, Table 8: 82.70 against 82.86).
Expected: that error (mean absolute, normalized RGB). Run here: two steps at full size (docs/results.md).
"""

from ml_collections import ConfigDict

IMAGENET = dict(
  source="tfds", name="imagenet2012", image_size=224, token_image_size=112, workers=8, threads=8
)


def get_config():
  return ConfigDict(
    dict(
      objective="dvae",
      batch_size=512,
      total_epochs=60.0,  # 150,000 updates
      model=dict(n_hid=256, n_init=128, n_blk_per_group=2, group_count=4, vocab_size=8192, dtype="bfloat16"),
      optimizer=dict(learning_rate=3e-4, min_lr=1e-6, warmup_steps=2000, weight_decay=1e-4, clip_norm=1.0),
      loss=dict(
        reconstruction="logit_laplace",
        kl_weight=6.6 / 192,
        kl_warmup_steps=5000,
        temperature=1.0,
        temperature_end=1 / 16,
        temperature_steps=150_000,
      ),
      data={**IMAGENET, "crop_scale": (0.2, 1.0)},
      eval=dict(split="validation", fraction=0.1, batch_size=512, every_steps=5000),
      checkpoint=dict(every_steps=2500),
    )
  )
