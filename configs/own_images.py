"""A tokenizer and a backbone from your own folder of images; labels are not needed.

    python -m beit_jax.main --config=configs/own_images.py --config.data.root=/path/to/images --workdir=runs/mine

Images may be color, gray, 16-bit or palette images of any size; sub-folders are searched. They are cropped to 64x64
and cut into patches of 8x8. The tokenizer sees 32x32 and has 512 words. docs/own_data.md says what to change for
larger runs. A tenth of the images is not trained on but evaluated every 500 steps, which also finds a collapse of the
tokenizer's codebook.
Expected: nothing published. Run here: two steps of each stage, in the tests; 500 steps of the tokenizer on 450
photographs, after which 21 % of the words were in use on the 50 that were held out.
"""

from ml_collections import ConfigDict

DATA = dict(
  source="folder",
  split="train[10%:]",  # of the sub-folder "train" of `root`; without one, of `root` itself
  label_key="",
  image_size=64,
  token_image_size=32,
  crop_scale=(0.3, 1.0),
  workers=0,
  threads=4,
)
MODEL = dict(variant="tiny", depth=6, patch_size=8)
EVAL = dict(split="train[:10%]", batch_size=64, every_steps=500)  # the other tenth


def get_config():
  tokenizer = dict(
    objective="dvae",
    batch_size=32,
    total_steps=1500,
    model=dict(n_hid=32, n_init=32, n_blk_per_group=1, group_count=3, vocab_size=512),
    optimizer=dict(learning_rate=6e-3, min_lr=1e-4, warmup_steps=50, weight_decay=0.0),
    loss=dict(kl_weight=0.03, kl_warmup_steps=500, temperature_steps=1200),
    data=DATA,
    eval=EVAL,
    checkpoint=dict(every_steps=500),
  )
  pretrain = dict(
    objective="beit",
    tokenizer=dict(init_from="stage:tokenizer"),
    batch_size=64,
    total_steps=3000,
    model=MODEL,
    mask=dict(num_masked=25, min_block_patches=4),
    optimizer=dict(learning_rate=1.5e-3, warmup_steps=200, clip_norm=3.0, betas=(0.9, 0.98)),
    data={**DATA, "color_jitter": 0.4},
    eval=EVAL,
    checkpoint=dict(every_steps=500),
  )
  stages = dict(tokenizer=tokenizer, pretrain=pretrain)
  return ConfigDict(dict(stages=tuple(stages), **stages))
