"""WebDataset shards as a source: tar files whose members of one name form an example."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_jax.data.listing import OTHER, Listing, endings
from beit_jax.data.shards import find_shards
from beit_jax.data.source import Example, Source, class_label, indices_of_part
from beit_jax.data.source_folder import MAP_ENDINGS
from beit_jax.data.tar_index import Member, read_index
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime.logs import log

UNLABELED = "no label"
NO_MEMBER = Member("", 0, 0)


class _Row(NamedTuple):
  """An example: its image and its label in shard number `shard`; `ending` is that of the label."""

  shard: int
  image: Member
  ending: str
  label: Member


class TarSource(Source):
  """Tar files as WebDataset writes them, with random access by an index (`tar_index`).

  Members that have the same path up to the first dot of the name are one example: an image, and a label. The label is
  `NAME.cls`, the number of a class; the value of `label_key` in `NAME.json`, a number, a name, or a list of several; or
  a label map `NAME.LABEL_KEY.png` (or .bmp, .tif, .tiff). Examples have the order of a folder of the same names: sorted
  by the path of the image, part by part, whatever the shards are.

  Args:
    root: the folder of the shards; see `shards.find_shards`.
    split: name of a split; "NAME[10%:]" is a part of it by the names of the images, as in a folder.
    label_key: "" = no labels.

  Raises:
    UserError: there are no images, a shard is damaged, or some examples have a label and others none.
  """

  def __init__(self, root: str, split: str, label_key: str):
    paths, part = find_shards(root, split, ".tar")
    report = Listing(root)
    rows = [row for number, path in enumerate(paths) for row in _rows(number, path, label_key, report)]
    report.files = [row.image.name for row in rows]
    report.check_not_empty(f"data.root={root}")
    report.log_report()
    rows.sort(key=lambda row: row.image.name.replace("/", "\0"))
    rows = [rows[i] for i in indices_of_part([row.image.name for row in rows], split if part else "")]
    self._paths, self._label_key = [str(path) for path in paths], label_key
    self._ending = _ending_of_labels(rows, paths)
    self._names = [row.image.name for row in rows]
    # Arrays, since there may be many millions of examples, and every data worker gets a copy.
    self._places = np.array(
      [(row.shard, row.image.offset, row.image.size, row.label.offset, row.label.size) for row in rows],
      np.int64,
    )
    self._numbers = np.zeros(0, np.int32)
    if self._ending == ".cls":
      self._numbers = np.array([self._class_number(row) for row in rows], np.int32)
    self.description = {"source": "tar", "root": root, "split": split, "num_examples": len(rows)}
    self._set_kind_of_labels()

  def _class_number(self, row: _Row) -> int:
    try:
      return int(row.label.text)
    except ValueError:
      where = f"{self._paths[row.shard]}: {row.label.name!r}"
      raise UserError(
        f"{where} holds {row.label.text!r}; expected the number of a class (names belong into .json files)"
      ) from None

  def _set_kind_of_labels(self) -> None:
    self.has_labels = self._ending in (".cls", ".json")
    if self._ending == ".json":
      found = self._json(0).get(self._label_key)
      self.has_labels, self.multi_label = found is not None, isinstance(found, list)
      if found is None:
        log.info(
          "%s: no %r in the .json of %s, so no labels",
          self.description["root"],
          self._label_key,
          self._names[0],
        )

  def listing(self) -> Iterable[str]:
    for i, name in enumerate(self._names):
      label = self._numbers[i] if len(self._numbers) else self._places[i, 4]  # a class, or the size of a file
      yield f"{name}\t{self._places[i, 2]}\t{label}"

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Example:
    where = self._where(index)
    example: Example = {"image": self._read(index, 1), "file": where}
    if self._ending in MAP_ENDINGS:
      return {
        **example,
        "label_map": self._read(index, 3),
        "label_file": f"{where} ({self._label_key}{self._ending})",
      }
    if self._ending == ".cls":
      return {**example, "label": int(self._numbers[index])}
    if self.has_labels:
      return {**example, "label": class_label(self._json(index).get(self._label_key), self, where)}
    return example

  def _where(self, index: int) -> str:
    return f"{self._paths[self._places[index, 0]]}/{self._names[index]}"

  def _json(self, index: int) -> dict[str, Any]:
    try:
      found = json.loads(self._read(index, 3))
    except ValueError as error:
      raise UserError(
        f"{self._where(index)}: its .json cannot be read ({error}); pack the shard anew"
      ) from None
    return found if isinstance(found, dict) else {}

  def _read(self, index: int, column: int) -> bytes:
    """The bytes of a member, whose offset and size stand in two columns of `_places`."""
    offset, size = self._places[index, column : column + 2].tolist()
    with open(self._paths[self._places[index, 0]], "rb", buffering=0) as file:
      found = os.pread(file.fileno(), size, offset)
    if len(found) != size:
      raise BadImage(
        f"{self._where(index)}: {size} bytes from byte {offset} expected, found {len(found)}; the file was cut off "
        "after the start of the run"
      )
    return found


def _rows(shard: int, path: Path, label_key: str, report: Listing) -> Iterator[_Row]:
  """The examples in a shard; counts the members that are neither an image nor a label."""
  groups: dict[str, dict[str, Member]] = {}
  for member in read_index(path):
    folder, _, name = member.name.rpartition("/")
    key, dot, rest = name.partition(".")
    group, ending = groups.setdefault(f"{folder}/{key}", {}), dot + rest.lower()
    if ending in group:
      raise UserError(
        f"{path}: {group[ending].name!r} and {member.name!r} belong to one example; rename one of them"
      )
    group[ending] = member
  kinds = {f".{label_key.lower()}{ending}": ending for ending in MAP_ENDINGS} | {
    ".cls": ".cls",
    ".json": ".json",
  }
  for group in groups.values():
    image = next((ending for ending in group if ending in endings()), None)
    label = next((ending for ending in kinds if ending in group), None) if label_key else None
    for ending in group:
      if ending not in (image, label, ".json") or image is None:
        report.leave_out(OTHER, ending or "no ending")
    if image is not None:
      yield _Row(
        shard, group[image], kinds[label] if label else UNLABELED, group[label] if label else NO_MEMBER
      )


def _ending_of_labels(rows: list[_Row], paths: list[Path]) -> str:
  """The ending of all labels: of maps, ".cls" or ".json"; `UNLABELED` if there are none."""
  found = [row.ending for row in rows]
  for row in rows:
    if row.ending != found[0]:
      counts = ", ".join(f"{found.count(ending)} {ending}" for ending in sorted(set(found)))
      raise UserError(
        f"{paths[row.shard]}: {row.image.name!r} has {row.ending}, and the first example {found[0]}; expected the same "
        f"for all, found {counts}; add the missing labels, or set data.label_key= to use none"
      )
  return found[0]
