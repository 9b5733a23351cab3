"""Checks of the runs that a config asks for: data, room on the disk, locks, checkpoints, sizes."""

import platform
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import trees
from beit_jax.config import parse as config_lib
from beit_jax.config import ranges
from beit_jax.data import examples
from beit_jax.doctor.findings import FAIL, OK, WARN, Found, Skip, unless_worse
from beit_jax.doctor.machine import Machine, Run, each_run
from beit_jax.errors import BadImage, UserError
from beit_jax.models.beit import BeitForMaskedImageModeling
from beit_jax.models.dvae import Dvae
from beit_jax.objectives.encoder import encoder_fields
from beit_jax.run import checkpoint, record
from beit_jax.runtime import bucket, lock, sharding
from beit_jax.step import make_optimizer, make_schedules
from beit_jax.weights import io as weights_io

SAMPLE = 8  # examples that are tried, besides the first and the last
LABELLED = ("classify", "linear_probe", "knn")


@each_run
def data(machine: Machine, run: Run) -> Found:
  for part in machine.parts(run):
    source = machine.source(run, part)
    if source is None:
      continue
    where = f"{part} ({run.config.data.split if part == 'train' else run.config.eval.split or 'all'})"
    if not len(source):
      yield FAIL, f"{where}: no examples at all", "look at data.split and at the files"
      continue
    drawn = np.random.default_rng(0).integers(0, len(source), SAMPLE).tolist()
    chosen = sorted({0, len(source) - 1, *drawn})
    reasons = [(index, why) for index in chosen for why in [_trouble(machine, run, source, index)] if why]
    bad = [why for _, (tolerable, why) in reasons if tolerable]
    wrong = [why for _, (tolerable, why) in reasons if not tolerable]
    if wrong:
      yield (
        FAIL,
        f"{where}: {len(wrong)} of {len(chosen)} tried are wrong, the first: {wrong[0]}",
        "mend the data",
      )
    elif bad:
      limit = run.config.data.max_bad
      status = FAIL if len(bad) > len(chosen) / 2 or not limit else WARN
      advice = (
        f"repair or remove such files; a run takes another in its place, up to data.max_bad={limit} of all"
      )
      yield status, f"{where}: {len(bad)} of {len(chosen)} tried cannot be read, the first: {bad[0]}", advice
    else:
      labels = f", {source.num_classes} classes" if source.num_classes else ""
      yield OK, f"{where}: {len(source):,} examples{labels}, {len(chosen)} tried", ""


def _trouble(machine: Machine, run: Run, source: Any, index: int) -> tuple[bool, str] | None:
  """(whether a run goes on with another example, what is wrong), or None for a good example."""
  try:
    example = source[index]
    image = examples.decode(example, index)
    image.pixels()
  except (BadImage, OSError) as error:
    return True, str(error)
  except Exception as error:
    return False, f"example {index}: {type(error).__name__}: {error}"
  if run.config.objective == "segment":
    if "label_map" not in example:
      return False, f"example {index} has no label map; segmentation needs data.source='pairs' or such"
    try:
      machine.objective(run).reader().labels(example, image, index)
    except UserError as error:
      return isinstance(error, BadImage), str(error)
  elif run.config.objective in LABELLED:
    if "label" not in example:
      return (
        False,
        f"example {index} has no label, which objective {run.config.objective!r} needs (data.label_key)",
      )
    label, count = np.asarray(example["label"]), run.config.model.get("num_classes") or source.num_classes
    if not label.ndim and count and not 0 <= int(label) < count:
      return False, f"example {index} has the label {int(label)}, there are {count} classes"
  return None


def _shapes(machine: Machine, run: Run) -> dict[str, Any]:
  """Linen variables without values. What a stage pre-trains is known before its tokenizer is there."""
  earlier = run.waits.get("tokenizer.init_from")
  if earlier is None:
    init = machine.objective(run).init
  else:
    size = config_lib.pair(run.config.data.image_size, "data.image_size")
    encoder = encoder_fields(run.config.model, size, pretrain=True)
    words = run.config.model.vocab_size or earlier.config.model.vocab_size
    module = BeitForMaskedImageModeling(encoder, words)
    init = lambda key: module.init(key, jnp.zeros((1, *size, 3)))
  return dict(jax.eval_shape(lambda: init(jax.random.key(0))))


def state_bytes(machine: Machine, run: Run) -> int:
  """Size of one checkpoint: parameters, optimizer state, averaged parameters if there are any, and collections."""
  variables = _shapes(machine, run)
  tx = make_optimizer(run.config, make_schedules(run.config, 1, ranges.STEPS), variables["params"], depth=0)
  averages = variables["params"] if run.config.optimizer.ema_decay else {}
  return trees.num_bytes((variables, jax.eval_shape(tx.init, variables["params"]), averages))


def _amount(count: int) -> str:
  return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _total_steps(machine: Machine, run: Run) -> int:
  return config_lib.duration(run.config, "total", len(machine.main_source(run)) // run.config.batch_size)


def _copies(machine: Machine, run: Run) -> int:
  """Checkpoints on the disk at the same time."""
  options = run.config.checkpoint
  if not options.keep:  # all are kept
    every = min(n for n in (options.every_steps, run.config.eval.every_steps, 10**9) if n)
    return _total_steps(machine, run) // every + 1
  return options.keep + 1 + 2 * bool(options.best)


def space(machine: Machine) -> Found:
  if bucket.remote(machine.workdir):
    yield OK, "a bucket has no limit that could be asked for", ""
    return
  free = shutil.disk_usage(machine.ground()).free
  needed, there, parts, unknown = 0, 0, [], {}
  for run in machine.runs:
    if not run.trains or record.finished(run.config, run.folder) is not None:
      continue
    try:
      size, copies = state_bytes(machine, run), _copies(machine, run)
    except (Skip, UserError) as error:  # said by another check
      unknown.setdefault(str(error.args[-1]), []).append(run.name or "this run")
      continue
    needed += size * copies
    files = [*run.folder.glob("checkpoints/**/*"), *run.folder.glob("best/**/*")]
    there += min(sum(path.stat().st_size for path in files if path.is_file()), size * copies)
    parts.append(f"{run.name + ' ' if run.name else ''}{copies} x {_amount(size)}")
  text = f"{_amount(free)} free in {machine.ground()}"
  if not parts:
    yield OK, f"{text}; no checkpoints to come that could be counted", ""
  else:
    text += f", checkpoints need up to {_amount(needed)} ({', '.join(parts)})"
    text += f", of which {_amount(there)} are there" if there else ""
    short = free < 2 * (needed - there)
    status = FAIL if free < needed - there else WARN if short else OK
    yield status, text, "make room, take another --workdir, or lower checkpoint.keep" if short else ""
  for why, names in unknown.items():
    yield OK, f"{', '.join(names)}: not counted: {why}", ""


@unless_worse
def locks(machine: Machine) -> Found:
  here = []
  for folder in machine.folders():
    before = lock.holder(folder)
    who = f"process {before.get('pid')} on {before.get('host')}, since {before.get('started')}"
    who = f"{folder}: {who} ({before.get('command')})" if before else f"{folder}: a process without a name"
    if lock.held(folder):
      yield FAIL, f"{who} is writing there", "wait for it, stop it, or take another --workdir"
    elif before and before.get("host") != platform.node():
      advice = "look whether it is still alive there, as not every network mount shares locks; else nothing"
      yield WARN, f"{who} did not end in good order", advice
    elif before:
      here.append(f"{who} is dead, its lock will be taken over")
  yield OK, "; ".join(here) or "nobody writes there", ""


@each_run
def checkpoints(machine: Machine, run: Run) -> Found:
  done, root = record.finished(run.config, run.folder), run.folder / "checkpoints"
  if done is not None and run.trains:
    yield OK, f"finished earlier, at step {done['step']}; nothing is left to do", ""
    return
  good, faults = None, {}
  for count, step in enumerate(checkpoint.steps(root)[::-1]):
    if good is not None and count >= 4:  # of older ones nobody asks, and reading takes time
      break
    problem = checkpoint.fault(root / str(step))
    if problem is not None:
      faults[f"{root / str(step)} is {problem}"] = step
    elif good is None:
      good = step
  halves = [f"{path} is unfinished" for path in sorted(root.glob("*.orbax-checkpoint-tmp*"))]
  then = f"goes on from step {good}" if good is not None else ""
  if faults or halves:
    text, lost = "; ".join([*faults, *halves]), good is None and any("damaged" in fault for fault in faults)
    advice = f"nothing: the run {then or 'begins anew'}" + (
      "; or put a good copy in its place" if faults else ""
    )
    advice = "put good copies in their place, or begin anew in another --workdir" if lost else advice
    yield FAIL if lost else WARN, text, advice
    if lost:
      return
  if good is not None:
    record.check_same_run(root / str(good), run.config)
    try:
      description = record.describe(run.config, machine.objective(run), machine.main_source(run))
      record.check_same_model(root / str(good), description)
      record.check_same_data(root / str(good), description)
      total_steps = _total_steps(machine, run)
      record.check_length(good, total_steps)
      if good == total_steps:
        then = f"is at its end, step {good}: only evaluates"
    except Skip:
      pass
  yield OK, then or _beginning(machine, run), ""


def _beginning(machine: Machine, run: Run) -> str:
  """What a run without checkpoints begins with. Raises a UserError where it cannot."""
  resume = run.config.resume if "resume" not in run.waits else ""
  record.check_not_lost(run.folder, checkpoint.find_resumable(resume)[1] if resume else 0)
  for key in ("resume", "init_from"):
    path = run.config[key]
    if key in run.waits:
      return f"begins with the result of stage {run.waits[key].name!r}, not yet there"
    if path and key == "resume":
      return f"begins with the whole state of {checkpoint.find(path)}"
    if path:
      pretrained = weights_io.load(path)
      found = machine.objective(run).adapt(pretrained, _shapes(machine, run)["params"])
      return f"begins with {len(found)} tensors of {pretrained.description.get('path', path)}"
  return "begins anew" if run.trains else "evaluates"


@each_run
def sizes(machine: Machine, run: Run) -> Found:
  config = run.config
  count = sharding.make_mesh(config.mesh.data, config.mesh.fsdp).size if machine.devices() else 0
  unit = max(config.microbatches, 1) * count
  if run.trains and (config.microbatches < 1 or config.batch_size % unit):
    nearest = [n for n in (config.batch_size // unit * unit, -(-config.batch_size // unit) * unit) if n]
    what = (
      f"batch_size={config.batch_size} is no multiple of microbatches={config.microbatches} x {count} devices"
    )
    yield FAIL, what, f"set batch_size to {' or '.join(map(str, dict.fromkeys(nearest)))}"
    return
  earlier = run.waits.get("tokenizer.init_from")
  if earlier is not None:
    image, token = (config_lib.pair(config.data[f"{key}image_size"], key) for key in ("", "token_"))
    patch = encoder_fields(config.model, image, pretrain=True)["patch_size"]
    stride = Dvae(**dict(earlier.config.model)).stride
    wanted = tuple(side // patch * stride for side in image)
    if tuple(token) != wanted:
      what = f"data.token_image_size={token} is not one token for each of the patches of {image}"
      yield FAIL, what, f"set it to {wanted}: {stride} pixels for each patch of {patch}"
      return
  if run.trains:
    total = _total_steps(machine, run)
    if total < 1:
      what = f"no update at all: the {len(machine.main_source(run))} examples do not fill one batch"
      yield FAIL, f"{what} of {config.batch_size}", "lower batch_size, or set total_steps"
      return
  text = "evaluation"
  if run.trains:
    parts = f"{config.microbatches} microbatches x {count} devices x {config.batch_size // unit}"
    text = f"{total:,} steps of {config.batch_size} = {parts}"
  try:
    machine.objective(run)
  except Skip as skip:
    if skip.args[0] != OK:
      raise
    text += f"; {skip.args[1]}"
  yield OK, text, ""
