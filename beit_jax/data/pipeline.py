"""Makes host batches from a source, with grain. The step is the data position.

There is one global order of examples: position p = step * batch_size + row lies in epoch p // n, and the order within
an epoch is a permutation that depends on (seed, epoch). Each process reads the rows of a global batch that its devices
hold. Crops and flips depend on (seed, epoch, index) only. A run can therefore start at any step at once, and an example
looks the same with any batch size, mesh, and number of processes or workers.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np

from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.examples import MAX_CANDIDATES, HostBatch, Reader, candidates, decode, read
from beit_jax.data.sources import Source
from beit_jax.errors import BadImage, TransientError, UserError

DEPTH = 2  # batches in preparation
STUCK_SECONDS = 10  # that a worker has after the end to finish its read; then it is killed
MIN_PIECE = 8  # examples that a thread reads at a time; fewer would cost more to pass on than to read


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch, 1)).permutation(count)


@functools.lru_cache(maxsize=2)
def places(seed: int, epoch: int, count: int) -> np.ndarray:
  """The position of each example in the order of an epoch: uint32 [count]. Token caches are written in that order."""
  result = np.empty(count, np.uint32)
  result[_order(seed, epoch, count)] = np.arange(count, dtype=np.uint32)
  return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """Random access to this process's rows of all global batches, in order; grain reads from it.

  Attributes:
    rows: the rows of a global batch that this process reads.
    batch_size: of the global batch.
    steps: number of global batches.
    train: whether to shuffle and augment.
    replace: whether other examples replace those that cannot be read.
  """

  source: Source
  reader: Reader
  rows: np.ndarray
  batch_size: int
  steps: int
  seed: int
  train: bool
  replace: bool

  def __len__(self) -> int:
    return self.steps * len(self.rows)

  def __getitem__(self, i: int) -> HostBatch:
    step, row = divmod(int(i), len(self.rows))
    position = step * self.batch_size + int(self.rows[row])
    epoch, index = divmod(position, len(self.source))  # without shuffling, the position is the example
    if self.train:
      index = int(_order(self.seed, epoch, len(self.source))[index])
    arrays, replaced = self._read(index, (self.seed, epoch, index))
    return {
      **arrays,
      "example_key": np.array([epoch, index], np.uint32),
      "valid": np.array(self.train or (position < len(self.source) and not replaced)),
      "replaced": np.array(replaced),
    }

  def _read(self, index: int, key: tuple[int, ...]) -> tuple[HostBatch, bool]:
    """Reads an example or, if that fails, a replacement that depends on the index only.

    Returns:
      The arrays, and whether they are those of a replacement.
    """
    problem = None
    attempts = None if self.replace else 1
    for other in itertools.islice(candidates(index, len(self.source)), attempts):
      try:
        example = {**read(self.source, other), "index": other, "replaces": problem}
        image = decode(example, other, self.source.pixel_rule)
        reader = self.reader
        arrays = reader.train(image, example, key) if self.train else reader.eval(image, example)
        return arrays, other != index
      except BadImage as error:
        problem = problem or error
    replacements = f"; nor could any of {MAX_CANDIDATES} replacements" if self.replace else ""
    raise BadImage(f"{problem}{replacements}")


def _init_worker(*_: Any) -> None:
  """Makes a worker ignore the signals meant for its parent, and end when its parent ends, for whatever reason."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  # PR_SET_PDEATHSIG would act when the thread that started the worker ends, which is one of grain's.
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _clear_errors(workers: int) -> Iterator[None]:
  """Translates errors of grain's worker processes into errors that say what to do."""
  try:
    yield
  except OSError as error:
    if not workers or error.errno != errno.ENOSPC:
      raise
    raise UserError(
      "no space left in /dev/shm, where data workers put their batches: make it larger (docker run --shm-size=8g) or "
      "decrease data.workers"
    ) from None
  except RuntimeError as error:
    if "Worker process was terminated" not in str(error):
      raise
    code = re.search(r"exit code (\d+)", str(error))  # a signal has a negative one
    if code:
      raise UserError(
        f"one of the {workers} data workers ended with status {code[1]}, for the reason that it printed above. A "
        "worker imports the main module anew: a script needs `if __name__ == '__main__':` around what it runs, or "
        "data.workers=0"
      ) from None
    raise TransientError(
      f"one of the {workers} data workers was killed; if the machine ran out of memory, decrease data.workers or "
      "data.threads"
    ) from None


def _joined(pieces: Iterator[HostBatch], size: int) -> Generator[HostBatch, None, None]:
  """Joins consecutive pieces of any size into batches of `size` examples."""
  batch: HostBatch = {}
  filled = 0
  for piece in pieces:
    start, stop = 0, len(piece["valid"])
    while start < stop:
      if not filled:
        batch = {name: np.empty((size, *array.shape[1:]), array.dtype) for name, array in piece.items()}
      count = min(size - filled, stop - start)
      for name, array in piece.items():
        batch[name][filled : filled + count] = array[start : start + count]
      start, filled = start + count, (filled + count) % size
      if not filled:
        yield batch


@contextlib.contextmanager
def _closing(iterator: grain.DatasetIterator) -> Iterator[None]:
  """On leaving, ends the workers and removes what they left in shared memory; entered before they start."""
  others = multiprocessing.active_children()
  try:
    yield
  finally:
    timer = threading.Timer(STUCK_SECONDS, _kill_workers, [others])
    timer.start()
    try:
      iterator.close()  # waits until every worker has finished its pieces
    finally:
      timer.cancel()
    # A thread of grain unlinks the shared memory of deleted arrays; the end of this process would not wait for it.
    pool = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
      gc.collect()  # tracebacks of grain's threads hold their last pieces
      pool.apply(int)  # the only thread works in order


def _kill_workers(others: list[Any]) -> None:
  """Kills grain's workers except `others`, which were there before, such as those of the training data."""
  for process in multiprocessing.active_children():
    if process.name.startswith("grain") and process not in others:
      process.kill()  # they ignore SIGTERM


_open: weakref.WeakSet[Generator[HostBatch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
  """Closes the batches that the program still holds at its end, when it is too late for their own clean-up."""
  for batches in list(_open):
    batches.close()


def _batches(*args: Any) -> Iterator[HostBatch]:
  batches = _generate(*args)
  _open.add(batches)
  return batches


def _generate(
  rows: _Rows, start_step: int, workers: int, threads: int, bad_images: BadImageTracker | None
) -> Generator[HostBatch, None, None]:
  # All threads of all workers read pieces of the same DEPTH batches, so that memory does not grow with their number.
  # Pieces are made before `to_iter_dataset`: after it the order would depend on the number of workers.
  size, readers = len(rows.rows), max(workers, 1)
  piece = max(size // (readers * threads), min(size, MIN_PIECE))
  dataset = grain.MapDataset.source(rows)[start_step * size :].batch(piece)
  ahead = max(DEPTH * size // (readers * piece), threads)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
  if workers:
    from absl import flags

    main = sys.modules["__main__"]
    if (
      getattr(main, "__file__", "") == "<stdin>"
    ):  # `python - < script`: workers would look for a file of this name
      del main.__file__
    flags.FLAGS.mark_as_parsed()  # grain's workers do not start otherwise; we use no absl flags
    processes = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
    dataset = dataset.mp_prefetch(processes, worker_init_fn=_init_worker)
  with _clear_errors(workers):
    iterator = iter(dataset)
  with _closing(iterator), contextlib.closing(_joined(iterator, size)) as batches:
    while True:
      with _clear_errors(workers):
        batch = next(batches, None)
      if batch is None:
        return
      replaced = batch.pop("replaced")
      if bad_images is not None:
        bad_images.update(batch["example_key"][:, 1], replaced)
      yield batch


def train_batches(
  source: Source,
  reader: Reader,
  *,
  rows: np.ndarray,
  batch_size: int,
  total_steps: int,
  start_step: int,
  seed: int,
  workers: int = 0,
  threads: int = 1,
  bad_images: BadImageTracker | None = None,
) -> Iterator[HostBatch]:
  """Makes the host batches of steps start_step to total_steps - 1.

  Args:
    source: the data.
    reader: makes the arrays of each row.
    rows: the rows of a global batch that this process reads.
    batch_size: of the global batch.
    total_steps: the step to stop before.
    start_step: the first step.
    seed: of the order and of augmentation.
    workers: number of processes that read; with 0, threads of this process do.
    threads: number of threads that read, in each process.
    bad_images: records examples that cannot be read; others replace them. If None, they raise `BadImage`.

  Yields:
    {view: uint8 [b, H, W, 3], "example_key": uint32 [b, 2] = (epoch, index), "valid": bool [b]} and, if there are
    labels, "label": int32 [b], or float32 [b, C] of 0 and 1 with several labels per image. b = len(rows).
  """
  replace = bad_images is not None
  table = _Rows(source, reader, rows, batch_size, total_steps, seed=seed, train=True, replace=replace)
  return _batches(table, start_step, workers, threads, bad_images)


def eval_batches(
  source: Source,
  reader: Reader,
  *,
  rows: np.ndarray,
  batch_size: int,
  workers: int = 0,
  threads: int = 1,
  bad_images: BadImageTracker | None = None,
) -> Iterator[HostBatch]:
  """Makes host batches with every example once, in order, without randomness. See `train_batches`.

  `valid` is False for the padding of the last batch and for examples that cannot be read.
  """
  steps, replace = -(-len(source) // batch_size), bad_images is not None
  table = _Rows(source, reader, rows, batch_size, steps, seed=0, train=False, replace=replace)
  return _batches(table, 0, workers, threads, bad_images)
