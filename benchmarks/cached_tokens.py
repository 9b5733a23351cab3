"""The pre-training step with the tokenizer in it against the same step with cached tokens, on the same batch.

    python benchmarks/cached_tokens.py --batch_size=8 --rounds=5

BEiT-B at 224 as configs/beit_base.py has it (colour jitter, 75 masked patches, AdamW, clipping), and a tokenizer of the
full size with random weights, both in float32 unless --dtype says otherwise. The two take turns; medians are printed.
The losses of their first steps must be the same. Then: reads a second from a cache of such tokens, by one thread.
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
from beit_jax.config import parse as config_lib
from beit_jax.data import pipeline
from beit_jax.data import token_cache as tokens
from beit_jax.data.sources import Source
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained, make_module

ROOT = Path(__file__).resolve().parent.parent


class NoData(Source):
  """As many examples as ImageNet has, and no image."""

  description = {}

  def __len__(self):
    return 1_281_167


def random_tokenizer(folder: Path, dtype: str) -> str:
  module = make_module("tokenizer", dict(dtype=dtype))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 112, 112, 3)))["params"]
  look = dict(mean=(-0.125,) * 3, std=(1.25,) * 3, image_size=(112, 112), crop_pct=1.0)
  model = Pretrained("tokenizer", params, module, look | dict(interpolation="lanczos", resize="short_side"))
  weights_io.save(model, folder, format="orbax")
  return str(folder)


def steps(batch_size: int, dtype: str, tokenizer: str):
  """name -> a function that makes one step and returns its loss; both begin with the same parameters."""
  overrides = [("pretrain.tokenizer.init_from", tokenizer), ("batch_size", batch_size)]
  overrides.append(("pretrain.model.dtype", dtype))
  config = config_lib.load(f"{ROOT}/configs/beit_base.py", overrides, objectives.schemas()).pretrain
  objective = objectives.OBJECTIVES["beit"](config, NoData())
  mesh = sharding.make_mesh()
  rng = np.random.default_rng(0)
  size = {"image": 224, "token_image": 112}
  batch = {n: rng.integers(0, 256, (batch_size, side, side, 3), np.uint8) for n, side in size.items()}
  batch["example_key"] = np.stack([np.zeros(batch_size), np.arange(batch_size)], 1).astype(np.uint32)
  batch["valid"] = np.ones(batch_size, bool)
  with jax.set_mesh(mesh):
    frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))
    online = sharding.put_batch(mesh, batch, batch_size)
    targets = np.asarray(jax.jit(objective.tokenize)(frozen, online)).astype(np.uint16)
    without = {name: value for name, value in batch.items() if name != "token_image"}
    cached = sharding.put_batch(mesh, {**without, "targets": targets}, batch_size)
    init = functools.partial(objective.init, jax.random.key(1))
    schedules = step.make_schedules(config, 1000, 100_000)
    shapes = jax.eval_shape(init)["params"]
    tx = step.make_optimizer(config, schedules, shapes, objective.depth)

    def stepper(batch, frozen):
      state, _, shardings = train_state.create(init, tx, mesh)
      run = step.make_train_step(objective, tx, 1, jax.random.key(2), shardings)
      held = [state]

      def once():
        with jax.set_mesh(mesh):
          held[0], metrics = run(held[0], frozen, batch)
        return float(metrics["loss"])

      return once

    return {"online": stepper(online, frozen), "cached": stepper(cached, {})}


def lookups(folder: Path, count: int = 2**14) -> float:
  """Random reads a second from a cache of 196 tokens an example, by one thread."""
  key = {"examples": count, "tokens": 196, "vocab_size": 8192}
  folder.mkdir()
  tokens.create(folder, key, 1, "")
  cache, rng = tokens.TokenCache(folder), np.random.default_rng(0)
  order = np.argsort(pipeline.places(0, 0, count))
  cache.write(0, np.stack([np.zeros(count), order], 1), rng.integers(0, 8192, (count, 196)))
  cache.read(0, 0, 0)  # opens the shard
  began = time.perf_counter()
  for index in range(count):
    cache.read(0, 0, index)
  rate = count / (time.perf_counter() - began)
  print(
    f"{cache.path(0).stat().st_size / count:.0f} bytes an example on disk (uniform tokens), {rate:.0f} reads/s"
  )
  return rate


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dtype", default="float32")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    run = steps(args.batch_size, args.dtype, random_tokenizer(Path(folder) / "tokenizer", args.dtype))
    print("first losses:", {name: round(once(), 6) for name, once in run.items()}, flush=True)
    seconds = {name: [] for name in run}
    for _ in range(args.rounds):
      for name, once in run.items():
        began = time.perf_counter()
        once()
        seconds[name].append(time.perf_counter() - began)
    rate = {name: args.batch_size / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
      shown = ", ".join(f"{t:.2f}" for t in times)
      print(f"{name}: {rate[name]:.2f} images/s (seconds a step: {shown})")
    print(f"cached / online: {rate['cached'] / rate['online']:.2f}")
    lookups(Path(folder) / "cache")


if __name__ == "__main__":
  main()
