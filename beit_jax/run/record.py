"""What a run records about itself and checks when it continues: environment, description, config, metrics, result."""

import collections
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import beit_jax
from beit_jax import trees
from beit_jax.config import defaults
from beit_jax.errors import UserError
from beit_jax.models.beit import Beit, BeitForMaskedImageModeling
from beit_jax.models.dvae import Dvae
from beit_jax.run import checkpoint, files
from beit_jax.runtime import bucket, distributed
from beit_jax.runtime.logs import log

RESULT = "result.json"
PACKAGES = (
  "jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets numpy pillow simplejpeg cykooz-resizer"
).split()

# Environment and description.


def version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def environment() -> str:
  """Returns command, host, revision, versions and devices for log.txt, one per line."""
  devices = collections.Counter(device.device_kind for device in jax.devices())
  lines = {
    "command": shlex.join(sys.argv),
    "host": f"{platform.node()}, process {os.getpid()} ({jax.process_index()} of {jax.process_count()})",
    "beit_jax": f"{beit_jax.__version__}, {_revision()}",
    "python": f"{platform.python_version()} on {platform.platform()}",
    "packages": " ".join(f"{name}={version(name)}" for name in PACKAGES),
    "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
  }
  return "\n".join(f"{key}: {value}" for key, value in lines.items())


def _revision() -> str:
  """The commit of the checkout that the package is imported from, with "-dirty" if tracked files were changed."""
  root = Path(beit_jax.__file__).resolve().parent.parent
  command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(
      [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.SubprocessError) as error:
    return f"unknown ({error})"
  return done.stdout.strip() or "no git checkout"


def describe(config: ConfigDict, objective: Any, source: Any) -> dict[str, Any]:
  """Returns description.json: what a reader needs to rebuild the model and to judge where it comes from."""
  return _as_json(
    {
      "version": beit_jax.__version__,
      "preset": config.model.get("preset", ""),
      "dataset": {**source.description, "num_examples": len(source), "sha256": source.digest()},
      "config": config.to_dict(),
      "packages": {name: version(name) for name in PACKAGES},
      "python": platform.python_version(),
      **objective.describe(),
    }
  )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
  """The value after a round trip through JSON: tuples become lists."""
  return json.loads(json.dumps(value, default=str))


# Metrics.


def rows(workdir: Path) -> list[dict[str, Any]]:
  """Returns the complete rows of metrics.jsonl; a kill may have cut off the last one."""
  found = files.read_json_lines(bucket.local(workdir / "metrics.jsonl"))
  return [row for row in found if isinstance(row.get("step"), int)]


def first_and_last(workdir: Path) -> tuple[dict[str, float], dict[str, float]]:
  """Returns the first and the last row of training metrics in metrics.jsonl; ({}, {}) if there are none."""
  found = [row for row in rows(workdir) if "loss" in row]
  return (found[0], found[-1]) if found else ({}, {})


def count(workdir: Path, key: str) -> int:
  """Returns the number of rows of metrics.jsonl that have a key."""
  return sum(key in row for row in rows(workdir))


# Checks before a run starts or continues.


def check_not_lost(workdir: Path, start_step: int = 0) -> None:
  """Raises a UserError if a folder without checkpoints has had complete ones; warns if steps are repeated.

  `saved.json` records that there was a checkpoint, and so does an evaluation, since each follows a save.

  Args:
    workdir: The folder of the run.
    start_step: The step at which the run would start: 0, or the step of `resume`.
  """
  if jax.process_index() != 0:
    return
  later = [row for row in rows(workdir) if row["step"] > start_step]
  reached = max((row["step"] for row in later), default=start_step)
  evaluated = any(key.startswith("eval_") for row in later for key in row)
  if evaluated or (workdir / checkpoint.SAVED).is_file():
    raise UserError(
      f"{workdir} had complete checkpoints (metrics.jsonl has {reached} steps), but {workdir / 'checkpoints'} has "
      f"none now: put them back (see {workdir / 'damaged'} too), use another --workdir, or move {checkpoint.SAVED} "
      "and metrics.jsonl away to start over"
    )
  if later:
    text = "%s: an earlier run reached step %d without a checkpoint; this one starts at step %d"
    log.warning(text, workdir, reached, start_step)


def check_length(start_step: int, total_steps: int) -> None:
  """Raises a UserError if a run has already passed its last step."""
  if start_step > total_steps:
    raise UserError(
      f"config key 'total_steps': {total_steps}, but this run starts at step {start_step} already; give {start_step} "
      "to evaluate only, or more"
    )


def check_same_model(folder: Path, description: dict[str, Any]) -> None:
  """Raises a UserError if a checkpoint has another architecture, pixel statistics or frozen model than the config."""

  # What a field is in a checkpoint of a version that did not have it.
  defaults_of_fields = {
    field.name: field.default
    for kind in (Beit, BeitForMaskedImageModeling, Dvae)
    for field in dataclasses.fields(kind)
  }

  def facts(text: dict[str, Any]) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in trees.flatten(text["module"]).items()}
    data = {f"data.{key}": text["preprocessing"].get(key) for key in ("mean", "std")}
    frozen = {
      f"{part}'s sha256": text.get(part, {}).get("sha256") for part in ("tokenizer", "encoder", "teacher")
    }
    return {"kind": text["kind"], **model, **data, **frozen}

  old, new = facts(checkpoint.read_description(folder)), facts(description)
  # None of these changes the parameters.
  free = ("remat", "scan", "dtype", "residual_dtype", "attention", "drop_path_rate")
  lines = []
  for name in sorted(old.keys() | new.keys()):
    last = re.split("[./]", name)[-1]
    before, now = (found.get(name, defaults_of_fields.get(last)) for found in (old, new))
    if before != now and last not in free:
      lines.append(f"{name.replace('encoder/', '')}: {before!r} in the checkpoint, {now!r} in the config")
  if lines:
    raise UserError(
      f"{folder} holds a different model than this config:\n  "
      + "\n  ".join(lines)
      + "\nUse another --workdir, or the config that made it"
    )


def check_same_data(folder: Path, description: dict[str, Any]) -> None:
  """Raises a UserError if class ids mean other classes than in a checkpoint; warns if the data has grown or shrunk."""
  texts = (checkpoint.read_description(folder), description)
  old, new = (text.get("labels") for text in texts)
  if old and new and old != new:
    pairs = enumerate(zip(old, new, strict=False))
    number = next((i for i, (before, now) in pairs if before != now), min(len(old), len(new)))
    names = [repr(labels[number]) if number < len(labels) else "none" for labels in (old, new)]
    raise UserError(
      f"{folder}: class {number} was {names[0]} and is {names[1]} in the data now: restore the names of the classes "
      "(folders, or the label file), or start in another --workdir with init_from"
    )
  for text in _data_changes(*texts):
    log.warning("the data set %s: the order of examples and epochs changes", text)


def _data_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs between the data sets of two descriptions; earlier versions did not write the sha256."""
  before, now = old.get("dataset", {}), new.get("dataset", {})
  counts = before.get("num_examples"), now.get("num_examples")
  if None not in counts and counts[0] != counts[1]:
    return [
      f"had {counts[0]} examples before and has {counts[1]} now (files were added or removed, or this version finds "
      "others: the log says what it leaves out)"
    ]
  if before.get("sha256", now.get("sha256")) != now.get("sha256"):
    return ["has other files or classes than before"]
  return []


# Config keys that may change when a run continues: apart from its length, none of them changes what is computed.
MAY_CHANGE = re.compile(
  r"log_every_steps|wandb|profile_steps|total_(steps|epochs)|eval_only|figures|microbatches|(.*\.)?init_from|resume"
  r"|(mesh|checkpoint|eval)\..*|data\.(workers|threads|data_dir|root|max_bad)|model\.(remat|scan|(residual_)?dtype|attention)"
  r"|optimizer\.(max_skipped|ema_decay)|tokenizer\.cache|collapse\..*"
)


def check_same_run(folder: Path, config: ConfigDict) -> None:
  """Raises a UserError if a key that affects training differs from a checkpoint's; logs other differences."""
  lines = _differences(checkpoint.read_config(folder), config)
  wrong = [line for name, line in lines.items() if not MAY_CHANGE.fullmatch(name)]
  if wrong:
    raise UserError(
      f"{folder} was trained with another config:\n  "
      + "\n  ".join(wrong)
      + "\nUse another --workdir (with init_from or resume to start from this checkpoint), or the old values"
    )
  if lines:
    log.info("continuing with a changed config:\n  %s", "\n  ".join(lines.values()))


# Config keys that may differ between the processes of a run, because they say where its data lie on a host.
OF_A_HOST = re.compile(r"(.*\.)?data\.(root|data_dir|label_file|class_file|workers|threads)")


def check_same_config(config: ConfigDict) -> None:
  """Raises a UserError on all processes if their configs differ; see `distributed.check_same`."""
  keys = flatten_config(config.to_dict())
  facts = {name: str(value) for name, value in keys.items() if not OF_A_HOST.fullmatch(name)}
  distributed.check_same("config", {"beit_jax": beit_jax.__version__, **facts})


def check_same_sources(name: str, batch_size: int, sources: Mapping[str, Any]) -> None:
  """Raises a UserError on all processes if their data differ in number, names, classes, files or shards.

  Args:
    name: the run in messages.
    batch_size: of the run, for the steps of an epoch.
    sources: what each source is for, such as "training" -> the source, or None.
  """
  if jax.process_count() == 1:
    return
  facts: dict[str, str] = {}
  for part, source in sources.items():
    if source is None:
      continue
    shown_elsewhere = ("root", "label_file", "num_examples")
    text = {key: value for key, value in source.description.items() if key not in shown_elsewhere}
    facts |= {f"{part} examples": str(len(source)), f"{part} steps an epoch": str(len(source) // batch_size)}
    facts |= {f"{part} class {i}": label for i, label in enumerate(source.class_names)}
    facts |= {f"{part} data": str(text), f"{part} files and their classes (sha256)": source.digest()[:16]}
  distributed.check_same(f"{name}: data", facts)


# Config keys that say which example a step sees, and what is masked in it.
POSITION = re.compile(r"batch_size|seed|data\.(source|name|split|fraction|num_examples|render_size)|mask\..*")


def check_same_position(
  origin: Any, old: dict[str, Any], config: ConfigDict, description: dict[str, Any] | None = None
) -> None:
  """Raises a UserError if `resume` would continue at another place of the data; logs other differences.

  The data position is a function of the step, so it is lost if a step has other examples than in the checkpoint.

  Args:
    origin: where the checkpoint lies, or will lie.
    old: the config that it was trained with.
    config: the config of the run that resumes.
    description: of that run, to compare the data set as well.
  """
  lines = _differences(old, config)
  wrong = [line for name, line in lines.items() if POSITION.fullmatch(name)]
  if description is not None:
    changes = _data_changes(checkpoint.read_description(origin), description)
    wrong += [f"the data set {text}" for text in changes]
  if wrong:
    raise UserError(
      f"config key 'resume': a run continues at the place in the data where {origin} stopped, which changes with\n  "
      + "\n  ".join(wrong)
      + "\nGive the earlier values, or use init_from, which takes the weights and starts at step 0"
    )
  if lines:
    log.info("resume with a changed config:\n  %s", "\n  ".join(lines.values()))


def section_differences(folder: Path, config: ConfigDict, section: str) -> str:
  """Returns one line for each key of a config section that differs from a checkpoint's."""
  return "\n  ".join(
    line
    for name, line in _differences(checkpoint.read_config(folder), config).items()
    if name.startswith(f"{section}.")
  )


def _differences(before: dict[str, Any], config: ConfigDict) -> dict[str, str]:
  """Dotted key -> its values in a checkpoint's config and in this one, where they differ."""
  old, new = flatten_config(before), flatten_config(config.to_dict())
  names = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
  return {name: f"{name}: {old[name]!r} in the checkpoint, {new[name]!r} in the config" for name in names}


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
  """A config as JSON: dotted key -> value.

  Keys that a run of an earlier version lacks get their defaults, which must therefore mean what that version did.
  """
  found = dict(_leaves(_as_json(defaults.plain()))) | dict(_leaves(_as_json(config)))
  if "model.dtype" in found:  # versions without this key had one dtype for both
    found.setdefault("model.residual_dtype", found["model.dtype"])
  return found


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


# Config and result.


def write_config(config: ConfigDict, workdir: Path) -> None:
  """Writes config.json and deletes result.json, which would belong to another config."""
  if jax.process_index() == 0:
    (workdir / RESULT).unlink(missing_ok=True)
    text = json.dumps(config.to_dict(), indent=1, default=str)
    files.write_atomic(workdir / "config.json", text + "\n")


def write_result(workdir: Path, result: dict[str, Any]) -> None:
  if jax.process_index() == 0:
    files.write_atomic(workdir / RESULT, json.dumps(result, indent=1) + "\n")


def finished(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
  """Returns the result of an earlier, complete run of exactly this config in a folder."""
  try:
    before = json.loads((workdir / "config.json").read_text())
    result = json.loads((workdir / RESULT).read_text())
  except (OSError, ValueError):
    return None
  if not isinstance(before, dict):
    return None
  old, new = flatten_config(before), flatten_config(config.to_dict())
  # A key that only one of the two versions has is not compared, as in `check_same_run`: its default keeps the behavior.
  return result if all(old[name] == new[name] for name in old.keys() & new.keys()) else None
