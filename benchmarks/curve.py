"""Compares the training curves of masked image modeling here and of a plain PyTorch program of the same recipe.

    python benchmarks/curve.py                       # 3 seeds of 1,000 steps each, about 10 minutes on two CPU cores
    python benchmarks/curve.py --steps=60 --seeds=2  # a small run, as in the tests

Both train the same small BEiT on the same images and given tokens. Order of the images, masks, initial values and
their random numbers are each program's own: the PyTorch program is written from the formulas of the paper and shares
no code with the library. The table shows the mean loss of equal parts of the run and the difference of the means in
units of the spread between seeds; two programs of one recipe differ by about one.
"""

import argparse
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from beit_jax import objectives  # noqa: E402
from beit_jax.config import parse  # noqa: E402
from beit_jax.objectives import stages  # noqa: E402
from beit_jax.run import state as train_state  # noqa: E402
from beit_jax.runtime import sharding  # noqa: E402
from beit_jax.step import make_optimizer, make_schedules, make_train_step  # noqa: E402
from tests.peers import torch  # noqa: E402  works around broken installations of torchvision

SIDE, PATCH, GRID, WORDS = 24, 4, 6, 27
WIDTH, DEPTH, HEADS, SCALE = 64, 4, 2, 0.1
NUM_MASKED, MIN_BLOCK, MIN_ASPECT = 14, 4, 0.3
BATCH, IMAGES = 32, 4096
MEAN = STD = (0.5, 0.5, 0.5)
PEAK, END, DECAY, CLIP, BETAS = 1.5e-3, 1e-5, 0.05, 3.0, (0.9, 0.98)
PARTS = 8  # rows of the table


def images_and_tokens() -> tuple[np.ndarray, np.ndarray]:
  """Images of rectangles, uint8 [I, H, W, 3], and as token of a patch its mean color in three levels, int32 [I, N]."""
  rng = np.random.default_rng(0)
  images = np.empty((IMAGES, SIDE, SIDE, 3), np.uint8)
  for image in images:
    image[:] = rng.integers(256, size=3)
    for _ in range(3):
      top, left = rng.integers(SIDE - 6, size=2)
      height, width = rng.integers(6, 16, size=2)
      image[top : top + height, left : left + width] = rng.integers(256, size=3)
  patches = images.reshape(IMAGES, GRID, PATCH, GRID, PATCH, 3).mean((2, 4))  # [I, h, w, 3]
  levels = np.minimum(patches * 3 // 256, 2).astype(np.int32)
  return images, (levels @ np.array([9, 3, 1], np.int32)).reshape(IMAGES, -1)


def order(seed: int, steps: int) -> np.ndarray:
  """Indices of the images of every step, [steps, B], epoch by epoch."""
  rng = np.random.default_rng(seed)
  epochs = math.ceil(steps * BATCH / IMAGES)
  return np.concatenate([rng.permutation(IMAGES) for _ in range(epochs)])[: steps * BATCH].reshape(steps, -1)


def config_of_ours(seed: int, steps: int):
  tokenizer = dict(
    objective="dvae", model=dict(group_count=2, vocab_size=WORDS), data=dict(token_image_size=12)
  )
  beit = dict(
    objective="beit",
    seed=seed,
    batch_size=BATCH,
    total_steps=steps,
    tokenizer=dict(init_from="stage:tokenizer"),
    model=dict(variant="tiny", width=WIDTH, depth=DEPTH, num_heads=HEADS, patch_size=PATCH),
    mask=dict(
      kind="block_at_most", num_masked=NUM_MASKED, min_block_patches=MIN_BLOCK, min_aspect=MIN_ASPECT
    ),
    optimizer=dict(
      learning_rate=PEAK,
      min_lr=END,
      warmup_steps=steps // 20,
      weight_decay=DECAY,
      clip_norm=CLIP,
      betas=BETAS,
    ),
    data=dict(image_size=SIDE, token_image_size=12),
  )
  runs = {"tokenizer": tokenizer, "beit": beit}
  data = dict(source="shapes", num_examples=IMAGES, mean=MEAN, std=STD)
  for run in runs.values():
    run["data"] |= data
  return {name: parse.complete(run, objectives.schemas(), name) for name, run in runs.items()}


def ours(seed: int, steps: int) -> np.ndarray:
  """The loss of every step of the library's objective, optimizer and training step."""
  configs = config_of_ours(seed, steps)
  tokenizer = stages.Stage("tokenizer", configs["tokenizer"], Path("stage:tokenizer"))
  config = configs["beit"]
  config.tokenizer.init_from = "tokens are given"
  expected = tokenizer.objective.expected_result(tokenizer.config)
  objective = objectives.OBJECTIVES["beit"](config, range(IMAGES), load=lambda path: expected)
  mesh = sharding.make_mesh(1, 1)
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  tx = make_optimizer(config, make_schedules(config, IMAGES // BATCH, steps), shapes, objective.depth)
  state, _, shardings = train_state.create(lambda: objective.init(jax.random.key(seed)), tx, mesh)
  step = make_train_step(objective, tx, 1, jax.random.key(seed), shardings)
  images, tokens = images_and_tokens()
  found = []
  with jax.set_mesh(mesh):
    for number, index in enumerate(order(seed, steps)):
      keys = np.stack([np.full(BATCH, number), np.arange(BATCH)], 1).astype(np.uint32)
      batch = dict(image=images[index], targets=tokens[index], example_key=keys, valid=np.ones(BATCH, bool))
      state, metrics = step(state, {}, jax.tree.map(jnp.asarray, batch))
      found.append(metrics["loss"])
  return np.array([float(loss) for loss in found])


# The PyTorch program: nothing below uses the library.


def block_mask(rng: random.Random) -> np.ndarray:
  """Algorithm 1 of the paper with the stopping rule of the released generator: bool [h, w]."""
  mask = np.zeros((GRID, GRID), bool)
  while (left := NUM_MASKED - int(mask.sum())) > 0:
    for _ in range(10):
      area = rng.uniform(MIN_BLOCK, left)
      aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
      height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if height >= GRID or width >= GRID:
        continue
      top, column = rng.randint(0, GRID - height), rng.randint(0, GRID - width)
      block = mask.copy()
      block[top : top + height, column : column + width] = True
      if 0 < block.sum() - mask.sum() <= left:
        mask = block
        break
    else:
      return mask
  return mask


def _offsets() -> np.ndarray:
  """Rows of the table of relative positions for all pairs of tokens, [T, T]; the last three are those of cls."""
  y, x = np.divmod(np.arange(GRID * GRID), GRID)
  side = 2 * GRID - 1
  index = np.empty((GRID * GRID + 1,) * 2, np.int64)
  index[1:, 1:] = (y[:, None] - y + GRID - 1) * side + x[:, None] - x + GRID - 1
  index[0, :], index[:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
  return index


def _initial(seed: int) -> dict:
  """Parameters: weights from a normal distribution of 0.02 cut off at one standard deviation, the rest 0 or 1."""
  torch.manual_seed(seed)

  def weight(*shape, scale=1.0):
    values = torch.nn.init.trunc_normal_(torch.empty(shape), std=0.02, a=-0.02, b=0.02)
    return torch.nn.Parameter(values * scale)

  def constant(value, *shape):
    return torch.nn.Parameter(torch.full(shape, value))

  p = {"patch.w": weight(3 * PATCH**2, WIDTH), "patch.b": constant(0.0, WIDTH)}
  p |= {"cls": weight(1, 1, WIDTH), "mask": weight(1, 1, WIDTH), "head.w": weight(WIDTH, WORDS)}
  p |= {"head.b": constant(0.0, WORDS), "table": constant(0.0, (2 * GRID - 1) ** 2 + 3, HEADS)}
  p |= {"norm.w": constant(1.0, WIDTH), "norm.b": constant(0.0, WIDTH)}
  for i in range(DEPTH):
    scale = (2 * (i + 1)) ** -0.5
    p |= {f"{i}.qkv": weight(WIDTH, 3 * WIDTH), f"{i}.proj.w": weight(WIDTH, WIDTH, scale=scale)}
    p |= {f"{i}.fc1.w": weight(WIDTH, 4 * WIDTH), f"{i}.fc2.w": weight(4 * WIDTH, WIDTH, scale=scale)}
    p |= {f"{i}.{name}": constant(0.0, WIDTH) for name in ("q.b", "v.b", "proj.b", "fc2.b")}
    p |= {f"{i}.norm{j}.{part}": constant(float(part == "w"), WIDTH) for j in (1, 2) for part in "wb"}
    p |= {f"{i}.fc1.b": constant(0.0, 4 * WIDTH), f"{i}.gamma1": constant(SCALE, WIDTH)}
    p |= {f"{i}.gamma2": constant(SCALE, WIDTH)}
  return p


def _logits(p: dict, image, mask):
  """Logits of the masked patches, [masked patches, words]."""
  norm = lambda x, name: torch.nn.functional.layer_norm(x, (WIDTH,), p[f"{name}.w"], p[f"{name}.b"], 1e-6)
  x = image.reshape(BATCH, GRID, PATCH, GRID, PATCH, 3).transpose(2, 3).reshape(BATCH, GRID**2, -1)
  x = torch.where(mask[..., None], p["mask"], x @ p["patch.w"] + p["patch.b"])
  x = torch.cat([p["cls"].expand(BATCH, 1, WIDTH), x], 1)
  bias = p["table"][_offsets()].permute(2, 0, 1)
  for i in range(DEPTH):
    biases = torch.cat([p[f"{i}.q.b"], torch.zeros(WIDTH), p[f"{i}.v.b"]])
    qkv = norm(x, f"{i}.norm1") @ p[f"{i}.qkv"] + biases
    q, k, v = qkv.reshape(BATCH, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * (WIDTH // HEADS) ** -0.5 + bias).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(x.shape) @ p[f"{i}.proj.w"] + p[f"{i}.proj.b"]
    x = x + p[f"{i}.gamma1"] * out
    out = torch.nn.functional.gelu(norm(x, f"{i}.norm2") @ p[f"{i}.fc1.w"] + p[f"{i}.fc1.b"])
    x = x + p[f"{i}.gamma2"] * (out @ p[f"{i}.fc2.w"] + p[f"{i}.fc2.b"])
  return norm(x, "norm")[:, 1:][mask] @ p["head.w"] + p["head.b"]


def theirs(seed: int, steps: int) -> np.ndarray:
  """The loss of every step of the PyTorch program."""
  p, rng, warmup = _initial(seed), random.Random(seed), steps // 20
  decayed = [x for name, x in p.items() if x.ndim > 1 and name != "cls"]
  others = [x for name, x in p.items() if x.ndim == 1 or name == "cls"]
  groups = [dict(params=decayed, weight_decay=DECAY), dict(params=others, weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=1e-8)
  images, tokens = images_and_tokens()
  found = []
  for step, index in enumerate(order(1000 + seed, steps)):
    mask = torch.from_numpy(np.stack([block_mask(rng).ravel() for _ in range(BATCH)]))
    pixels = (torch.from_numpy(images[index]).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    targets = torch.from_numpy(tokens[index]).long()[mask]
    loss = torch.nn.functional.cross_entropy(_logits(p, pixels, mask), targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(p.values(), CLIP)
    progress = (step - warmup) / (steps - warmup)
    rate = END + (PEAK - END) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
      group["lr"] = PEAK * step / max(warmup - 1, 1) if step < warmup else rate
    optimizer.step()
    found.append(float(loss.detach()))
  return np.array(found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--seeds", type=int, default=3)
  args = parser.parse_args()
  curves = {f.__name__: np.stack([f(seed, args.steps) for seed in range(args.seeds)]) for f in (ours, theirs)}
  parts = {name: [part.mean(1) for part in np.array_split(c, PARTS, axis=1)] for name, c in curves.items()}
  print(f"{'steps':>12} {'beit_jax':>10} {'PyTorch':>10} {'spread':>8} {'difference / spread':>20}")
  for i, steps in enumerate(np.array_split(np.arange(args.steps), PARTS)):
    a, b = parts["ours"][i], parts["theirs"][i]
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    label = f"{steps[0] + 1}-{steps[-1] + 1}"
    print(
      f"{label:>12} {a.mean():10.4f} {b.mean():10.4f} {spread:8.4f} {(a.mean() - b.mean()) / spread:20.2f}"
    )


if __name__ == "__main__":
  main()
