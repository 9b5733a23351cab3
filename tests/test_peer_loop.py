"""A pre-training run in float32 against a plain PyTorch loop of the same recipe, written here from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import losses, optim, trees
from beit_jax.models import beit, layers
from beit_jax.objectives.base import LossOutput, Metric
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.step import make_train_step
from tests.peers import torch

STEPS, BATCH, WARMUP, MASKED = 260, 8, 20, 7
PEAK, END, DECAY, CLIP, BETAS, EPS = 1.5e-3, 1e-5, 0.05, 1.0, (0.9, 0.999), 1e-8
GRID, PATCH, WIDTH, DEPTH, HEADS, WORDS = (4, 4), 4, 32, 3, 4, 12
ENCODER = dict(
  image_size=(16, 16), patch_size=PATCH, width=WIDTH, depth=DEPTH, num_heads=HEADS, layer_scale_init=0.1
)


def _batches():
  """Images of one color, masks, and the word of the color for every patch; the same for both programs."""
  rng = np.random.default_rng(0)
  colors = rng.normal(size=(WORDS, 3))
  for _ in range(STEPS):
    targets = rng.integers(WORDS, size=(BATCH, 1)).repeat(16, 1)
    pixels = colors[targets].reshape(BATCH, *GRID, 3).repeat(PATCH, 1).repeat(PATCH, 2)
    image = pixels + 0.1 * rng.normal(size=pixels.shape)
    mask = rng.random((BATCH, 16)).argsort(1) < MASKED
    yield image.astype(np.float32), mask.reshape(BATCH, *GRID), targets.astype(np.int32)


class _Objective:
  """Masked image modeling of given batches, with the library's model, slots and loss."""

  module = beit.BeitForMaskedImageModeling(ENCODER, WORDS)

  def init(self):
    params = self.module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    draw = lambda name, leaf: leaf + 0.02 * jax.random.normal(jax.random.key(len(name)), leaf.shape)
    return {"params": trees.named_map(draw, params)}

  def loss(self, variables, frozen, batch, key, step):
    slots, weight = beit.masked_slots(batch["mask"], MASKED)
    logits = self.module.apply(variables, batch["image"], batch["mask"], slots=slots, train=True)
    targets = jnp.take_along_axis(batch["targets"], slots, 1)
    total, _, count = losses.masked_cross_entropy(logits, targets, weight)
    return LossOutput({"loss": Metric(total, count)})

  def after_update(self, params, collections, statistics, step):
    return collections


def _ours():
  """The loss of every step, and the parameters at the start."""
  objective, mesh = _Objective(), sharding.make_mesh(1, 1)
  rate = dict(peak=PEAK, end=END, warmup_steps=WARMUP, total_steps=STEPS)
  tx = optim.make_optimizer(
    jax.eval_shape(objective.init)["params"],
    schedule=lambda step: optim.warmup_cosine(step, **rate, xp=jnp),
    weight_decay=DECAY,
    betas=BETAS,
    eps=EPS,
    clip_norm=CLIP,
  )
  state, _, shardings = train_state.create(objective.init, tx, mesh)
  start = {name: np.array(leaf) for name, leaf in trees.flatten(state.params).items()}
  step = make_train_step(objective, tx, 1, jax.random.key(0), shardings)
  found = []
  for image, mask, targets in _batches():
    state, metrics = step(state, {}, dict(image=image, mask=mask, targets=targets))
    found.append(float(metrics["loss"]))
  return np.array(found), start


def _layer_norm(x, p, name):
  return torch.nn.functional.layer_norm(x, (WIDTH,), p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)


def _attention(x, p, name, bias):
  q_bias, v_bias = p[f"{name}/q_bias"], p[f"{name}/v_bias"]
  qkv = x @ p[f"{name}/qkv/kernel"] + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
  q, k, v = qkv.reshape(BATCH, 17, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
  weights = (q @ k.mT * (WIDTH // HEADS) ** -0.5 + bias).softmax(-1)
  out = (weights @ v).transpose(1, 2).reshape(BATCH, 17, WIDTH)
  return out @ p[f"{name}/proj/kernel"] + p[f"{name}/proj/bias"]


def _mlp(x, p, name):
  x = torch.nn.functional.gelu(x @ p[f"{name}/fc1/kernel"] + p[f"{name}/fc1/bias"])
  return x @ p[f"{name}/fc2/kernel"] + p[f"{name}/fc2/bias"]


def _forward(p, image, mask):
  """The mean cross-entropy's logits: [masked patches of the batch, words]."""
  x = image.reshape(BATCH, 4, PATCH, 4, PATCH, 3).transpose(2, 3).reshape(BATCH, 16, -1)
  x = x @ p["encoder/patch_embed/kernel"].reshape(-1, WIDTH) + p["encoder/patch_embed/bias"]
  x = torch.where(mask.reshape(BATCH, 16, 1), p["encoder/mask_token"], x)
  x = torch.cat([p["encoder/cls_token"].expand(BATCH, 1, WIDTH), x], 1)
  index = torch.from_numpy(np.array(layers.relative_position_index(GRID))).long()
  bias = p["encoder/rel_pos_bias/relative_position_bias_table"][index].permute(2, 0, 1)
  for i in range(DEPTH):
    block = f"encoder/block_{i:02d}"
    x = x + p[f"{block}/gamma_1"] * _attention(_layer_norm(x, p, f"{block}/norm1"), p, f"{block}/attn", bias)
    x = x + p[f"{block}/gamma_2"] * _mlp(_layer_norm(x, p, f"{block}/norm2"), p, f"{block}/mlp")
  x = _layer_norm(x, p, "encoder/norm")[:, 1:][mask.reshape(BATCH, 16)]
  return x @ p["lm_head/kernel"] + p["lm_head/bias"]


def _theirs(start):
  p = {name: torch.nn.Parameter(torch.from_numpy(leaf)) for name, leaf in start.items()}
  vectors = [leaf for name, leaf in p.items() if leaf.ndim == 1 or name.endswith("cls_token")]
  others = [leaf for leaf in p.values() if not any(leaf is vector for vector in vectors)]
  groups = [dict(params=others, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)
  torch.set_num_threads(1)  # the arrays are tiny
  found = []
  for step, batch in enumerate(_batches()):
    image, mask, targets = map(torch.from_numpy, batch)
    words = targets.long()[mask.reshape(BATCH, 16)]
    loss = torch.nn.functional.cross_entropy(_forward(p, image, mask), words)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.sqrt(sum((leaf.grad**2).sum() for leaf in p.values()))
    progress = (step - WARMUP) / (STEPS - WARMUP)
    rate = END + (PEAK - END) * (1 + np.cos(np.pi * progress)) / 2
    for group in optimizer.param_groups:
      group["lr"] = PEAK * step / (WARMUP - 1) if step < WARMUP else rate
    for leaf in p.values():
      leaf.grad *= min(1.0, CLIP / float(norm.detach()))
    optimizer.step()
    found.append(float(loss.detach()))
  return np.array(found)


@pytest.mark.slow
def test_the_losses_of_260_steps_agree_with_pytorch():
  ours, start = _ours()
  theirs = _theirs(start)
  assert ours[:5].mean() > 2.3 and ours[-20:].mean() < 1.5  # it has learned something
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
