"""Finds the shards of a split: the files of one ending that hold many examples each."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from beit_jax.data.listing import is_metadata
from beit_jax.data.source import SLICE
from beit_jax.errors import UserError

NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})(.*)")  # "train-00000-of-00010.parquet"


def find_shards(root: str, split: str, ending: str) -> tuple[list[Path], str]:
  """Finds the shards of a split.

  They are the files below `root/SPLIT`, else those in `root` or `root/data` whose name has the split as a word, as in
  "train-00000.tar" or "cifar10-train.arrow". The split "train" is all files if their names differ in numbers only; the
  split "" is all files. `root` may also be a file.

  Args:
    root: value of `data.root`.
    split: name of a split, or a part of one: "train[10%:]".
    ending: of the files, with the dot.

  Returns:
    (the files in the order of their names, the brackets of `split` or "").

  Raises:
    UserError: there are none, one of them is missing, or it is unclear which ones belong to the split.
  """
  match = SLICE.fullmatch(split)
  name = match[1] if match else split
  base = Path(os.path.expanduser(root))
  if not root or not base.exists():
    raise UserError(f"data.root={root!r}: no such file or folder; set it to the folder of the {ending} files")
  if base.is_file():
    files = [base]
  elif name and (base / name).is_dir():
    files, name = _files(base / name, ending), ""
  else:
    files = _files(base, ending) or _files(base / "data", ending)
  chosen = _of_split(files, name)
  if not chosen:
    found = sorted({path.name for path in files}) or _entries(base)
    listed = ", ".join([*found[:8], *["..."][: len(found) > 8]]) or "nothing"
    wanted = name or "NAME"
    raise UserError(
      f"data.split or eval.split={split!r}: {base} holds no {ending} files of this split (found {listed}); expected "
      f"{wanted}-00000{ending}, ... or {wanted}/*{ending} in it"
    )
  _check_complete(chosen)
  return chosen, split[len(match[1]) :] if match else ""


def _files(folder: Path, ending: str) -> list[Path]:
  names = sorted(os.listdir(folder)) if folder.is_dir() else []
  wanted = [name for name in names if name.lower().endswith(ending) and not is_metadata(name)]
  # `datasets` keeps results of its functions beside the data, as cache-0123456789abcdef.arrow.
  paths = [folder / name for name in wanted if not (ending == ".arrow" and name.startswith("cache-"))]
  return [path for path in paths if path.is_file()]


def _entries(base: Path) -> list[str]:
  return sorted(os.listdir(base)) if base.is_dir() else [base.name]


def _of_split(files: list[Path], name: str) -> list[Path]:
  if not name:
    return files
  word = re.compile(rf"(.*[-_.])?{re.escape(name)}([-_.].*)?")
  chosen = [path for path in files if word.fullmatch(path.stem)]
  if not chosen and name == "train" and len({re.sub(r"\d+", "", path.name) for path in files}) == 1:
    return files
  return chosen


def _check_complete(files: Iterable[Path]) -> None:
  """Raises a UserError if one of the shards "NAME-00003-of-00010" is missing."""
  numbers: dict[tuple[Path, str, str, str], set[int]] = {}
  for path in files:
    if match := NUMBERED.fullmatch(path.name):
      numbers.setdefault((path.parent, match[1], match[3], match[4]), set()).add(int(match[2]))
  for (folder, name, total, rest), found in numbers.items():
    missing = sorted(set(range(int(total))) - found)
    if missing:
      first = folder / f"{name}-{missing[0]:0{len(total)}d}-of-{total}{rest}"
      raise UserError(f"{first}: missing; {len(missing)} of {int(total)} files are not there; copy them")
