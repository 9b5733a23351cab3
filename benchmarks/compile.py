"""Measures the time to the first step: tracing, lowering, compiling, running; with and without `scan`, cold and warm.

    python benchmarks/compile.py                    # BEiT-L/24, float32, batch 1, tokens given
    python benchmarks/compile.py --variant=base --batch=8

Each start is a new process. A warm start finds the compiled programs of the cold start before it in JAX's persistent
cache, as a resumed run does (`beit_jax.main` keeps the cache in the run's folder). The baseline is the same model
without `scan`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

PARTS = ("import and state", "trace", "lower", "compile", "first step", "second step")


def measure(args) -> dict[str, float]:
  """Runs in a new process: part -> seconds."""
  began = time.perf_counter()
  import jax
  import step_ours

  from beit_jax.runtime import sharding

  jax.config.update("jax_compilation_cache_dir", args.cache)
  seconds = []

  def lap():
    nonlocal began
    seconds.append(time.perf_counter() - began)
    began = time.perf_counter()

  with jax.set_mesh(sharding.make_mesh(1, 1)):
    changes = {"model.scan": bool(args.scan)}
    step, state, frozen, batch, _ = step_ours.build(args.variant, args.batch, args.dtype, "cached", **changes)
    jax.block_until_ready(state)
    lap()
    traced = step.trace(state, frozen, batch)
    lap()
    lowered = traced.lower()
    lap()
    compiled = lowered.compile()
    lap()
    for _ in range(2):
      state, metrics = compiled(state, frozen, batch)
      jax.block_until_ready((state, metrics))
      lap()
  return dict(zip(PARTS, seconds, strict=True))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--variant", choices=("base", "large"), default="large")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
  parser.add_argument("--scan", type=int, default=0, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.cache:
    print(json.dumps(measure(args)))
    return
  print(f"BEiT {args.variant}, {args.dtype}, batch {args.batch}, tokens given; seconds")
  print(f"{'':14}" + "".join(f"{part:>18}" for part in PARTS) + f"{'trace to step':>18}")
  for scan in (0, 1):
    with tempfile.TemporaryDirectory() as cache:
      for start in ("cold", "warm"):
        flags = [f"--variant={args.variant}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
        command = [sys.executable, __file__, *flags, f"--cache={cache}", f"--scan={scan}"]
        out = subprocess.run(
          command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        ).stdout
        found = json.loads(out.splitlines()[-1])
        total = sum(found[part] for part in PARTS[1:5])
        name = f"{'scan' if scan else 'unrolled'}, {start}"
        print(f"{name:14}" + "".join(f"{found[p]:18.1f}" for p in PARTS) + f"{total:18.1f}", flush=True)


if __name__ == "__main__":
  main()
