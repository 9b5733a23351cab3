"""Checkpoints on disk: their files, how they are found and verified, and models without a run around them.

`workdir/checkpoints/<step>/` holds

- `params/`, `rest/` (step, other collections, optimizer state) and, if the run averages its weights, `ema/`: Orbax;
- `description.json`: what a reader needs to rebuild the model, see `record.describe`;
- `digest.json`: size and SHA-256 of every other file (in a bucket MD5, which the store states without a download).

`digest.json` is written last. A checkpoint without it is unfinished, and one that does not match it is damaged;
neither is ever restored. `workdir/saved.json` records that a complete checkpoint has existed.
"""

import errno
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from beit_jax.errors import UserError
from beit_jax.run import files
from beit_jax.runtime import bucket

DESCRIPTION, DIGEST, SAVED = "description.json", "digest.json", "saved.json"
DISK_DEFECTS = {errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)}  # EUCLEAN: Linux only

# Verification and lookup.


def fault(folder: Path, items: Collection[str] | None = None) -> str | None:
  """Returns why a checkpoint must not be used, or None if every file matches its digest.

  Args:
    folder: A checkpoint.
    items: What is to be read, such as "params"; of the files of other items only the size is checked. None: all.
  """
  try:
    if not (folder / DIGEST).is_file():
      return f"unfinished: {DIGEST} is missing"
    wanted = json.loads((folder / DIGEST).read_text())
    if not isinstance(wanted, dict) or not all(isinstance(row, dict) for row in wanted.values()):
      return f"damaged: {DIGEST} names no files"
    parts = None if items is None else {*items, DESCRIPTION}
    found = files.digests(folder, exclude=DIGEST, like=wanted, parts=parts)
  except ValueError:
    return f"damaged: {DIGEST} is not JSON"
  except OSError as error:
    if error.errno not in DISK_DEFECTS:
      raise
    return f"damaged: {error.filename or 'a file'} cannot be read ({error.strerror})"
  for name in sorted(wanted.keys() | found.keys()):
    if name not in wanted or name not in found or not found[name].items() <= wanted[name].items():
      state = "missing" if name not in found else "not in the digest" if name not in wanted else "changed"
      return f"damaged: {name} is {state}"
  return None


def write_digest(folder: Path) -> None:
  """Declares the files that are in a checkpoint now to be all of it."""
  files.write_json(folder / DIGEST, files.digests(folder, exclude=DIGEST))


def steps(root: Path) -> list[int]:
  """Returns the steps of the checkpoints in a `checkpoints` folder, usable or not, oldest first."""
  if not root.is_dir():
    return []
  return sorted(int(path.name) for path in root.iterdir() if path.is_dir() and path.name.isdigit())


def is_run(path: Path) -> bool:
  """Whether a folder is a run, its `checkpoints` folder, or one checkpoint; usable or not."""
  return (path / "checkpoints").is_dir() or (path / DESCRIPTION).is_file() or bool(steps(path))


def find(path: str | Path, step: int | None = None, items: Collection[str] | None = None) -> Path:
  """Returns the folder of the newest usable checkpoint.

  Args:
    path: A run, its `checkpoints` folder, or one checkpoint.
    step: Accept this step only.
    items: See `fault`.

  Raises:
    UserError: No checkpoint is usable, or the requested one is not.
  """
  folder = bucket.absolute(bucket.path(path))  # Orbax requires absolute paths.
  if (folder / DESCRIPTION).is_file():
    root, names = folder.parent, [folder.name]
  else:
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    names = [str(number) for number in reversed(steps(root))]
  if step is not None:
    names = [name for name in names if name == str(step)]
  faults = []
  for name in names:
    problem = fault(root / name, items)
    if problem is None:
      return root / name
    faults.append(f"{root / name}: {problem}")
  reason = "; ".join(faults) or f"steps found: {steps(root) or 'none'}"
  wish = "" if step is None else f" of step {step}"
  raise UserError(
    f"{folder}: no usable checkpoint{wish} here ({reason}); expected the folder of a run of beit_jax.main"
  )


def find_resumable(path: str | Path) -> tuple[Path, int]:
  """Finds a checkpoint for the config key `resume`: its folder and its step.

  Raises:
    UserError: There is no usable checkpoint, or it holds weights without an optimizer state.
  """
  location = bucket.path(path)
  if location.exists() and not is_run(location):
    raise UserError(
      f"config key 'resume': {path} is no run of beit_jax, which has the state of an optimizer. To start from its "
      "weights, give it as init_from"
    )
  folder = find(path)
  if not (folder / "rest").is_dir():
    raise UserError(f"config key 'resume': {folder} holds only weights, no optimizer state; use init_from")
  return folder, int(read_description(folder)["step"])


def read_description(folder: Path) -> dict[str, Any]:
  return json.loads((folder / DESCRIPTION).read_text())


def read_config(folder: Path) -> dict[str, Any]:
  """The config that a checkpoint was trained with; {} for a model without a run."""
  return read_description(folder).get("config", {})


# Models: parameters without a run around them.


def load_params(folder: Path, item: str = "params") -> dict[str, Any]:
  """Reads one item of a checkpoint, whatever devices wrote it.

  Args:
    folder: A checkpoint.
    item: `params`, `ema`, or `rest` (step, collections, optimizer state).

  Returns:
    Nested dicts of NumPy arrays.

  Raises:
    UserError: The arrays would be far larger than the files that hold them.
  """
  handler = ocp.PyTreeCheckpointHandler()
  metadata = handler.metadata(folder / item).tree
  claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(metadata))
  _check_claimed_size(folder / item, claimed)
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
  return handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=args))


def _check_claimed_size(folder: Path, claimed: int) -> None:
  """Refuses a small download whose metadata claims arrays that would fill the memory; weights barely compress."""
  actual = files.total_size(folder)
  if claimed > 2**28 and claimed > 1000 * actual:
    raise UserError(
      f"{folder} claims {claimed:,} bytes of arrays in files of {actual:,} bytes; it is damaged or malicious"
    )


def write_model(folder: Path, params: Any, description: dict[str, Any]) -> None:
  """Writes a checkpoint without optimizer state: `find`, `load_params` and `init_from` accept it, `resume` does not."""
  # Neither asynchronous nor compressed: both would copy a large model once more.
  handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder.absolute() / "params", jax.tree.map(np.asarray, params))
  files.write_json(folder / DESCRIPTION, description)
  write_digest(folder)
