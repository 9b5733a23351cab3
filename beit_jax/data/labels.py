"""Class labels of examples: their check, and their numbers in a model that knows the classes by name."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from beit_jax.data.source import Example, Source, multi_hot
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log


def check_label(example: Example, num_classes: int, multi_label: bool, index: int) -> np.ndarray:
  """Checks the label of an example; all readers of labels call this.

  Args:
    example: see `Source.__getitem__`.
    num_classes: number of classes.
    multi_label: whether a label is a vector of 0 and 1.
    index: of the example, for messages.

  Returns:
    int32 [], or with `multi_label` float32 [num_classes].

  Raises:
    UserError: there is no label, or it is not a class; names the file, or the example.
  """
  name = str(example.get("file", f"example {index}"))
  if example.get("label") is None:
    raise UserError(f"{name}: no label; this objective needs labeled data (data.label_key)")
  label = np.asarray(example["label"])
  if multi_label:
    valid = (
      label.shape == (num_classes,) and label.dtype.kind in "biuf" and ((label == 0) | (label == 1)).all()
    )
    expected = f"a vector of {num_classes} zeros and ones"
  else:
    valid = label.shape == () and label.dtype.kind in "biu" and 0 <= label < num_classes
    expected = f"a whole number from 0 to {num_classes - 1}, one for each of the {num_classes} classes"
  if not valid:
    advice = "look at data.label_key, data.num_classes and model.num_classes"
    if label.shape == () and label == -1:
      advice = (
        "-1 in every example means that the split has no labels: choose another one (data.split, eval.split)"
      )
    raise UserError(f"{name}: the label is {str(label)[:80]}, expected {expected}; {advice}")
  return label.astype(np.float32 if multi_label else np.int32)


class _Relabeled(Source):
  """A source whose classes have the numbers that their names have in `class_names`."""

  def __init__(self, source: Source, class_names: tuple[str, ...]):
    for name in Source.__annotations__:  # all that is known of the data
      setattr(self, name, getattr(source, name))
    self._source, self._old_count, self.description = source, source.num_classes, source.description
    self.class_names, self.num_classes = class_names, len(class_names)
    numbers = {name: i for i, name in enumerate(class_names)}
    self._numbers = np.array([numbers[name] for name in source.class_names])

  def listing(self) -> Iterable[str]:
    return self._source.listing()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    example = self._source[index]
    label = check_label(example, self._old_count, self.multi_label, index)
    if self.multi_label:
      return {**example, "label": multi_hot(self._numbers[label > 0], self.num_classes)}
    return {**example, "label": int(self._numbers[label])}


def relabel(source: Source, class_names: Sequence[str], *, same_names: bool = True) -> Source:
  """Numbers the classes of a source as `class_names` does: the names of the training data, or those of a model.

  A source with some of the classes only is allowed. The classes are matched by name.

  Args:
    source: labeled data.
    class_names: the name of each class, in order.
    same_names: whether data and model must use the same words. If not, and they have no name but the number of classes
      in common ("n01440764" and "tench"), the numbers of the source are kept, with a warning.

  Raises:
    UserError: a class of the source is not in `class_names`, or several of these have its name.
  """
  names, own = tuple(class_names), source.class_names
  if own == names or not own or not names:
    return source
  counts = collections.Counter(names)
  unknown = [name for name in own if name not in counts]
  if not same_names and len(unknown) == len(own) == len(names):
    log.warning(
      "the model calls its %d classes %s, ... and the data %s, ...: no name is the same, so class k of the data is "
      "taken for class k of the model",
      len(names),
      ", ".join(map(repr, names[:3])),
      ", ".join(map(repr, own[:3])),
    )
    return source
  wrong = unknown or [name for name in own if counts[name] > 1]
  if wrong:
    reason = "are not among" if unknown else "have the name of several of"
    raise UserError(
      f"{source.description}: the classes {wrong[:5]} {reason} the {len(names)} that the model has "
      f"({', '.join(names[:5])}, ...); use data with the classes of the model, under the same names"
    )
  if len(own) < len(names):
    absent = listed([name for name in names if name not in set(own)])
    log.info("the data has %d of the %d classes of the model; absent: %s", len(own), len(names), absent)
  return _Relabeled(source, names)


def check_order(theirs: Sequence[str], ours: Sequence[str]) -> None:
  """Raises a UserError if a checkpoint has the classes of the data in another order."""
  if list(theirs) != list(ours) and sorted(theirs) == sorted(ours):
    raise UserError(
      f"init_from: the checkpoint has the same classes as the data in another order ({theirs[0]!r} is class 0 there, "
      f"{ours[0]!r} here)"
    )


def listed(names: Sequence[str], limit: int = 10) -> str:
  """Names for a message; of a longer list the first ones and the number of the others."""
  more = f" and {len(names) - limit} others" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
