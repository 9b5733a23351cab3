"""The table of data sources.

To add one, write a subclass of `Source` in a file `source_NAME.py` and add it to `SOURCES`.
"""

from collections.abc import Callable
from typing import Any

from beit_jax.data.pixels import PixelRule
from beit_jax.data.source import Example, Source, Subset, multi_hot
from beit_jax.data.source_folder import FolderSource, PairsSource
from beit_jax.data.source_shapes import ShapesSource
from beit_jax.data.source_tfds import TfdsSource
from beit_jax.errors import UserError
from beit_jax.runtime import bucket

__all__ = [
  "SOURCES",
  "Example",
  "FolderSource",
  "PairsSource",
  "ShapesSource",
  "Source",
  "Subset",
  "TfdsSource",
  "make_source",
  "multi_hot",
]

# Value of `data.source` -> the class, and the keys of the config's `data` section that are its keyword arguments.
SOURCES: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
  "tfds": (TfdsSource, ("name", "split", "data_dir", "image_key", "label_key", "value_range")),
  "folder": (FolderSource, ("root", "split", "label_file")),
  "pairs": (PairsSource, ("root", "split")),
  "shapes": (ShapesSource, ("split", "num_examples", "render_size")),
}


def make_source(data: dict[str, Any]) -> Source:
  """Builds the source that a config's `data` section names.

  Raises:
    UserError: the section is invalid, or the data is missing or has another number of classes.
  """
  if data["source"] not in SOURCES:
    raise UserError(f"data.source={data['source']!r} is unknown; there are {sorted(SOURCES)}")
  source_class, keys = SOURCES[data["source"]]
  if data.get("label_file") and "label_file" not in keys:
    raise UserError(
      f"config key 'data.label_file': only for data.source='folder', here it is {data['source']!r}"
    )
  for key in ("data_dir", "root", "label_file"):
    bucket.check_local(f"data.{key}", data.get(key))
  source = source_class(**{key: data[key] for key in keys})
  expected = data["num_classes"]
  if expected is not None and source.num_classes not in (0, expected):
    raise UserError(
      f"config key 'data.num_classes': {expected} classes expected, found {source.num_classes} in {source.description}"
    )
  if not 0 < data["fraction"] <= 1:
    raise UserError(f"data.fraction={data['fraction']} must lie in (0, 1]")
  source = source if data["fraction"] == 1 else Subset(source, data["fraction"])
  source.pixel_rule = PixelRule(len(data["mean"]), data["value_range"])
  return source
