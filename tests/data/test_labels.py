"""Class labels: their range, and matching by name."""

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import labels, sources
from beit_jax.errors import UserError


class Numbers(sources.Source):
  """Gray images whose labels are given as an array."""

  has_labels = True

  def __init__(self, values, names=(), multi_label=False):
    self.class_names, self.num_classes, self.multi_label = tuple(names), len(names), multi_label
    self._values, self.description = values, {"source": "numbers"}

  def __len__(self):
    return len(self._values)

  def __getitem__(self, index):
    return {"image": np.full((16, 16, 3), 100, np.uint8), "label": self._values[index]}


def folder(root, names, split=""):
  for name in names:
    (root / split / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (10, 20, 30)).save(root / split / name / "0.png")
  return sources.FolderSource(str(root), split)


def test_names_that_are_numbers_sort_as_numbers(tmp_path):
  source = folder(tmp_path / "a", map(str, range(12)))
  assert source.class_names == tuple(map(str, range(12)))
  assert [source[i]["label"] for i in range(12)] == [
    0,
    1,
    10,
    11,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
  ]  # files sort as text
  assert folder(tmp_path / "b", ["10", "9", "x"]).class_names == ("10", "9", "x")
  assert folder(tmp_path / "c", ["7", "007", "10"]).class_names == ("007", "7", "10")


@pytest.mark.parametrize("value", [-1, 3, 2**40, 1.5, 1.0, "b", [1], None, True + 2])
def test_a_label_outside_the_classes_is_refused(value):
  example = {} if value is None else {"label": value, "file": "x.png"}
  with pytest.raises(UserError, match="x.png: the label is|example 5: no label"):
    labels.check_label(example, 3, False, 5)


def test_a_label_of_minus_one_says_that_there_are_no_labels():
  with pytest.raises(UserError, match="example 5: the label is -1.*has no labels"):
    labels.check_label({"label": np.int64(-1)}, 3, False, 5)


@pytest.mark.parametrize("value", [[0, 1], [0, 1, 2], [0, np.nan, 1], [0, -1, 1], 1])
def test_several_labels_are_zeros_and_ones(value):
  with pytest.raises(UserError, match="3 zeros and ones"):
    labels.check_label({"label": np.asarray(value)}, 3, True, 0)
  found = labels.check_label({"label": [0, 1, 1]}, 3, True, 0)
  assert found.dtype == np.float32 and found.tolist() == [0, 1, 1]


@pytest.mark.parametrize("ids", [[-1], [3], [0.5]])
def test_ids_of_several_labels_are_classes(ids):
  with pytest.raises(UserError, match="not all class numbers from 0 to 2"):
    sources.multi_hot(ids, 3)
  assert sources.multi_hot([], 3).tolist() == [0, 0, 0]


def test_relabeled_by_name(caplog):
  """Any source, also one whose numbers are fixed; absent classes are named."""
  source = labels.relabel(Numbers([0, 1, 1], "ac"), "cbad")
  assert source.class_names == tuple("cbad") and source.num_classes == 4
  assert [source[i]["label"] for i in range(3)] == [2, 0, 0]
  assert "2 of the 4 classes of the model; absent: b, d" in caplog.text
  own = Numbers([0], "ac")
  own.pixel_rule = own.map_class_names = object()
  changed = {"class_names", "num_classes"}
  for name in sources.Source.__annotations__.keys() - changed:
    assert getattr(labels.relabel(own, "cbad"), name) is getattr(own, name), name
  vectors = np.array([[1, 0], [1, 1]], np.float32)
  many = labels.relabel(Numbers(vectors, "ac", multi_label=True), "cbad")
  assert [many[i]["label"].tolist() for i in range(2)] == [[0, 0, 1, 0], [1, 0, 1, 0]]
  with pytest.raises(UserError, match="label is -1"):
    labels.relabel(Numbers([-1], "ac"), "cbad")[0]


def test_names_that_the_model_lacks_are_refused(caplog):
  with pytest.raises(UserError, match="'x'.* not among the 3"):
    labels.relabel(Numbers([0], "ax"), "abc")
  with pytest.raises(UserError, match="'a'.* have the name of several of the 3"):
    labels.relabel(Numbers([0], "a"), "aba")
  for own in ("xy", "xyza"):  # another number, or some words in common
    with pytest.raises(UserError, match="not among"):
      labels.relabel(Numbers([0], own), "abcd", same_names=False)
  other = Numbers([0], "xyz")
  assert labels.relabel(other, "abc", same_names=False) is other and "no name is the same" in caplog.text
