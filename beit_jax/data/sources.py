"""Data sources: random access to the examples of a data set.

`Source` is the interface to the rest of the library. To add a data source, write a class here and add it to `SOURCES`.
"""

import csv
import difflib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from beit_jax.data import shapes
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime import bucket

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}

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
    has_labels: whether examples have a `label`.
    multi_label: whether a `label` is a vector of 0 and 1 instead of one class id.
    description: JSON values that identify the data; checkpoints and token caches record them. Caches ignore `root`
      and `label_file`, since data may move.
  """

  num_classes: int = 0
  class_names: tuple[str, ...] = ()
  map_class_names: tuple[str, ...] = ()
  has_labels: bool = False
  multi_label: bool = False
  description: dict[str, Any]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Returns:
      A dict with `image`, encoded bytes or uint8 [H, W, 3 or 1], and optionally
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
    lines = list(self.listing())
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest() if lines else ""

  def relabel(self, class_names: tuple[str, ...]) -> None:
    """Renumbers the classes to match `class_names`, those of the training data or of a checkpoint.

    Raises:
      UserError: a class is not in `class_names`, or the numbers of this source are fixed and differ.
    """
    if tuple(class_names) != tuple(self.class_names):
      raise UserError(
        f"{self.description}: found the classes {self.class_names[:5]}..., the model expects {class_names[:5]}...; use "
        "data with the classes of the model"
      )


class TfdsSource(Source):
  """A prepared TFDS data set in a random-access format (ArrayRecord), read without TensorFlow.

  Nothing is downloaded: if the data set is not prepared, the error gives the command that builds it.
  """

  def __init__(self, name: str, split: str, data_dir: str, image_key: str, label_key: str):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    bucket.check_local("data.data_dir", data_dir)
    root = Path(os.path.expanduser(data_dir))
    folder = _version_folder(root, name)
    import tensorflow_datasets as tfds  # slow to import; only this source needs it

    builder = tfds.builder_from_directory(str(folder))
    features = builder.info.features
    for key, option in ((image_key, "data.image_key"), (label_key, "data.label_key")):
      if key and key not in features:
        raise UserError(
          f"{option}={key!r}: data set {name} has the features {sorted(features)}; set {option}"
        )
    self._has_maps = bool(label_key) and isinstance(features[label_key], tfds.features.Image)
    encoded = (image_key, label_key) if self._has_maps else (image_key,)
    try:
      self._source = builder.as_data_source(
        split=split, decoders={key: tfds.decode.SkipDecoding() for key in encoded}
      )
    except (ValueError, KeyError) as error:
      splits = sorted(builder.info.splits)
      raise UserError(f"data.split={split!r}: data set {name} has the splits {splits} ({error})") from None
    except NotImplementedError:
      raise UserError(
        f"{folder} is not in a random-access format; rebuild it with: {_build_command(root, name)}"
      ) from None
    self.description = {"source": "tfds", "name": str(builder.info.full_name), "split": split}
    shards = builder.info.splits[split].file_instructions
    self._listing = [f"{Path(s.filename).name} {s.skip} {s.take} {s.examples_in_shard}" for s in shards]
    self._image_key, self._label_key = image_key, label_key
    self.has_labels = bool(label_key)
    if label_key:
      label = features[label_key]
      self.multi_label = isinstance(label, tfds.features.Sequence)
      label = label.feature if self.multi_label else label
      classified = isinstance(label, tfds.features.ClassLabel | tfds.features.LabeledImage)
      if classified and label.num_classes:
        self.num_classes, self.class_names = label.num_classes, tuple(label.names)

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
    example = {"image": stored[self._image_key]}
    if self._has_maps:
      example["label_map"] = stored[self._label_key]
    elif self._label_key:
      label = stored[self._label_key]
      example["label"] = multi_hot(label, self.num_classes) if self.multi_label else int(label)
    return example


def multi_hot(labels: Any, num_classes: int) -> np.ndarray:
  """Converts class ids to float32 [num_classes] of 0 and 1."""
  result = np.zeros(num_classes, np.float32)
  result[np.asarray(labels, np.int64)] = 1.0
  return result


def _build_command(root: Path, name: str) -> str:
  return f"tfds build {name} --file_format=array_record --data_dir={root}"


def _version_folder(root: Path, name: str) -> Path:
  """root/name[/config]/version of the newest prepared version; `name` may be "name/config:version"."""
  base, _, version = name.partition(":")
  folder = root / base
  versions = sorted(
    (path.parent for path in folder.glob("**/dataset_info.json")),
    key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")],
  )
  versions = [path for path in versions if not version or path.name == version]
  if versions:
    return versions[-1]
  prepared = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
  similar = difflib.get_close_matches(base, prepared, 1)
  hint = f" Did you mean {similar[0]!r}?" if similar else ""
  raise UserError(
    f"data.name={name!r}: no prepared data set in {folder} (found in {root}: {', '.join(prepared) or 'nothing'})."
    f"{hint} Build it with: {_build_command(root, name)}   (needs `pip install tensorflow` once), or set data.data_dir"
  )


def list_images(folder: Path) -> list[Path]:
  """Lists the image files below a folder, recursively, sorted by path."""
  return sorted(
    path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
  )


class FolderSource(Source):
  """A folder of images: `root/[split/]<class>/*.jpg`, or without class folders (unlabeled). Files are sorted by path.

  Args:
    root: the folder.
    split: name of a subfolder to use; for "" and "train", `root` itself if there is no such subfolder.
    label_file: a CSV of `file,class[,class...]`, with files relative to the split's folder. With it an image has any
      number of labels, and only the listed files are used.

  Raises:
    UserError: there are no images, or the label file does not fit them.
  """

  def __init__(self, root: str, split: str, label_file: str = ""):
    base = Path(os.path.expanduser(root))
    if not root or not base.is_dir():
      raise UserError(f"data.root={root!r}: no such folder; set it to the folder that contains the images")
    folder = base / split if split and (base / split).is_dir() else base
    if split not in ("", "train") and folder == base:
      found = sorted(path.name for path in base.iterdir() if path.is_dir())
      raise UserError(f"data.split={split!r}: {base} has no such subfolder (it has {found or 'none'})")
    self._files = list_images(folder)
    if not self._files:
      raise UserError(
        f"data.root: no images below {folder}; known file extensions are {', '.join(sorted(IMAGE_SUFFIXES))}"
      )
    self.description = {"source": "folder", "root": str(folder), "num_examples": len(self._files)}
    if label_file:
      self._read_label_file(folder, folder / os.path.expanduser(label_file))
      return
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self._files]
    self.has_labels = "" not in parents
    if self.has_labels:
      self._class_names_of = [[parent] for parent in parents]
      self.relabel(tuple(sorted(set(parents))))

  def _read_label_file(self, folder: Path, table: Path) -> None:
    self.has_labels = self.multi_label = True
    try:
      with table.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
      raise UserError(f"data.label_file: {table} cannot be read ({error})") from None
    known = {str(path.relative_to(folder)): path for path in self._files}
    missing = [row[0] for row in rows if row[0] not in known]
    if missing or not rows:
      raise UserError(
        f"data.label_file: {table} names {len(missing)} files that are not below {folder}, first {missing[:3]}; "
        "expected rows `file,class[,class...]` without a header"
      )
    labels: dict[str, list[str]] = {}  # several rows of one file are one example
    for row in rows:
      labels.setdefault(row[0], []).extend(name for name in row[1:] if name)
    self._files = [known[name] for name in labels]
    self._class_names_of = list(labels.values())
    self.relabel(tuple(sorted({name for names in self._class_names_of for name in names})))
    if not self.num_classes:
      raise UserError(f"data.label_file: {table} names no class; expected rows `file,class[,class...]`")
    self.description |= {"label_file": str(table), "num_examples": len(self._files)}

  def relabel(self, class_names: tuple[str, ...]) -> None:
    unknown = sorted({name for names in self._class_names_of for name in names} - set(class_names))
    if unknown:
      raise UserError(
        f"{self.description['root']}: the classes {unknown[:5]} are not among the {len(class_names)} that the model "
        f"has ({', '.join(class_names[:5])}, ...)"
      )
    self.class_names, self.num_classes = tuple(class_names), len(class_names)
    ids = {name: i for i, name in enumerate(class_names)}
    self._class_ids = [[ids[name] for name in names] for names in self._class_names_of]

  def listing(self) -> Iterable[str]:
    start = len(self.description["root"]) + 1
    names = self._class_names_of if self.has_labels else [[]] * len(self._files)
    return ("\t".join([str(path)[start:], *own]) for path, own in zip(self._files, names, strict=True))

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    example: Example = {"image": self._files[index].read_bytes(), "file": str(self._files[index])}
    if self.has_labels:
      ids = self._class_ids[index]
      example["label"] = multi_hot(ids, self.num_classes) if self.multi_label else ids[0]
    return example


class PairsSource(Source):
  """Images and label maps in two folders: `root/{images,annotations}/<split>/NAME.{jpg,png}`, as in SceneParse150."""

  def __init__(self, root: str, split: str):
    base = Path(os.path.expanduser(root))
    images, annotations = base / "images" / split, base / "annotations" / split
    for folder in (images, annotations):
      if not root or not folder.is_dir():
        raise UserError(
          f"data.root={root!r}: no folder {folder}; expected images/{split} and annotations/{split} in it"
        )
    self._images = list_images(images)
    if not self._images:
      raise UserError(f"data.root: no images below {images}")
    self._maps = [annotations / path.relative_to(images).with_suffix(".png") for path in self._images]
    missing = [path for path in self._maps if not path.is_file()]
    if missing:
      raise UserError(f"{missing[0]}: missing; {len(missing)} of {len(self._maps)} images have no annotation")
    count = len(self._images)
    self.description = {"source": "pairs", "root": str(base), "split": split, "num_examples": count}

  def listing(self) -> Iterable[str]:
    return (str(path.relative_to(self.description["root"])) for path in self._images)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    image, label_map = self._images[index], self._maps[index]
    return {
      "image": image.read_bytes(),
      "file": str(image),
      "label_map": label_map.read_bytes(),
      "label_file": str(label_map),
    }


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


class Subset(Source):
  """A random fraction of a source, for few-label runs. The choice is a function of the source's length."""

  def __init__(self, source: Source, fraction: float):
    count = max(int(round(len(source) * fraction)), 1)
    self._source, self._indices = source, np.random.default_rng(0).permutation(len(source))[:count]
    self.description = {**source.description, "fraction": fraction}
    self.map_class_names = source.map_class_names
    self.has_labels, self.multi_label = source.has_labels, source.multi_label
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def relabel(self, class_names: tuple[str, ...]) -> None:
    self._source.relabel(class_names)
    self.num_classes, self.class_names = self._source.num_classes, self._source.class_names

  def listing(self) -> Iterable[str]:
    return self._source.listing()

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._source[int(self._indices[index])]


# Value of `data.source` -> the class, and the keys of the config's `data` section that are its keyword arguments.
SOURCES: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
  "tfds": (TfdsSource, ("name", "split", "data_dir", "image_key", "label_key")),
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
  return source if data["fraction"] == 1 else Subset(source, data["fraction"])
