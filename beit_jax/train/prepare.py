"""What a config describes: its data, objective, schedules and optimizer, validated before anything is computed."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from beit_jax import augment
from beit_jax import evaluate as evaluation
from beit_jax.config import parse, ranges
from beit_jax.data import sources
from beit_jax.data.examples import Reader
from beit_jax.errors import TransientError, UserError
from beit_jax.objectives import Objective, objective_of, stages
from beit_jax.objectives.base import Loader, PyTree, check_size
from beit_jax.objectives.stages import Stage
from beit_jax.run import checkpoint, record
from beit_jax.runtime import bucket, sharding
from beit_jax.runtime.logs import log, silent
from beit_jax.step import make_optimizer, make_schedules


class Data(NamedTuple):
  """The data of a run.

  Attributes:
    source: the training data.
    eval_source: the data of `eval.split`, or None.
  """

  source: sources.Source
  eval_source: sources.Source | None


@contextlib.contextmanager
def user_errors_of_files(workdir: Path) -> Iterator[None]:
  try:
    yield
  except bucket.errors(OSError) as error:
    what = f"{getattr(error, 'filename', None) or workdir}: {getattr(error, 'strerror', None) or error}"
    raise (TransientError if bucket.is_transient(error) else UserError)(
      f"{what}. Complete checkpoints in {workdir} are kept; fix this, then give the same command again"
    ) from error


def make_data(config: ConfigDict, workdir: Path | None = None, name: str = "run") -> Data:
  """Opens the data of a run.

  Args:
    config: a complete config.
    workdir: the run's folder, whose checkpoints say which number each class of the training data has.
    name: the run in messages.

  Raises:
    UserError: the data cannot be used, or differ between the processes of the run.
  """
  source = evaluation.train_source(config, workdir)
  data = Data(source, evaluation.eval_source(config, tuple(source.class_names)))
  record.check_same_sources(name, config.batch_size, {"training": source, "evaluation": data.eval_source})
  return data


def check_examples(objective: Objective, data: Data) -> None:
  """Looks at the first examples of training and evaluation; see `Objective.check_source`."""
  for source in data:
    if source is not None:
      objective.check_source(source)


def check_stages(runs: Sequence[Stage]) -> dict[str, Data]:
  """Validates every stage before the first one starts, so that no mistake in a later one appears after days.

  The results of earlier stages are stand-ins, which have shapes in place of parameters; nothing is computed.

  Returns:
    Stage -> its data, for `run`. Stages that have finished, or train nothing, are left out.

  Raises:
    UserError: a stage cannot run.
  """
  found: dict[str, Data] = {}
  made: dict[str, Data] = {}
  for stage in runs:
    config = stage.config
    if config.eval_only or record.finished(config, stage.folder) is not None:
      continue
    names = evaluation.class_names_of_run(config, stage.folder)
    key = json.dumps([config.data.to_dict(), config.eval.to_dict(), config.batch_size, names], default=str)
    try:
      mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
      with user_errors_of_files(stage.folder), jax.set_mesh(mesh):
        data = made[key] = made.get(key) or make_data(config, stage.folder, stage.name)
        with silent():
          _check_stage(stage, mesh, data)
    except UserError as error:
      raise type(error)(f"stage {stage.name!r}: {error}") from error
    if stage.objective.trains:
      found[stage.name] = data
  return found


def _check_stage(stage: Stage, mesh: jax.sharding.Mesh, data: Data) -> None:
  load = stages.loader(stage.uses.values()) if stage.uses else None
  if stage.objective.trains:
    objective = prepare(stage.config, mesh, data, load).objective
    check_start(stage, objective)
  else:
    objective = stage.objective(stage.config, data.source, load)
  check_examples(objective, data)


def check_start(stage: Stage, objective: Objective) -> str:
  """Checks that a run without checkpoints of its own can start from what `resume` or `init_from` names.

  Args:
    stage: the run; the models of the stages in `stage.uses` are stand-ins.
    objective: its objective.

  Returns:
    What it starts with; "" for fresh parameters, or if there are checkpoints.

  Raises:
    UserError: it cannot start from that.
  """
  config = stage.config
  key = "resume" if config.resume else "init_from"
  path, earlier = config[key], stage.uses.get(key)
  if not path or checkpoint.steps(stage.folder / "checkpoints"):
    return ""
  if key == "resume":
    if earlier is not None:
      record.check_same_position(path, earlier.config.to_dict(), config)
      return f"the full state of stage {earlier.name!r}, not yet there"
    folder, _ = checkpoint.find_resumable(path)
    record.check_same_position(folder, checkpoint.read_config(folder), config)
    return f"the full state of {folder}"
  pretrained = stages.loader(stage.uses.values(), objective.load_start)(path)
  if earlier is not None:  # arrays of zeros that take no memory
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), pretrained.params)
    pretrained = dataclasses.replace(pretrained, params=zeros)
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  count = len(objective.adapt(pretrained, shapes))
  what = (
    f"the result of stage {earlier.name!r}, not yet there"
    if earlier
    else pretrained.description.get("path", path)
  )
  return f"{count} tensors of {what}"


class Plan(NamedTuple):
  """What a config describes, before anything is computed.

  Attributes:
    source: the training data.
    eval_source: the data of `eval.split`, or None.
    objective: what is trained.
    reader: turns examples into rows of a batch.
    param_shapes: the parameters, as shapes.
    schedules: see `step.make_schedules`.
    tx: the optimizer.
    steps_per_epoch: optimizer updates in an epoch.
    total_steps: optimizer updates in the run.
  """

  source: sources.Source
  eval_source: sources.Source | None
  objective: Objective
  reader: Reader
  param_shapes: PyTree
  schedules: dict[str, Callable[..., Any]]
  tx: optax.GradientTransformation
  steps_per_epoch: int
  total_steps: int


def prepare(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  data: Data | None = None,
  load: Loader | None = None,
) -> Plan:
  """Builds objective, schedules and optimizer, and validates the config on the way; allocates no training state.

  `check_examples` looks at the data, and `check_start` at what the run starts from.

  Args:
    config: a complete config.
    mesh: the devices.
    data: default: what the config names.
    load: function from a path to a model, used instead of `beit_jax.load` for frozen models.

  Raises:
    UserError: a value does not fit the data, the model or the mesh.
  """
  _check_batch_size(config, mesh)
  _check_dtype(config)
  source, eval_source = data or make_data(config)
  objective = objective_of(config)(config, source, load)
  _check_best_metric(config, objective)
  _warn_about_unused_augmentation(config, objective)
  steps_per_epoch = len(source) // config.batch_size
  total_steps = _total_steps(config, len(source), steps_per_epoch)
  schedules = make_schedules(config, steps_per_epoch, total_steps)
  shapes = jax.eval_shape(functools.partial(objective.init, jax.random.key(0)))["params"]
  check_size(shapes)
  return Plan(
    source=source,
    eval_source=eval_source,
    objective=objective,
    reader=objective.reader(),
    param_shapes=shapes,
    schedules=schedules,
    tx=make_optimizer(config, schedules, shapes, objective.depth, objective.delayed),
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
  )


def _total_steps(config: ConfigDict, num_examples: int, steps_per_epoch: int) -> int:
  total_steps = parse.duration(config, "total", steps_per_epoch)
  if total_steps < 1:
    raise UserError(
      f"this run would not make a single update: its {num_examples} examples are {steps_per_epoch} batches of "
      f"batch_size={config.batch_size}; lower batch_size, or set total_steps or a larger total_epochs"
    )
  if total_steps > ranges.MAX_STEPS:
    raise UserError(
      f"config key 'total_epochs' or 'total_steps': {total_steps} steps are more than {ranges.MAX_STEPS:,}"
    )
  return total_steps


def _check_batch_size(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  unit = config.microbatches * mesh.size
  below = config.batch_size // unit * unit
  if below != config.batch_size:
    choices = " or ".join(str(size) for size in (below, below + unit) if size)
    raise UserError(
      f"config key 'batch_size': {config.batch_size} is not a multiple of microbatches={config.microbatches} x "
      f"{mesh.size} devices; set batch_size to {choices}"
    )


def _check_dtype(config: ConfigDict) -> None:
  if config.model.get("dtype") == "float16":
    raise UserError(
      "config key 'model.dtype': training in float16 is not implemented: without loss scaling, small gradients "
      "become 0; use 'bfloat16', which has the range of float32"
    )


def _check_best_metric(config: ConfigDict, objective: Objective) -> None:
  best, names = config.checkpoint.best, objective.eval_metrics
  names = names + tuple(f"ema_{name}" for name in names if config.optimizer.ema_decay)
  if best and not config.eval.split:
    raise UserError(f"config key 'checkpoint.best': {best!r} needs an evaluation; set eval.split")
  if best and best not in names:
    raise UserError(
      f"config key 'checkpoint.best': {best!r} is not evaluated; choose one of {', '.join(names)}"
    )


def _warn_about_unused_augmentation(config: ConfigDict, objective: Objective) -> None:
  for key in augment.AUGMENTATIONS:
    if config.data[key] and key not in objective.augmentations:
      log.warning("config key 'data.%s' has no effect on the objective %s", key, config.objective)
