"""Runs a config: `python -m beit_jax.main --config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]`.

Runs one training run, or the stages of a config one after the other. The same command, given again, continues where
the last one stopped. A user's mistake ends in one message and exit status 2. On SIGTERM and Ctrl-C the current step
finishes and a checkpoint is saved; the exit status is then 143 or 130.

Several processes find each other from the environment, or by `--coordinator=HOST:PORT --num_processes=N
--process_id=I`, with `--initialization_timeout` and `--heartbeat_timeout` in seconds (docs/scaling.md).

The keys of a config with their defaults are in beit_jax/config/defaults.py and beside each objective
(beit_jax/objectives/), ready-made configs in configs/.
"""

import fnmatch
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from beit_jax import objectives, train
from beit_jax.config import parse
from beit_jax.errors import UserError
from beit_jax.objectives import stages
from beit_jax.run import files, record
from beit_jax.runtime import bucket, distributed, logs, preemption
from beit_jax.runtime.flags import print_help


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  if print_help(argv, __doc__):
    return 0
  try:
    return _main(argv)
  finally:
    bucket.close()


def _main(argv: list[str]) -> int:
  logs.setup()
  try:
    flags, argv = distributed.take_flags(argv)
    spec, workdir, overrides = parse.parse_args(argv)
    distributed.initialize(flags)
    config = parse.load(spec, overrides, objectives.schemas())
    folder = bucket.path(workdir or parse.default_workdir(spec))
    check_buckets(config.to_dict())
    logs.setup(folder)
    distributed.check_shared("--workdir", folder)
    record.check_same_config(config)
    logs.only_file(record.environment())
    logging.captureWarnings(True)
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # options are defined at run time
    cache = compile_cache(folder, chosen, jax.process_count())
    jax.config.update("jax_compilation_cache_dir", cache)
    if "stages" not in config:
      train.run(config, folder)
    else:
      run_stages(config, folder)
  except bucket.errors(UserError) as error:
    return distributed.report_error(error)
  except preemption.Stopped as stopped:
    print(stopped, file=sys.stderr)
    logs.only_file(str(stopped))
    return stopped.status
  except KeyboardInterrupt:
    distributed.notify_peers("stopped by hand", 130)
    print("stopped; give the same command again to continue", file=sys.stderr)
    return 130
  except Exception:
    logs.only_file(traceback.format_exc())  # the terminal shows it as well
    raise
  return 0


def compile_cache(folder: Path, chosen: str | None, processes: int) -> str | None:
  """The folder for compiled programs, so that a resumed run starts at once.

  It is `chosen`, else in the run's folder. Several processes need one folder that all of them see, because a program
  that only some of them find makes the others wait; theirs is `chosen` or none. JAX recompiles what it cannot read.
  JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.
  """
  if chosen or processes > 1 or bucket.remote(folder):
    return chosen
  return str(folder.absolute() / "compile_cache")


def check_buckets(tree: dict[str, Any], prefix: str = "") -> None:
  """Tries every `gs://` path of a config before anything starts, since a later stage may need it only after days.

  Args:
    tree: the config as nested dicts.
    prefix: dotted name of the section with a final dot, for messages.

  Raises:
    UserError: a bucket cannot be reached, or a key that cannot name a bucket does.
  """
  for key, value in tree.items():
    if isinstance(value, dict):
      check_buckets(value, f"{prefix}{key}.")
    elif isinstance(value, str) and bucket.remote(value):
      if key not in ("init_from", "resume"):
        bucket.check_local(f"{prefix}{key}", value)
      bucket.path(value)


def run_stages(config: ConfigDict, folder: Path) -> None:
  """Runs each stage in its own sub-folder and writes the summary table."""
  runs = [stage for stage in stages.resolve(config, folder) if not stage.is_replaced]
  data = train.check_stages(runs)
  results = {
    stage.name: train.run(stage.config, stage.folder, stage.name, data.pop(stage.name, None))
    for stage in runs
  }
  if jax.process_index() != 0:
    return
  text = summary_table(config.summary, results)
  if text:
    print(text)
    files.write_atomic(folder / "summary.txt", text + "\n")
  files.write_atomic(folder / "summary.json", json.dumps(results, indent=1) + "\n")


def lookup(results: dict[str, Any], reference: str) -> list[float]:
  """Finds the values that a reference such as "finetune*.eval.acc1" names, one for each stage that matches.

  Args:
    results: stage -> content of its result.json.
    reference: a stage (or a pattern of stages), one of first, last, eval and seconds, and a metric.
  """
  pattern, *path = reference.split(".")
  values = []
  for name in fnmatch.filter(results, pattern):
    value = results[name]
    for key in path:
      value = value.get(key) if isinstance(value, dict) else None
    if value is not None:
      values.append(value)
  return values


def summary_table(rows: tuple[tuple[str, str, str], ...], results: dict[str, Any]) -> str:
  """Formats the table of a staged run. Where a reference has several values, it shows their mean and all of them.

  Args:
    rows: (label, reference, format).
    results: stage -> content of its result.json.
  """
  lines = []
  for label, reference, form in rows:
    values = lookup(results, reference)
    if values:
      text = format(sum(values) / len(values), form)
      if len(values) > 1:
        text += "   (" + ", ".join(format(v, form) for v in values) + ")"
      lines.append((label, text))
  width = max((len(label) for label, _ in lines), default=0)
  return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
