"""Lists the image files below a folder, and counts by reason what it leaves out."""

import collections
import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from PIL import Image

from beit_jax.data import images
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

# Folders that operating systems, archive programs and storage servers add to the data of a user.
METADATA_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
MAX_COUNTED = (
  10_000  # files of one folder that is left out: a hidden snapshot of a file system may hold millions
)
MAX_NAMED = 8  # names that the log gives for each reason

# Reasons why something is left out.
HIDDEN = "hidden files and files of operating systems"
OTHER = "files with other endings"
BROKEN = "links that lead to no file"
LOOP = "links to a folder that contains them"
SPECIAL = "pipes, sockets and devices"
EMPTY = "folders without an image"


def is_metadata(name: str) -> bool:
  """Whether a file or folder of this name is hidden, or belongs to an operating system."""
  return name.startswith(".") or name in METADATA_FOLDERS


@functools.cache
def endings() -> frozenset[str]:
  """The file endings of the formats that are read, in lower case and with the dot."""
  known = Image.registered_extensions().items()
  return frozenset((".npy", *(ending for ending, kind in known if kind in images.FORMATS)))


@dataclasses.dataclass
class Listing:
  """The image files below a folder.

  Attributes:
    folder: the folder.
    files: paths relative to the folder with "/" between their parts, sorted part by part.
    left_out: reason -> name or ending -> how many files (or links, or folders, as the reason says).
  """

  folder: str
  files: list[str] = dataclasses.field(default_factory=list)
  left_out: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)

  def leave_out(self, reason: str, name: str, count: int = 1) -> None:
    """Counts what is left out."""
    if count:
      self.left_out.setdefault(reason, collections.Counter())[name] += count

  def report(self) -> list[str]:
    """Returns a line for each reason: how many are left out, and the most frequent names."""
    lines = []
    for reason, names in self.left_out.items():
      order = sorted(names.items(), key=lambda item: (-item[1], item[0]))
      named = [f"{_printable(name)} ({count})" for name, count in order[:MAX_NAMED]]
      more = ", ..." if len(names) > MAX_NAMED else ""
      lines.append(f"{names.total()} {reason} left out: {', '.join(named)}{more}")
    return lines

  def log_report(self) -> None:
    """Logs the lines of `report`."""
    for line in self.report():
      log.info("%s: %s", self.folder, line)

  def check_not_empty(self, key: str) -> None:
    """Raises a UserError if there are no images; `key` names the folder."""
    if not self.files:
      known = ", ".join(sorted(endings()))
      raise UserError("; ".join([f"{key}: no images in this folder; they end in {known}", *self.report()]))


def list_images(folder: str | os.PathLike[str], key: str, expected: Collection[str] = ()) -> Listing:
  """Lists the images below a folder.

  Names that `is_metadata` knows are left out at every level. Links are followed, but not to a folder
  that contains them. A file without an ending is an image if its header says so.

  Args:
    folder: the folder.
    key: names the folder in errors, such as "data.root=/images".
    expected: relative paths of files that are no images and need not be mentioned.

  Raises:
    UserError: a folder cannot be listed.
  """
  found = Listing(os.fspath(folder))
  subfolders: list[str] = []
  for path, entry in _walk(found, key):
    if entry.is_dir():
      subfolders.append(path)
    elif _is_image(entry):
      found.files.append(path)
    elif path not in expected:
      found.leave_out(OTHER, _ending(entry.name) or "no ending")
  found.files.sort(key=lambda path: path.replace("/", "\0"))
  filled = {path.partition("/")[0] for path in found.files}
  for path in sorted(subfolders):
    if "/" not in path and path not in filled:
      found.leave_out(EMPTY, path)
  return found


def _walk(found: Listing, key: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
  """Yields (path relative to the folder, entry) of the files and folders below it, and counts what it leaves out."""
  root = Path(found.folder).resolve()
  pending = [("", tuple(_identity(path) for path in (root, *root.parents)))]
  while pending:
    prefix, above = pending.pop()
    for entry in _entries(os.path.join(found.folder, prefix), key):
      path, is_folder, reason = prefix + entry.name, *_kind(entry)
      if is_metadata(entry.name):
        found.leave_out(HIDDEN, entry.name, _count(entry))
      elif reason:
        found.leave_out(reason, path)
      elif not is_folder:
        yield path, entry
      elif (identity := _identity(entry.path)) in above:
        found.leave_out(LOOP, path)
      else:
        pending.append((path + "/", (*above, identity)))
        yield path, entry


def _identity(path: str | Path) -> tuple[int, int]:
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _entries(folder: str, key: str) -> list[os.DirEntry[str]]:
  try:
    with os.scandir(folder) as entries:
      return list(entries)
  except OSError as error:
    reason = error.strerror
    raise UserError(
      f"{key}: {folder} cannot be listed ({reason}); change its permissions or move it"
    ) from None


def _kind(entry: os.DirEntry[str]) -> tuple[bool, str]:
  """(whether an entry is a folder, why it is neither a folder nor a file)."""
  try:
    if entry.is_dir():
      return True, ""
    if entry.is_file():
      return False, ""
  except OSError:  # a link to itself, or into a folder that may not be read
    return False, BROKEN
  return False, BROKEN if entry.is_symlink() else SPECIAL


def _count(entry: os.DirEntry[str]) -> int:
  """The number of files in a folder that is left out, up to `MAX_COUNTED`; 1 for a file or a link."""
  if not entry.is_dir(follow_symlinks=False):
    return 1
  files = (file for _, _, names in os.walk(entry.path) for file in names)
  return sum(1 for _ in itertools.islice(files, MAX_COUNTED))


def _ending(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _is_image(entry: os.DirEntry[str]) -> bool:
  ending = _ending(entry.name)
  if ending:
    return ending in endings()
  try:
    with open(entry.path, "rb") as file, warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow warns of large images
      Image.open(file, formats=images.formats())
  except Image.DecompressionBombError:  # an image of too many pixels, which its reader reports
    return True
  except Exception:  # Pillow's readers raise almost anything
    return False
  return True


def _printable(name: str) -> str:
  return name if name.isprintable() else ascii(name)
