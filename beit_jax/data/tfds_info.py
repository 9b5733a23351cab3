"""Finds prepared TFDS data sets, and checks that their features are images and labels that the library reads."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import UserError

# What the command `tfds` of tensorflow-datasets 4.9.10 imports.
NEEDS = "needs `pip install tensorflow apache-beam mlcroissant` once"


def build_command(root: Path, name: str) -> str:
  """The command that prepares a data set."""
  return f"tfds build {name} --file_format=array_record --data_dir={root}"


def no_random_access(folder: Path, file_format: Any) -> str:
  """The message for a prepared version whose files only TensorFlow reads, and from their beginning only."""
  return (
    f"{folder}: expected a format with random access (array_record, parquet), found "
    f"{getattr(file_format, 'value', file_format)}, which is read in order only; convert it with: tfds convert_format "
    f"--dataset_version_dir={folder} --out_file_format=array_record   ({NEEDS})"
  )


def version_folder(root: Path, name: str) -> Path:
  """Returns root/name[/config]/version of the newest prepared version.

  Args:
    root: the folder of the data sets.
    name: "name", "name/config" or "name/config:version"; the config may be left out if only one is prepared.

  Raises:
    UserError: nothing is prepared, not this version, or several configs.
  """
  base, _, version = name.partition(":")
  folder = root / base
  prepared = [
    path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}dataset_info.json")
  ]
  configs = {"" if path == folder else str(path.parent.relative_to(folder)) for path in prepared if base}
  config = "." if "." in configs else min(configs, default="")
  if len(configs) > 1 and config != ".":
    names = [f"{base}/{one}" + (f":{version}" if version else "") for one in sorted(configs)]
    raise UserError(f"data.name={name!r}: {folder} has several configs; name one of {', '.join(names)}")
  versions = sorted(
    (path for path in prepared if base and (path == folder or path.parent == folder / config)),
    key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")],
  )
  chosen = [path for path in versions if not version or path.name == version]
  if chosen:
    return chosen[-1]
  if versions:
    there = ", ".join(path.name for path in versions)
    raise UserError(f"data.name={name!r}: {versions[0].parent} has the versions {there}, not {version}")
  sets = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
  similar = difflib.get_close_matches(base, sets, 1)
  hint = f" Did you mean {similar[0]!r}?" if similar else ""
  raise UserError(
    f"data.name={name!r}: no prepared data set in {folder} (found in {root}: {', '.join(sets) or 'nothing'})."
    f"{hint} Build it with: {build_command(root, name)}   ({NEEDS}), or set data.data_dir"
  )


def open_builder(folder: Path) -> Any:
  """Opens a prepared version; the result has its features and splits.

  Raises:
    UserError: the files that describe it are damaged.
  """
  import tensorflow_datasets as tfds

  try:
    return tfds.builder_from_directory(str(folder))
  except Exception as error:  # TFDS raises errors of many types
    reason = " ".join(str(error).split())
    raise UserError(
      f"data.name: {folder} is no complete TFDS data set ({reason}); copy or build it again"
    ) from None


def _parts(feature: Any) -> dict[str, Any]:
  """The features in a dictionary of features, or in a sequence of dictionaries; {} of any other feature."""
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.Sequence):
    feature = feature.feature
  return {name: feature[name] for name in feature} if isinstance(feature, tfds.features.FeaturesDict) else {}


def _paths(feature: Any, prefix: str = "") -> Iterator[str]:
  for name, part in _parts(feature).items():
    yield from _paths(part, f"{prefix}{name}/") if _parts(part) else [prefix + name]


def find_feature(features: Any, path: str, option: str) -> tuple[Any, bool]:
  """Finds the feature that a path such as "objects/label" names.

  Args:
    features: the features of a data set.
    path: names of features, with "/" between them.
    option: the config key that holds the path, for the error.

  Returns:
    (the feature, whether an example holds a sequence of them).

  Raises:
    UserError: there is no such feature.
  """
  import tensorflow_datasets as tfds

  feature, repeated = features, False
  for name in path.split("/"):
    if name not in _parts(feature):
      raise UserError(
        f"{option}={path!r}: the data set has the features {sorted(_paths(features))}; set {option}"
      )
    feature = _parts(feature)[name]
    repeated = repeated or isinstance(feature, tfds.features.Sequence)
  return feature, repeated


def check_image_feature(feature: Any, repeated: bool, path: str, has_range: bool) -> None:
  """Checks that a feature is an image, encoded or as an array.

  Args:
    feature: the feature.
    repeated: whether an example holds a sequence of them.
    path: names the feature in errors.
    has_range: whether the config says which values are black and white.

  Raises:
    UserError: it is no image, or its pixels cannot be understood.
  """
  import tensorflow_datasets as tfds

  where = f"data.image_key={path!r}: {_describe(feature)}"
  encoded = isinstance(feature, tfds.features.Image)
  if (
    repeated
    or not encoded
    and not (isinstance(feature, tfds.features.Tensor) and len(feature.shape) in (2, 3))
  ):
    raise UserError(f"{where} is no image; name a feature with one image per example")
  if feature.np_dtype not in (np.uint8, np.uint16) and (encoded or not has_range):
    advice = "store uint8, 0 to 255" if encoded else "set data.value_range=(low, high), or store uint8"
    raise UserError(f"{where}: the range of its values is not known; {advice}")
  first, *_, last = feature.shape
  if len(feature.shape) == 3 and first in (1, 3, 4) and last not in (None, 1, 3, 4):
    raise UserError(f"{where} has its channels first; store images as [height, width, channels]")


def label_form(feature: Any, repeated: bool, path: str) -> str:
  """What a feature tells about an image: "map" (a class per pixel), "classes" (several), or "class".

  Raises:
    UserError: it holds no class numbers.
  """
  import tensorflow_datasets as tfds

  where = f"data.label_key={path!r}: {_describe(feature)}"
  if isinstance(feature, tfds.features.Image) and not repeated:
    return "map"
  number = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
  integers = isinstance(number, tfds.features.Tensor) and np.dtype(number.np_dtype).kind in "iub"
  if integers and repeated and number.shape == ():
    if not getattr(number, "num_classes", None):
      raise UserError(f"{where} does not say how many classes there are; store a sequence of ClassLabel")
    return "classes"
  if integers and not repeated and len(number.shape) in (0, 2, 3):
    return "map" if number.shape else "class"
  raise UserError(
    f"{where} holds no labels; name a feature of class numbers: one, a sequence of them, or one for each pixel"
  )


def _describe(feature: Any) -> str:
  dtype = getattr(feature, "np_dtype", None)
  of = f" of shape {feature.shape}, {np.dtype(dtype).name}" if isinstance(dtype, type | np.dtype) else ""
  return f"this {type(feature).__name__}{of}"
