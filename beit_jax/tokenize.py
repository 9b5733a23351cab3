"""`python -m beit_jax.tokenize --config=FILE[:variant] [--workdir=DIR] --out=DIR [--epochs=K] [--config.key=value ...]`

Computes the visual tokens of K epochs of the pre-training run that the config describes and writes them to DIR; the run
replays them with `tokenizer.cache=DIR`. Default: as many epochs as the run sees. In a config with stages it is
the one that pre-trains (`--stage=NAME` where there are several), whose tokenizer is looked for in the workdir.

It may be killed at any time; the same command goes on where it stopped, and makes anew what is damaged. More epochs are
added to a cache that is there. Several processes are found, or told, as by `beit_jax.main`; process 0 writes.
"""

import itertools
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import objectives
from beit_jax.config import parse as config_lib
from beit_jax.data import pipeline, sources
from beit_jax.data import token_cache as tokens
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.examples import HostBatch
from beit_jax.errors import UserError
from beit_jax.objectives import MaskedImageModeling
from beit_jax.run import record
from beit_jax.runtime import bucket, distributed, logs, sharding
from beit_jax.runtime.lock import exclusive_lock
from beit_jax.runtime.logs import log

USAGE = (
  "usage: python -m beit_jax.tokenize --config=FILE[:variant] [--workdir=DIR] --out=DIR [--epochs=K] [--stage=NAME] "
  "[--config.key=value ...]"
)


def tokenize(config: Any, out: Path, epochs: int | None = None, command: str = "") -> tokens.TokenCache:
  """The tokens of the first `epochs` epochs of the run `config`, in the folder `out`.

  Args:
    epochs: None: all that the run sees.
    command: what to tell a user who finds the cache unfinished.

  Raises:
    UserError: anything a user can mend.
  """
  config.tokenizer.cache = ""
  out.mkdir(parents=True, exist_ok=True)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  with jax.set_mesh(mesh), exclusive_lock(out):
    source = sources.make_source(config.data.to_dict())
    objective = MaskedImageModeling(config, source)
    if epochs is None:
      steps = config_lib.duration(config, "total", len(source) // config.batch_size)
      epochs = -(-steps * config.batch_size // len(source))
    if epochs < 1:
      raise UserError(f"{epochs} epochs: nothing to do; give --epochs=K")
    if jax.process_index() == 0:
      tokens.create(out, objective.token_key(), epochs, command)
    distributed.barrier("the cache folder is there")
    cache = tokens.TokenCache(out)
    todo = cache.unfinished(verify=True)
    distributed.barrier("all know what there is to do", 3600)  # every byte is looked at
    about = (out, cache.epochs, cache.examples, len(todo), cache.shards)
    log.info("%s: %d epochs of %d examples, %d of %d shards to do", *about)
    room, wanted = shutil.disk_usage(out).free, len(todo) * cache.shard_size * cache.record_size
    if room < wanted:
      log.warning("%s has %.1f GB of room, the cache may need %.1f GB more", out, room / 1e9, wanted / 1e9)
    frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh)) if todo else {}
    bad_images = BadImageTracker(source, config.data.max_bad, out / "bad_images.jsonl")
    count = itertools.count()
    for _, group in itertools.groupby(todo, lambda shard: shard - next(count)):
      _make(cache, list(group), objective, frozen, mesh, bad_images)
  return cache


def _make(cache, shards, objective, frozen, mesh, bad_images) -> None:
  """Shards that follow one another, in one stream of batches."""
  start, stop = cache.span(shards[0])[0], cache.span(shards[-1])[1]
  parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
  began = time.monotonic()
  for first, keys, ids in _stream(objective, frozen, mesh, start, stop, bad_images):
    last = min(first + len(keys), stop) - 1
    for shard in range(max(first, start) // cache.shard_size, last // cache.shard_size + 1):
      low, high = cache.span(shard)
      rows = slice(max(low - first, 0), high - first)
      parts.setdefault(shard, []).append((keys[rows], ids[rows]))
      if first + len(keys) < high:
        continue
      whole = map(np.concatenate, zip(*parts.pop(shard), strict=True))
      if jax.process_index() == 0:
        cache.write(shard, *whole)
      rate = (high - start) / (time.monotonic() - began)
      left = (stop - high) / rate / 3600
      name = cache.path(shard).name
      log.info("%s: %d of %d examples, %.1f images/s, %.1f hours left", name, high, stop, rate, left)


class _Reader:
  """A reader that says, "read", which example the pixels are of: another one if that of the row cannot be read."""

  def __init__(self, reader: Any):
    self._reader = reader

  def train(self, image: Any, example: dict[str, Any], key: tuple[int, ...]) -> HostBatch:
    return {**self._reader.train(image, example, key), "read": np.array(example["index"], np.uint32)}


def _stream(
  objective: MaskedImageModeling,
  frozen: Any,
  mesh: jax.sharding.Mesh,
  start: int,
  stop: int,
  bad_images: BadImageTracker,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Batches that cover the positions: (that of the first row, keys uint32 [B, 2], tokens int32 [B, N]).

  A key is (epoch, index of the example that was read).
  """
  config = objective.config
  size = max(config.batch_size // config.microbatches, 1)  # as much at a time as the training
  host = pipeline.train_batches(
    objective.source,
    _Reader(objective.reader()),
    rows=sharding.local_rows(mesh, size),
    batch_size=size,
    start_step=start // size,
    total_steps=-(-stop // size),
    seed=config.seed,
    workers=config.data.workers,
    threads=config.data.threads,
    bad_images=bad_images,
  )
  run = jax.jit(
    lambda frozen, batch: (
      jnp.stack([batch["example_key"][:, 0], batch["read"]], 1),
      objective.tokenize(frozen, batch),
    ),
    out_shardings=sharding.replicated(mesh),
  )
  # Several CPU devices in one process can block each other when two programs with collectives are under way.
  ahead = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else 1
  waiting: list[tuple[int, Any]] = []
  for step, batch in enumerate(host, start // size):
    waiting.append((step * size, run(frozen, sharding.put_batch(mesh, batch, size))))
    if len(waiting) > ahead:
      first, arrays = waiting.pop(0)
      yield first, *jax.device_get(arrays)
  for first, arrays in waiting:
    yield first, *jax.device_get(arrays)


def _take_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
  """Splits --out, --epochs and --stage off: (their values, what is left)."""
  flags, rest, items = {"out": "", "epochs": "", "stage": ""}, [], iter(argv)
  for item in items:
    name, equals, value = item.partition("=")
    if not (name.startswith("--") and name[2:] in flags):
      rest.append(item)
      continue
    flags[name[2:]] = value if equals else next(items, "")
  if not flags["out"]:
    raise UserError(f"--out is missing; {USAGE}")
  if "://" in flags["out"]:
    raise UserError(f"--out={flags['out']}: a cache lies in a folder; mount the bucket")
  if flags["epochs"] and not (flags["epochs"].isdecimal() and 0 < int(flags["epochs"]) < 10**6):
    raise UserError(f"--epochs={flags['epochs']}: must be a whole number, 1 or more")
  return flags, rest


def _chosen(config: Any, stage: str, workdir: Path) -> tuple[Any, str]:
  """(the run that pre-trains, with its tokenizer's place, what its keys begin with on a command line)."""
  if "stages" not in config:
    run = config
    if stage:
      raise UserError(f"--stage={stage}: the config has no stages")
  else:
    fitting = [name for name in config.stages if config[name].objective == "beit"]
    if (stage and stage not in fitting) or (not stage and len(fitting) != 1):
      raise UserError(f"--stage={stage}: the stages that pre-train are {fitting}; name one of them")
    stage = stage or fitting[0]
    run = config[stage]
    place = run.tokenizer.init_from if run.objective == "beit" else ""
    earlier = place.removeprefix("stage:")
    if place.startswith("stage:") and earlier in config.stages:
      stands_in = config[earlier].init_from if config[earlier].objective == "dvae" else ""
      run.tokenizer.init_from = stands_in or str(workdir / earlier)
  if run.objective != "beit":
    raise UserError(
      f"config key 'objective': {run.objective!r} uses no visual tokens; only the pre-training, 'beit', does"
    )
  return run, f"config.{stage}." if "stages" in config else "config."


def main(argv: list[str]) -> int:
  logs.setup()
  try:
    flags, argv = distributed.take_flags(argv)
    own, rest = _take_flags(argv)
    spec, workdir, overrides = config_lib.parse_args(rest, USAGE)
    distributed.initialize(flags)
    config = config_lib.load(spec, overrides, objectives.schemas())
    path, _, variant = spec.partition(":")
    folder = Path(workdir or f"runs/{Path(path).stem}{'_' if variant else ''}{variant}")
    run, prefix = _chosen(config, own["stage"], folder)
    out = Path(os.path.expanduser(own["out"]))
    logs.setup(out)
    distributed.check_shared("--out", out)
    logs.only_file(record.environment())
    logging.captureWarnings(True)
    words = [*rest, f"--out={own['out']}", *([f"--stage={own['stage']}"] if own["stage"] else [])]
    command = f"python -m beit_jax.tokenize {shlex.join(words)}"
    try:
      cache = tokenize(run, out, int(own["epochs"]) if own["epochs"] else None, command)
    except OSError as error:
      raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    size = sum(path.stat().st_size for path in out.glob("tokens-*.array_record"))
    replay = f"--{prefix}tokenizer.cache={out}"
    log.info("finished: %d epochs, %.1f MB; replay them with %s", cache.epochs, size / 1e6, replay)
  except (UserError, *bucket.errors()) as error:
    return distributed.report_error(error)
  except KeyboardInterrupt:
    distributed.notify_peers("stopped by hand", 130)
    print("stopped; give the same command again to go on", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
