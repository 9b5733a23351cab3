"""Reads and decodes one example of a source; `Reader` turns it into arrays."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from beit_jax.data import images
from beit_jax.data.label_maps import decode_labels
from beit_jax.data.pixels import RGB, PixelRule
from beit_jax.data.sources import Example, Source
from beit_jax.errors import BadImage

HostBatch = dict[str, np.ndarray]
MAX_FIRST = 8  # examples among which `check_first` looks for one that is not damaged
MAX_CANDIDATES = 100  # replacements to try for an example that cannot be read
PAUSES = (0.1, 0.5)  # seconds before a file is read again; errors of network mounts are often transient
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Reader(Protocol):
  """Turns an example into the arrays of one row of a host batch. Pickled when `data.workers` is positive."""

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    """Augments an example; all randomness is a function of `key` = (seed, epoch, index).

    `example["index"]` differs from the index in `key` if the example replaces one that cannot be read;
    `example["replaces"]` is then the error.

    Raises:
      BadImage: the image, or another part of the example, is damaged.
    """
    ...

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    """Prepares an example for evaluation, without randomness. Raises as `train`."""
    ...


def decode(example: Example, index: int, rule: PixelRule = RGB) -> images.LazyImage:
  """Returns the image of an example. Decoding is lazy: corruption may only surface when the pixels are read.

  Args:
    example: what a source returns.
    index: of the example, which names it in errors.
    rule: the source's `pixel_rule`.

  Raises:
    BadImage: the image cannot be decoded; names the file, or the example.
  """
  return images.LazyImage(example["image"], str(example.get("file", f"example {index}")), rule)


def read(source: Source, index: int) -> Example:
  """Reads an example; retries after errors that may be transient.

  Raises:
    BadImage: the example cannot be read.
  """
  pauses = iter(PAUSES)
  while True:
    try:
      return source[index]
    except OSError as error:
      pause = next(pauses, None)
      if pause is None or isinstance(error, PERMANENT_ERRORS):
        raise BadImage(str(error)) from error
      time.sleep(pause)


def candidates(index: int, count: int) -> Iterator[int]:
  """Yields `index`, then its replacements: random ones out of `count`, since neighbors are often damaged together."""
  yield index
  rng = np.random.default_rng((index, 4))
  for _ in range(MAX_CANDIDATES):
    yield int(rng.integers(count))


def check_first(source: Source, reader: Reader) -> None:
  """Reads the first example that is not damaged, among a few.

  Raises:
    UserError: its label or label map is not what the objective needs.
  """
  for index in range(min(len(source), MAX_FIRST)):
    with contextlib.suppress(BadImage):
      example = {**read(source, index), "index": index}
      reader.eval(decode(example, index, source.pixel_rule), example)
      return


def label_map_name(example: Example, index: int) -> str:
  """Names an example's label map in errors."""
  return str(example.get("label_file", example.get("file", f"example {index}")))


def read_error(source: Source, index: int, reader: Reader | None = None) -> str:
  """Returns the reason why an example cannot be read, or not by `reader`; it names the file or the example."""
  try:
    example = {**source[index], "index": index}
    image = decode(example, index, source.pixel_rule)
    image.pixels()
    if "label_map" in example:
      decode_labels(example["label_map"], label_map_name(example, index))
    if reader is not None:
      reader.eval(image, example)
  except (BadImage, OSError) as error:
    return str(error)
  return f"example {index}: could not be read before, or when its tokens were cached; now it can"
