"""What the checks look at: the runs that a command line asks for, their data and objectives, made once."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from beit_jax import evaluate as evaluation
from beit_jax import objectives
from beit_jax.config import parse as config_lib
from beit_jax.data import sources
from beit_jax.doctor.findings import OK, WARN, Found, Skip, guarded
from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.runtime import bucket, distributed, lock

USAGE = "usage: python -m beit_jax.doctor [--config=FILE[:variant]] [--workdir=DIR] [--config.key=value ...] [--json]"


@dataclasses.dataclass
class Run:
  """One run or stage. `waits`: config key -> the earlier stage whose result it names, where that is not yet there."""

  name: str
  config: Any
  folder: Path
  waits: dict[str, "Run"] = dataclasses.field(default_factory=dict)

  @property
  def kind(self) -> type:
    return objectives.OBJECTIVES[self.config.objective]

  @property
  def trains(self) -> bool:
    return self.kind.trains and not self.config.eval_only


@dataclasses.dataclass
class Machine:
  """`place`: this process among several, or None. `apart`: they did not find each other."""

  workdir: Path
  runs: list[Run] = dataclasses.field(default_factory=list)
  flags: Any = None
  place: Any = None
  apart: bool = False
  _made: dict[Any, tuple[Any, Exception | None]] = dataclasses.field(default_factory=dict)

  def once(self, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returned or raised the first time."""
    if key not in self._made:
      try:
        self._made[key] = (make(), None)
      except Exception as error:
        self._made[key] = (None, error)
    value, error = self._made[key]
    if error is not None:
      raise error
    return value

  def source(self, run: Run, part: str) -> Any:
    """The data of "train", or of "eval": None without a split."""
    data, split = (json.dumps(run.config[key].to_dict(), default=str) for key in ("data", "eval"))
    if part == "train":
      return self.once(data, lambda: sources.make_source(run.config.data.to_dict()))
    names = tuple(self.source(run, "train").class_names) if run.trains else ()
    return self.once((data, split, names), lambda: evaluation.eval_source(run.config, names))

  def parts(self, run: Run) -> tuple[str, ...]:
    """Which of "train" and "eval" a run reads; the objective is made with the first."""
    return ("eval",) if run.kind.trains and run.config.eval_only else ("train", "eval")

  def main_source(self, run: Run) -> Any:
    try:
      source = self.source(run, self.parts(run)[0])
    except Exception:
      raise Skip(WARN, "not looked at, since the data cannot be read") from None
    if source is None:
      raise UserError("config key 'eval.split': empty, so there is nothing to evaluate on; name a split")
    return source

  def objective(self, run: Run) -> Any:
    for key, earlier in run.waits.items():
      if key not in ("init_from", "resume"):
        raise Skip(OK, f"{key}: the result of stage {earlier.name!r} is not yet there")
    source = self.main_source(run)
    return self.once(run.folder, lambda: run.kind(run.config, source))

  def devices(self) -> list[Any]:
    if self.apart:
      raise Skip(WARN, "not looked at, since the processes did not find each other")
    return jax.devices()

  def ground(self) -> Path:
    """The workdir, or the nearest there is of the folders that it will be made in; in a bucket there are none."""
    if bucket.remote(self.workdir):
      return self.workdir
    path = self.workdir.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())

  def folders(self) -> list[Path]:
    """Where runs write, or have written."""
    below = sorted(path.parent for path in self.workdir.glob(f"*/{lock.LOCK}"))
    return [run.folder for run in self.runs] or [self.workdir, *below]


def each_run(check: Callable[[Machine, Run], Found]) -> Callable[[Machine], Found]:
  """A check of one run -> a check of every run of a machine; what several have in common is said once."""

  @functools.wraps(check)
  def over(machine):
    if not machine.runs:
      yield OK, "no --config, so nothing to look at", ""
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in machine.runs:
      for one in guarded(check(machine, run)):
        found.setdefault(one, []).append(run.name)
    for (status, what, advice), names in found.items():
      yield status, f"{', '.join(names)}: {what}" if names[0] else what, advice

  return over


def prepare(argv: list[str]) -> Machine:
  """The command line -> what to look at, the stages tied together as `beit_jax.main` does.

  Raises:
    UserError: a mistake in it, or in the config file.
  """
  flags, argv = distributed.take_flags(argv)
  distributed.from_flags(flags)
  spec, workdir, overrides = config_lib.parse_args(["--config=-", *argv], USAGE)
  if spec == "-":
    if overrides:
      raise UserError(f"--config.{overrides[0][0]} is set, but there is no --config=FILE; {USAGE}")
    return Machine(bucket.path(workdir or "runs"), flags=flags)
  config = config_lib.load(spec, overrides, objectives.schemas())
  path, _, variant = spec.partition(":")
  folder = bucket.path(workdir or f"runs/{Path(path).stem}{'_' if variant else ''}{variant}")
  runs = _stages(config, folder) if "stages" in config else [Run("", config, folder)]
  return Machine(folder, runs, flags)


def _stages(config: Any, folder: Path) -> list[Run]:
  runs, where = [], {}
  for name in config.stages:
    run = Run(name, config[name], folder / name)
    if run.config.objective == "dvae" and run.config.init_from:  # stands in for the stage's result
      where[name] = (run.config.init_from, None)
      continue
    for key in ("init_from", "resume", "tokenizer.init_from", "encoder.init_from"):
      section, _, last = key.rpartition(".")
      node = run.config.get(section, {}) if section else run.config
      earlier = node.get(last) or ""
      if not earlier.startswith("stage:"):
        continue
      earlier = earlier.removeprefix("stage:")
      if earlier not in where:
        raise UserError(
          f"config key '{name}.{key}': {earlier!r} is no earlier stage; there are {list(where)}"
        )
      node[last], before = where[earlier]
      if before is not None and not checkpoint.steps(before.folder / "checkpoints"):
        run.waits[key] = before
    where[name] = (str(run.folder), run)
    runs.append(run)
  return runs
