"""The table of data sources.

To add one, write a subclass of `Source` in a file `source_*.py` and add it to `SOURCES`.
"""

from collections.abc import Callable
from typing import Any

from beit_jax.data.class_file import read_class_file
from beit_jax.data.labels import relabel
from beit_jax.data.pixels import PixelRule
from beit_jax.data.source import Example, Source, Subset, multi_hot
from beit_jax.data.source_folder import FolderSource, PairsSource
from beit_jax.data.source_shapes import ShapesSource
from beit_jax.data.source_tables import ArrowSource, ParquetSource
from beit_jax.data.source_tar import TarSource
from beit_jax.data.source_tfds import TfdsSource
from beit_jax.errors import UserError
from beit_jax.runtime import bucket

__all__ = [
  "SOURCES",
  "ArrowSource",
  "Example",
  "FolderSource",
  "PairsSource",
  "ParquetSource",
  "ShapesSource",
  "Source",
  "Subset",
  "TarSource",
  "TfdsSource",
  "make_source",
  "multi_hot",
]

# Value of `data.source` -> the class, and the keys of the config's `data` section that are its keyword arguments.
SOURCES: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
  "tfds": (TfdsSource, ("name", "split", "data_dir", "image_key", "label_key", "value_range")),
  "folder": (FolderSource, ("root", "split", "label_file")),
  "pairs": (PairsSource, ("root", "split")),
  "tar": (TarSource, ("root", "split", "label_key")),
  "parquet": (ParquetSource, ("root", "split", "image_key", "label_key")),
  "arrow": (ArrowSource, ("root", "split", "image_key", "label_key")),
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
  for key in ("data_dir", "root", "label_file", "class_file"):
    bucket.check_local(f"data.{key}", data.get(key))
  source = source_class(**{key: data[key] for key in keys})
  if data.get("class_file"):
    source = _with_classes(source, data["class_file"])
  expected = data["num_classes"]
  if expected is not None and source.num_classes not in (0, expected):
    raise UserError(
      f"config key 'data.num_classes': {expected} classes expected, found {source.num_classes} in {source.description}"
    )
  if expected is not None and source.has_labels:
    source.num_classes = expected
  if not 0 < data["fraction"] <= 1:
    raise UserError(f"data.fraction={data['fraction']} must lie in (0, 1]")
  source = source if data["fraction"] == 1 else Subset(source, data["fraction"])
  source.pixel_rule = PixelRule(len(data["mean"]), data["value_range"])
  return source


def _with_classes(source: Source, class_file: str) -> Source:
  """Gives the classes of a source the names, numbers and colors of `data.class_file`."""
  names, colors = read_class_file(class_file)
  if not source.has_labels:
    source.map_class_names, source.map_colors = names, colors
  elif source.class_names:
    return relabel(source, names)
  elif source.num_classes not in (0, len(names)):
    raise UserError(
      f"data.class_file: {class_file} names {len(names)} classes, and the data has {source.num_classes}; give one row "
      "for each"
    )
  else:
    source.class_names, source.num_classes = names, len(names)
  return source
