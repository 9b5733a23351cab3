"""Tables in Parquet and Arrow files as a source, such as those of Hugging Face's `datasets`."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.data.shards import find_shards
from beit_jax.data.source import Example, Source, class_label, indices_of_part
from beit_jax.errors import BadImage, UserError
from beit_jax.runtime.logs import log

LARGE_GROUP = 1 << 20  # bytes of a row group that make random access slow
KEPT_GROUPS = 8  # of Parquet, in each process
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


def _pyarrow() -> Any:
  try:
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      f"data.source: Parquet and Arrow files need pyarrow ({error}); pip install -e '.[arrow]'"
    ) from None
  return pyarrow


class TableSource(Source):
  """A row for each example, in the order of the files and their rows.

  The image is a column of bytes or a struct of `bytes` and `path`, as in Hugging Face's `datasets`. The label is a
  column of class numbers or names, of lists of them, or of label maps that are stored like images. Names of the classes
  come from the features that `datasets` writes into the schema.

  Args:
    root: the folder of the files; see `shards.find_shards`.
    split: name of a split; "NAME[10%:]" is a part of it, a random choice by the numbers of the rows.
    image_key: a column.
    label_key: a column; "" = no labels.

  Raises:
    UserError: a file is damaged, or its columns are not these.
  """

  name = ""
  ending = ""

  def __init__(self, root: str, split: str, image_key: str, label_key: str):
    paths, part = find_shards(root, split, self.ending)
    self._paths, self._columns = [str(path) for path in paths], [key for key in (image_key, label_key) if key]
    self._groups: list[tuple[int, int]] = []  # (number of the file, of its row group)
    starts, schema = [0], None
    for number, path in enumerate(self._paths):
      found, counts = self.open_file(path)
      schema = found if schema is None else schema
      if self._facts(found) != self._facts(schema):
        raise UserError(
          f"{path}: the columns {self._columns} have other types or class names than in {self._paths[0]}"
        )
      for group, count in enumerate(counts):
        self._groups.append((number, group))
        starts.append(starts[-1] + count)
    if not starts[-1]:
      raise UserError(f"data.root={root!r}: the files {', '.join(self._paths[:3])} hold no rows")
    self._starts = np.array(starts, np.int64)
    chosen = indices_of_part([str(i) for i in range(starts[-1])], split) if part else range(starts[-1])
    self._rows = np.array(chosen, np.int64)
    self._image_key, self._label_key = image_key, label_key
    self.description = {"source": self.name, "root": root, "split": split, "num_examples": len(self._rows)}
    self._check_columns(schema)

  def _facts(self, schema: Any) -> list[Any]:
    """What all files must have in common."""
    return [
      (schema.field(key).type, _class_names(schema, key)) for key in self._columns if key in schema.names
    ]

  def open_file(self, path: str) -> tuple[Any, list[int]]:
    """Returns (schema, number of rows of each group) of a file; raises a UserError if it is damaged."""
    raise NotImplementedError

  def read_group(self, path: str, group: int) -> Any:
    """Returns a group of rows, with at least the columns in use."""
    raise NotImplementedError

  def __getstate__(self) -> dict[str, Any]:
    return {
      key: value for key, value in self.__dict__.items() if key != "opened"
    }  # each process opens its own

  def _check_columns(self, schema: Any) -> None:
    for option, key in (("image_key", self._image_key), ("label_key", self._label_key)):
      if key not in schema.names and (key or option == "image_key"):
        unlabeled = (
          "; for data without labels, set data.label_key= (nothing)" if option == "label_key" else ""
        )
        raise UserError(f"data.{option}={key!r}: {self._paths[0]} has the columns {schema.names}{unlabeled}")
    if not _holds_files(schema.field(self._image_key).type):
      raise UserError(
        f"data.image_key={self._image_key!r}: the column has the type {schema.field(self._image_key).type}; expected "
        "bytes, or a struct of bytes and path"
      )
    if not self._label_key:
      return
    types, kind = _pyarrow().types, schema.field(self._label_key).type
    self._has_maps = _holds_files(kind)
    self.has_labels, self.multi_label = not self._has_maps, types.is_list(kind) or types.is_large_list(kind)
    one = kind.value_type if self.multi_label else kind
    if self.has_labels and not (types.is_integer(one) or types.is_string(one) or types.is_large_string(one)):
      raise UserError(
        f"data.label_key={self._label_key!r}: the column has the type {kind}; expected class numbers or names, lists "
        "of them, or label maps as bytes or a struct of bytes and path"
      )
    if self.has_labels:
      self.class_names = _class_names(schema, self._label_key)
      self.num_classes = len(self.class_names)

  def listing(self) -> Iterable[str]:
    for (number, group), count in zip(self._groups, np.diff(self._starts), strict=True):
      yield f"{Path(self._paths[number]).name} {group} {count}"

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example:
    row = int(self._rows[index])
    place = int(np.searchsorted(self._starts, row, "right")) - 1
    number, group = self._groups[place]
    where = f"{self._paths[number]}, row {row - self._starts[place]} of group {group}"
    try:
      table = self.read_group(self._paths[number], group)
      stored = {key: table.column(key)[row - int(self._starts[place])].as_py() for key in self._columns}
    except (_pyarrow().ArrowException, OSError) as error:
      raise BadImage(f"{where}: cannot be read ({_line(error)}); copy the file again") from None
    example: Example = {"image": _bytes(stored[self._image_key], where), "file": where}
    if not self._label_key:
      return example
    value = stored[self._label_key]
    if self.has_labels:
      return {**example, "label": None if value is None else class_label(value, self, where)}
    return {**example, "label_map": _bytes(value, where), "label_file": f"{where} ({self._label_key})"}


class ParquetSource(TableSource):
  """Parquet files. A row is read with its row group; each process keeps the last `KEPT_GROUPS`."""

  name, ending = "parquet", ".parquet"
  _largest = 0  # bytes of a row group

  def __init__(self, root: str, split: str, image_key: str, label_key: str):
    super().__init__(root, split, image_key, label_key)
    if self._largest > LARGE_GROUP:
      log.warning(
        "%s: each example of a random order reads one row group of up to %.0f MiB, which is slow; docs/data.md has the "
        "lines that write the files as Arrow",
        root,
        self._largest / 2**20,
      )

  def open_file(self, path: str) -> tuple[Any, list[int]]:
    arrow = _pyarrow()
    try:
      metadata = arrow.parquet.read_metadata(path)
    except (arrow.ArrowException, OSError) as error:
      raise _damaged(path, "a complete Parquet file, whose last bytes are its footer", error) from None
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    self._largest = max([self._largest, *(group.total_byte_size for group in groups)])
    return metadata.schema.to_arrow_schema(), [group.num_rows for group in groups]

  def read_group(self, path: str, group: int) -> Any:
    return self.opened(path, group)

  @functools.cached_property
  def opened(self) -> Any:
    """The row groups read last."""
    parquet = _pyarrow().parquet
    metadata = functools.cache(parquet.read_metadata)

    def read(path: str, group: int) -> Any:
      with parquet.ParquetFile(path, metadata=metadata(path)) as file:
        return file.read_row_group(group, columns=self._columns, use_threads=False)

    return functools.lru_cache(maxsize=KEPT_GROUPS)(read)


class ArrowSource(TableSource):
  """Arrow streams, as `datasets` writes with `save_to_disk` and into its cache; read through a memory map."""

  name, ending = "arrow", ".arrow"

  def open_file(self, path: str) -> tuple[Any, list[int]]:
    schema, batches = self.opened(path)
    return schema, [batch.num_rows for batch in batches]

  def read_group(self, path: str, group: int) -> Any:
    return self.opened(path)[1][group]

  @functools.cached_property
  def opened(self) -> Any:
    """The files that are mapped."""
    return functools.cache(_open_stream)


def _open_stream(path: str) -> tuple[Any, list[Any]]:
  """(schema, record batches) of a file; the batches point into the map, so hardly anything is read."""
  arrow, batches = _pyarrow(), []
  try:
    with open(path, "rb") as file:
      file.seek(-min(len(END), Path(path).stat().st_size), 2)
      ended = file.read() == END  # without it, a file that is cut off between two batches would pass
    with arrow.ipc.open_stream(arrow.memory_map(path)) as stream:
      for batch in stream:
        batches.append(batch)
      schema = stream.schema
  except (arrow.ArrowException, OSError) as error:
    raise _damaged(
      path, f"a complete Arrow stream, of which {len(batches)} record batches are there", error
    ) from None
  if not ended:
    reason = f"the end mark is missing after {len(batches)} record batches"
    raise _damaged(path, "a complete Arrow stream", reason)
  return schema, batches


def _damaged(path: str, expected: str, reason: object) -> UserError:
  size = Path(path).stat().st_size
  return UserError(
    f"{path}: expected {expected}; found {size} bytes ({_line(reason)}); the file is cut off or damaged: copy it again"
  )


def _line(reason: object) -> str:
  return " ".join(str(reason).split())


def _holds_files(kind: Any) -> bool:
  """Whether values of an Arrow type are encoded files."""
  types = _pyarrow().types
  if types.is_struct(kind):
    return kind.get_field_index("bytes") >= 0 and _holds_files(kind.field("bytes").type)
  return types.is_binary(kind) or types.is_large_binary(kind)


def _bytes(value: Any, where: str) -> bytes:
  found = value["bytes"] if isinstance(value, dict) else value
  if not found:
    path = value.get("path") if isinstance(value, dict) else None
    named = (
      f", only the path {path!r}; store the files with `embed_table_storage` of `datasets`" if path else ""
    )
    raise BadImage(f"{where}: holds no bytes{named}")
  return found


def _class_names(schema: Any, key: str) -> tuple[str, ...]:
  """The names of the classes in the features that `datasets` writes; () without them."""
  text = (schema.metadata or {}).get(b"huggingface", b"{}")
  feature: Any = json.loads(text).get("info", {}).get("features", {}).get(key, {})
  feature = feature[0] if isinstance(feature, list) and feature else feature
  if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # a sequence of classes
    feature = feature["feature"]
  return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()
