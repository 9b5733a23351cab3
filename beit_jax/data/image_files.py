"""Finds and reads the image files that a user names on a command line."""

import fnmatch
import glob
import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from beit_jax.data import images
from beit_jax.data.listing import METADATA_FOLDERS, list_images
from beit_jax.data.pixels import RGB, PixelRule
from beit_jax.errors import UserError

MAX_ASPECT = 1000  # models resize the short side: a narrower image would fill the memory


def find_images(names: list[str]) -> list[Path]:
  """Expands files, folders (searched recursively) and glob patterns (`**` included).

  Returns:
    The files in the order given, each once.

  Raises:
    UserError: one of the names matches no file.
  """
  found: dict[str, Path] = {}
  for name in names:
    text = os.path.expanduser(name)
    matches = [text] if os.path.exists(text) else _matches(text)
    files = [file for match in matches for file in _files_in(Path(match), name, named=match == text)]
    if not files:
      raise UserError(f"{name!r}: no such file or folder, and no match for it as a pattern")
    for file in files:
      found.setdefault(os.path.abspath(file), file)
  return list(found.values())


def _matches(pattern: str) -> list[str]:
  """The paths that a pattern matches; with `**`, the images. Metadata counts only if the pattern names it."""
  recursive = re.fullmatch(r"(|.*/)\*\*(?:/(.*))?", pattern)
  if recursive is None:
    named = Path(pattern).parts
    found = glob.glob(pattern)  # leaves hidden names out
    return sorted(path for path in found if not (METADATA_FOLDERS - {*named}).intersection(Path(path).parts))
  above, wanted = recursive[1], (recursive[2] or "*").split("/")
  paths = []
  for folder in sorted(glob.glob(above)) if above else [""]:
    listing = list_images(folder or ".", pattern)  # `glob` does not end at a loop of links
    listing.log_report()
    for file in listing.files:
      last = file.split("/")[-len(wanted) :]
      if len(last) == len(wanted) and all(map(fnmatch.fnmatchcase, last, wanted)):
        paths.append(os.path.join(folder, file))
  return paths


def _files_in(path: Path, name: str, named: bool) -> list[Path]:
  if not path.is_dir():
    return [path]
  listing = list_images(path, name)
  if named:
    listing.check_not_empty(name)
  listing.log_report()
  return [path / file for file in listing.files]


def read_image(path: Path, rule: PixelRule = RGB) -> np.ndarray:
  """Reads an image file of any supported format: uint8 [H, W, C], turned upright.

  Args:
    path: the file.
    rule: how its values become pixels.

  Raises:
    ValueError: the file cannot be read; the message gives the reason without the file's name.
  """
  data = b""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow warns of large images before it refuses them
      data = path.read_bytes()
      image = images.decode(data, rule)
  except Image.UnidentifiedImageError:
    raise ValueError("not an image in a supported format" if data else "the file is empty") from None
  except OSError as error:
    raise ValueError(error.strerror or str(error)) from None
  except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
    raise ValueError(str(error) or type(error).__name__) from None
  check_aspect(image.shape[1], image.shape[0], MAX_ASPECT)
  return image


def check_aspect(width: int, height: int, limit: int) -> None:
  """Checks that no side is more than `limit` times the other.

  Raises:
    ValueError: the image is too narrow.
  """
  if max(width, height) > limit * min(width, height):
    raise ValueError(f"an image of {width}x{height} pixels is too narrow")
