"""Runs a config: `python -m beit_jax.main --config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]`.

Runs one training run, or the stages of a config one after the other. The same command, given again, continues where
the last one stopped. A user's mistake ends in one message and exit status 2. On SIGTERM and Ctrl-C the current step
finishes and a checkpoint is saved; the exit status is then 143 or 130.

Several processes find each other from the environment, or by `--coordinator=HOST:PORT --num_processes=N
--process_id=I`, with `--initialization_timeout` and `--heartbeat_timeout` in seconds (docs/scaling.md).

The keys of a config with their defaults are in beit_jax/config/defaults.py and beside each objective
(beit_jax/objectives/), ready-made configs in configs/.
"""

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
from beit_jax.errors import TransientError, UserError
from beit_jax.objectives import stages
from beit_jax.run import comparison, files, record, summary
from beit_jax.runtime import bucket, distributed, logs, preemption
from beit_jax.runtime.flags import print_help
from beit_jax.runtime.logs import log


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
  """Runs each stage in its own sub-folder and writes the summary table, and the comparison if the config has one.

  In a comparison on one process, a stage that fails does not end the others: those that need it are left out.

  Raises:
    UserError: a stage failed; in a comparison only after the others, naming it.
  """
  comparison.check(config.comparison)
  runs = [stage for stage in stages.resolve(config, folder) if not stage.is_replaced]
  data = train.check_stages(runs)
  results: dict[str, Any] = {}
  failed: dict[str, str] = {}
  for stage in runs:
    missing = [earlier.name for earlier in stage.uses.values() if earlier.name in failed]
    if missing:
      failed[stage.name] = f"needs {', '.join(missing)}"
      continue
    try:
      results[stage.name] = train.run(stage.config, stage.folder, stage.name, data.pop(stage.name, None))
    except UserError as error:
      # Other processes may not have failed; a transient failure is for the launcher.
      if not config.comparison or jax.process_count() > 1 or isinstance(error, TransientError):
        raise
      failed[stage.name] = str(error)
      log.error("stage %s failed: %s", stage.name, error)
  if jax.process_index() == 0:
    _write_results(config, folder, results)
  if failed:
    lines = [f"{name}: {reason}" for name, reason in failed.items()]
    raise UserError(f"{len(failed)} of {len(runs)} stages have no result:\n  " + "\n  ".join(lines))


def _write_results(config: ConfigDict, folder: Path, results: dict[str, Any]) -> None:
  texts = [summary.summary_table(config.summary, results)]
  if config.comparison:
    texts.append(comparison.write(config.comparison.to_dict(), results, folder))
  text = "\n\n".join(filter(None, texts))
  if text:
    print(text)
    files.write_atomic(folder / "summary.txt", text + "\n")
  files.write_atomic(folder / "summary.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
