"""Compares block masks (75 of 14x14) with a plain NumPy generator, and with the time of a training step.

    python benchmarks/masks.py                             # measures a step: BEiT-B 224, batch 8, forward and backward
    python benchmarks/masks.py --step=0.25 --batch=2048    # seconds of a step that was measured elsewhere

Our masks are jitted and batched. The step has neither tokenizer nor optimizer, so the printed fraction is an upper
bound.
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

GRID_SIZE, NUM_MASKED, MIN_BLOCK_PATCHES, MIN_ASPECT = (14, 14), 75, 16, 0.3


def numpy_mask(rng: random.Random) -> np.ndarray:
  """Runs Algorithm 1 of the paper until exactly `NUM_MASKED` patches are masked: bool [h, w]."""
  height, width = GRID_SIZE
  mask = np.zeros(GRID_SIZE, bool)
  count = 0
  while count < NUM_MASKED:
    left = NUM_MASKED - count
    for _ in range(masking.ATTEMPTS):
      area = rng.uniform(MIN_BLOCK_PATCHES, left)
      aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
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
  mask.ravel()[rng.sample(rest.tolist(), NUM_MASKED - count)] = True
  return mask


def median_seconds(call, rounds=7):
  """Returns the median time of a call, after a first one that compiles."""
  call()
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def time_step(batch: int) -> float:
  """Returns the seconds of the forward and backward pass of BEiT-B 224 on random pixels and targets."""
  fields = {
    **beit.VARIANTS["base"],
    **beit.preset_fields("plus", "base", pretrain=True),
    "image_size": (224, 224),
  }
  module = beit.BeitForMaskedImageModeling(fields, 8192)
  mask = jnp.asarray(np.stack([numpy_mask(random.Random(i)) for i in range(batch)]))
  slots, _ = beit.masked_slots(mask, NUM_MASKED)
  image = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
  params = jax.jit(module.init)(jax.random.key(1), image)["params"]
  targets = jax.random.randint(jax.random.key(2), slots.shape, 0, 8192)

  def loss(params):
    logits = module.apply({"params": params}, image, mask, slots=slots)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -picked.mean()

  gradient = jax.jit(jax.grad(loss))
  return median_seconds(lambda: jax.block_until_ready(gradient(params)), rounds=5)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=8, help="batch size of the step")
  parser.add_argument("--step", type=float, help="seconds of a step, instead of measuring it")
  flags = parser.parse_args()
  print(f"on {jax.device_count()} x {jax.devices()[0].device_kind}")

  def sample_one(key):
    options = dict(min_block_patches=MIN_BLOCK_PATCHES, min_aspect=MIN_ASPECT)
    return masking.block_mask(key, GRID_SIZE, NUM_MASKED, **options)

  sample = jax.jit(lambda key, n: jax.vmap(sample_one)(jax.random.split(key, n)), static_argnums=1)

  reference = [numpy_mask(random.Random(i)) for i in range(2000)]
  mine = np.asarray(sample(jax.random.key(0), 2000))
  assert all(mask.sum() == NUM_MASKED for mask in reference) and (mine.sum((1, 2)) == NUM_MASKED).all()
  # Both have the same distribution: compare how often each patch is masked.
  print(
    f"largest difference of a patch's frequency: {np.abs(np.mean(reference, 0) - mine.mean(0)).max():.3f}"
  )

  rng = random.Random(0)
  plain = median_seconds(lambda: [numpy_mask(rng) for _ in range(500)]) / 500
  print(f"NumPy: {1 / plain:,.0f} masks/s")
  for batch in (64, 2048):
    mine = median_seconds(lambda batch=batch: jax.block_until_ready(sample(jax.random.key(1), batch))) / batch
    print(f"ours, batch {batch}: {1 / mine:,.0f} masks/s, {plain / mine:.1f} times NumPy's rate")
  mine = median_seconds(lambda: jax.block_until_ready(sample(jax.random.key(1), flags.batch)))
  step = time_step(flags.batch) if flags.step is None else flags.step
  print(
    f"a step of batch {flags.batch}: {step * 1e3:,.0f} ms, its masks {mine * 1e3:.2f} ms, {mine / step:.3%} "
    f"(NumPy: {plain * flags.batch / step:.3%})"
  )


if __name__ == "__main__":
  main()
