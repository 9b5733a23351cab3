"""Procedural scenes as a source."""

from beit_jax.data import shapes
from beit_jax.data.source import Example, Source
from beit_jax.errors import UserError


class ShapesSource(Source):
  """`num_examples` procedural scenes of `render_size` x `render_size` pixels, with labels and label maps."""

  num_classes = len(shapes.KINDS)
  class_names = shapes.KINDS
  map_class_names = ("background", *shapes.KINDS)
  has_labels = True

  def __init__(self, split: str, num_examples: int, render_size: int):
    if split not in shapes.SPLITS:
      raise UserError(f"data.split={split!r}: the shapes data has the splits {sorted(shapes.SPLITS)}")
    self._split, self._num_examples, self._size = split, num_examples, render_size
    self.description = {
      "source": "shapes",
      "split": split,
      "num_examples": num_examples,
      "size": render_size,
    }
    self._cache: dict[int, Example] = {}  # small scenes only: 3 kB each at 32 pixels, faster than rendering

  def __len__(self) -> int:
    return self._num_examples

  def __getitem__(self, index: int) -> Example:
    if self._size > 64:
      return shapes.render(self._split, index, self._size)
    if index not in self._cache:
      self._cache[index] = shapes.render(self._split, index, self._size)
    return self._cache[index]
