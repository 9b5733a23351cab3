"""TFDS data sets as a source."""

import functools
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from beit_jax import trees
from beit_jax.data import tfds_info
from beit_jax.data.source import Example, Source, multi_hot
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime import bucket


class TfdsSource(Source):
  """A prepared TFDS data set in a random-access format (ArrayRecord), read without TensorFlow.

  Nothing is downloaded: if the data set is not prepared, the error gives the command that builds it.
  """

  def __init__(
    self, name: str, split: str, data_dir: str, image_key: str, label_key: str, value_range: Any = None
  ):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    bucket.check_local("data.data_dir", data_dir)
    root = Path(os.path.expanduser(data_dir))
    folder = tfds_info.version_folder(root, name)
    import tensorflow_datasets as tfds  # slow to import; only this source needs it

    builder = tfds_info.open_builder(folder)
    features = builder.info.features
    image, repeated = tfds_info.find_feature(features, image_key, "data.image_key")
    tfds_info.check_image_feature(image, repeated, image_key, value_range is not None)
    labels, encoded = "", {image_key} if isinstance(image, tfds.features.Image) else set()
    if label_key:
      label, repeated = tfds_info.find_feature(features, label_key, "data.label_key")
      labels = tfds_info.label_form(label, repeated, label_key)
      encoded |= {label_key} if isinstance(label, tfds.features.Image) else set()
      label = label.feature if isinstance(label, tfds.features.Sequence) else label
      if getattr(label, "num_classes", None):
        self.num_classes, self.class_names = label.num_classes, tuple(label.names)
    skip = tfds.decode.SkipDecoding()
    try:
      self._source = builder.as_data_source(
        split=split, decoders=trees.unflatten({key: skip for key in encoded})
      )
    except (ValueError, KeyError) as error:
      splits = sorted(builder.info.splits)
      raise UserError(f"data.split={split!r}: data set {name} has the splits {splits} ({error})") from None
    except NotImplementedError:
      raise UserError(tfds_info.no_random_access(folder, builder.info.file_format)) from None
    self.description = {"source": "tfds", "name": str(builder.info.full_name), "split": split}
    shards = builder.info.splits[split].file_instructions
    self._listing = [f"{Path(s.filename).name} {s.skip} {s.take} {s.examples_in_shard}" for s in shards]
    self._image_key, self._label_key = image_key, label_key
    self.multi_label, self._has_maps = labels == "classes", labels == "map"
    self.has_labels = bool(labels) and not self._has_maps
    if self._has_maps:
      self.class_names, self.map_class_names = (), self.class_names

  def listing(self) -> Iterable[str]:
    return self._listing

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    try:
      stored = self._source[int(index)]
    except (RuntimeError, ValueError) as error:  # a checksum of ArrayRecord does not match
      where = f"{self.description['name']} ({self.description['split']}), example {index}"
      raise BadImage(f"{where} cannot be read: {error}; copy or build the data set again") from None
    example = {"image": _at(stored, self._image_key)}
    if self._has_maps:
      example["label_map"] = _at(stored, self._label_key)
    elif self._label_key:
      label = _at(stored, self._label_key)
      example["label"] = multi_hot(label, self.num_classes) if self.multi_label else int(label)
    return example


def _at(stored: dict[str, Any], path: str) -> Any:
  """The value in nested dictionaries that a path such as "objects/label" names."""
  return functools.reduce(operator.getitem, path.split("/"), stored)
