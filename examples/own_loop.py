# %% [markdown]
# # A training loop of one's own
#
# The modules of `beit_jax` are ordinary Flax modules. This loop trains a small classifier with Optax and saves it in a
# form that `beit_jax.load`, `beit_jax.predict` and `--config.init_from` read.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import beit_jax
from beit_jax.data import shapes
from beit_jax.models.beit import BeitForImageClassification
from beit_jax.weights.pretrained import Pretrained

STEPS = int(os.environ.get("STEPS", "300"))
OUT = Path(os.environ.get("OUT", "own_model"))  # must not exist
SIZE, BATCH_SIZE = 24, 32

# %% [markdown]
# ## Data
#
# Any arrays do: images in [0, 1] and class numbers.


# %%
def batch_of(split, step):
  scenes = [shapes.render(split, step * BATCH_SIZE + i, SIZE) for i in range(BATCH_SIZE)]
  images = np.stack([scene["image"] for scene in scenes])
  return images.astype(np.float32) / 255, np.array([scene["label"] for scene in scenes])


# %% [markdown]
# ## Model
#
# The fields of `Beit` give the encoder. To start from pre-trained weights, use the module and the parameters of
# `beit_jax.load(...)`.

# %%
encoder = dict(image_size=(SIZE, SIZE), patch_size=4, width=64, depth=4, num_heads=2, rel_pos="per_block")
module = BeitForImageClassification(encoder={**encoder, "drop_path_rate": 0.1}, num_classes=len(shapes.KINDS))
params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, STEPS // 10, STEPS), weight_decay=0.05)
opt_state = optimizer.init(params)

# %% [markdown]
# ## Loop


# %%
@jax.jit
def train_step(params, opt_state, images, labels, key):
  def loss_of(params):
    x = (images - 0.5) / 0.5
    logits = module.apply({"params": params}, x, train=True, rngs={"drop_path": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  loss, gradients = jax.value_and_grad(loss_of)(params)
  updates, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


for step in range(STEPS):
  key = jax.random.fold_in(jax.random.key(1), step)
  params, opt_state, loss = train_step(params, opt_state, *batch_of("train", step), key)
  if step % 50 == 0 or step == STEPS - 1:
    print(f"step {step}: loss {loss:.3f}")

# %% [markdown]
# ## Save and use
#
# `preprocessing` says how images become input, `labels` what the classes are called.

# %%
preprocessing = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(SIZE, SIZE), crop_pct=1.0)
preprocessing |= dict(interpolation="bicubic", resize="short_side")
model = Pretrained("classifier", params, module, preprocessing, {"labels": list(shapes.KINDS)})
beit_jax.save(model, OUT, format="orbax")

again = beit_jax.load(OUT)
print(again)
images, labels = batch_of("test", 0)
accuracy = (np.asarray(again(images)).argmax(-1) == labels).mean()
print(f"accuracy on {len(labels)} test scenes: {accuracy:.0%}")
