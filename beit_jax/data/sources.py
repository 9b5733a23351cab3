"""Data sources: random access to the examples of a data set.

`Source` is the interface to the rest of the library. To add a data source, write a class here and add it to `SOURCES`.
"""

import csv
import functools
import hashlib
import itertools
import operator
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from beit_jax import trees
from beit_jax.data import shapes, tfds_info
from beit_jax.data.listing import Listing, list_images
from beit_jax.data.pixels import RGB, PixelRule
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

SLICE = re.compile(r"(.*)\[([0-9]{1,12}%?)?:([0-9]{1,12}%?)?\]")  # "train[10%:]", as in TFDS
MAP_ENDINGS = (".png", ".bmp", ".tif", ".tiff")  # of label maps; other formats do not keep every value
UNNAMED = "images that the label file does not name"

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
    pixel_rule: how stored values become pixels; `make_source` sets it from the config.
    description: JSON values that identify the data; checkpoints and token caches record them. Caches ignore `root`
      and `label_file`, since data may move.
  """

  num_classes: int = 0
  class_names: tuple[str, ...] = ()
  map_class_names: tuple[str, ...] = ()
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
    kind, encoded = "", {image_key} if isinstance(image, tfds.features.Image) else set()
    if label_key:
      label, repeated = tfds_info.find_feature(features, label_key, "data.label_key")
      kind = tfds_info.label_kind(label, repeated, label_key)
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
      command = tfds_info.build_command(root, name)
      raise UserError(f"{folder} is not in a random-access format; rebuild it with: {command}") from None
    self.description = {"source": "tfds", "name": str(builder.info.full_name), "split": split}
    shards = builder.info.splits[split].file_instructions
    self._listing = [f"{Path(s.filename).name} {s.skip} {s.take} {s.examples_in_shard}" for s in shards]
    self._image_key, self._label_key = image_key, label_key
    self.multi_label, self._has_maps = kind == "classes", kind == "map"
    self.has_labels = bool(kind) and not self._has_maps
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


def _at(stored: dict[str, Any], path: str) -> Any:
  """The value in nested dictionaries that a path such as "objects/label" names."""
  return functools.reduce(operator.getitem, path.split("/"), stored)


def _slice(names: list[str], split: str) -> list[int]:
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


class FolderSource(Source):
  """A folder of images: `root/[split/]<class>/*.jpg`, or without class folders (unlabeled). Files are sorted by path.

  Args:
    root: the folder.
    split: name of a subfolder to use; for "" and "train", `root` itself if there is no such subfolder. "NAME[10%:]" and
      "NAME[:10%]" are parts of it (see `_slice`), for data without a split for evaluation.
    label_file: a CSV of `file,class[,class...]`, with files relative to the split's folder. With it an image has any
      number of labels, and only the listed files are used.

  Raises:
    UserError: there are no images, or the label file does not fit them.
  """

  def __init__(self, root: str, split: str, label_file: str = ""):
    base = Path(os.path.expanduser(root))
    if not root or not os.path.isdir(base):
      raise UserError(f"data.root={root!r}: no such folder; set it to the folder that contains the images")
    match = None if os.path.isdir(base / split) else SLICE.fullmatch(split)
    name = match[1] if match else split
    folder = base / name if name and os.path.isdir(base / name) else base
    if name not in ("", "train") and folder == base:
      found = sorted(path.name for path in base.iterdir() if path.is_dir())
      raise UserError(
        f"data.split={split!r}: {base} has no such subfolder (it has {found or 'none'}); to hold out a tenth of the "
        "images, use data.split='train[10%:]' and eval.split='train[:10%]'"
      )
    self._folder = str(folder)
    self._class_ids: list[list[int]] = []
    table = folder / os.path.expanduser(label_file)
    listing = list_images(folder, f"data.root={folder}", [os.path.relpath(table, folder)])
    listing.check_not_empty(f"data.root={folder}")
    self._files = listing.files
    self.description = {"source": "folder", "root": str(folder)}
    if label_file:
      self._read_label_file(listing, table)
    else:
      parents = [path.rpartition("/")[0].partition("/")[0] for path in self._files]
      self.has_labels = "" not in parents
      if not self.has_labels and any(parents):
        text = "%s: %d of %d images lie outside of subfolders, so the subfolders are no classes"
        log.info(text, folder, parents.count(""), len(parents))
      self._class_names_of = [[parent] for parent in parents]
    listing.log_report()
    if self.has_labels:  # the numbers are those of all classes, also in a part of the folder
      self._number_classes()
    if match:
      self._keep(_slice(self._files, split))
      self.description["part"] = split[len(name) :]
    self.description["num_examples"] = len(self._files)

  def _read_label_file(self, listing: Listing, table: Path) -> None:
    self.has_labels = self.multi_label = True
    try:
      is_utf16 = table.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write it
      encoding = "utf-16" if is_utf16 else "utf-8-sig"
      with table.open(newline="", encoding=encoding, errors="surrogateescape") as file:
        rows = [row for row in csv.reader(file) if any(map(str.strip, row))]
    except (OSError, ValueError, csv.Error) as error:
      raise UserError(f"data.label_file: {table} cannot be read ({error})") from None
    known, folder = set(self._files), self._folder
    labels: dict[str, list[str]] = {}  # several rows of one file are one example
    missing = []
    for row in rows:
      path = _named_file(row[0], folder, known)
      if path is None:
        missing.append(row[0])
      else:
        labels.setdefault(path, []).extend(name for cell in row[1:] if (name := cell.strip()))
    if missing or not rows:
      there = [name for name in missing if os.path.exists(os.path.join(folder, name))]
      reason = f"; {there[0]!r} exists, but is hidden, outside, or no image by its ending" if there else ""
      raise UserError(
        f"data.label_file: {table} names {len(missing)} files that are not among the images below {folder}, first "
        f"{missing[:3]}{reason}; expected rows `file,class[,class...]` without a header, with files relative to "
        "that folder"
      )
    if not any(labels.values()):
      raise UserError(f"data.label_file: {table} names no class; expected rows `file,class[,class...]`")
    for path in known - labels.keys():
      listing.leave_out(UNNAMED, path)
    self._files, self._class_names_of = list(labels), list(labels.values())
    self.description["label_file"] = str(table)

  def _keep(self, indices: list[int]) -> None:
    self._files = [self._files[i] for i in indices]
    if self.has_labels:
      self._class_names_of = [self._class_names_of[i] for i in indices]
      self._class_ids = [self._class_ids[i] for i in indices]

  def _number_classes(self) -> None:
    """Sorts the names of the classes: as numbers if all of them are, else as text."""
    names = {name for names in self._class_names_of for name in names}
    are_numbers = all(name.isascii() and name.isdecimal() for name in names)
    self.class_names = tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))
    self.num_classes = len(names)
    ids = {name: i for i, name in enumerate(self.class_names)}
    self._class_ids = [[ids[name] for name in names] for names in self._class_names_of]

  def listing(self) -> Iterable[str]:
    names = self._class_names_of if self.has_labels else [[]] * len(self._files)
    return ("\t".join([path, *own]) for path, own in zip(self._files, names, strict=True))

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    path = Path(self._folder, self._files[index])
    example: Example = {"image": path.read_bytes(), "file": str(path)}
    if self.has_labels:
      ids = self._class_ids[index]
      example["label"] = multi_hot(ids, self.num_classes) if self.multi_label else ids[0]
    return example


def _named_file(name: str, folder: str, known: set[str]) -> str | None:
  """Finds the file that a label file names: as it stands, without spaces, from "./" or "/", or with back-slashes."""
  for text in (name, name.strip(), name.strip().replace("\\", "/")):
    if text in known:
      return text
    for root in (folder, os.path.realpath(folder)):
      path = os.path.relpath(os.path.join(root, text), root)
      if path in known:
        return path
  return None


class PairsSource(Source):
  """Images and label maps in two folders: `root/{images,annotations}/<split>/NAME.*`, as in SceneParse150.

  A split "NAME[10%:]" is a part of a folder, as in `FolderSource`.
  """

  def __init__(self, root: str, split: str):
    base = Path(os.path.expanduser(root))
    match = None if os.path.isdir(base / "images" / split) else SLICE.fullmatch(split)
    name = match[1] if match else split
    images, annotations = base / "images" / name, base / "annotations" / name
    for folder in (images, annotations):
      if not root or not os.path.isdir(folder):
        raise UserError(
          f"data.root={root!r}: no folder {folder}; expected images/{name} and annotations/{name} in it"
        )
    listing = list_images(images, f"data.root={images}")
    listing.check_not_empty(f"data.root={images}")
    listing.log_report()
    indices = _slice(listing.files, split if match else "")
    self._images = [images / listing.files[i] for i in indices]
    label_maps = _label_maps(listing.files, annotations)
    self._maps = [annotations / label_maps[i] for i in indices]
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


def _label_maps(images: list[str], annotations: Path) -> list[str]:
  """The label map of each image: the file of the same name with one of `MAP_ENDINGS`, the first that is there."""
  listing = list_images(annotations, f"data.root={annotations}")
  found: dict[str, str] = {}
  for ending in reversed(MAP_ENDINGS):
    found |= {path[: -len(ending)]: path for path in listing.files if path.lower().endswith(ending)}
  stems = [os.path.splitext(path)[0] for path in images]
  missing = [stem for stem in stems if stem not in found]
  if missing:
    raise UserError(
      f"{annotations / missing[0]}.png: missing; {len(missing)} of {len(images)} images have no annotation; label maps "
      f"have the names of their images and end in {', '.join(MAP_ENDINGS)}"
    )
  for path in set(listing.files) - {found[stem] for stem in stems}:
    listing.leave_out("files that are the label map of no image", path)
  listing.log_report()
  return [found[stem] for stem in stems]


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

  def listing(self) -> Iterable[str]:
    return self._source.listing()

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._source[int(self._indices[index])]


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
