# %% [markdown]
# # Looking inside a model
#
# Features, attention, visual tokens and predictions of the quickstart's models. Train them first:
# `python -m beit_jax.main --config=configs/quickstart.py`. The variable `RUN` of the environment names another run with
# the stages `tokenizer` and `pretrain`.

# %%
import os

import jax
import numpy as np
from PIL import Image

import beit_jax
from beit_jax import masking
from beit_jax.data import drawing, shapes

RUN = os.environ.get("RUN", "runs/quickstart")
tokenizer = beit_jax.load(f"{RUN}/tokenizer")
model = beit_jax.load(f"{RUN}/pretrain")
print(tokenizer)
print(model)

# %% [markdown]
# ## Images
#
# Scenes that no model has seen. A list of paths, such as `sorted(pathlib.Path("photos").iterdir())`, does as well.

# %%
scenes = [shapes.render("test", index, 32) for index in range(200)]
images = [scene["image"] for scene in scenes]
prepared = np.asarray(model.preprocess(images))
mean, std = (np.asarray(model.preprocessing[name]) for name in ("mean", "std"))
pixels = (prepared * std + mean).clip(0, 1)  # what the model sees, to draw it

# %% [markdown]
# ## Visual tokens
#
# The tokenizer turns an image into one word per patch; its decoder turns the words back into pixels.

# %%
ids = tokenizer.tokenize(images)
print(
  f"{ids.shape[1]} tokens per image; image 0 uses {len(np.unique(ids[0]))} of {tokenizer.module.vocab_size} words"
)
rows = {"image": pixels, "decoded from its tokens": np.asarray(tokenizer.decode(ids))}
Image.fromarray(drawing.labeled_rows(rows))

# %% [markdown]
# ## Masked patches
#
# The model predicts the tokens of the patches that it does not see.

# %%
patch = model.encoder_fields["patch_size"]
grid_size = tuple(side // patch for side in model.preprocessing["image_size"])
num_masked = round(0.4 * grid_size[0] * grid_size[1])
mask = np.asarray(masking.block_mask(jax.random.key(0), grid_size, num_masked, min_block_patches=4))
predicted = np.asarray(model.forward(prepared, mask).argmax(-1))
right = (predicted == np.asarray(ids))[:, mask.reshape(-1)].mean()
print(f"tokens of masked patches predicted exactly: {right:.1%}")
rows["masked"] = drawing.gray_out(pixels, np.broadcast_to(mask, (len(images), *grid_size)))
rows["predicted"] = np.asarray(tokenizer.decode(np.where(mask.reshape(-1), predicted, ids)))

# %% [markdown]
# ## Attention
#
# Where the patch in the middle of the image looks, in the last block. Each row of the weights sums to 1.

# %%
weights = model.attention(images)  # [B, K, T, T]
height, width = model.preprocessing["image_size"]
looks = np.asarray(model.attention_map(images, point=(height // 2, width // 2)))
sums = weights.sum(-1)
print(
  f"{weights.shape[1]} heads, {weights.shape[2]} tokens; sums of rows from {sums.min():.3f} to {sums.max():.3f}"
)
brightness = looks / looks.max((1, 2), keepdims=True)
rows["attention of the middle"] = pixels * (0.2 + 0.8 * brightness[..., None])

# %% [markdown]
# ## Features
#
# The mean patch token after each block. How often is the most similar other image of the same class?

# %%
labels = np.array([scene["label"] for scene in scenes])
for block, features in enumerate(model.features(images, pool="mean")):
  unit = np.asarray(features) / np.linalg.norm(features, axis=-1, keepdims=True)
  similarity = unit @ unit.T - 2 * np.eye(len(unit))
  print(
    f"block {block}: nearest neighbor of the same class {(labels[similarity.argmax(-1)] == labels).mean():.0%}"
  )

# %%
sheet = Image.fromarray(drawing.labeled_rows(rows))
sheet.save("look_inside.png")
