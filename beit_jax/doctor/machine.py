"""What the checks look at: the runs of a command line, their data and objectives, each made once."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from beit_jax import evaluate as evaluation
from beit_jax import objectives, train
from beit_jax.config import parse
from beit_jax.data import sources
from beit_jax.doctor.findings import OK, WARN, Found, Skip, guarded
from beit_jax.errors import UserError
from beit_jax.objectives import Objective, stages
from beit_jax.objectives.base import Loader
from beit_jax.objectives.stages import Stage
from beit_jax.run import checkpoint
from beit_jax.runtime import bucket, distributed, lock, sharding
from beit_jax.runtime.rendezvous import ProcessInfo

USAGE = "usage: python -m beit_jax.doctor [--config=FILE[:variant]] [--workdir=DIR] [--config.key=value ...] [--json]"


@dataclasses.dataclass
class Machine:
  """What the checks look at."""

  workdir: Path
  runs: list[Stage] = dataclasses.field(
    default_factory=list
  )  # `uses` names only results that are not there yet
  flags: distributed.Flags = dataclasses.field(default_factory=distributed.Flags)
  process: ProcessInfo | None = None  # this process among several
  disconnected: bool = False  # whether the processes did not find each other
  _made: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def once(self, key: Any, make: Callable[[], Any]) -> Any:
    """Returns what `make` returned the first time."""
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  def train_source(self, run: Stage) -> sources.Source:
    data = json.dumps(run.config.data.to_dict(), default=str)
    return self.once((data, run.folder), lambda: evaluation.train_source(run.config, run.folder))

  def eval_source(self, run: Stage) -> sources.Source | None:
    if only_evaluates(run):
      return self.once((run.folder, "eval"), lambda: evaluation.eval_only_source(run.config, run.folder)[0])
    names = tuple(self.train_source(run).class_names)
    data, split = (json.dumps(run.config[key].to_dict(), default=str) for key in ("data", "eval"))
    return self.once((data, split, names), lambda: evaluation.eval_source(run.config, names))

  def main_source(self, run: Stage) -> sources.Source:
    """Returns the data that the objective is made with."""
    try:
      source = self.eval_source(run) if only_evaluates(run) else self.train_source(run)
    except Exception:
      raise Skip(WARN, "not checked, because the data cannot be read") from None
    if source is None:
      raise UserError("config key 'eval.split': empty, so there is nothing to evaluate on; name a split")
    return source

  def mesh(self, run: Stage) -> jax.sharding.Mesh:
    return sharding.make_mesh(run.config.mesh.data, run.config.mesh.fsdp, self.devices())

  def plan(self, run: Stage) -> train.Plan:
    """Validates a run that trains; the models of stages that have not run yet are shapes.

    Raises:
      UserError: see `train.prepare`.
    """
    data, mesh = train.Data(self.main_source(run), None), self.mesh(run)
    return self.once((run.folder, "plan"), lambda: train.prepare(run.config, mesh, data, _loader(run)))

  def objective(self, run: Stage) -> Objective:
    if trains(run):
      return self.plan(run).objective
    source = self.main_source(run)
    return self.once(run.folder, lambda: run.objective(run.config, source, _loader(run)))

  def devices(self) -> list[Any]:
    if self.disconnected:
      raise Skip(WARN, "not checked, because the processes did not find each other")
    return jax.devices()

  def ground(self) -> Path:
    """The workdir, or its nearest parent that exists; a bucket has no folders."""
    if bucket.remote(self.workdir):
      return self.workdir
    path = self.workdir.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())

  def folders(self) -> list[Path]:
    """The folders that runs write to, or have written to."""
    below = sorted(path.parent for path in self.workdir.glob(f"*/{lock.LOCK}"))
    return [run.folder for run in self.runs] or [self.workdir, *below]


def trains(run: Stage) -> bool:
  return run.objective.trains and not run.config.eval_only


def only_evaluates(run: Stage) -> bool:
  """Whether a run reads no training data; an objective that never trains may read it for its evaluation."""
  return run.objective.trains and run.config.eval_only


def pending(run: Stage) -> dict[str, Stage]:
  """Config key of each frozen model that is not there yet -> the stage that will make it."""
  return {key: stage for key, stage in run.uses.items() if key not in ("init_from", "resume")}


def _loader(run: Stage) -> Loader | None:
  return stages.loader(pending(run).values()) if pending(run) else None


def each_run(check: Callable[[Machine, Stage], Found]) -> Callable[[Machine], Found]:
  """Turns a check of one run into a check of all runs of a machine, which reports equal findings once."""

  @functools.wraps(check)
  def check_all(machine: Machine) -> Found:
    if not machine.runs:
      yield OK, "no --config, so there is nothing to check", ""
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in machine.runs:
      for one in guarded(check(machine, run)):
        found.setdefault(one, []).append(run.name)
    for (status, what, advice), names in found.items():
      yield status, f"{', '.join(names)}: {what}" if names[0] else what, advice

  return check_all


def prepare(argv: list[str]) -> Machine:
  """Parses the command line; its stages are resolved as `beit_jax.main` does.

  Raises:
    UserError: a mistake in the command line or in the config file.
  """
  flags, argv = distributed.take_flags(argv)
  distributed.from_flags(flags)
  spec, workdir, overrides = parse.parse_args(["--config=-", *argv], USAGE)
  if spec == "-":
    if overrides:
      raise UserError(f"--config.{overrides[0][0]} is set, but there is no --config=FILE; {USAGE}")
    return Machine(bucket.path(workdir or "runs"), flags=flags)
  config = parse.load(spec, overrides, objectives.schemas())
  folder = bucket.path(workdir or parse.default_workdir(spec))
  runs = [run for run in stages.resolve(config, folder) if not run.is_replaced]
  for run in runs:
    run.uses = {key: used for key, used in run.uses.items() if not _has_result(used)}
  return Machine(folder, runs, flags)


def _has_result(run: Stage) -> bool:
  return bool(checkpoint.steps(run.folder / "checkpoints"))
