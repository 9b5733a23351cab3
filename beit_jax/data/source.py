"""The interface of a data set to the rest of the library, and what several sources share."""

import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from beit_jax.data.pixels import RGB, PixelRule
from beit_jax.errors import UserError

SLICE = re.compile(r"(.*)\[([0-9]{1,12}%?)?:([0-9]{1,12}%?)?\]")  # "train[10%:]", as in TFDS

Example = dict[str, Any]


class Source(Protocol):
  """A data set with random access.

  A subclass implements `__len__` and `__getitem__` and sets `description`; the other attributes have defaults for
  images without labels. Sources are pickled when `data.workers` is positive, so they hold paths rather than pixels.

  Attributes:
    num_classes: number of classes of `label`, the same for all splits; 0 if there are no labels, or if only the config
      knows the number (`model.num_classes`).
    class_names: name of each class of `label`; () if unknown.
    map_class_names: name of each class of `label_map`; () if unknown.
    map_colors: (red, green, blue) of each class of `label_map`; () if unknown.
    has_labels: whether examples have a `label`.
    multi_label: whether a `label` is a vector of 0 and 1 instead of one class id.
    pixel_rule: how stored values become pixels; `make_source` sets it from the config.
    description: JSON values that identify the data; checkpoints and token caches record them. Caches ignore `root`
      and `label_file`, since data may move.
  """

  num_classes: int = 0
  class_names: tuple[str, ...] = ()
  map_class_names: tuple[str, ...] = ()
  map_colors: tuple[tuple[int, int, int], ...] = ()
  has_labels: bool = False
  multi_label: bool = False
  pixel_rule: PixelRule = RGB
  description: dict[str, Any]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Returns:
      A dict with `image`, encoded bytes or an array [H, W, C or 1], and optionally
      `label`: int, or with `multi_label` float32 [num_classes];
      `label_map`: encoded bytes or an integer array [H, W], the class of each pixel;
      `file`, `label_file`: the paths of the image and of its label map, for error messages.

    Raises:
      BadImage: the example is damaged.
      OSError: the example cannot be read.
    """
    ...

  def listing(self) -> Iterable[str]:
    """What the data hold, wherever they lie: for files one line an example, its relative path and its classes.

    It tells apart data of the same `description` and length; () where these say all.
    """
    return ()

  def digest(self) -> str:
    """The sha256 of `listing`; "" if that is empty."""
    digest, lines, separator = hashlib.sha256(), iter(self.listing()), ""
    while part := list(itertools.islice(lines, 10_000)):  # there may be many millions
      digest.update((separator + "\n".join(part)).encode(errors="surrogateescape"))
      separator = "\n"
    return digest.hexdigest() if separator else ""


def multi_hot(labels: Any, num_classes: int) -> np.ndarray:
  """Converts class ids to float32 [num_classes] of 0 and 1.

  Raises:
    UserError: an id is not a whole number in [0, num_classes).
  """
  ids, result = np.asarray(labels), np.zeros(num_classes, np.float32)
  if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= num_classes):
    raise UserError(
      f"the labels {ids.tolist()} of an example are not all class numbers from 0 to {num_classes - 1}; look at "
      "data.label_key"
    )
  result[ids.astype(np.int64)] = 1.0
  return result


def class_label(value: Any, source: Source, where: str) -> int | np.ndarray:
  """The label of an example from what a file holds.

  Args:
    value: the number or the name of a class, or a list of them if `source.multi_label`.
    source: its classes give names their numbers.
    where: names the example in errors.

  Returns:
    int, or with `multi_label` float32 [num_classes].

  Raises:
    UserError: it is neither, or there is no class of this name.
  """

  def number(item: Any) -> int:
    if isinstance(item, str) and item in source.class_names:
      return source.class_names.index(item)
    if isinstance(item, int) and not isinstance(item, bool):
      return item
    known = (
      f"one of the {len(source.class_names)} class names"
      if source.class_names
      else "a name only with data.class_file"
    )
    raise UserError(
      f"{where}: the label holds {item!r}; expected the number of a class, or {known}; data.label_key= uses no labels"
    )

  if isinstance(value, list) != source.multi_label:
    raise UserError(
      f"{where}: the label is {str(value)[:80]}; the first example has {'several' if source.multi_label else 'one'}"
    )
  if isinstance(value, list):
    return multi_hot([number(item) for item in value], source.num_classes)
  return number(value)


def indices_of_part(names: list[str], split: str) -> list[int]:
  """Indices of the part of `names` that a split such as "train[10%:]" takes: all of them if there are no brackets.

  The names are ordered by their digests, so a part has some of every class; it keeps most of its names when others are
  added. Parts that do not overlap in the brackets have no name in common. Shares are rounded up.
  """
  match = SLICE.fullmatch(split)
  if match is None:
    return list(range(len(names)))

  def position(text: str | None, default: int) -> int:
    if text is None:
      return default
    return -(-len(names) * int(text[:-1]) // 100) if text.endswith("%") else int(text)

  digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
  order = np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")
  part = np.sort(order[position(match[2], 0) : position(match[3], len(names))])
  if not len(part):
    raise UserError(f"data.split or eval.split={split!r}: this part of {len(names)} images is empty")
  return part.tolist()


class Subset(Source):
  """A random fraction of a source, for few-label runs. The choice is a function of the source's length."""

  def __init__(self, source: Source, fraction: float):
    count = max(int(round(len(source) * fraction)), 1)
    for name in Source.__annotations__:  # all that is known of the data
      setattr(self, name, getattr(source, name))
    self._source, self._indices = source, np.random.default_rng(0).permutation(len(source))[:count]
    self.description = {**source.description, "fraction": fraction}

  def listing(self) -> Iterable[str]:
    return self._source.listing()

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._source[int(self._indices[index])]
