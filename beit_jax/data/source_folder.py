"""Folders of image files as a source: with a class for each image, or with label maps."""

import os
from collections.abc import Iterable
from pathlib import Path

from beit_jax.data.class_file import read_rows
from beit_jax.data.listing import Listing, list_images
from beit_jax.data.source import SLICE, Example, Source, indices_of_part, multi_hot
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

MAP_ENDINGS = (".png", ".bmp", ".tif", ".tiff")  # of label maps; other formats do not keep every value
UNNAMED = "images that the label file does not name"


class FolderSource(Source):
  """A folder of images: `root/[split/]<class>/*.jpg`, or without class folders (unlabeled). Files are sorted by path.

  Args:
    root: the folder.
    split: name of a subfolder to use; for "" and "train", `root` itself if there is no such subfolder. "NAME[10%:]" and
      "NAME[:10%]" are parts of it (see `indices_of_part`), for data without a split for evaluation.
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
      self._keep(indices_of_part(self._files, split))
      self.description["part"] = split[len(name) :]
    self.description["num_examples"] = len(self._files)

  def _read_label_file(self, listing: Listing, table: Path) -> None:
    self.has_labels = self.multi_label = True
    rows = read_rows(table, "data.label_file")
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
    indices = indices_of_part(listing.files, split if match else "")
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
