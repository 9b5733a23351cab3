"""What a run writes about itself, and reads again when it goes on: description, config, result."""

import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import beit_jax
from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.run import checkpoint, files
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "tensorflow-datasets",
  "numpy",
  "pillow",
  "simplejpeg",
  "cykooz-resizer",
)
RESULT = "result.json"


def version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def environment() -> str:
  """Who runs what, with which versions, on what: for log.txt, to be understood a week later."""
  root = Path(__file__).resolve().parent.parent
  revision = "no git checkout"
  if (root / ".git").exists():
    git = lambda *words: subprocess.run(
      ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
    ).stdout.strip()
    try:
      changed = len(git("status", "--porcelain", "--untracked-files=no").splitlines())
      revision = git("rev-parse", "HEAD") + (f", {changed} files changed" if changed else "")
    except (OSError, subprocess.SubprocessError) as error:
      revision = f"unknown ({error})"
  devices = collections.Counter(device.device_kind for device in jax.devices())
  packages = " ".join(f"{name}={version(name)}" for name in PACKAGES)
  lines = {
    "command": shlex.join(sys.argv),
    "host": f"{platform.node()}, process {os.getpid()} ({jax.process_index()} of {jax.process_count()})",
    "beit_jax": f"{beit_jax.__version__}, {revision}",
    "python": f"{platform.python_version()} on {platform.platform()}",
    "packages": packages,
    "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
  }
  return "\n".join(f"{key}: {value}" for key, value in lines.items())


def describe(config, objective, source) -> dict[str, Any]:
  """description.json: what a stranger needs to use, and to distrust, a checkpoint."""
  text = dict(
    version=beit_jax.__version__,
    preset=config.model.get("preset", ""),
    dataset={**source.description, "num_examples": len(source)},
    config=config.to_dict(),
    packages={name: version(name) for name in PACKAGES},
    python=platform.python_version(),
    **objective.describe(),
  )
  return json.loads(json.dumps(text, default=str))


def check_same_model(folder: Path, description: dict[str, Any]) -> None:
  """Refuses a checkpoint of another architecture, other pixel statistics or another tokenizer."""

  def facts(of):
    model = {f"model.{name}": value for name, value in trees.flatten(of["module"]).items()}
    data = {f"data.{key}": of["preprocessing"].get(key) for key in ("mean", "std")}
    frozen = {f"{part}'s sha256": of.get(part, {}).get("sha256") for part in ("tokenizer", "encoder")}
    return {"kind": of["kind"], **model, **data, **frozen}

  have, want = facts(checkpoint.read_description(folder)), facts(description)
  free = ("remat", "scan", "dtype", "attention", "drop_path_rate")
  names = [n for n in sorted(want.keys() | have.keys()) if want.get(n) != have.get(n)]
  lines = [
    f"{n.replace('encoder/', '')}: the checkpoint has {have.get(n)!r}, the config {want.get(n)!r}"
    for n in names
    if re.split("[./]", n)[-1] not in free
  ]
  if lines:
    raise UserError(
      f"{folder} holds another model than this config:\n  "
      + "\n  ".join(lines)
      + "\nUse another --workdir, or the config that made it"
    )


def rows(workdir: Path) -> list[dict[str, float]]:
  """The rows of metrics.jsonl that are whole: a kill may have cut the last one off."""
  try:
    lines = bucket.local(workdir / "metrics.jsonl").read_text(errors="replace").splitlines()
  except FileNotFoundError:
    return []
  found = []
  for line in lines:
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]


def logged(workdir: Path) -> tuple[dict[str, float], dict[str, float]]:
  """The first and the last training metrics in metrics.jsonl."""
  found = [row for row in rows(workdir) if "loss" in row]
  return (found[0], found[-1]) if found else ({}, {})


def count(workdir: Path, key: str) -> int:
  """Rows of metrics.jsonl with this key."""
  return sum(key in row for row in rows(workdir))


def check_not_lost(workdir: Path, begun: int = 0) -> None:
  """Refuses to begin where complete checkpoints have been and are gone, and says what is begun again.

  `saved.json` tells of them, and so does an evaluation, before which there always is one.

  Args:
    begun: the step at which the run begins: 0, or that of `resume`.

  Raises:
    UserError: the run had checkpoints.
  """
  if jax.process_index() != 0:
    return
  found = [row for row in rows(workdir) if row["step"] > begun]
  reached = max((row["step"] for row in found), default=begun)
  mark = workdir / checkpoint.SAVED
  if mark.is_file() or any(key.startswith("eval_") for row in found for key in row):
    raise UserError(
      f"{workdir} had complete checkpoints (metrics.jsonl tells of {reached} steps), and there is none in "
      f"{workdir / 'checkpoints'} any more: put them back (look into {workdir / 'damaged'} too), take another "
      f"--workdir, or move {checkpoint.SAVED} and metrics.jsonl away to begin anew"
    )
  if found:
    text = "%s: the run before got to step %d, with no checkpoint yet; this one begins at step %d"
    log.warning(text, workdir, reached, begun)


def check_length(start_step: int, total_steps: int) -> None:
  """
  Raises:
    UserError: the run is to be shorter than it is.
  """
  if start_step > total_steps:
    raise UserError(
      f"config key 'total_steps': {total_steps}, but this run begins at step {start_step} already; give "
      f"{start_step} to evaluate only, or more"
    )


# What may differ when a run goes on: none of it changes what is computed from a step on, but for the run's length.
FREE = re.compile(
  r"log_every_steps|profile_steps|total_(steps|epochs)|eval_only|figures|microbatches|(.*\.)?init_from|resume"
  r"|(mesh|checkpoint|eval)\..*|data\.(workers|threads|data_dir|root|max_bad)|model\.(remat|scan|dtype|attention)"
  r"|optimizer\.(max_skipped|ema_decay)|tokenizer\.cache"
)


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def check_same_data(folder: Path, description: dict[str, Any]) -> None:
  """Warns of files that were added or removed since a checkpoint; refusing would bring nothing back.

  Raises:
    UserError: classes have other numbers than they had, so that the network would have to learn them anew.
  """
  texts = (checkpoint.read_description(folder), description)
  have, want = (text.get("labels") for text in texts)
  if have and want and have != want:
    number = next(
      (i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), min(len(have), len(want))
    )
    names = [repr(of[number]) if number < len(of) else "none" for of in (have, want)]
    raise UserError(
      f"{folder}: class {number} was {names[0]} and is {names[1]} in the data now: give the classes (folders, or the "
      "label file) the names of before, or begin in another --workdir with init_from"
    )
  before, now = (text.get("dataset", {}).get("num_examples") for text in texts)
  if None not in (before, now) and before != now:
    log.warning(
      "the data set had %d examples before and has %d now: from here on the order of examples, and the length of an "
      "epoch, are not those of the run so far",
      before,
      now,
    )


# Keys of later versions, with what a run did before it had them.
ADDED = {"optimizer.name": "adamw", "optimizer.momentum": 0.9}


def _differences(folder: Path, config) -> dict[str, str]:
  """Dotted key -> what a checkpoint's config and this one have for it, where they differ."""
  before = ADDED | dict(_leaves(checkpoint.read_description(folder).get("config", {})))
  now = dict(_leaves(json.loads(json.dumps(config.to_dict(), default=str))))
  names = [n for n in sorted(before.keys() & now.keys()) if before[n] != now[n]]
  return {n: f"{n}: {before[n]!r} in the checkpoint, {now[n]!r} in the config" for n in names}


def differing(folder: Path, config, section: str) -> str:
  """A line for each key of a section that differs."""
  return "\n  ".join(line for n, line in _differences(folder, config).items() if n.startswith(f"{section}."))


def check_same_run(folder: Path, config) -> None:
  """Refuses to go on from a checkpoint of the run's own folder with another recipe; lists what differs freely.

  Raises:
    UserError: a key that changes the training differs.
  """
  lines = _differences(folder, config)
  wrong = [line for name, line in lines.items() if not FREE.fullmatch(name)]
  if wrong:
    raise UserError(
      f"{folder} was trained with another config:\n  "
      + "\n  ".join(wrong)
      + "\nUse another --workdir (with init_from "
      "or resume to begin from this one), or the values of before"
    )
  if lines:
    log.info("going on with another config than before:\n  %s", "\n  ".join(lines.values()))


def write_config(config, workdir) -> None:
  """config.json; a result of the folder, which is another config's or `finished` would have found it, goes."""
  if jax.process_index() == 0:
    (workdir / RESULT).unlink(missing_ok=True)
    text = json.dumps(config.to_dict(), indent=1, default=str)
    files.write_atomic(workdir / "config.json", text + "\n")


def finished(config, workdir) -> dict[str, Any] | None:
  """The result of an earlier, complete run of the very same config in this folder."""
  try:
    before = json.loads((workdir / "config.json").read_text())
    result = json.loads((workdir / RESULT).read_text())
  except (OSError, ValueError):
    return None
  now = json.loads(json.dumps(config.to_dict(), default=str))
  same = isinstance(before, dict) and ADDED | dict(_leaves(before)) == dict(_leaves(now))
  return result if same else None


def write_result(workdir: Path, result: dict[str, Any]) -> None:
  if jax.process_index() == 0:
    files.write_atomic(workdir / RESULT, json.dumps(result, indent=1) + "\n")
