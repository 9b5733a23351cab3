"""One example of a source: reading it, decoding its image and its label map, and what to say when that fails."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from beit_jax.data import images
from beit_jax.data.sources import Example, Source
from beit_jax.errors import BadImage, UserError

HostBatch = dict[str, np.ndarray]
TRIES = 100  # examples to try before giving up
PAUSES = (0.1, 0.5)  # seconds before a file is read again: a network mount has errors that pass
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # those do not


class Reader(Protocol):
  """Turns an example into the arrays of one row of a host batch. Pickled when `data.workers` is positive."""

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    """Augments an example; all randomness is a function of `key` = (seed, epoch, index of the row's example).

    Raises:
      BadImage: the image, or another part of the example, is damaged.
    """
    ...

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    """Prepares an example for evaluation, without randomness. Raises as `train`."""
    ...


def decode(example: Example, index: int, field: str = "image") -> images.LazyImage:
  """The picture of an example; its pixels may be damaged all the same, which shows when they are asked for.

  Raises:
    BadImage: it cannot be decoded; names the file, or the example.
  """
  return images.LazyImage(example[field], str(example.get("file", f"example {index}")))


def read(source: Source, index: int) -> Example:
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


def decode_labels(encoded: Any, name: str) -> np.ndarray:
  """Encoded bytes or an array -> label map uint8 or int32 [H, W], values as stored.

  Raises:
    BadImage: it is no picture, or a damaged one.
    UserError: it is one of colours instead of class numbers.
  """
  if not isinstance(encoded, bytes):
    array = np.asarray(encoded)
    return array[..., 0] if array.ndim == 3 else array
  try:
    image = images.open_picture(encoded)
    image.load()
  except Image.UnidentifiedImageError:
    raise BadImage(f"{name}: the label map cannot be decoded: no picture of a kind that is read") from None
  except Exception as error:  # whatever a damaged file leads to
    reason = str(error) or type(error).__name__
    raise BadImage(f"{name}: the label map cannot be decoded: {reason}") from None
  if image.mode not in ("L", "P", "1", "I", "I;16"):
    raise UserError(
      f"{name}: the label map has mode {image.mode}: a picture in colours; expected one channel of class numbers (an "
      "8-bit grey or palette PNG)"
    )
  return np.asarray(image).astype(np.int32 if image.mode.startswith("I") else np.uint8, copy=False)


def map_name(example: Example, index: int) -> str:
  """What to call an example's label map in an error."""
  return str(example.get("label_file", example.get("file", f"example {index}")))


def read_error(source: Source, index: int) -> str:
  """Which example it is, and why it cannot be read."""
  try:
    example = source[index]
    decode(example, index).pixels()
    if "label_map" in example:
      decode_labels(example["label_map"], map_name(example, index))
  except (BadImage, OSError) as error:
    return str(error)
  return f"example {index} could not be read a moment ago, or not when its tokens were cached, and can be now"
