"""Checkpoints: `workdir/checkpoints/<step>/` with the state (Orbax), description.json and digest.json.

`digest.json` holds sha256 and size of every other file and is written last, after Orbax has committed the step.
A checkpoint without it is unfinished, one that does not match it is damaged; neither is ever restored. In a bucket an
MD5 takes the place of the sha256: the store states it, so that nothing has to be read back.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from beit_jax.errors import TransientError, UserError
from beit_jax.run.state import TrainState
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

DESCRIPTION, DIGEST = "description.json", "digest.json"
SAVED = "saved.json"  # in the workdir: there has been a complete checkpoint, which must not be forgotten
ATTEMPTS = 3  # of a save whose error may pass
PAUSE = 1.0  # seconds before the next
DEFECTS = {
  getattr(errno, name) for name in ("EIO", "EBADMSG", "EUCLEAN") if hasattr(errno, name)
}  # of a disk
SLOW_SAVE = "BEIT_JAX_SLOW_SAVE"  # seconds before and after each file of the seal; for tests that kill


def _digests(folder: Path, wanted: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> dict[str, Any]:
  """name -> {"size": int, "sha256" or "md5": str}; `wanted`: a digest, which may come from the other kind of place."""
  if bucket.remote(folder):
    return {name: row for name, row in bucket.digests(folder, wanted).items() if name != DIGEST}
  files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != DIGEST}
  result = {}
  for name, path in sorted(files.items()):
    kind = "md5" if "md5" in wanted.get(name, {}) else "sha256"
    result[name] = {"size": path.stat().st_size, kind: _hash(path, kind)}
  return result


def sha256(path: Path) -> str:
  return _hash(path, "sha256")


def _hash(path: Path, kind: str) -> str:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, kind).hexdigest()
  except OSError as error:
    error.filename = str(path)  # a read does not say of what
    raise


def write_whole(path: Path, text: str) -> None:
  """The file is what it was or all of `text`, also after a kill or a power cut in between."""
  if bucket.remote(path):  # an object is there as a whole or not at all
    path.write_text(text)
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  _sync(path.parent)


def _sync(path: Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  except OSError:
    if path.is_file():  # some file systems know this of files only
      raise
  finally:
    os.close(number)


def _write_json(path: Path, value: Any) -> None:
  write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _flush(folder: Path) -> None:
  """To the disk itself, before the digest says that all is there; a bucket has what it has taken."""
  if bucket.remote(folder):
    return
  for path in (*folder.rglob("*"), folder, folder.parent):
    _sync(path)


def fault(folder: Path) -> str | None:
  """Why a checkpoint folder must not be used, or None when every file is as its digest says."""
  if not (folder / DIGEST).is_file():
    return f"unfinished: {DIGEST} is missing"
  try:
    wanted = json.loads((folder / DIGEST).read_text())
  except ValueError:
    return f"damaged: {DIGEST} is not JSON"
  if not isinstance(wanted, dict) or not all(isinstance(row, dict) for row in wanted.values()):
    return f"damaged: {DIGEST} names no files"
  try:
    found = _digests(folder, wanted)
  except OSError as error:
    if error.errno not in DEFECTS:
      raise
    return f"damaged: {error.filename or 'a file'} cannot be read ({error.strerror})"
  for name in sorted(set(wanted) | set(found)):
    if wanted.get(name) != found.get(name):
      state = "missing" if name not in found else "not in the digest" if name not in wanted else "changed"
      return f"damaged: {name} is {state}"
  return None


def steps(root: Path) -> list[int]:
  """Steps of the committed checkpoints in `checkpoints/`, oldest first, good or not."""
  if not root.is_dir():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit())


def is_run(path: Path) -> bool:
  """Whether a folder is a run, its `checkpoints`, or one checkpoint, good or not."""
  return (path / "checkpoints").is_dir() or (path / DESCRIPTION).is_file() or bool(steps(path))


def find(path: str | Path, step: int | None = None) -> Path:
  """A run folder, its `checkpoints` folder or one step's folder -> the folder of the newest good checkpoint.

  Raises:
    UserError: there is none, or the step asked for is missing or damaged.
  """
  path = bucket.absolute(bucket.path(path))  # Orbax takes no relative paths
  if (path / DESCRIPTION).is_file():
    root, wanted = path.parent, [path.name]
  else:
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    wanted = [str(s) for s in steps(root)[::-1]]
  if step is not None:
    wanted = [s for s in wanted if s == str(step)]
  faults = []
  for candidate in wanted:
    problem = fault(root / candidate)
    if problem is None:
      return root / candidate
    faults.append(f"{root / candidate}: {problem}")
  reason = "; ".join(faults) or f"found the steps {steps(root) or 'none'}"
  wish = "" if step is None else f" of step {step}"
  raise UserError(
    f"{path}: no usable checkpoint{wish} here ({reason}); expected a run folder of beit_jax.main"
  )


def whole(path: str | Path) -> tuple[Path, int]:
  """As `find`, for `resume`: (folder, its step).

  Raises:
    UserError: none, or weights without the optimizer.
  """
  folder = find(path)
  if not (folder / "rest").is_dir():
    raise UserError(f"config key 'resume': {folder} holds weights only, no optimizer; use init_from")
  return folder, int(read_description(folder)["step"])


def read_description(folder: Path) -> dict[str, Any]:
  return json.loads((folder / DESCRIPTION).read_text())


def load_params(folder: Path, item: str = "params") -> dict[str, Any]:
  """The parameters (or `ema`, or `rest`: step, collections, optimizer): nested NumPy, whatever devices wrote them."""
  handler = ocp.PyTreeCheckpointHandler()
  metadata = handler.metadata(folder / item).tree
  _check_claim(
    folder / item, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(metadata))
  )
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
  return handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=args))


def _check_claim(folder: Path, claimed: int) -> None:
  """Refuses a folder of a stranger whose arrays, by what it says, would fill the memory with nothing."""
  if bucket.remote(folder):
    there = sum(row["size"] for row in bucket.digests(folder, {}).values())
  else:
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  if claimed > 2**28 and claimed > 1000 * there:  # weights hardly compress at all
    raise UserError(
      f"{folder} claims {claimed:,} bytes of arrays, in files of {there:,}; it is damaged or made to harm"
    )


def write_model(folder: Path, params: Any, description: dict[str, Any]) -> None:
  """A checkpoint without optimizer: `find`, `load_params` and `init_from` take it, `resume` does not."""
  # Not asynchronous and not compressed: a large model would be copied once more on its way out.
  with ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
  ) as checkpointer:
    checkpointer.save(folder.absolute() / "params", jax.tree.map(np.asarray, params))
  _write_json(folder / DESCRIPTION, description)
  _write_json(folder / DIGEST, _digests(folder))


class Checkpointer:
  """Saves and restores the state of one run.

  Saving is asynchronous: the arrays are copied, then written by Orbax and sealed (description, digest) by one
  thread, while training goes on. Older checkpoints are deleted only when a newer one is sealed.
  """

  def __init__(
    self, workdir: Path, *, keep: int, asynchronous: bool = True, needed: bool = True, fresh: bool = False
  ):
    """
    Args:
      needed: without them the run cannot go on, so that it is refused where all are damaged; else it does without.
      fresh: the run has just begun, and what is there is of another one: put aside.
    """
    self.root = bucket.absolute(workdir) / "checkpoints"
    self._quarantine = bucket.absolute(workdir) / "damaged"
    self._keep, self._failures, self._saving = keep, 0, 0
    self._to_mark = needed
    self._put_aside(needed, fresh)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints that cannot be used were put aside")
    # Orbax would delete the old ones as soon as the new one is committed, which is before it is sealed.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self.root, options=options)
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._sealing: concurrent.futures.Future | None = None

  def _put_aside(self, needed: bool, fresh: bool) -> None:
    """Moves unfinished and damaged checkpoints that are newer than the newest good one out of the way, loudly.

    Raises:
      UserError: there are damaged ones and no good one, which are needed. Nothing is moved then.
    """
    if jax.process_index() != 0:
      return
    faults = {}
    for step in steps(self.root)[::-1]:
      problem = "of an earlier run" if fresh else fault(self.root / str(step))
      if problem is None:
        break
      faults[step] = problem
    else:
      damaged = [
        f"{self.root / str(step)} is {problem}" for step, problem in faults.items() if "damaged" in problem
      ]
      if damaged and needed:
        raise UserError(
          "no checkpoint of this run can be used:\n  "
          + "\n  ".join(damaged)
          + "\nPut good copies in their place, or begin anew in another --workdir"
        )
    for step, problem in faults.items():
      target = self._quarantine / f"{step}-{time.time_ns()}"
      log.warning("checkpoint %s is %s; it was moved to %s", self.root / str(step), problem, target)
      if bucket.remote(target):
        bucket.move(self.root / str(step), target, first=DIGEST)
        continue
      self._quarantine.mkdir(exist_ok=True)
      os.rename(self.root / str(step), target)

  def save(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
    """Begins to save; waits for the save before this one."""
    self.wait()
    self._saving = step
    rest = {"step": state.step, "collections": state.collections, "opt_state": state.opt_state}
    items = {"params": state.params, "rest": rest} | ({} if state.ema is None else {"ema": state.ema})
    items = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    try:
      if not (
        bucket.remote(self.root) or self.root.is_dir()
      ):  # Orbax would make it again, apart from all else that the run has written
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
      if not self._manager.save(step, args=ocp.args.Composite(**items)):
        raise RuntimeError(f"{self.root}: step {step} was not saved; there are the steps {steps(self.root)}")
    except Exception as error:  # whatever the file system says
      self._failed(error)
      return
    self._sealing = self._sealer.submit(self._seal, step, {**description, "step": step})

  def save_and_wait(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
    """Saves and waits until the checkpoint is complete, repeating a save that fails for a transient reason.

    Raises:
      UserError: The save fails for good, or too often.
    """
    self.save(step, state, description)
    while not self.wait():
      self.save(step, state, description)

  def forget_from(self, step: int) -> None:
    """Deletes checkpoints of this step and later ones: a run that was begun anew may reach them again."""
    self.wait()
    for later in [s for s in self._manager.all_steps() if s >= step]:
      self._manager.delete(later)

  def _seal(self, step: int, description: dict[str, Any]) -> None:
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      pause = float(os.environ.get(SLOW_SAVE, 0))
      folder = self.root / str(step)
      self._push_metrics()
      time.sleep(pause)
      _write_json(folder / DESCRIPTION, description)
      time.sleep(pause)
      _flush(folder)
      _write_json(folder / DIGEST, _digests(folder))
      time.sleep(pause)
      if self._to_mark:
        if not (self.root.parent / SAVED).is_file():
          _write_json(self.root.parent / SAVED, {"first": step})
        self._to_mark = False
    if self._keep:
      for old in sorted(self._manager.all_steps())[: -self._keep]:
        try:
          self._manager.delete(old)
        except Exception as error:  # the new one is sealed: no reason to call its save failed
          log.warning("%s could not be deleted (%s)", self.root / str(old), bucket.brief(error))

  def _push_metrics(self) -> None:
    """Metrics up to this step are there before the checkpoint counts."""
    bucket.push()
    metrics = self.root.parent / "metrics.jsonl"
    if not bucket.remote(metrics) and metrics.is_file():
      _sync(metrics)

  def _failed(self, error: Exception) -> None:
    """A save's error: remembered when it may pass, else raised, with the half-written files removed."""
    self._failures += 1
    if jax.process_index() == 0:
      half = self.root / str(self._saving)
      with contextlib.suppress(Exception):
        if not (half / DIGEST).is_file():  # it may have its final name already
          bucket.remove(half) if bucket.remote(half) else shutil.rmtree(half, ignore_errors=True)
        self._manager.reload()
      if not bucket.remote(self.root):
        for half in self.root.glob("*.orbax-checkpoint-tmp*"):
          shutil.rmtree(half, ignore_errors=True)
    if bucket.is_transient(error) and self._failures < ATTEMPTS and jax.process_count() == 1:
      text = "saving in %s failed (%s); it will be tried again at the next step"
      log.warning(text, self.root, bucket.brief(error))
      time.sleep(PAUSE)  # the next step may be the same one
      return
    there = bucket.remote(self.root) or self.root.parent.is_dir()
    hint = "" if there else f"; {self.root.parent} is no longer there"
    raise (TransientError if bucket.is_transient(error) else UserError)(
      f"saving in {self.root} failed{hint}: {bucket.brief(error)}. Earlier checkpoints there are as they "
      "were; make room or mend the disk, and give the same command again to go on from the newest"
    ) from error

  def wait(self) -> bool:
    """Until the last save is on disk and sealed.

    Returns:
      False when it failed for a reason that may pass: save again.

    Raises:
      UserError: it failed for good.
    """
    if self._sealing is not None:
      sealing, self._sealing = self._sealing, None
      try:
        sealing.result()
        self._failures = 0
      except Exception as error:  # whatever the file system says
        self._failed(error)
    return self._failures == 0

  def wanted(self) -> bool:
    """Whether the last save has failed by now and must be repeated. Does not wait; raises as `wait` does."""
    if self._sealing is not None and not self._sealing.done():
      return False
    return not self.wait()

  def latest(self) -> int | None:
    """Step of the newest good checkpoint (bad ones were put aside at the start)."""
    return max(steps(self.root), default=None)

  def restore(self, folder: Path, shapes: TrainState, shardings: TrainState) -> TrainState:
    """The state in a step's folder, on the devices that `shardings` say, whatever mesh wrote it."""
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes,
      shardings,
    )
    rest = {"step": abstract.step, "collections": abstract.collections, "opt_state": abstract.opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", abstract.params)
      rest = checkpointer.restore(folder / "rest", rest)
      ema = None
      if shapes.ema is not None and (folder / "ema").is_dir():
        ema = checkpointer.restore(folder / "ema", abstract.ema)
      elif shapes.ema is not None:
        log.warning("%s has no averaged weights; the average starts at its weights", folder)
        ema = jax.tree.map(jnp.copy, params)
    return TrainState(rest["step"], params, rest["collections"], rest["opt_state"], ema)

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._sealer.shutdown()
      try:
        self._manager.close()
      except Exception as error:  # Orbax raises once more what a failed save has raised
        if not self._failures:
          raise
        log.warning("closing %s: %s", self.root, bucket.brief(error))
