"""`python -m beit_jax.tokenize --config=FILE[:variant] [--workdir=DIR] --out=DIR [--epochs=K] [--config.key=value ...]`

Computes the visual tokens of the first K epochs of a pre-training run and writes them to a token cache, which the run
replays with `tokenizer.cache=DIR`. Default: as many epochs as the run sees. Of a config with stages it takes the one
that uses a tokenizer (`--stage=NAME` if there are several); a tokenizer that another stage trains is looked for in the
workdir.

The command may be killed at any time: given again, it continues where it stopped and repairs damaged shards. A larger K
extends an existing cache. Several processes find each other as those of `beit_jax.main` do; process 0 writes.
"""

import argparse
import dataclasses
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
from ml_collections import ConfigDict

from beit_jax import objectives
from beit_jax.config import parse
from beit_jax.data import images, pipeline, sources, token_cache
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.examples import HostBatch, Reader
from beit_jax.data.sources import Example
from beit_jax.errors import UserError
from beit_jax.objectives import stages
from beit_jax.objectives.beit import MaskedImageModeling
from beit_jax.run import record
from beit_jax.runtime import bucket, distributed, logs, sharding
from beit_jax.runtime.flags import Parser, number, print_help
from beit_jax.runtime.lock import exclusive_lock
from beit_jax.runtime.logs import log

USAGE = (
  "usage: python -m beit_jax.tokenize --config=FILE[:variant] [--workdir=DIR] --out=DIR [--epochs=K] [--stage=NAME] "
  "[--config.key=value ...]"
)
VERIFY_TIMEOUT = 3600  # seconds that processes may need to hash an existing cache


def tokenize(
  config: ConfigDict, out: Path, epochs: int | None = None, command: str = ""
) -> token_cache.TokenCache:
  """Computes the tokens of the first epochs of a run.

  Args:
    config: the run's complete config.
    out: folder of the cache.
    epochs: number of epochs; default: all that the run sees.
    command: the command that makes the cache, for messages to users who find it unfinished.

  Returns:
    The finished cache.

  Raises:
    UserError: the config, the data or the folder cannot be used.
  """
  config.tokenizer.cache = ""
  out.mkdir(parents=True, exist_ok=True)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  with jax.set_mesh(mesh), exclusive_lock(out):
    source = sources.make_source(config.data.to_dict())
    record.check_same_sources("tokenize", config.batch_size, {"training": source})
    objective = MaskedImageModeling(config, source)
    if epochs is None:
      steps = parse.duration(config, "total", len(source) // config.batch_size)
      epochs = -(-steps * config.batch_size // len(source))
    if epochs < 1:
      raise UserError("the run has no epochs; give --epochs=K")
    if jax.process_index() == 0:
      token_cache.create(out, objective.token_key(), epochs, command)
    distributed.barrier("the cache folder exists")
    cache = token_cache.TokenCache(out)
    shards = list(cache.faults(verify=True))
    distributed.barrier("the cache is verified", VERIFY_TIMEOUT)
    log.info("%s: %d epochs, %d of %d shards to make", out, cache.epochs, len(shards), cache.num_shards)
    free, needed = shutil.disk_usage(out).free, len(shards) * cache.shard_size * cache.record_size
    if free < needed:
      log.warning("%s has %.1f GB of free space; the cache may need %.1f GB", out, free / 1e9, needed / 1e9)
    frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh)) if shards else {}
    bad_images = BadImageTracker(source, config.data.max_bad, out / "bad_images.jsonl")
    for group in _consecutive(shards):
      start, stop = cache.span(group[0])[0], cache.span(group[-1])[1]
      _write_shards(cache, group, _tokens(objective, frozen, mesh, start, stop, bad_images))
  return cache


def _consecutive(shards: list[int]) -> Iterator[list[int]]:
  """Splits sorted numbers into groups without gaps."""
  for _, group in itertools.groupby(enumerate(shards), lambda pair: pair[1] - pair[0]):
    yield [shard for _, shard in group]


def _write_shards(
  cache: token_cache.TokenCache, shards: list[int], batches: Iterator[tuple[np.ndarray, np.ndarray]]
) -> None:
  """Cuts batches of (keys [B, 2], tokens [B, N]) into consecutive shards; process 0 writes them."""
  start, stop = cache.span(shards[0])[0], cache.span(shards[-1])[1]
  began = time.monotonic()
  keys, tokens = next(batches)
  for shard in shards:
    low, high = cache.span(shard)
    size = high - low
    while len(keys) < size:
      keys, tokens = (np.concatenate(pair) for pair in zip((keys, tokens), next(batches), strict=True))
    if jax.process_index() == 0:
      cache.write(shard, keys[:size], tokens[:size])
    keys, tokens = keys[size:], tokens[size:]
    rate = (high - start) / (time.monotonic() - began)
    hours, name = (stop - high) / rate / 3600, cache.path(shard).name
    log.info("%s: %d of %d examples, %.1f images/s, %.1f hours left", name, high, stop, rate, hours)


@dataclasses.dataclass
class _IndexReader:
  """Adds "read" to the arrays of a reader: the index of the example whose pixels they hold."""

  reader: Reader

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    return {**self.reader.train(image, example, key), "read": np.array(example["index"], np.uint32)}

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    return self.reader.eval(image, example)


def _tokens(
  objective: MaskedImageModeling,
  frozen: Any,
  mesh: jax.sharding.Mesh,
  start: int,
  stop: int,
  bad_images: BadImageTracker,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Computes the tokens at the positions from `start` to `stop` of the training order.

  Yields:
    Batches of (keys uint32 [B, 2], tokens int32 [B, N]); a key is (epoch, index of the example that was read).
  """
  config = objective.config
  batch_size = max(config.batch_size // config.microbatches, 1)  # needs no more memory than the training
  host_batches = pipeline.train_batches(
    objective.source,
    _IndexReader(objective.reader()),
    rows=sharding.local_rows(mesh, batch_size),
    batch_size=batch_size,
    start_step=start // batch_size,
    total_steps=-(-stop // batch_size),
    seed=config.seed,
    workers=config.data.workers,
    threads=config.data.threads,
    bad_images=bad_images,
  )

  def compute(frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    keys = jnp.stack([batch["example_key"][:, 0], batch["read"]], 1)
    return keys, objective.tokenize(frozen, batch)

  run = jax.jit(compute, out_shardings=sharding.replicated(mesh))
  # On a mesh of CPU devices in one process, two programs with collectives can block each other.
  max_in_flight = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else 1
  in_flight: list[tuple[jax.Array, jax.Array]] = []
  position = start // batch_size * batch_size
  for batch in itertools.chain(host_batches, [None] * max_in_flight):
    if batch is not None:
      in_flight.append(run(frozen, sharding.put_batch(mesh, batch, batch_size)))
    if len(in_flight) > max_in_flight or batch is None:
      keys, tokens = jax.device_get(in_flight.pop(0))
      rows = slice(max(start - position, 0), stop - position)
      yield keys[rows], tokens[rows]
      position += batch_size


def _take_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Splits this command's own flags from a command line: (flags, remaining arguments)."""
  parser = Parser(
    "python -m beit_jax.tokenize", USAGE.removeprefix("usage: "), add_help=False, allow_abbrev=False
  )
  parser.add_argument("--out", required=True)
  parser.add_argument("--epochs", type=number(int, 1, 10**6))
  parser.add_argument("--stage", default="")
  flags, rest = parser.parse_known_args(argv)
  if "://" in flags.out:
    raise UserError(f"--out={flags.out}: a cache must be in a folder; mount the bucket")
  return flags, rest


def _choose_run(config: ConfigDict, name: str, workdir: Path) -> stages.Stage:
  """Finds the run that uses a tokenizer; `name` is that of its stage, "" if there is only one."""
  if name and "stages" not in config:
    raise UserError(f"--stage={name}: the config has no stages")
  runs = [run for run in stages.resolve(config, workdir) if "tokenizer" in run.objective.frozen_sections]
  if "stages" not in config and not runs:
    target = " with target='pixels'" if config.get("target") == "pixels" else ""
    raise UserError(f"config key 'objective': {config.objective!r}{target} uses no visual tokens")
  fitting = [run for run in runs if run.name == name or not name]
  if len(fitting) != 1:
    raise UserError(
      f"--stage={name}: name one of the stages that use a tokenizer, {[run.name for run in runs]}"
    )
  return fitting[0]


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  if print_help(argv, __doc__):
    return 0
  logs.setup()
  try:
    process_flags, argv = distributed.take_flags(argv)
    flags, rest = _take_flags(argv)
    spec, workdir, overrides = parse.parse_args(rest, USAGE)
    distributed.initialize(process_flags)
    config = parse.load(spec, overrides, objectives.schemas())
    run = _choose_run(config, flags.stage, Path(workdir or parse.default_workdir(spec)))
    out = Path(os.path.expanduser(flags.out))
    logs.setup(out)
    distributed.check_shared("--out", out)
    record.check_same_config(config)
    logs.only_file(record.environment())
    logging.captureWarnings(True)
    words = [*rest, f"--out={flags.out}", *([f"--stage={flags.stage}"] if flags.stage else [])]
    command = f"python -m beit_jax.tokenize {shlex.join(words)}"
    try:
      cache = tokenize(run.config, out, flags.epochs, command)
    except OSError as error:
      raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    size = sum(path.stat().st_size for path in out.glob("tokens-*.array_record"))
    replay = f"--config.{run.name}{'.' if run.name else ''}tokenizer.cache={out}"
    log.info("finished: %d epochs, %.1f MB; replay them with %s", cache.epochs, size / 1e6, replay)
  except bucket.errors(UserError) as error:
    return distributed.report_error(error)
  except KeyboardInterrupt:
    distributed.notify_peers("stopped by hand", 130)
    print("stopped; give the same command again to continue", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
