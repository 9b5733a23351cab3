"""Parquet and Arrow files: columns, names of classes, and files that are cut off or damaged."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beit_jax.data import examples, source_tables, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage, UserError
from tests.conftest import ROOT
from tests.data import source_files
from tests.data.test_folders import PNG
from tests.data.test_sources import make, options

ROWS = source_files.labeled(9)


def _write(path, found, ending, group=3):
  path.mkdir(parents=True, exist_ok=True)
  if ending == ".parquet":
    pq.write_table(found, path / "train.parquet", row_group_size=group)
  else:
    source_files.write_arrow(path / "train.arrow", found, group)
  return path / f"train{ending}"


def _source(path, image_key="image", label_key="label"):
  return sources.SOURCES[path.suffix[1:]][0](str(path.parent), "train", image_key, label_key)


BOTH = pytest.mark.parametrize("ending", [".parquet", ".arrow"])


def _images(count):
  return pa.array([PNG] * count, pa.binary())


@BOTH
def test_columns_of_bytes_and_names(tmp_path, ending):
  found = pa.table({"img": _images(3), "fine": ["bee", "ant", "bee"]})
  path = _write(tmp_path, found, ending)
  source = _source(path, "img", "fine")
  assert source.has_labels and source.num_classes == 0
  with pytest.raises(UserError, match="train.*row 0 of group 0: the label holds 'bee'.*data.class_file"):
    source[0]
  (tmp_path / "names.json").write_text('["ant", "bee"]')
  keys = dict(source=ending[1:], root=str(tmp_path), image_key="img", label_key="fine")
  source = make(**keys, class_file=str(tmp_path / "names.json"))
  assert [source[i]["label"] for i in range(3)] == [1, 0, 1]


@BOTH
@pytest.mark.parametrize("kind", ["Sequence", "List", "old"])
def test_several_labels(tmp_path, ending, kind):
  names = {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]}
  feature = [names] if kind == "old" else {"_type": kind, "feature": names}
  label = pa.array([[0, 2], [], [1]], pa.list_(pa.int64()))
  found = source_files.table(ROWS[:3], {"label": feature}, label)
  source = _source(_write(tmp_path, found, ending))
  assert source.multi_label and source.class_names == ("ant", "bee", "cat")
  assert [source[i]["label"].tolist() for i in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@BOTH
def test_data_without_labels(tmp_path, ending):
  path = _write(tmp_path, pa.table({"image": _images(2)}), ending)
  assert "label" not in _source(path, label_key="")[0]
  with pytest.raises(
    UserError, match=r"data.label_key='label': .*has the columns \['image'\]; for data without"
  ):
    _source(path)


@BOTH
@pytest.mark.parametrize(
  "column, values, fact",
  [
    ("image", [1, 2], "data.image_key='image': the column has the type int64; expected bytes"),
    ("image", ["a", "b"], "the type string"),
    ("label", [1.5, 2.0], "data.label_key='label': the column has the type double; expected class numbers"),
    ("label", [[0.5], []], "the type list<.*double>"),
  ],
)
def test_other_columns_are_refused(tmp_path, ending, column, values, fact):
  found = pa.table({"image": _images(2), "label": [0, 1], column: values})
  with pytest.raises(UserError, match=fact):
    _source(_write(tmp_path, found, ending))


@BOTH
def test_files_without_rows_are_refused(tmp_path, ending):
  with pytest.raises(UserError, match="the files .*train.* hold no rows"):
    _source(_write(tmp_path, source_files.table([]), ending))


@BOTH
def test_files_of_other_types_are_refused(tmp_path, ending):
  _write(tmp_path, source_files.table(ROWS), ending).rename(tmp_path / f"train-0{ending}")
  path = _write(tmp_path, pa.table({"image": _images(2), "label": [0, 1]}), ending)
  path = path.rename(tmp_path / f"train-1{ending}")
  with pytest.raises(
    UserError, match=f"{path}: the columns .* have other types or class names than in .*train-0"
  ):
    _source(path)
  other = {**source_files.HF, "label": {**source_files.HF["label"], "names": ["bee", "ant", "cat"]}}
  _write(tmp_path, source_files.table(ROWS, other), ending).rename(path)
  with pytest.raises(UserError, match="other types or class names"):
    _source(path)


@BOTH
def test_rows_without_bytes_or_label(tmp_path, ending):
  image = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": PNG, "path": None}, None])
  found = pa.table({"image": image, "label": pa.array([0, None, 0])})
  source = _source(_write(tmp_path, found, ending))
  with pytest.raises(
    BadImage, match="row 0 of group 0: holds no bytes, only the path 'a.png'; store the files"
  ):
    source[0]
  assert source[1]["label"] is None
  with pytest.raises(BadImage, match="row 2 of group 0: holds no bytes$"):
    source[2]


@BOTH
def test_every_cut_is_found_and_named(tmp_path, ending):
  whole = _write(tmp_path / "whole", source_files.table(ROWS), ending).read_bytes()
  path = tmp_path / "cut" / f"train{ending}"
  path.parent.mkdir()
  ends = [0, 1, 4, 8, len(whole) - 1, len(whole) - 4, len(whole) - 8, len(whole) - 12]
  for size in {*range(0, len(whole), 997), *ends}:
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match=f"{path}: expected a complete .*found {size} bytes .*copy it again"):
      _source(path)


def test_a_stream_that_ends_between_two_batches_is_cut_off(tmp_path):
  path = tmp_path / "train.arrow"
  found = source_files.table(ROWS)
  with pa.OSFile(str(path), "wb") as file:
    writer = pa.ipc.new_stream(file, found.schema)
    writer.write_table(found, max_chunksize=3)
    file.flush()
    data = path.read_bytes()
    writer.close()
  path.write_bytes(data)
  with pytest.raises(UserError, match="the end mark is missing after 3 record batches"):
    _source(path)


def test_results_that_datasets_keeps_beside_the_data_are_left_out(tmp_path):
  for name in ("data-00000-of-00001", "cache-1c80317fa3b1799d"):
    source_files.write_arrow(tmp_path / "train" / f"{name}.arrow", source_files.table(ROWS))
  assert len(sources.ArrowSource(str(tmp_path), "train", "image", "label")) == len(ROWS)


def test_a_damaged_row_group_is_a_bad_image(tmp_path):
  path = _write(tmp_path, source_files.table(ROWS), ".parquet")
  place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
  data = bytearray(path.read_bytes())
  data[place : place + 16] = bytes(16)
  path.write_bytes(data)
  source = _source(path)
  assert source[0]["image"] == ROWS[0][1]
  with pytest.raises(BadImage, match="train.parquet, row 1 of group 1: cannot be read .*copy the file again"):
    source[4]


def test_one_row_group_is_read_for_an_example(tmp_path, monkeypatch):
  """The others are not; the last ones are kept."""
  path = _write(tmp_path, source_files.table(ROWS), ".parquet")
  seen, read = [], pq.ParquetFile.read_row_group

  def spy(self, group, **options):
    seen.append(group)
    return read(self, group, **options)

  monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
  source = _source(path)
  assert [source[i]["label"] for i in (7, 6, 1, 8)] == [ROWS[i][2] for i in (7, 6, 1, 8)]
  assert seen == [2, 0]


def test_large_row_groups_are_told(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(source_tables, "LARGE_GROUP", 100)
  _source(_write(tmp_path, source_files.table(ROWS), ".parquet"))
  assert caplog.text.count("each example of a random order reads one row group of up to 0 MiB") == 1


def test_the_conversion_in_the_documentation(tmp_path, monkeypatch):
  """The lines of docs/data.md write a data set as Arrow with the names of the classes."""
  wanted = sources.ParquetSource(
    str(_write(tmp_path / "dataset", source_files.table(ROWS), ".parquet")), "train", "image", "label"
  )
  monkeypatch.chdir(tmp_path)
  exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)[1], {})
  found = _source(tmp_path / "dataset" / "train.arrow")
  assert found.class_names == wanted.class_names and len(found) == len(wanted)
  assert all(
    found[i]["image"] == wanted[i]["image"] and found[i]["label"] == wanted[i]["label"] for i in range(9)
  )


def test_pyarrow_is_optional(tmp_path, monkeypatch):
  path = _write(tmp_path, source_files.table(ROWS), ".parquet")
  monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
  with pytest.raises(UserError, match=r"need pyarrow .*pip install -e '.\[arrow\]'"):
    _source(path)


def test_data_of_the_library_datasets(tmp_path):
  """What `datasets` itself writes; its format is imitated in the other tests."""
  datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
  features = datasets.Features(
    image=datasets.Image(), label=datasets.ClassLabel(names=list(source_files.CLASSES))
  )
  rows = {"image": [{"bytes": row[1], "path": None} for row in ROWS], "label": [row[2] for row in ROWS]}
  found = datasets.Dataset.from_dict(rows, features=features)
  datasets.DatasetDict({"train": found}).save_to_disk(str(tmp_path / "saved"))
  found.to_parquet(str(tmp_path / "train.parquet"))
  for source in (
    _source(tmp_path / "train.parquet"),
    sources.ArrowSource(str(tmp_path / "saved"), "train", "image", "label"),
  ):
    assert source.class_names == source_files.CLASSES
    assert [(source[i]["image"], source[i]["label"]) for i in range(len(ROWS))] == [row[1:] for row in ROWS]


def test_the_schema_of_other_writers_has_no_names():
  schema = pa.schema({"label": pa.int64()}, metadata={b"huggingface": json.dumps({"info": {}}).encode()})
  assert source_tables._class_names(schema, "label") == ()
  assert source_tables._class_names(pa.schema({"label": pa.int64()}), "label") == ()


def test_objectives_that_need_no_label_read_rows_without_one():
  reader = ViewReader({"image": ((8, 8), "bicubic")}, options())
  source = [{"image": PNG, "label": None}]
  arrays = reader.eval(examples.decode(source[0], 0), source[0])
  assert arrays["label"] == -1 and arrays["image"].shape == (8, 8, 3)
