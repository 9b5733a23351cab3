"""Labels and class names in runs: evaluation by the names of a checkpoint; labels that are no classes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import evaluate, train
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.objectives import OBJECTIVES
from beit_jax.run import checkpoint
from beit_jax.weights import io as weights_io
from beit_jax.weights.files import safetensors
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import tiny
from tests.data.test_labels import Numbers

COLORS = {"red": (220, 20, 20), "lime": (20, 220, 20), "blue": (20, 20, 220), "gray": (90, 90, 90)}
COLORS |= {"white": (240, 240, 240), "cyan": (20, 220, 220)}
LOOK = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(16, 16), crop_pct=1.0)
LOOK |= dict(interpolation="bicubic", resize="short_side")


def _by_color(root, names, split="val"):
  for name in names:
    (root / split / name).mkdir(parents=True, exist_ok=True)
    for i in range(2):
      Image.new("RGB", (16, 16), COLORS[name]).save(root / split / name / f"{i}.png")
  return {"data.source": "folder", "data.root": str(root), "eval.split": split, "data.split": split}


@pytest.fixture(scope="module")
def color_model():
  """A classifier of plain colors, made without training: the head is fitted to the features. Classes are not sorted."""
  names = ["red", "cyan", "white", "blue", "gray", "lime"]
  encoder = dict(image_size=(16, 16), patch_size=2, width=32, depth=2, num_heads=2, weight_init="finetune")
  encoder |= dict(rel_pos="per_block", layer_scale_init=0.1)
  module = make_module("classifier", dict(encoder=encoder, num_classes=6, head_init_scale=1.0))
  params = jax.device_get(module.init(jax.random.key(3), np.zeros((1, 16, 16, 3)))["params"])
  model = Pretrained("classifier", params, module, LOOK)
  images = np.stack([np.full((16, 16, 3), COLORS[name], np.uint8) for name in names])
  kernel = params["head"]["kernel"]
  model.params["head"] = {"kernel": np.eye(*kernel.shape, dtype=np.float32), "bias": np.zeros(6, np.float32)}
  probe = make_module("classifier", dict(encoder=encoder, num_classes=32, head_init_scale=1.0))
  eye = {**params, "head": {"kernel": np.eye(32, dtype=np.float32), "bias": np.zeros(32, np.float32)}}
  features = np.asarray(Pretrained("classifier", eye, probe, LOOK)(images))
  features = np.concatenate([features, np.ones((6, 1))], 1)
  fit = np.linalg.pinv(features) @ (10 * np.eye(6))
  params = {**params, "head": {"kernel": fit[:-1].astype(np.float32), "bias": fit[-1].astype(np.float32)}}
  return Pretrained("classifier", params, module, LOOK, {"labels": names, "multi_label": False})


def _foreign(path, labels):
  """Makes a folder look as if another program had written it: without our description; class names as given."""
  config = json.loads((path / "config.json").read_text())
  config.pop("beit_jax", None)
  for key in ("id2label", "label2id", "label_names"):
    config.pop(key, None)
  (path / "config.json").write_text(json.dumps({**config, **labels}))
  state, _ = safetensors.read(path / "model.safetensors")
  arrays = {name: np.array(tensor.read()) for name, tensor in state.items()}
  safetensors.write(path / "model.safetensors", arrays, {"format": "pt"})
  return str(path)


def _named(format, names):
  if not names:
    return {}
  return (
    {"label_names": names} if format == "timm" else {"id2label": {str(i): n for i, n in enumerate(names)}}
  )


def _evaluate(path, folder, **changes):
  changes = {"eval_only": True, "init_from": str(path), "eval.batch_size": 16, **changes}
  return tiny.config("classify", **changes), folder


@pytest.mark.parametrize("format", ["hf", "timm"])
@pytest.mark.parametrize("absent", [("gray",), (), ("gray", "red", "lime", "blue")])
def test_a_foreign_checkpoint_is_evaluated_by_its_names(format, absent, color_model, tmp_path, caplog):
  names = color_model.description["labels"]
  weights_io.save(color_model, tmp_path / "model", format=format)
  path = _foreign(tmp_path / "model", _named(format, names))
  data = _by_color(tmp_path / "data", [name for name in names if name not in absent])
  config, folder = _evaluate(path, tmp_path / "run", **data)
  assert train.run(config, folder)["eval"]["acc1"] == 1.0
  assert (f"{6 - len(absent)} of the 6 classes" in caplog.text) == bool(absent)
  assert (tmp_path / "run" / "per_class.csv").read_text().split()[1].startswith("red,")


@pytest.mark.parametrize("format", ["hf", "timm"])
def test_without_names_fewer_classes_are_refused(format, color_model, tmp_path):
  weights_io.save(color_model, tmp_path / "model", format=format)
  path = _foreign(tmp_path / "model", {})
  data = _by_color(tmp_path / "data", ["red", "cyan", "blue", "gray", "lime"])
  for changes in ({}, {"model.num_classes": 6}):
    config, folder = _evaluate(path, tmp_path / "run", **data, **changes)
    with pytest.raises(UserError, match="6 classes without names and the data 5 "):
      train.run(config, folder)


def test_names_of_another_kind_keep_their_numbers(color_model, tmp_path, caplog):
  """As ImageNet's folders, whose names are synsets, and Hugging Face's labels."""
  weights_io.save(color_model, tmp_path / "model", format="hf")
  path = _foreign(tmp_path / "model", _named("hf", list("ABCDEF")))
  data = _by_color(tmp_path / "data", COLORS)
  config, folder = _evaluate(path, tmp_path / "run", **data)
  assert train.run(config, folder)["eval"]["acc1"] < 1
  assert "no name is the same" in caplog.text
  config, folder = _evaluate(
    path, tmp_path / "run", **{**data, **_by_color(tmp_path / "some", ["red", "lime"])}
  )
  with pytest.raises(UserError, match="not among the 6"):
    train.run(config, folder)


def test_knn_numbers_the_classes_as_the_training_data(tmp_path):
  """With a class less in the evaluation data, each image still finds its own color."""
  _by_color(tmp_path, ["blue", "gray", "red"], "train")
  data = {**_by_color(tmp_path, ["gray", "red"]), "data.split": "train", "knn.k": 1, "model.depth": 1}
  result = train.run(tiny.config("knn", **data), tmp_path / "run")
  assert result["eval"]["acc1"] == 1.0


def _numbered(root):
  """One image in each of the folders 0 to 11; the order in which versions up to 0.1 sorted the names."""
  for name in range(12):
    (root / str(name)).mkdir(parents=True)
    Image.new("RGB", (16, 16), (20 * name,) * 3).save(root / str(name) / "0.png")
  data = {"data.source": "folder", "data.root": str(root), "data.split": "", "eval.split": "train"}
  return {**data, "batch_size": 4}, tuple(sorted(map(str, range(12))))


def test_an_earlier_order_of_the_classes_is_kept(color_model, tmp_path):
  data, old = _numbered(tmp_path / "data")
  model = dataclasses.replace(color_model, description={"labels": old, "dataset": {}})
  weights_io.save(model, tmp_path / "model", format="orbax")
  config = tiny.config("classify", **data, init_from=str(tmp_path / "model"))
  source = evaluate.train_source(config, tmp_path / "new")
  assert source.class_names == old and [source[i]["label"] for i in range(12)] == list(range(12))
  assert evaluate.eval_only_source(config, tmp_path / "new")[0].class_names == old
  fresh = evaluate.train_source(tiny.config("classify", **data), tmp_path / "new")
  assert fresh.class_names == tuple(map(str, range(12)))


@pytest.mark.slow
def test_a_run_with_an_earlier_order_of_the_classes_goes_on(tmp_path):
  data, old = _numbered(tmp_path / "data")
  config, run = tiny.config("classify", **data, total_steps=1), tmp_path / "run"
  train.run(config, run)
  (folder,) = (run / "checkpoints").iterdir()
  description = json.loads((folder / "description.json").read_text())
  assert description["labels"] == list(map(str, range(12)))
  (folder / "description.json").write_text(json.dumps({**description, "labels": old}))
  checkpoint.write_digest(folder)
  longer = tiny.config("classify", **data, total_steps=2)
  assert train.run(longer, run)["step"] == 2
  again = tiny.config("classify", **data, total_steps=1, init_from=str(run))
  assert train.run(again, tmp_path / "other")["step"] == 1
  assert checkpoint.read_description(checkpoint.find(tmp_path / "other"))["labels"] == list(old)


def _run_on(monkeypatch, tmp_path, values, objective, **changes):
  made = Numbers(np.asarray(values), "abc")
  monkeypatch.setattr(sources, "make_source", lambda data: made)
  changes = {"batch_size": 4, "eval.batch_size": 4, "total_steps": 2, **changes}
  return train.run(tiny.config(objective, **changes), tmp_path / "run")


@pytest.mark.parametrize("objective", ["classify", "linear_probe", "knn"])
@pytest.mark.parametrize("value", [7, -1])
def test_a_label_outside_the_classes_ends_a_run(objective, value, monkeypatch, tmp_path):
  with pytest.raises(UserError, match=f"label is {value}, expected a whole number from 0 to 2"):
    _run_on(monkeypatch, tmp_path, [value] * 8, objective, **({"knn.k": 1} if objective == "knn" else {}))


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_a_label_outside_the_classes_is_found_in_training(mixup, monkeypatch, tmp_path):
  """Beyond the first examples, which are looked at before the run begins."""
  with pytest.raises(UserError, match="example 9: the label is 7"):
    _run_on(
      monkeypatch, tmp_path, [0] * 9 + [7, 1, 2], "classify", batch_size=12, **{"loss.mixup_alpha": mixup}
    )


def test_a_split_without_labels_is_refused(monkeypatch, tmp_path, color_model):
  model = dataclasses.replace(color_model, description={})
  weights_io.save(model, tmp_path / "model", format="orbax")
  changes = {"eval_only": True, "init_from": str(tmp_path / "model"), "eval.predictions": True}
  with pytest.raises(UserError, match="has no labels"):
    _run_on(monkeypatch, tmp_path, [-1] * 8, "classify", **{"model.num_classes": 6}, **changes)


@pytest.mark.parametrize("objective", ["classify", "linear_probe"])
def test_one_class_is_refused(objective, tmp_path):
  data = _by_color(tmp_path, ["red"])
  with pytest.raises(UserError, match="one class only|two or more classes"):
    train.run(tiny.config(objective, **data), tmp_path / "run")


def test_a_metric_that_is_not_a_number_is_refused(tmp_path):
  """Several labels per image of which none occurs in the evaluation data."""
  for split, row in (("train", "0.png,a,b\n1.png,b"), ("val", "0.png\n1.png")):
    (tmp_path / split).mkdir()
    for i in range(2):
      Image.new("RGB", (16, 16)).save(tmp_path / split / f"{i}.png")
    (tmp_path / split / "labels.csv").write_text(row)
  source = sources.FolderSource(str(tmp_path), "train", "labels.csv")
  config = tiny.config("classify")
  objective = OBJECTIVES["classify"](config, source)
  objective.evaluate_images = lambda *_: ({"mAP": float("nan")}, {})
  with pytest.raises(UserError, match="mAP=nan"):
    evaluate.check_finite(evaluate.evaluate_all(config, objective, None, {}, {}, source, None)[0], source)
  assert np.isnan(objective.summarize({"loss": (np.zeros(()), np.zeros(()))})["loss"])


@pytest.mark.parametrize(
  "description, fact",
  [({"regression": True}, "regression model"), ({"multi_label": True}, "predicts several labels per image")],
)
def test_outputs_of_another_kind_are_not_evaluated(description, fact, color_model, tmp_path):
  model = dataclasses.replace(color_model, description={**color_model.description, **description})
  weights_io.save(model, tmp_path / "model", format="orbax")
  config, folder = _evaluate(tmp_path / "model", tmp_path / "run", **_by_color(tmp_path / "data", COLORS))
  with pytest.raises(UserError, match=fact):
    train.run(config, folder)


def test_the_head_of_a_regression_model_is_not_a_start(color_model, tmp_path):
  data = _by_color(tmp_path, COLORS)
  objective = OBJECTIVES["classify"](
    tiny.config("classify", **data), sources.FolderSource(str(tmp_path), "val")
  )
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  model = dataclasses.replace(color_model, description={})
  assert "head/kernel" in objective.adapt(model, shapes)
  found = objective.adapt(dataclasses.replace(model, description={"regression": True}), shapes)
  assert found and not any(name.startswith("head/") for name in found)
