"""From a source to host batches, by grain. The step is the data position.

There is one global order of examples: position p = step * batch_size + row, epoch = p // n, and within an epoch
the permutation of (seed, epoch). A process reads the rows of each global batch that its devices hold; crops and
flips depend on (seed, epoch, index) only. So a run starts anywhere at once, and neither the batch, the mesh,
the number of processes nor that of workers changes what an example looks like.
"""

import ctypes
import errno
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.examples import MAX_CANDIDATES, HostBatch, Reader, candidates, decode, read
from beit_jax.data.sources import Source
from beit_jax.errors import BadImage, TransientError, UserError


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch, 1)).permutation(count)


@functools.lru_cache(maxsize=2)
def places(seed: int, epoch: int, count: int) -> np.ndarray:
  """Example -> its place in the order of an epoch: uint32 [count]. Token caches are written in that order."""
  found = np.empty(count, np.uint32)
  found[_order(seed, epoch, count)] = np.arange(count, dtype=np.uint32)
  return found


class _Rows:
  """Random access to this process's rows of the global batches, in order; the unit that grain reads."""

  def __init__(
    self, source: Source, reader: Reader, *, rows: np.ndarray, batch_size: int, steps: int, seed: int, train: bool,
    replace: bool,
  ) -> None:  # fmt: skip
    self._source, self._reader, self._tries = source, reader, 1 + MAX_CANDIDATES if replace else 1
    self._rows, self._batch, self._steps = rows, batch_size, steps
    self._seed, self._train = seed, train

  def __len__(self) -> int:
    return self._steps * len(self._rows)

  def __getitem__(self, i: int) -> HostBatch:
    step, row = divmod(int(i), len(self._rows))
    position = step * self._batch + int(self._rows[row])
    epoch, index = divmod(position, len(self._source))
    if self._train:
      index = int(_order(self._seed, epoch, len(self._source))[index])
    arrays, replaced = self._read(index, (self._seed, epoch, index))
    return {
      **arrays,
      "example_key": np.array([epoch, index], np.uint32),
      "valid": np.array(self._train or (position < len(self._source) and not replaced)),
      "replaced": np.array(replaced),
    }

  def _read(self, index: int, key: tuple[int, ...]) -> tuple[HostBatch, bool]:
    """An example's arrays; if it cannot be read, those of a replacement that depends on the index only.

    To its reader an example says which it is, "index", and what is wrong with the one that it replaces, "replaces".
    """
    problem = None
    for other in itertools.islice(candidates(index, len(self._source)), self._tries):
      try:
        example = {**read(self._source, other), "index": other, "replaces": problem}
        image = decode(example, other)
        reader = self._reader
        arrays = reader.train(image, example, key) if self._train else reader.eval(image, example)
        return arrays, other != index
      except BadImage as error:
        problem = problem or error
    more = (
      "" if self._tries == 1 else f"; nor could any of {MAX_CANDIDATES} others that were tried in its place"
    )
    raise BadImage(f"{problem}{more}")


def _as_worker(*_: Any) -> None:
  """A worker ignores the signals that are meant for its parent, and dies with that, however it dies."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # at once, but only if the parent is still alive now
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


def _batches(
  rows: _Rows,
  local_batch: int,
  start_step: int,
  workers: int,
  threads: int,
  bad_images: BadImageTracker | None,
) -> Iterator[HostBatch]:
  # Batching comes before `to_iter_dataset`: after it the order would depend on the number of workers.
  dataset = grain.MapDataset.source(rows).batch(local_batch)[start_step:]
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
  dataset = dataset.to_iter_dataset(options)
  if workers:
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain's workers refuse to start otherwise; we use no absl flags
    processes = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
    dataset = dataset.mp_prefetch(processes, worker_init_fn=_as_worker)
  iterator = None
  while True:
    try:
      iterator = iter(dataset) if iterator is None else iterator
      batch = next(iterator)
    except StopIteration:
      return
    except OSError as error:
      if not workers or error.errno != errno.ENOSPC:
        raise
      raise UserError(
        "no space left in /dev/shm, where data workers leave their batches: make it larger (docker run --shm-size=8g), "
        "or lower data.workers"
      ) from None
    except RuntimeError as error:
      if "Worker process was terminated" not in str(error):
        raise
      raise TransientError(
        f"one of the {workers} data workers was killed; if the machine ran out of memory, lower data.workers or "
        "data.threads"
      ) from None
    replaced = batch.pop("replaced")
    if bad_images is not None:
      bad_images.update(batch["example_key"][:, 1], replaced)
    yield batch


def train_batches(
  source: Source, reader: Reader, *,
  rows: np.ndarray, batch_size: int, total_steps: int, start_step: int, seed: int, workers: int = 0, threads: int = 1,
  bad_images: BadImageTracker | None = None,
) -> Iterator[HostBatch]:  # fmt: skip
  """Host batches of steps start_step..total_steps-1.

  Args:
    reader: makes the arrays of each row.
    rows: the rows of a global batch that this process reads.
    workers: processes that read; 0 = `threads` of this one.
    bad_images: records examples that cannot be read, which others replace. Without it they are errors.

  Yields:
    {view: uint8 [b, H, W, 3], "example_key": uint32 [b, 2] = (epoch, index), "valid": bool [b] and, with labels,
    "label": int32 [b], or float32 [b, C] of 0 and 1 with several labels}, b = len(rows).
  """
  options: dict[str, Any] = dict(rows=rows, batch_size=batch_size, seed=seed, replace=bad_images is not None)
  table = _Rows(source, reader, steps=total_steps, train=True, **options)
  return _batches(table, len(rows), start_step, workers, threads, bad_images)


def eval_batches(
  source: Source, reader: Reader, *,
  rows: np.ndarray, batch_size: int, workers: int = 0, threads: int = 1, bad_images: BadImageTracker | None = None,
) -> Iterator[HostBatch]:  # fmt: skip
  """Every example once, in order, centre-cropped; `valid` is False in the last batch's padding and for damaged ones."""
  steps = -(-len(source) // batch_size)
  options: dict[str, Any] = dict(rows=rows, batch_size=batch_size, seed=0, replace=bad_images is not None)
  table = _Rows(source, reader, steps=steps, train=False, **options)
  return _batches(table, len(rows), 0, workers, threads, bad_images)
