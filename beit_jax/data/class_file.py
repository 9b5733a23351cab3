"""Reads the small files in which a user lists classes and labels."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from beit_jax.errors import UserError

Color = tuple[int, int, int]
EXPECTED = (
  "expected one row `name` or `name,red,green,blue` for each class in order (CSV, without a header), or a JSON list of "
  "names, or a JSON object of names and [red, green, blue]"
)


def read_rows(path: Path, key: str) -> list[list[str]]:
  """Reads the rows of a CSV that are not empty; `key` names the file in errors.

  Raises:
    UserError: it cannot be read.
  """
  try:
    is_utf16 = path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write it
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    with path.open(newline="", encoding=encoding, errors="surrogateescape") as file:
      return [row for row in csv.reader(file) if any(map(str.strip, row))]
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(f"{key}: {path} cannot be read ({error})") from None


def read_class_file(name: str) -> tuple[tuple[str, ...], tuple[Color, ...]]:
  """Reads the names and colors of classes, in the order of their numbers.

  Args:
    name: path of a CSV or, with the ending .json, a JSON file.

  Returns:
    (the name of each class, the color of each class or ()).

  Raises:
    UserError: the file cannot be read, names a class twice, or gives colors to some classes only.
  """
  path = Path(os.path.expanduser(name))
  where = f"data.class_file: {path}"
  if path.suffix.lower() == ".json":
    try:
      found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
      raise UserError(f"{where} cannot be read ({error})") from None
    if not isinstance(found, dict | list):
      raise UserError(f"{where} holds a {type(found).__name__}; {EXPECTED}")
    rows = (
      [[key, *value] if isinstance(value, list) else [key, value] for key, value in found.items()]
      if isinstance(found, dict)
      else [[item] for item in found]
    )
  else:
    rows = [[cell.strip() for cell in row] for row in read_rows(path, "data.class_file")]
    rows = [[row[0], *map(_number, row[1:])] for row in rows]
  names = tuple(row[0] for row in rows)
  for number, row in enumerate(rows):
    valid = len(row) in (1, 4) and isinstance(row[0], str) and row[0] and all(map(_is_byte, row[1:]))
    if not valid or len(row) != len(rows[0]):
      raise UserError(
        f"{where}: class {number} is {row}; {EXPECTED}, with colors from 0 to 255 for all classes or none"
      )
    if row[0] in names[:number]:
      raise UserError(
        f"{where}: the name {row[0]!r} stands twice, for classes {names.index(row[0])} and {number}"
      )
  if not rows:
    raise UserError(f"{where} names no class; {EXPECTED}")
  return names, tuple((row[1], row[2], row[3]) for row in rows if len(row) == 4)


def _number(text: str) -> int | str:
  return int(text) if text.isascii() and text.isdecimal() else text


def _is_byte(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
