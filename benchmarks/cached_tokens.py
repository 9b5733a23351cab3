"""Compares the pre-training step that runs the tokenizer with the step that gets cached tokens, on the same batch.

    python benchmarks/cached_tokens.py --batch_size=8 --rounds=5

The model is BEiT-B at 224 pixels as in configs/beit_base.py (color jitter, 75 masked patches, AdamW, clipping). The
tokenizer has its full size and random weights. Both are in float32 unless --dtype is given. The two steps alternate and
the medians are printed; the losses of their first steps must be equal. The last line is the number of lookups a second
in a cache of such tokens, by one thread.
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import objectives, step
from beit_jax.config import parse
from beit_jax.data import pipeline, token_cache
from beit_jax.data.sources import Source
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained

ROOT = Path(__file__).resolve().parent.parent
TOTAL_STEPS = 100_000
STEPS_PER_EPOCH = 1000


class NoData(Source):
  """As many examples as ImageNet has, but no images."""

  description = {}

  def __len__(self):
    return 1_281_167


def random_tokenizer(folder: Path, dtype: str) -> str:
  """Saves a full-size tokenizer with random weights and returns its path."""
  module = make_module("tokenizer", dict(dtype=dtype))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 112, 112, 3)))["params"]
  preprocessing = dict(
    mean=(-0.125,) * 3,
    std=(1.25,) * 3,
    image_size=(112, 112),
    crop_pct=1.0,
    interpolation="lanczos",
    resize="short_side",
  )
  weights_io.save(Pretrained("tokenizer", params, module, preprocessing), folder, format="orbax")
  return str(folder)


def make_steps(batch_size: int, dtype: str, tokenizer: str):
  """Returns name -> function that makes one step and returns its loss; both start from the same parameters."""
  overrides = [
    ("pretrain.tokenizer.init_from", tokenizer),
    ("pretrain.model.dtype", dtype),
    ("batch_size", batch_size),
  ]
  config = parse.load(f"{ROOT}/configs/beit_base.py", overrides, objectives.schemas()).pretrain
  objective = objectives.objective_of(config)(config, NoData())
  mesh = sharding.make_mesh()
  rng = np.random.default_rng(0)
  sides = {"image": 224, "token_image": 112}
  batch = {name: rng.integers(0, 256, (batch_size, side, side, 3), np.uint8) for name, side in sides.items()}
  batch["example_key"] = np.stack([np.zeros(batch_size), np.arange(batch_size)], 1).astype(np.uint32)
  batch["valid"] = np.ones(batch_size, bool)
  with jax.set_mesh(mesh):
    frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))
    online = sharding.put_batch(mesh, batch, batch_size)
    targets = np.asarray(jax.jit(objective.tokenize)(frozen, online)).astype(np.uint16)
    rest = {name: value for name, value in batch.items() if name != "token_image"}
    cached = sharding.put_batch(mesh, {**rest, "targets": targets}, batch_size)
    init = functools.partial(objective.init, jax.random.key(1))
    schedules = step.make_schedules(config, STEPS_PER_EPOCH, TOTAL_STEPS)
    shapes = jax.eval_shape(init)["params"]
    tx = step.make_optimizer(config, schedules, shapes, objective.depth)

    def make_step(batch, frozen):
      state, _, shardings = train_state.create(init, tx, mesh)
      train_step = step.make_train_step(objective, tx, 1, jax.random.key(2), shardings)

      def run():
        nonlocal state
        with jax.set_mesh(mesh):
          state, metrics = train_step(state, frozen, batch)
        return float(metrics["loss"])

      return run

    return {"online": make_step(online, frozen), "cached": make_step(cached, {})}


def time_lookups(folder: Path, count: int = 2**14) -> None:
  """Prints the rate of lookups in random order in a cache of 196 tokens an example, by one thread."""
  key = {"examples": count, "tokens": 196, "vocab_size": 8192}
  folder.mkdir()
  token_cache.create(folder, key, 1, "")
  cache, rng = token_cache.TokenCache(folder), np.random.default_rng(0)
  order = np.argsort(pipeline.places(0, 0, count))
  cache.write(0, np.stack([np.zeros(count), order], 1), rng.integers(0, 8192, (count, 196)))
  cache.lookup(0, 0, 0)  # opens the shard
  began = time.perf_counter()
  for index in range(count):
    cache.lookup(0, 0, index)
  rate, size = count / (time.perf_counter() - began), cache.path(0).stat().st_size / count
  print(f"{size:.0f} bytes an example on disk (uniform tokens), {rate:.0f} lookups/s")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dtype", default="float32")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    steps = make_steps(args.batch_size, args.dtype, random_tokenizer(Path(folder) / "tokenizer", args.dtype))
    print("first losses:", {name: round(run(), 6) for name, run in steps.items()}, flush=True)
    seconds = {name: [] for name in steps}
    for _ in range(args.rounds):
      for name, run in steps.items():
        began = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - began)
    rates = {name: args.batch_size / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
      listed = ", ".join(f"{t:.2f}" for t in times)
      print(f"{name}: {rates[name]:.2f} images/s (seconds a step: {listed})")
    print(f"cached / online: {rates['cached'] / rates['online']:.2f}")
    time_lookups(Path(folder) / "cache")


if __name__ == "__main__":
  main()
