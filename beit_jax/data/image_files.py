"""Pictures as users name and keep them: files, folders, patterns; read whatever they hold."""

import glob
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from beit_jax.data import images
from beit_jax.data.sources import IMAGE_SUFFIXES
from beit_jax.errors import UserError

MAX_ASPECT = 1000  # the short side is resized to the model's: a thinner picture would fill the memory


def find_images(names: list[str]) -> list[Path]:
  """Files, folders (searched recursively) and patterns (`**` too) -> files, each once, in the order given.

  Raises:
    UserError: one of the names stands for no file.
  """
  found: dict[str, Path] = {}
  for name in names:
    text = os.path.expanduser(name)
    matches = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
    files = [file for match in matches for file in _inside(Path(match))]
    if not files and os.path.isdir(text):
      endings = ", ".join(sorted(IMAGE_SUFFIXES))
      raise UserError(f"{name}: no images in this folder; known endings are {endings}")
    if not files:
      raise UserError(f"{name!r}: no such file or folder, and no pattern that matches any")
    for file in files:
      found.setdefault(os.path.abspath(file), file)
  return list(found.values())


def _inside(path: Path) -> list[Path]:
  if not os.path.isdir(path):
    return [path]
  return sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(p))


def read_image(path: Path) -> np.ndarray:
  """A picture file of any kind -> uint8 [H, W, 3], upright.

  Raises:
    ValueError: it cannot be read; the message says why, without the name.
  """
  data = b""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter(
        "ignore"
      )  # Pillow refuses from 179 million pixels on, and warns from half of that
      data = path.read_bytes()
      image = images.decode(data)
  except Image.UnidentifiedImageError:
    raise ValueError("not a picture that Pillow can read" if data else "the file is empty") from None
  except OSError as error:
    raise ValueError(error.strerror or str(error)) from None
  except Exception as error:  # Pillow's readers let through whatever a damaged file leads to
    raise ValueError(str(error) or type(error).__name__) from None
  if max(image.size) > MAX_ASPECT * min(image.size):
    raise ValueError(f"{image.width}x{image.height} pixels are too narrow a picture")
  return np.asarray(image)
