"""What a segmentation run says about its label maps: classes that do not occur, colors, sets without labels."""

from types import SimpleNamespace

import numpy as np
import pytest

from beit_jax import train
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.objectives import Segmentation
from tests import tiny
from tests.data.test_label_maps import pairs

COLORS = ((10, 10, 10), (200, 0, 0), (0, 200, 0))


def _config(**changes):
  return tiny.config("segment", **{"model.num_classes": 3, **changes})


def _source():
  return sources.ShapesSource("train", 4, 16)


def _evaluated(objective, labelled, monkeypatch):
  """Runs the evaluation with given numbers of labelled pixels of each class; every pixel is right."""
  monkeypatch.setattr(objective, "_evaluate_bucket", lambda *_: np.array([labelled] * 3))
  return objective.evaluate_images(None, _source(), None)[0]


@pytest.mark.parametrize("names", [(), tuple("abcdefghi")])
def test_classes_that_occur_are_counted(names, monkeypatch, caplog):
  config = _config(**{"model.num_classes": 9, "segment.class_names": names})
  source = _source()
  source.map_class_names = ()
  objective = Segmentation(config, source)
  assert _evaluated(objective, [5, 0, 2, 1, 1, 1, 1, 0, 1], monkeypatch)["mIoU"] == 1.0
  assert f"7 of 9 classes occur in the label maps; absent: {'b, h' if names else '1, 7'}" in caplog.text
  caplog.clear()
  _evaluated(objective, [5] * 9, monkeypatch)
  assert "9 of 9 classes occur in the label maps" in caplog.text and "absent" not in caplog.text


def test_a_set_without_labelled_pixels_has_no_metrics(monkeypatch):
  objective = Segmentation(_config(**{"model.num_classes": 9}), _source())
  with pytest.raises(UserError, match="no pixel has a class"):
    _evaluated(objective, [0] * 9, monkeypatch)


def test_one_class_is_refused():
  with pytest.raises(UserError, match=r"data.num_classes': 1 must lie in \[2, 254\].*background"):
    Segmentation(_config(**{"model.num_classes": 1}), _source())


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"segment.palette": COLORS[:2]}, "2 colors for 3 classes"),
    ({"segment.palette": (*COLORS, (1, 1, 1))}, "segment.ignore_label=3"),
    ({"segment.palette": (*COLORS[:2], COLORS[0])}, "same color"),
    ({"segment.palette": ()}, "0 colors for 3 classes"),
    ({"segment.palette": "rainbow"}, "'rainbow' is unknown"),
    (
      {"segment.palette": COLORS, "segment.reduce_zero_label": True},
      "0, which is ignored, and then the classes",
    ),
  ],
)
def test_palettes_that_do_not_fit_the_classes(changes, fact):
  with pytest.raises(UserError, match=f"segment.palette.*{fact}"):
    Segmentation(_config(**{"segment.label_colors": True, **changes}), _source())


def test_colors_of_classes():
  """Positions in the palette are the stored values: with 0 for "other" first, and an ignored one at the end."""
  other, void = (1, 1, 1), (2, 2, 2)
  for palette, changes in (
    (COLORS, {}),
    ((other, *COLORS), {"segment.reduce_zero_label": True}),
    ((*COLORS, void), {"segment.ignore_label": 3}),
  ):
    config = _config(**{"segment.label_colors": True, "segment.palette": palette, **changes})
    assert Segmentation(config, _source()).colors.tolist() == [list(color) for color in COLORS]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_set_of_0_and_255_ends_a_run(split, tmp_path):
  good, binary = [[[0, 1], [2, 0]]] * 8, [[[0, 255], [255, 0]]] * 8
  pairs(tmp_path, binary if split == "train" else good, "training")
  pairs(tmp_path, good if split == "train" else binary, "validation")
  data = {
    "data.source": "pairs",
    "data.root": str(tmp_path),
    "data.split": "training",
    "eval.split": "validation",
  }
  with pytest.raises(UserError, match="hold only the values"):
    train.run(_config(**data), tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_colors_equals_one_with_numbers(tmp_path):
  rng = np.random.default_rng(0)
  values = [rng.integers(0, 3, (16, 16)) for _ in range(8)]
  results = []
  for name, maps, changes in (
    ("numbers", values, {}),
    ("colors", np.array(COLORS)[values], {"segment.label_colors": True, "segment.palette": COLORS}),
  ):
    pairs(tmp_path / name, maps)
    data = {"data.source": "pairs", "data.root": str(tmp_path / name), "data.split": "training"}
    config = _config(**data, **changes, **{"eval.split": "training", "total_steps": 1})
    results.append(train.run(config, tmp_path / f"{name}_run")["eval"])
  assert results[0] == results[1]


def test_names_number_and_colors_come_from_the_class_file(tmp_path):
  """The config's own values come first; label maps may have the colors."""
  pairs(tmp_path, [[[0, 1, 2]]], "train")
  (tmp_path / "classes.csv").write_text("sky,10,10,10\nroad,200,0,0\ntree,0,200,0\n")
  keys = {"model.num_classes": None, "data.class_file": str(tmp_path / "classes.csv")}
  keys |= {"data.source": "pairs", "data.root": str(tmp_path), "data.split": "train"}

  def made(**changes):
    config = _config(**{**keys, **changes})
    return Segmentation(config, sources.make_source(config.data.to_dict()))

  objective = made()
  assert objective.class_names == ("sky", "road", "tree") and objective.num_classes == 3
  assert objective.describe()["palette"] == objective.colors.tolist() == [list(color) for color in COLORS]
  other = made(**{"segment.class_names": ("a", "b", "c"), "segment.palette": COLORS[::-1]})
  assert other.class_names == ("a", "b", "c") and other.colors.tolist() == [
    list(color) for color in COLORS[::-1]
  ]
  with pytest.raises(UserError, match="data.num_classes': .*set it, or data.class_file"):
    made(**{"data.class_file": ""})
  found = (
    made(**{"segment.label_colors": True}).reader().stored({"label_map": np.array([COLORS], np.uint8)}, 0)
  )
  assert found.tolist() == [[0, 1, 2]]


def test_the_figure_has_a_legend_of_the_classes_shown():
  objective = Segmentation(_config(**{"segment.palette": COLORS}), _source())
  height, width = objective.image_size
  logits = np.zeros((2, height, width, 3), np.float32)
  logits[..., 2] = 1.0
  objective.module = SimpleNamespace(apply=lambda *_: {"logits": logits})
  batch = {"image": np.zeros((2, height, width, 3), np.uint8), "label_map": np.full((2, height, width), 255)}
  sheet = objective.figures({}, None, batch)["segmentation"]
  colors = {tuple(color) for color in sheet.reshape(-1, 3).tolist()}
  assert COLORS[2] in colors and COLORS[1] not in colors
  batch["label_map"][0, 0] = 1
  colors = {
    tuple(color) for color in objective.figures({}, None, batch)["segmentation"].reshape(-1, 3).tolist()
  }
  assert {COLORS[1], COLORS[2]} <= colors
