"""Saves and restores the checkpoints of a run while training continues; `checkpoint.py` describes their files."""

import concurrent.futures
import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from beit_jax.errors import TransientError, UserError
from beit_jax.run import files
from beit_jax.run.checkpoint import DESCRIPTION, DIGEST, SAVED, fault, steps, write_digest
from beit_jax.run.state import TrainState
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

MAX_ATTEMPTS = 3  # of a save that fails for a transient reason
RETRY_DELAY = 1.0  # seconds
# Environment variable: seconds around each file of the seal, for tests that kill.
SLOW_SAVE = "BEIT_JAX_SLOW_SAVE"


class Checkpointer:
  """Saves and restores the state of one run.

  A save happens in three phases:

  1. `save`, on the main thread of every process, copies the arrays from the devices to the host.
  2. Orbax, in the background, writes them to a temporary folder and renames it to `checkpoints/<step>`.
  3. A thread of process 0 seals the checkpoint: it writes description and digest, then deletes old checkpoints.

  Training continues during 2 and 3. These threads only touch files and never launch a program on the devices, not
  even a barrier: all processes must launch the same programs in the same order, or collectives deadlock.
  """

  def __init__(
    self, workdir: Path, *, keep: int, asynchronous: bool = True, required: bool = True, fresh: bool = False
  ):
    """
    Args:
      workdir: The checkpoints are in its subfolder `checkpoints`.
      keep: Number of sealed checkpoints to keep; 0 keeps all.
      asynchronous: Whether training continues while the arrays are written.
      required: Whether the run cannot continue without its checkpoints, so that it must not start over if all of
        them are damaged.
      fresh: Whether the run has just begun. Checkpoints found here then belong to another run and are moved away.

    Raises:
      UserError: All checkpoints are damaged, and they are required.
    """
    self.root = bucket.absolute(workdir) / "checkpoints"
    self._keep, self._asynchronous, self._required = keep, asynchronous, required
    self._failures = 0  # in a row
    self._step = 0  # of the newest save
    self._seal_thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._sealing: concurrent.futures.Future[None] | None = None
    if jax.process_index() == 0:
      self._quarantine(fresh)
      self.root.mkdir(parents=True, exist_ok=True)
      self._delete_temporary_folders()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("the checkpoints that remain are usable")
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

  def _quarantine(self, fresh: bool) -> None:
    """Moves checkpoints that are newer than the newest usable one to `damaged/`."""
    faults = {}
    for step in reversed(steps(self.root)):
      problem = "from an earlier run" if fresh else fault(self.root / str(step))
      if problem is None:
        break
      faults[step] = problem
    else:  # none is usable
      damaged = [f"{self.root / str(step)} is {text}" for step, text in faults.items() if "damaged" in text]
      if damaged and self._required:
        raise UserError(
          "no checkpoint of this run can be used:\n  "
          + "\n  ".join(damaged)
          + "\nReplace them with good copies, or start over in another --workdir"
        )
    for step, problem in faults.items():
      source = self.root / str(step)
      target = self.root.parent / "damaged" / f"{step}-{time.time_ns()}"
      log.warning("checkpoint %s is %s; it was moved to %s", source, problem, target)
      if bucket.remote(target):
        bucket.move(source, target, first=DIGEST)
      else:
        target.parent.mkdir(exist_ok=True)
        os.rename(source, target)

  def _delete_temporary_folders(self) -> None:
    """Deletes what Orbax had not finished; in a bucket, it has no temporary folders."""
    if not bucket.remote(self.root):
      for path in self.root.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint; unusable ones were moved away at the start."""
    return max(steps(self.root), default=None)

  def restore(self, folder: Path, shapes: TrainState, shardings: TrainState) -> TrainState:
    """Reads a checkpoint into the devices that `shardings` name, whatever mesh wrote it.

    Args:
      folder: A usable checkpoint.
      shapes: `jax.ShapeDtypeStruct` leaves.
      shardings: `jax.sharding.Sharding` leaves.

    Raises:
      ValueError: The trees differ (from Orbax).
    """
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes,
      shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", abstract.params)
      rest = checkpointer.restore(folder / "rest", _rest(abstract))
      ema = None
      if shapes.ema is not None and (folder / "ema").is_dir():
        ema = checkpointer.restore(folder / "ema", abstract.ema)
      elif shapes.ema is not None:
        log.warning("%s has no averaged weights; the average starts at its weights", folder)
        ema = jax.tree.map(jnp.copy, params)
    return TrainState(rest["step"], params, rest["collections"], rest["opt_state"], ema)

  def save(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
    """Starts to save `state`, after the save before has finished.

    A failure may be raised here or by `wait`, `must_retry` or the next `save`.

    Raises:
      UserError: A save failed for good; TransientError, a subclass, if it failed too often.
    """
    self.wait()
    self._step = step
    items = {"params": state.params, "rest": _rest(state)}
    if state.ema is not None:
      items["ema"] = state.ema
    args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
    try:
      if not (bucket.remote(self.root) or self.root.is_dir()):
        # Orbax would create the folder again, without the other files of the run.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
      self._orbax.save(self.root / str(step), args=args)
      if not self._asynchronous:
        self._orbax.wait_until_finished()
    except Exception as error:  # File systems and Orbax raise errors of many types.
      self._handle_failure(error)
    else:
      self._sealing = self._seal_thread.submit(self._seal, step, {**description, "step": step})

  def save_and_wait(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
    """Saves and waits until the checkpoint is complete, repeating a save that fails for a transient reason.

    Raises:
      UserError: As `save`.
    """
    self.save(step, state, description)
    while not self.wait():
      self.save(step, state, description)

  def wait(self) -> bool:
    """Waits until the last save is sealed.

    Returns:
      False if it failed for a transient reason and must be repeated.

    Raises:
      UserError: As `save`.
    """
    if self._sealing is not None:
      sealing, self._sealing = self._sealing, None
      try:
        sealing.result()
        self._failures = 0
      except Exception as error:  # File systems and Orbax raise errors of many types.
        self._handle_failure(error)
    return self._failures == 0

  def must_retry(self) -> bool:
    """Whether the last save has failed and must be repeated; does not wait for a save in progress.

    Raises:
      UserError: As `save`.
    """
    in_progress = self._sealing is not None and not self._sealing.done()
    return not in_progress and not self.wait()

  def _seal(self, step: int, description: dict[str, Any]) -> None:
    """Completes a checkpoint that Orbax is writing; runs in a thread, so it must not launch programs."""
    self._orbax.wait_until_finished()
    if jax.process_index() != 0:
      return
    pause = float(os.environ.get(SLOW_SAVE, 0))
    folder = self.root / str(step)
    self._flush_metrics()
    time.sleep(pause)
    files.write_json(folder / DESCRIPTION, description)
    time.sleep(pause)
    files.sync_tree(folder)
    write_digest(folder)
    time.sleep(pause)
    # The checkpoint is complete now: what fails from here on must not make the save be repeated.
    if self._required:
      self._record_first(step)
    if self._keep:
      self._delete_old()

  def _record_first(self, step: int) -> None:
    path = self.root.parent / SAVED
    try:
      if not path.is_file():
        files.write_json(path, {"first": step})
    except Exception as error:  # File systems raise errors of many types; the next save tries again.
      log.warning("%s could not be written (%s)", path, bucket.brief(error))

  def _flush_metrics(self) -> None:
    """Makes the metrics up to a checkpoint durable before the checkpoint is."""
    bucket.push()
    metrics = self.root.parent / "metrics.jsonl"
    if not bucket.remote(metrics) and metrics.is_file():
      files.sync(metrics)

  def _delete_old(self) -> None:
    for old in steps(self.root)[: -self._keep]:
      try:
        _delete(self.root / str(old))
      except Exception as error:
        log.warning("%s could not be deleted (%s)", self.root / str(old), bucket.brief(error))

  def delete_from(self, step: int) -> None:
    """Deletes checkpoints of this step and later ones, which a run that started over may reach again."""
    self.wait()
    if jax.process_index() == 0:
      for later in [number for number in steps(self.root) if number >= step]:
        _delete(self.root / str(later))

  def _handle_failure(self, error: Exception) -> None:
    """Removes what a failed save has left; raises unless the save may be repeated."""
    self._failures += 1
    if jax.process_index() == 0:
      with contextlib.suppress(Exception):
        unfinished = self.root / str(self._step)
        if not (unfinished / DIGEST).is_file():
          _delete(unfinished)
      with contextlib.suppress(Exception):
        self._delete_temporary_folders()
    transient = bucket.is_transient(error)
    if transient and self._failures < MAX_ATTEMPTS and jax.process_count() == 1:
      text = "saving in %s failed (%s); it will be tried again at the next step"
      log.warning(text, self.root, bucket.brief(error))
      time.sleep(RETRY_DELAY)  # The next attempt may be made at the same step.
      return
    there = bucket.remote(self.root) or self.root.parent.is_dir()
    hint = "" if there else f"; {self.root.parent} is no longer there"
    raise (TransientError if transient else UserError)(
      f"saving in {self.root} failed{hint}: {bucket.brief(error)}. Earlier checkpoints there are intact; make room or "
      "repair the disk, and give the same command again to go on from the newest"
    ) from error

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._seal_thread.shutdown()
      self._orbax.close()


def _rest(state: TrainState) -> dict[str, Any]:
  return {"step": state.step, "collections": state.collections, "opt_state": state.opt_state}


def _delete(folder: Path) -> None:
  """Deletes a checkpoint, its digest first: one that is deleted in part is unfinished, not damaged."""
  if bucket.remote(folder):
    bucket.remove(folder, first=DIGEST)
  else:
    (folder / DIGEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
