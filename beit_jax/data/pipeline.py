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
import time
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from beit_jax.data import images, randaugment, resize
from beit_jax.data.damage import Damage
from beit_jax.errors import BadImage, Outage, UserError

HostBatch = dict[str, np.ndarray]
TRIES = 100  # examples to try before giving up
PAUSES = (0.1, 0.5)  # seconds before a file is read again: a network mount has errors that pass
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # those do not


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch, 1)).permutation(count)


@functools.lru_cache(maxsize=2)
def places(seed: int, epoch: int, count: int) -> np.ndarray:
  """Example -> its place in the order of an epoch: uint32 [count]. Token caches are written in that order."""
  found = np.empty(count, np.uint32)
  found[_order(seed, epoch, count)] = np.arange(count, dtype=np.uint32)
  return found


class Views:
  """Reads an example as pictures of fixed sizes, all of one box: what every objective but segmentation wants.

  Args:
    views: name -> ((H, W), interpolation).
    options: the config's `data` section (crop, crop_scale, crop_ratio, flip, rand_augment, mean, crop_pct, resize).

  Raises:
    UserError: a rand_augment that is not understood, or one with more than one view, which would then differ.
  """

  def __init__(self, views: images.Views, options: dict[str, Any]):
    self._views, self._options = views, options
    known = {"resize": images.RESIZES, "crop": images.CROPS}
    checked = [(key, options[key], names) for key, names in known.items()]
    checked += [(f"interpolation of {name}", how, tuple(images.RESAMPLE)) for name, (_, how) in views.items()]
    for key, value, names in checked:
      if value not in names:
        raise UserError(f"config key 'data.{key}': {value!r} is unknown; there are {', '.join(names)}")
    if not 0 < options["crop_pct"] <= 1:
      raise UserError(f"config key 'data.crop_pct': {options['crop_pct']} must lie in (0, 1]")
    resize.check()
    if options["rand_augment"]:
      randaugment.parse(options["rand_augment"])
      if len(views) > 1:
        raise UserError(
          "config key 'data.rand_augment': the views of an example would no longer show the same; it is for fine-tuning"
        )

  def train(self, image: images.Picture, example: dict[str, Any], key: tuple[int, ...]) -> HostBatch:
    """`key`, (seed, epoch, index of the row), is all the randomness there is.

    Raises:
      BadImage: the picture turns out to be damaged.
    """
    o = self._options
    rng = np.random.default_rng((*key, 2))
    options = dict(crop=o["crop"], scale=o["crop_scale"], ratio=o["crop_ratio"], flip=o["flip"])
    views = images.train_views(image, rng, self._views, scaled=o.get("scaled_decode", False), **options)
    if o["rand_augment"]:
      rng, fill = np.random.default_rng((*key, 3)), randaugment.fill_colour(o["mean"])
      augment = lambda view: randaugment.rand_augment(Image.fromarray(view), rng, o["rand_augment"], fill)  # noqa: E731
      views = {name: np.asarray(augment(view)) for name, view in views.items()}
    return {**views, **self._label(example)}

  def eval(self, image: images.Picture, example: dict[str, Any]) -> HostBatch:
    o = self._options
    views = images.eval_views(image, self._views, crop_pct=o["crop_pct"], resize=o["resize"])
    return {**views, **self._label(example)}

  def _label(self, example):
    if "label" not in example:
      return {}
    label = np.asarray(example["label"])  # a class, or 0 and 1 for every class (multi-label, float32)
    return {"label": label if label.ndim else label.astype(np.int32)}


def decode(example: dict[str, Any], index: int, field: str = "image") -> images.Picture:
  """The picture of an example; its pixels may be damaged all the same, which shows when they are asked for.

  Raises:
    BadImage: it cannot be decoded; names the file, or the example.
  """
  return images.Picture(example[field], str(example.get("file", f"example {index}")))


def read(source: Any, index: int) -> dict[str, Any]:
  """An example of a source, its file tried three times.

  Raises:
    BadImage: it cannot be read.
  """
  for pause in (*PAUSES, None):
    try:
      return source[index]
    except OSError as error:
      if pause is None or isinstance(error, LASTING):
        raise BadImage(str(error)) from error
    time.sleep(pause)


def candidates(index: int, count: int) -> Iterator[int]:
  """An example, and those that take its place in turn. Not simply the next ones: a whole folder may be damaged."""
  yield index
  rng = np.random.default_rng((index, 4))
  for _ in range(TRIES):
    yield int(rng.integers(count))


class _Rows:
  """Random access to this process's rows of the global batches, in order; the unit that grain reads."""

  def __init__(self, source, reader, *, rows, batch_size, steps, seed, train, replace):
    self._source, self._reader, self._tries = source, reader, 1 + TRIES if replace else 1
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
    """An example's arrays; where its picture cannot be read those of another one, always the same for an index.

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
    more = "" if self._tries == 1 else f"; nor could any of {TRIES} others that were tried in its place"
    raise BadImage(f"{problem}{more}")


def _as_worker(*_) -> None:
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
  rows: _Rows, local_batch: int, start_step: int, workers: int, threads: int, damage: Damage | None
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
      raise Outage(
        f"one of the {workers} data workers was killed; if the machine ran out of memory, lower data.workers or "
        "data.threads"
      ) from None
    replaced = batch.pop("replaced")
    if damage is not None:
      damage.note(batch["example_key"][:, 1], replaced)
    yield batch


def train_batches(
  source: Any, reader: Any, *,
  rows: np.ndarray, batch_size: int, total_steps: int, start_step: int, seed: int, workers: int = 0, threads: int = 1,
  damage: Damage | None = None,
) -> Iterator[HostBatch]:  # fmt: skip
  """Host batches of steps start_step..total_steps-1.

  Args:
    reader: `Views`, or anything with its `train` and `eval`.
    rows: the rows of a global batch that this process reads.
    workers: processes that read; 0 = `threads` of this one.
    damage: is told of examples that cannot be read; others take their place. Without it they are errors.

  Yields:
    {view: uint8 [b, H, W, 3], "example_key": uint32 [b, 2] = (epoch, index), "valid": bool [b] and, with labels,
    "label": int32 [b], or float32 [b, C] of 0 and 1 with several labels}, b = len(rows).
  """
  options = dict(rows=rows, batch_size=batch_size, seed=seed, replace=damage is not None)
  table = _Rows(source, reader, steps=total_steps, train=True, **options)
  return _batches(table, len(rows), start_step, workers, threads, damage)


def eval_batches(
  source: Any, reader: Any, *,
  rows: np.ndarray, batch_size: int, workers: int = 0, threads: int = 1, damage: Damage | None = None,
) -> Iterator[HostBatch]:  # fmt: skip
  """Every example once, in order, centre-cropped; `valid` is False in the last batch's padding and for damaged ones."""
  steps = -(-len(source) // batch_size)
  options = dict(rows=rows, batch_size=batch_size, seed=0, replace=damage is not None)
  table = _Rows(source, reader, steps=steps, train=False, **options)
  return _batches(table, len(rows), 0, workers, threads, damage)
