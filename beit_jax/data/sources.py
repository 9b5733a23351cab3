"""Where examples come from. A source has `__len__`, `__getitem__(i)`, `num_classes`, `class_names`, `description`.

An example is a dict with `image` (encoded bytes or uint8 array) and, where there are labels, `label`: an int, or,
with several labels an image (`multi_label`), float32 [num_classes] of 0 and 1; or `label_map` (bytes or array), a class
for every pixel. How many classes a label map has, only the config knows (data.num_classes).
`SOURCES` is the register: a new data set is a class here, unless it is in TFDS or a folder of images.
"""

import csv
import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.data.shapes import SPLITS, ShapesSource
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime import bucket

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class TfdsSource:
  """A prepared TFDS data set in a random-access form (ArrayRecord), read without TensorFlow.

  Nothing is ever downloaded: a data set that is not there is an error with the command that builds it.
  """

  def __init__(self, name: str, split: str, data_dir: str, image_key: str, label_key: str):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    bucket.refuse("data.data_dir", data_dir)
    root = Path(os.path.expanduser(data_dir))
    folder = _version_folder(root, name)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    features = builder.info.features
    for key, option in ((image_key, "data.image_key"), (label_key, "data.label_key")):
      if key and key not in features:
        raise UserError(
          f"{option}={key!r}: data set {name} has the features {sorted(features)}; set {option}"
        )
    self._maps = bool(label_key) and isinstance(features[label_key], tfds.features.Image)
    encoded = (image_key, label_key) if self._maps else (image_key,)
    try:
      self._source = builder.as_data_source(
        split=split, decoders={key: tfds.decode.SkipDecoding() for key in encoded}
      )
    except (ValueError, KeyError) as error:
      splits = sorted(builder.info.splits)
      raise UserError(f"data.split={split!r}: data set {name} has the splits {splits} ({error})") from None
    except NotImplementedError:
      raise UserError(
        f"{folder} is not in a random-access form; rebuild it with: {_build_command(root, name)}"
      ) from None
    label = features[label_key] if label_key else None
    self.has_labels = label is not None
    self.multi_label = isinstance(label, tfds.features.Sequence)
    label = label.feature if self.multi_label else label
    self.num_classes = getattr(label, "num_classes", 0) or 0
    self.class_names = tuple(label.names) if self.num_classes else ()
    self.description = {"source": "tfds", "name": str(builder.info.full_name), "split": split}
    self._image_key, self._label_key = image_key, label_key

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      example = self._source[int(index)]
    except (RuntimeError, ValueError) as error:  # ArrayRecord's checksums
      where = f"{self.description['name']} ({self.description['split']}), example {index}"
      raise BadImage(f"{where} cannot be read: {error}; copy or build the data set again") from None
    result = {"image": example[self._image_key]}
    if self._maps:
      result["label_map"] = example[self._label_key]
    elif self._label_key:
      label = example[self._label_key]
      result["label"] = multi_hot(label, self.num_classes) if self.multi_label else int(label)
    return result


def multi_hot(labels: Any, num_classes: int) -> np.ndarray:
  """Class ids -> float32 [num_classes] of 0 and 1."""
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
  there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
  near = difflib.get_close_matches(base, there, 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise UserError(
    f"data.name={name!r}: no prepared data set in {folder} (found in {root}: {', '.join(there) or 'nothing'}).{hint} "
    f"Build it with: {_build_command(root, name)}   (needs `pip install tensorflow` once), or set data.data_dir"
  )


class FolderSource:
  """A folder of images of any kind: `root/[split/]<class>/*.jpg`, or no class folders at all (unlabelled).

  Files are taken in sorted order of their path. A file that Pillow cannot open is found on reading it.
  With `label_file`, a CSV of `file,class[,class...]` with files relative to the split's folder, an image has
  any number of labels, and only the files listed are taken.
  """

  def __init__(self, root: str, split: str, label_file: str = ""):
    base = Path(os.path.expanduser(root))
    if not root or not base.is_dir():
      raise UserError(f"data.root={root!r}: no such folder; give the folder that holds the images")
    folder = base / split if split and (base / split).is_dir() else base
    if split not in ("", "train") and folder == base:
      have = sorted(p.name for p in base.iterdir() if p.is_dir())
      raise UserError(f"data.split={split!r}: {base} has no such sub-folder (it has {have or 'none'})")
    self._files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not self._files:
      raise UserError(
        f"data.root: no images below {folder}; known endings are {', '.join(sorted(IMAGE_SUFFIXES))}"
      )
    self.description = {"source": "folder", "root": str(folder), "num_examples": len(self._files)}
    self.has_labels = self.multi_label = bool(label_file)
    if label_file:
      self._read_labels(folder, folder / os.path.expanduser(label_file))
      return
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self._files]
    self.has_labels = "" not in parents
    self.class_names, self.num_classes = (), 0
    if self.has_labels:
      self._names = [[parent] for parent in parents]
      self.relabel(tuple(sorted(set(parents))))

  def _read_labels(self, folder: Path, table: Path) -> None:
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
    names: dict[str, list[str]] = {}  # several rows of one file are one example
    for row in rows:
      names.setdefault(row[0], []).extend(name for name in row[1:] if name)
    self._files, self._names = [known[name] for name in names], list(names.values())
    self.relabel(tuple(sorted({name for some in self._names for name in some})))
    if not self.num_classes:
      raise UserError(
        f"data.label_file: {table} names no class at all; expected rows `file,class[,class...]`"
      )
    self.description |= {"label_file": str(table), "num_examples": len(self._files)}

  def relabel(self, class_names: tuple[str, ...]) -> None:
    """Numbers the classes as in `class_names`, those of the training data or of a checkpoint.

    Raises:
      UserError: a class here is not among them.
    """
    unknown = sorted({name for some in self._names for name in some} - set(class_names))
    if unknown:
      raise UserError(
        f"{self.description['root']}: the classes {unknown[:5]} are not among the {len(class_names)} that the model "
        f"has ({', '.join(class_names[:5])}, ...)"
      )
    self.class_names, self.num_classes = tuple(class_names), len(class_names)
    ids = {name: i for i, name in enumerate(class_names)}
    if self.multi_label:
      self._labels = [multi_hot([ids[name] for name in some], self.num_classes) for some in self._names]
    else:
      self._labels = [ids[some[0]] for some in self._names]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example: dict[str, Any] = {"image": self._files[index].read_bytes(), "file": str(self._files[index])}
    if self.has_labels:
      example["label"] = self._labels[index]
    return example


class PairsSource:
  """Images and label maps in two folders, as in SceneParse150: `root/{images,annotations}/<split>/NAME.{jpg,png}`."""

  num_classes, class_names, multi_label = 0, (), False

  def __init__(self, root: str, split: str):
    base = Path(os.path.expanduser(root))
    folders = [base / name / split for name in ("images", "annotations")]
    for folder in folders:
      if not root or not folder.is_dir():
        raise UserError(
          f"data.root={root!r}: no folder {folder}; expected images/{split} and annotations/{split} in it"
        )
    images, maps = folders
    self._images = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not self._images:
      raise UserError(f"data.root: no images below {images}")
    self._maps = [maps / path.relative_to(images).with_suffix(".png") for path in self._images]
    missing = [path for path in self._maps if not path.is_file()]
    if missing:
      raise UserError(f"{missing[0]}: missing; {len(missing)} of {len(self._maps)} images have no annotation")
    self.description = {
      "source": "pairs",
      "root": str(base),
      "split": split,
      "num_examples": len(self._images),
    }

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image, label_map = self._images[index], self._maps[index]
    return {
      "image": image.read_bytes(),
      "file": str(image),
      "label_map": label_map.read_bytes(),
      "label_file": str(label_map),
    }


class Subset:
  """A fixed random fraction of a source (for few-label runs); the choice depends only on the source's length."""

  def __init__(self, source: Any, fraction: float):
    count = max(int(round(len(source) * fraction)), 1)
    self._source, self._indices = source, np.random.default_rng(0).permutation(len(source))[:count]
    self.description = {**source.description, "fraction": fraction}

  def __getattr__(self, name: str) -> Any:
    """num_classes, class_names, relabel and so on are the source's."""
    if name.startswith("_"):
      raise AttributeError(name)
    return getattr(self._source, name)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[int(self._indices[index])]


def _shapes(data) -> ShapesSource:
  if data["split"] not in SPLITS:
    raise UserError(f"data.split={data['split']!r}: the shapes data has the splits {sorted(SPLITS)}")
  return ShapesSource(data["split"], data["num_examples"], data["render_size"])


SOURCES = {
  "tfds": lambda d: TfdsSource(d["name"], d["split"], d["data_dir"], d["image_key"], d["label_key"]),
  "folder": lambda d: FolderSource(d["root"], d["split"], d["label_file"]),
  "pairs": lambda d: PairsSource(d["root"], d["split"]),
  "shapes": _shapes,
}


def make_source(data: dict[str, Any]) -> Any:
  """The source that a config's `data` (or `eval.data`) section asks for."""
  if data["source"] not in SOURCES:
    raise UserError(f"data.source={data['source']!r} is unknown; there are {sorted(SOURCES)}")
  if data.get("label_file") and data["source"] != "folder":
    raise UserError(
      f"config key 'data.label_file': only for data.source='folder', here it is {data['source']!r}"
    )
  for key in ("data_dir", "root", "label_file"):
    bucket.refuse(f"data.{key}", data.get(key))
  source = SOURCES[data["source"]](data)
  expected = data["num_classes"]
  if expected is not None and source.num_classes not in (0, expected):
    raise UserError(
      f"config key 'data.num_classes': {expected} classes expected, found {source.num_classes} in {source.description}"
    )
  if not 0 < data["fraction"] <= 1:
    raise UserError(f"data.fraction={data['fraction']} must lie in (0, 1]")
  return source if data["fraction"] == 1 else Subset(source, data["fraction"])
