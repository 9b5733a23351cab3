"""Block masks (75 of 14x14): ours, jitted and batched, against a plain NumPy generator; and their share of a step.

    python benchmarks/masks.py                        # the step is measured: BEiT-B 224, batch 8, forward and backward
    python benchmarks/masks.py --step=0.25 --batch=2048    # seconds of a step that was measured elsewhere

The step has neither tokenizer nor optimizer, so that the share comes out too large rather than too small.
"""

import argparse
import math
import random
import time

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import masking
from beit_jax.models import beit

GRID, MASKED, SMALLEST, ASPECT = (14, 14), 75, 16, 0.3


def numpy_mask(rng: random.Random) -> np.ndarray:
  """Algorithm 1 of the paper until exactly `MASKED` patches are masked: bool [h, w]."""
  height, width = GRID
  mask = np.zeros(GRID, bool)
  count = 0
  while count < MASKED:
    left = MASKED - count
    for _ in range(masking.ATTEMPTS):
      area = rng.uniform(SMALLEST, left)
      aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
      h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if h >= height or w >= width:
        continue
      top, start = rng.randint(0, height - h), rng.randint(0, width - w)
      block = mask[top : top + h, start : start + w]
      new = block.size - np.count_nonzero(block)
      if 0 < new <= left:
        block[:] = True
        count += new
        break
    else:
      break
  rest = np.flatnonzero(~mask)
  mask.ravel()[rng.sample(rest.tolist(), MASKED - count)] = True
  return mask


def seconds(call, rounds=7):
  """Median time of a call, after one that compiles."""
  call()
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def step(batch: int) -> float:
  """Seconds of the forward and backward pass of BEiT-B 224 on random pixels and targets."""
  fields = {
    **beit.VARIANTS["base"],
    **beit.preset_fields("plus", "base", pretrain=True),
    "image_size": (224, 224),
  }
  module = beit.BeitForMaskedImageModeling(fields, 8192)
  mask = jnp.asarray(np.stack([numpy_mask(random.Random(i)) for i in range(batch)]))
  slots, _ = beit.masked_slots(mask, MASKED)
  image = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
  params = jax.jit(module.init)(jax.random.key(1), image)["params"]
  targets = jax.random.randint(jax.random.key(2), slots.shape, 0, 8192)

  def loss(params):
    logits = module.apply({"params": params}, image, mask, slots=slots)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -picked.mean()

  gradient = jax.jit(jax.grad(loss))
  return seconds(lambda: jax.block_until_ready(gradient(params)), rounds=5)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=8, help="of the step")
  parser.add_argument("--step", type=float, help="seconds")
  flags = parser.parse_args()
  print(f"on {jax.device_count()} x {jax.devices()[0].device_kind}")
  one = lambda key: masking.block_mask(key, GRID, MASKED, min_block_patches=SMALLEST, min_aspect=ASPECT)
  sample = jax.jit(lambda key, n: jax.vmap(one)(jax.random.split(key, n)), static_argnums=1)

  peer = [numpy_mask(random.Random(i)) for i in range(2000)]
  mine = np.asarray(sample(jax.random.key(0), 2000))
  assert all(mask.sum() == MASKED for mask in peer) and (mine.sum((1, 2)) == MASKED).all()
  # The same law: how often a patch is masked, by its place.
  print(f"largest difference of a patch's frequency: {np.abs(np.mean(peer, 0) - mine.mean(0)).max():.3f}")

  rng = random.Random(0)
  plain = seconds(lambda: [numpy_mask(rng) for _ in range(500)]) / 500
  print(f"NumPy: {1 / plain:,.0f} masks/s")
  for batch in (64, 2048):
    mine = seconds(lambda batch=batch: jax.block_until_ready(sample(jax.random.key(1), batch))) / batch
    print(f"ours, batch {batch}: {1 / mine:,.0f} masks/s, {plain / mine:.1f} times NumPy's")
  mine = seconds(lambda: jax.block_until_ready(sample(jax.random.key(1), flags.batch)))
  whole = step(flags.batch) if flags.step is None else flags.step
  print(
    f"a step of batch {flags.batch}: {whole * 1e3:,.0f} ms, its masks {mine * 1e3:.2f} ms, {mine / whole:.3%} "
    f"(NumPy: {plain * flags.batch / whole:.3%})"
  )


if __name__ == "__main__":
  main()
