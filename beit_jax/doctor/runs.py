"""Checks of the runs of a config: data, sizes, locks, checkpoints, and room on the disk."""

import platform
import shutil
from typing import Any

import jax
import numpy as np

from beit_jax import train, trees
from beit_jax.data import examples, sources
from beit_jax.data.labels import check_label
from beit_jax.doctor.findings import FAIL, OK, WARN, Found, Skip, unless_worse
from beit_jax.doctor.machine import Machine, each_run, only_evaluates, pending, trains
from beit_jax.errors import BadImage, UserError
from beit_jax.objectives.stages import Stage
from beit_jax.run import checkpoint, record
from beit_jax.runtime import bucket, lock
from beit_jax.step import make_optimizer

SAMPLE = 8  # examples that are tried, besides the first and the last
OLDER = 4  # checkpoints that are verified besides the newest good one


@each_run
def data(machine: Machine, run: Stage) -> Found:
  for part in ("eval",) if only_evaluates(run) else ("train", "eval"):
    source = machine.train_source(run) if part == "train" else machine.eval_source(run)
    if source is None:
      continue
    split = run.config.data.split if part == "train" else run.config.eval.split
    where = f"{part} ({split or 'all'})"
    if not len(source):
      yield FAIL, f"{where}: no examples at all", "look at data.split and at the files"
      continue
    reader = machine.objective(run).reader() if run.objective.labels == "map" else None
    drawn = np.random.default_rng(0).integers(0, len(source), SAMPLE).tolist()
    chosen = sorted({0, len(source) - 1, *drawn})
    problems = [problem for index in chosen if (problem := problem_of(run, source, index, reader))]
    wrong = [reason for tolerable, reason in problems if not tolerable]
    what = f"{where}: {len(wrong) or len(problems)} of {len(chosen)} tried"
    if wrong:
      yield FAIL, f"{what} are wrong, the first: {wrong[0]}", "repair the data"
    elif problems:
      limit = run.config.data.max_bad
      status = FAIL if len(problems) > len(chosen) / 2 or not limit else WARN
      advice = f"repair or remove such files; a run replaces them, up to data.max_bad={limit} of all"
      yield status, f"{what} cannot be read, the first: {problems[0][1]}", advice
    else:
      labels = f", {source.num_classes} classes" if source.num_classes else ""
      yield OK, f"{where}: {len(source):,} examples{labels}, {len(chosen)} tried", ""


def problem_of(
  run: Stage, source: sources.Source, index: int, reader: examples.Reader | None
) -> tuple[bool, str] | None:
  """Reads one example as a run does; `reader` prepares label maps.

  Returns:
    None for a good example; otherwise whether a run replaces it by another one, and what is wrong.
  """
  labels = {"none": "", "class": "label", "map": "label_map"}[run.objective.labels]
  try:
    example = {**source[index], "index": index}
    image = examples.decode(example, index, source.pixel_rule)
    image.pixels()
    if labels and labels not in example:
      objective = run.config.objective
      return False, f"example {index} has no {labels}, which objective {objective!r} needs (data.label_key)"
    if reader is not None:
      reader.eval(image, example)
    elif labels == "label" and (count := run.config.model.get("num_classes") or source.num_classes):
      check_label(example, count, source.multi_label, index)
  except (BadImage, OSError) as error:
    return True, str(error)
  except UserError as error:
    return False, str(error)
  except Exception as error:
    return False, f"example {index}: {type(error).__name__}: {error}"
  return None


@each_run
def sizes(machine: Machine, run: Stage) -> Found:
  """Validates the config as a run does."""
  config, mesh, text = run.config, machine.mesh(run), "evaluation"
  if trains(run):
    steps, rows = machine.plan(run).total_steps, config.batch_size // (config.microbatches * mesh.size)
    parts = f"{config.microbatches} microbatches x {mesh.size} devices x {rows}"
    text = f"{steps:,} steps of {config.batch_size} = {parts}"
  machine.objective(run)
  for key, earlier in pending(run).items():
    text += f"; {key}: the result of stage {earlier.name!r} is not yet there"
  yield OK, text, ""


@unless_worse
def locks(machine: Machine) -> Found:
  stale = []
  for folder in machine.folders():
    holder = lock.holder(folder)
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
    who = f"{folder}: {who} ({holder.get('command')})" if holder else f"{folder}: an unnamed process"
    if lock.held(folder):
      yield FAIL, f"{who} is writing there", "wait for it, stop it, or use another --workdir"
    elif holder and holder.get("host") != platform.node():
      advice = "check that it has ended, because some network mounts do not share locks"
      yield WARN, f"{who} did not end cleanly", advice
    elif holder:
      stale.append(f"{who} is dead, its lock will be taken over")
  yield OK, "; ".join(stale) or "no process writes there", ""


@each_run
def checkpoints(machine: Machine, run: Stage) -> Found:
  """Reports bad checkpoints, and what the next run will do."""
  done, root = record.finished(run.config, run.folder), run.folder / "checkpoints"
  if done is not None and trains(run):
    yield OK, f"finished earlier, at step {done['step']}; nothing is left to do", ""
    return
  good, faults = None, []
  for count, step in enumerate(reversed(checkpoint.steps(root))):
    if good is not None and count >= OLDER:  # reading takes time
      break
    problem = checkpoint.fault(root / str(step))
    if problem is not None:
      faults.append(f"{root / str(step)} is {problem}")
    elif good is None:
      good = step
  lost = good is None and any("damaged" in fault for fault in faults)
  unfinished = [f"{path} is unfinished" for path in sorted(root.glob("*.orbax-checkpoint-tmp*"))]
  plan = f"continues from step {good}" if good is not None else ""
  if lost:
    yield FAIL, "; ".join(faults + unfinished), "restore good copies, or start over in another --workdir"
    return
  if faults or unfinished:
    advice = f"nothing: the run {plan or 'starts over'}" + ("; or restore good copies" if faults else "")
    yield WARN, "; ".join(faults + unfinished), advice
  if good is not None:
    record.check_same_run(root / str(good), run.config)
    plan = _continuation(machine, run, good)
  yield OK, plan or _beginning(machine, run), ""


def _continuation(machine: Machine, run: Stage, step: int) -> str:
  """What a run with a good checkpoint does. Raises a UserError if it cannot use that."""
  folder = run.folder / "checkpoints" / str(step)
  if description := _description(machine, run):
    record.check_same_model(folder, description)
    record.check_same_data(folder, description)
  if trains(run):
    total_steps = machine.plan(run).total_steps
    record.check_length(step, total_steps)
    if step == total_steps:
      return f"is at its end, step {step}: only evaluates"
  return f"continues from step {step}"


def _description(machine: Machine, run: Stage) -> dict[str, Any] | None:
  """The description of a run; None while the weights of its frozen models are unknown."""
  if pending(run):
    return None
  return record.describe(run.config, machine.objective(run), machine.main_source(run))


def _beginning(machine: Machine, run: Stage) -> str:
  """What a run without checkpoints starts with. Raises a UserError if it cannot start."""
  resume = run.config.resume if "resume" not in run.uses else ""
  record.check_not_lost(run.folder, checkpoint.find_resumable(resume)[1] if resume else 0)
  if resume and (description := _description(machine, run)):
    folder = checkpoint.find(resume)
    record.check_same_model(folder, description)
    record.check_same_data(folder, description)
    record.check_same_position(folder, checkpoint.read_config(folder), run.config, description)
  what = train.check_start(run, machine.objective(run)) if trains(run) or run.config.init_from else ""
  if what:
    return f"starts with {what}"
  return "starts from scratch" if trains(run) else "evaluates"


def space(machine: Machine) -> Found:
  if bucket.remote(machine.workdir):
    yield OK, "a bucket has no known limit", ""
    return
  free = shutil.disk_usage(machine.ground()).free
  needed, present, terms = 0, 0, []
  unknown: dict[str, list[str]] = {}
  for run in machine.runs:
    if not trains(run) or record.finished(run.config, run.folder) is not None:
      continue
    try:
      size, copies = state_bytes(machine, run), _copies(machine, run)
    except (Skip, UserError) as error:  # another check reports it
      unknown.setdefault(str(error.args[-1]), []).append(run.name or "this run")
      continue
    needed += size * copies
    files = [*run.folder.glob("checkpoints/**/*"), *run.folder.glob("best/**/*")]
    present += min(sum(path.stat().st_size for path in files if path.is_file()), size * copies)
    terms.append(f"{run.name + ' ' if run.name else ''}{copies} x {_amount(size)}")
  text = f"{_amount(free)} free in {machine.ground()}"
  if terms:
    missing, exist = needed - present, f", of which {_amount(present)} exist" if present else ""
    text += f", checkpoints need up to {_amount(needed)} ({', '.join(terms)}){exist}"
    status = FAIL if free < missing else WARN if free < 2 * missing else OK
    yield status, text, "" if status == OK else "make room, use another --workdir, or lower checkpoint.keep"
  else:
    yield OK, f"{text}; no checkpoints to come that could be counted", ""
  for reason, names in unknown.items():
    yield OK, f"{', '.join(names)}: not counted: {reason}", ""


def state_bytes(machine: Machine, run: Stage) -> int:
  """Size of one checkpoint: parameters, optimizer state, averaged parameters if there are any, and collections."""
  plan = machine.plan(run)
  variables = jax.eval_shape(plan.objective.init, jax.random.key(0))
  tx = make_optimizer(
    run.config, plan.schedules, variables["params"], plan.objective.depth, plan.objective.delayed
  )
  averages = variables["params"] if run.config.optimizer.ema_decay else {}
  return trees.num_bytes((variables, jax.eval_shape(tx.init, variables["params"]), averages))


def _amount(count: int) -> str:
  return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _copies(machine: Machine, run: Stage) -> int:
  """Number of checkpoints that are on the disk at the same time."""
  options = run.config.checkpoint
  if not options.keep:  # all are kept
    every = min(n for n in (options.every_steps, run.config.eval.every_steps, 10**9) if n)
    return machine.plan(run).total_steps // every + 1
  return options.keep + 1 + 2 * bool(options.best)
