"""Weights in: the format is detected from what is on disk."""

import os
from pathlib import Path

from beit_jax.convert import orbax
from beit_jax.errors import UserError
from beit_jax.pretrained import Pretrained


def load(
  path: str | Path,
  *,
  num_heads: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  step: int | None = None,
  ema: bool = False,
) -> Pretrained:
  """Loads a model from a run folder of `beit_jax.main` (newest good checkpoint, or `step`).

  Args:
    num_heads, image_size: for formats that do not say; an Orbax run does, so giving them is an error.
    ema: the averaged weights, of a run that keeps them.

  Raises:
    UserError: nothing usable is at `path`.
  """
  path = Path(os.path.expanduser(path))
  if not path.exists():
    raise UserError(f"{path}: no such file or folder")
  if not path.is_dir():
    raise UserError(f"{path}: not a format this version reads; expected the folder of a beit_jax run")
  for name, value in (("num_heads", num_heads), ("image_size", image_size)):
    if value is not None:
      raise UserError(f"{name}={value!r}: a beit_jax checkpoint says this itself; leave it out")
  if ema:
    raise UserError(f"{path}: this run kept no averaged weights; call load without ema=True")
  return orbax.load(path, step=step)
