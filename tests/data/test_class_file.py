"""The names and colors of classes in a small CSV or JSON."""

import json

import pytest

from beit_jax.data.class_file import read_class_file
from beit_jax.errors import UserError
from tests.data import source_files
from tests.data.test_sources import make


def _read(tmp_path, text, name="classes.csv"):
  (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  return read_class_file(str(tmp_path / name))


COLORS = ((128, 64, 0), (0, 0, 255))


@pytest.mark.parametrize(
  "name, text, colors",
  [
    ("a.csv", "sky\nroad, wet\n".replace(", wet", ""), ()),
    ("a.csv", "sky,128,64,0\r\n\r\nroad, 0, 0 ,255\r\n", COLORS),
    ("a.csv", "\ufeffsky\nroad", ()),
    ("a.csv", "sky,128,64,0\nroad,0,0,255".encode("utf-16"), COLORS),
    ("a.json", '["sky", "road"]', ()),
    ("a.json", '{"sky": [128, 64, 0], "road": [0, 0, 255]}', COLORS),
  ],
)
def test_formats(tmp_path, name, text, colors):
  assert _read(tmp_path, text, name) == (("sky", "road"), colors)


@pytest.mark.parametrize(
  "name, text, fact",
  [
    ("a.csv", "", "names no class"),
    ("a.csv", "name,red,green,blue\nsky,1,2,3", "class 0 is .*'red'.*without a header"),
    ("a.csv", "sky,1,2,3\nroad", "class 1 is .*for all classes or none"),
    ("a.csv", "sky,1,2,256", "class 0 is"),
    ("a.csv", "sky\nroad\nsky", "'sky' stands twice, for classes 0 and 2"),
    ("a.csv", ",1,2,3", "class 0 is"),
    ("a.json", "{", "cannot be read"),
    ("a.json", "3", "holds a int"),
    ("a.json", '{"0": "sky"}', "class 0 is"),
    ("a.json", '[1, "sky"]', "class 0 is"),
    ("a.json", '{"sky": [1.5, 0, 0]}', "class 0 is"),
  ],
)
def test_errors(tmp_path, name, text, fact):
  with pytest.raises(UserError, match=f"data.class_file: .*{name}.*{fact}"):
    _read(tmp_path, text, name)


def test_a_missing_file():
  with pytest.raises(UserError, match="data.class_file: nowhere.csv cannot be read"):
    read_class_file("nowhere.csv")


def test_the_classes_of_a_folder_get_the_numbers_of_the_file(tmp_path):
  keys = source_files.folder(tmp_path / "data", source_files.labeled(6))
  (tmp_path / "classes.json").write_text(json.dumps(["cat", "elk", "bee", "ant"]))
  source = make(**keys, class_file=str(tmp_path / "classes.json"))
  assert source.class_names == ("cat", "elk", "bee", "ant") and source.num_classes == 4
  assert [source[i]["label"] for i in range(6)] == [3, 3, 2, 2, 0, 0]
  (tmp_path / "classes.json").write_text('["cat", "bee"]')
  with pytest.raises(UserError, match=r"the classes \['ant'\] are not among the 2"):
    make(**keys, class_file=str(tmp_path / "classes.json"))


def test_names_for_numbers(tmp_path):
  keys = source_files.tar(tmp_path / "data", source_files.labeled(6))
  (tmp_path / "two.csv").write_text("ant\nbee\n")
  with pytest.raises(UserError, match="data.num_classes': 3 classes expected, found 2"):
    make(**{**keys, "class_file": str(tmp_path / "two.csv")}, num_classes=3)
  assert make(**{**keys, "class_file": ""}, num_classes=3).num_classes == 3
  assert make(**{**keys, "class_file": ""}).num_classes == 0
