"""Our side of `step.py`: the objective, optimizer and training step of configs/beit_base.py or beit_large.py."""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the PyTorch process uses the same GPU

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import rounds  # noqa: E402

import beit_jax  # noqa: E402
from beit_jax import augment, objectives  # noqa: E402
from beit_jax.config import parse  # noqa: E402
from beit_jax.data import sources  # noqa: E402
from beit_jax.objectives.beit import MaskedImageModeling  # noqa: E402
from beit_jax.run import state as train_state  # noqa: E402
from beit_jax.runtime import sharding  # noqa: E402
from beit_jax.step import make_optimizer, make_schedules, make_train_step  # noqa: E402
from beit_jax.weights.kinds import make_module  # noqa: E402
from beit_jax.weights.pretrained import Pretrained  # noqa: E402


def random_tokenizer(folder: Path, dtype: str) -> Path:
  """Saves DALL-E's dVAE at full size with random weights."""
  fields = dict(n_hid=256, n_init=128, n_blk_per_group=2, group_count=4, vocab_size=8192, dtype=dtype)
  module = make_module("tokenizer", fields)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 112, 112, 3)))["params"]
  preprocessing = dict(
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    image_size=(112, 112),
    crop_pct=1.0,
    interpolation="lanczos",
    resize="short_side",
  )
  beit_jax.save(Pretrained("tokenizer", params, module, preprocessing), folder, format="orbax")
  return folder


def build(variant, batch_size, dtype, tokenizer, **changes):
  """Builds the recipe with other sizes, dtype and images: (train step, state, frozen, batch, objective)."""
  changes = {
    "batch_size": batch_size,
    "model.dtype": dtype,
    "total_epochs": None,
    "total_steps": 500_000,
    "optimizer.warmup_epochs": None,
    "optimizer.warmup_steps": 6250,
    "data.source": "shapes",
    "data.name": "",
    "data.color_jitter": 0.0,  # the PyTorch side has none
    "eval.split": "",
    "model.scan": False,
    "model.remat": False,
    **changes,
  }
  spec = f"{ROOT}/configs/beit_{variant}.py"
  config = parse.load(spec, [(f"pretrain.{k}", v) for k, v in changes.items()], objectives.schemas())
  config = config.pretrain
  with tempfile.TemporaryDirectory() as folder:
    config.tokenizer.init_from = str(random_tokenizer(Path(folder) / "tokenizer", dtype))
    objective = MaskedImageModeling(config, sources.make_source(config.data.to_dict()))
    mesh = sharding.make_mesh(1, 1)
    frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))
  schedules = make_schedules(config, 625, config.total_steps)
  shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0)))["params"]
  tx = make_optimizer(config, schedules, shapes, objective.depth)
  state, _, shardings = train_state.create(lambda: objective.init(jax.random.key(0)), tx, mesh)
  step = make_train_step(objective, tx, 1, jax.random.key(1), shardings, 0.0)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (batch_size, 224, 224, 3), np.uint8),
    "example_key": np.stack([np.zeros(batch_size), np.arange(batch_size)], 1).astype(np.uint32),
    "valid": np.ones(batch_size, bool),
  }
  if tokenizer == "online":
    batch["token_image"] = rng.integers(0, 256, (batch_size, 112, 112, 3), np.uint8)
  else:  # as from a cache, without running the tokenizer
    batch["targets"] = rng.integers(0, 8192, (batch_size, 196), np.int32)
  return step, state, frozen, sharding.put_batch(mesh, batch, batch_size), objective


def parts(step, state, frozen, batch, objective) -> dict[str, tuple[float, float]]:
  """Times the step and programs that are parts of it: name -> (wall, CPU) seconds, the fastest of three runs.

  The rest of the step, besides tokenizer and gradient, is clipping, AdamW and the update. `state` is donated.
  """
  key = jax.random.key(0)
  given = {**batch, "targets": jnp.zeros((len(batch["image"]), 196), jnp.int32)}

  # All data are arguments, since XLA evaluates what depends only on constants at compile time.
  def sums(params, frozen, batch):
    return objective.loss({"params": params}, frozen, batch, key, 0).metrics["loss"].total

  def masks(batch):
    return objective.masks(batch)

  def tokenize(frozen, batch):
    pixels = augment.to_float(batch["token_image"])
    return objective.tokenizer.module.apply(frozen, pixels, method="tokenize")

  programs = {
    "masks": (masks, given),
    "forward": (sums, state.params, frozen, given),
    "gradient": (jax.grad(sums), state.params, frozen, given),
  }
  if "token_image" in batch:
    programs["tokenizer"] = (tokenize, frozen, batch)

  def best(call):
    laps = []
    for _ in range(4):  # the first compiles
      began = time.perf_counter(), time.process_time()
      jax.block_until_ready(call())
      laps.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return min(lap[0] for lap in laps[1:]), min(lap[1] for lap in laps[1:])

  found = {}
  for name, (program, *args) in programs.items():
    jitted = jax.jit(program)
    found[name] = best(lambda jitted=jitted, args=args: jitted(*args))

  def whole_step():
    nonlocal state
    state, metrics = step(state, frozen, batch)
    return state, metrics

  return {**found, "step": best(whole_step)}


def matmul_peak(dtype: str) -> float:
  """Returns the FLOP/s of one large matrix product, the best of several runs."""
  size, repeats = (4096, 1) if jax.default_backend() == "cpu" else (8192, 10)
  # Random numbers as in training: with equal numbers a GPU draws less power and is faster.
  a = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(dtype)
  product = jax.jit(jnp.matmul)
  best = float("inf")
  product(a, a).block_until_ready()
  for _ in range(5):
    began = time.perf_counter()
    out = a
    for _ in range(repeats):
      out = product(out, a)
    out.block_until_ready()
    best = min(best, (time.perf_counter() - began) / repeats)
  return 2 * size**3 / best


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--variant", default="base")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--tokenizer", default="online")
  args = parser.parse_args()
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="ours: %(message)s")
  if args.dtype == "float32" and jax.default_backend() != "cpu":
    # XLA's default on GPUs is TF32, which the PyTorch side does not use either.
    jax.config.update("jax_default_matmul_precision", "float32")
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    step, state, frozen, batch, objective = build(args.variant, args.batch, args.dtype, args.tokenizer)

    def run(count):
      nonlocal state
      for _ in range(count):
        state, metrics = step(state, frozen, batch)
      assert np.isfinite(float(metrics["loss"]))

    def memory():
      stats = jax.devices()[0].memory_stats()
      return stats["peak_bytes_in_use"] / 2**30 if stats else rounds.peak_rss()

    def device():
      return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"

    rounds.serve(
      run,
      memory=memory,
      peak=lambda: matmul_peak(args.dtype),
      device=device,
      parts=lambda: parts(step, state, frozen, batch, objective),
    )


if __name__ == "__main__":
  main()
