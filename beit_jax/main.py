"""`python -m beit_jax.main --config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]`

Runs one training run, or the stages of a config one after the other. Giving the same command again goes on where
the last one stopped. A mistake of yours ends in one message and exit status 2; SIGTERM and Ctrl-C let the step finish
and save, status 143 or 130.

Several processes are found from the environment, or told: `--coordinator=HOST:PORT --num_processes=N --process_id=I`,
with `--initialization_timeout` and `--heartbeat_timeout` in seconds (docs/scaling.md).
"""

import fnmatch
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import jax

from beit_jax import objectives, train
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.run import files, record
from beit_jax.runtime import bucket, distributed, logs, preemption

PARTS = ("tokenizer", "encoder")  # frozen parts of a run, whose init_from may be another stage's


def main(argv: list[str]) -> int:
  try:
    return _main(argv)
  finally:
    bucket.close()


def _main(argv: list[str]) -> int:
  logs.setup()
  try:
    flags, argv = distributed.take_flags(argv)
    spec, workdir, overrides = config_lib.parse_args(argv)
    distributed.initialize(flags)
    config = config_lib.load(spec, overrides, objectives.model_fields())
    path, _, variant = spec.partition(":")
    folder = bucket.path(workdir or f"runs/{Path(path).stem}{'_' if variant else ''}{variant}")
    check_buckets(config.to_dict())
    logs.setup(folder)
    distributed.check_shared("--workdir", folder)
    logs.only_file(record.environment())
    logging.captureWarnings(True)
    cache = compile_cache(folder, jax.config.jax_compilation_cache_dir, jax.process_count())
    jax.config.update("jax_compilation_cache_dir", cache)
    if "stages" not in config:
      train.run(config, folder)
    else:
      run_stages(config, folder)
  except (UserError, *bucket.errors()) as error:
    return distributed.end_with(error)
  except preemption.Stopped as stopped:
    print(stopped, file=sys.stderr)
    logs.only_file(str(stopped))
    return stopped.status
  except KeyboardInterrupt:
    distributed.tell("stopped by hand", 130)
    print("stopped; give the same command again to go on", file=sys.stderr)
    return 130
  except Exception:
    logs.only_file(traceback.format_exc())  # it goes to the terminal as well
    raise
  return 0


def compile_cache(folder: Path, chosen: str | None, processes: int) -> str | None:
  """Where compiled programs are kept, so that a run that goes on begins at once: `chosen`, else in the run's folder.

  Several processes need one folder that all of them see (a program that only some find makes the others wait), so
  theirs is `chosen` or none. JAX recompiles what it cannot read. JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
  """
  if chosen or processes > 1 or bucket.remote(folder):
    return chosen
  return str(folder.absolute() / "compile_cache")


def check_buckets(tree: dict[str, Any], prefix: str = "") -> None:
  """Every `gs://` in a config is tried before anything begins: a later stage may need it only after days.

  Raises:
    UserError: one cannot be reached, or is where data is expected.
  """
  for key, value in tree.items():
    if isinstance(value, dict):
      check_buckets(value, f"{prefix}{key}.")
    elif isinstance(value, str) and bucket.remote(value):
      if key not in ("init_from", "resume"):
        bucket.refuse(f"{prefix}{key}", value)
      bucket.path(value)


def run_stages(config, folder: Path) -> None:
  """Each stage in its own sub-folder; "stage:NAME" in a stage's config stands for an earlier stage's folder.

  A tokenizer stage with `init_from` is not trained: what that names stands in for its result.
  """
  results, where = {}, {}
  for name in config.stages:
    stage = config[name]
    if stage.objective == "dvae" and stage.init_from:
      where[name] = stage.init_from
      continue
    places = (("", "init_from", stage), ("", "resume", stage))
    places += tuple((f"{part}.", "init_from", stage[part]) for part in PARTS if part in stage)
    for prefix, key, section in places:
      value = section.get(key) or ""
      if value.startswith("stage:"):
        earlier = value.removeprefix("stage:")
        if earlier not in where:
          raise UserError(
            f"config key '{name}.{prefix}{key}': {value!r} names no earlier stage; there are {list(where)}"
          )
        section[key] = str(where[earlier])
    where[name] = folder / name
    results[name] = train.run(stage, folder / name, name)
  if jax.process_index() != 0:
    return
  text = summary_table(config.summary, results)
  if text:
    print(text)
    files.write_atomic(folder / "summary.txt", text + "\n")
  files.write_atomic(folder / "summary.json", json.dumps(results, indent=1) + "\n")


def lookup(results: dict[str, Any], reference: str) -> list[float]:
  """ "finetune*.eval.acc1"-like references -> the values of all stages that match.

  The parts are: a stage (a pattern), one of first, last, eval, seconds, and a metric.
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
  """Rows are (label, reference, format); several values give their mean and the list."""
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
