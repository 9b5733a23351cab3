"""Class names and `problem_type` in folders of Hugging Face's and timm's."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.errors import UserError
from beit_jax.predict import __main__ as predict
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained

LOOK = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(16, 16), crop_pct=1.0)
LOOK |= dict(interpolation="bicubic", resize="short_side")


def _model(outputs, **description):
  encoder = dict(image_size=(16, 16), patch_size=8, width=32, depth=1, num_heads=2, weight_init="finetune")
  encoder |= dict(rel_pos="per_block", layer_scale_init=0.1)
  module = make_module("classifier", dict(encoder=encoder, num_classes=outputs, head_init_scale=5.0))
  params = module.init(jax.random.key(3), np.zeros((1, 16, 16, 3)))["params"]
  return Pretrained("classifier", params, module, LOOK, description)


def _rewrite(folder, **changes):
  """Changes keys of config.json and removes our description; None removes a key."""
  path = folder / "config.json"
  config = {**json.loads(path.read_text()), "beit_jax": None, **changes}
  path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def image(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  return tmp_path / "image.png"


def _predicted(folder, image, capsys):
  assert predict.main([str(folder), str(image), "--json"]) == 0
  return json.loads(capsys.readouterr().out)[0]


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_problem_type_is_written_and_read(task, tmp_path):
  model = _model(3, **{task: True})
  beit_jax.save(model, tmp_path / "a", format="hf")
  stated = json.loads((tmp_path / "a" / "config.json").read_text())["problem_type"]
  assert stated == {"regression": "regression", "multi_label": "multi_label_classification"}[task]
  _rewrite(tmp_path / "a")
  assert beit_jax.load(tmp_path / "a").description[task] is True
  beit_jax.save(beit_jax.load(tmp_path / "a"), tmp_path / "b", format="hf")
  assert json.loads((tmp_path / "b" / "config.json").read_text())["problem_type"] == stated


def test_one_class_an_image_has_no_problem_type(tmp_path):
  beit_jax.save(_model(3, multi_label=False), tmp_path / "a", format="hf")
  assert "problem_type" not in json.loads((tmp_path / "a" / "config.json").read_text())
  _rewrite(tmp_path / "a", problem_type="single_label_classification")
  facts = beit_jax.load(tmp_path / "a").description
  assert facts["multi_label"] is False and "regression" not in facts


def test_several_labels_have_a_sigmoid_each(tmp_path, image, capsys):
  beit_jax.save(_model(3), tmp_path / "a", format="hf")
  _rewrite(tmp_path / "a", problem_type="multi_label_classification")
  logits = np.asarray(beit_jax.load(tmp_path / "a")(np.asarray(Image.open(image))[None]))[0]
  found = _predicted(tmp_path / "a", image, capsys)["predictions"]
  wanted = 1 / (1 + np.exp(-logits))
  assert [entry["probability"] for entry in found] == pytest.approx(sorted(wanted, reverse=True), rel=1e-3)


@pytest.mark.parametrize("outputs, changes", [(1, {}), (2, {"problem_type": "regression"})])
def test_a_regression_model_gives_its_values(outputs, changes, tmp_path, image, capsys):
  beit_jax.save(_model(outputs), tmp_path / "a", format="hf")
  _rewrite(tmp_path / "a", **changes)
  values = np.asarray(beit_jax.load(tmp_path / "a")(np.asarray(Image.open(image))[None]))[0]
  found = _predicted(tmp_path / "a", image, capsys)
  assert [entry["value"] for entry in found["values"]] == pytest.approx(values) and "predictions" not in found
  assert predict.main([str(tmp_path / "a"), str(image)]) == 0
  text = capsys.readouterr().out
  assert f"{values[0]:.4f}  output 0" in text and "%" not in text


def test_one_output_with_a_sigmoid(tmp_path, image, capsys):
  beit_jax.save(_model(1), tmp_path / "a", format="hf")
  _rewrite(tmp_path / "a", problem_type="multi_label_classification")
  ((entry,),) = [_predicted(tmp_path / "a", image, capsys)["predictions"]]
  assert 0 < entry["probability"] < 1


def test_an_unknown_problem_type_is_refused(tmp_path):
  beit_jax.save(_model(3), tmp_path / "a", format="hf")
  _rewrite(tmp_path / "a", problem_type="ranking")
  with pytest.raises(UserError, match="problem_type is 'ranking', expected one of regression"):
    beit_jax.load(tmp_path / "a")


def _without_our_description(folder):
  """Writes the weights again without the metadata that holds our description."""
  from beit_jax.weights.files import safetensors

  state, _ = safetensors.read(folder / "model.safetensors")
  arrays = {name: np.array(tensor.read()) for name, tensor in state.items()}
  safetensors.write(folder / "model.safetensors", arrays, {"format": "pt"})


@pytest.mark.parametrize("where", ["label_names", "pretrained_cfg", "labels", "dict"])
def test_names_in_a_folder_of_timm(where, tmp_path):
  beit_jax.save(_model(3, labels=["b", "a", "c"]), tmp_path / "a", format="timm")
  _without_our_description(tmp_path / "a")
  config = json.loads((tmp_path / "a" / "config.json").read_text())
  assert config["label_names"] == ["b", "a", "c"]
  if where != "label_names":
    names = config.pop("label_names")
    if where == "dict":
      config["label_names"] = {str(i): name for i, name in enumerate(names)}
    else:
      config["pretrained_cfg"][{"pretrained_cfg": "label_names"}.get(where, where)] = names
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
  assert beit_jax.load(tmp_path / "a").description["labels"] == ["b", "a", "c"]


def test_names_added_to_a_folder_of_ours_are_read(tmp_path):
  beit_jax.save(_model(3), tmp_path / "a", format="timm")
  path = tmp_path / "a" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "label_names": ["x", "y", "z"]}))
  assert beit_jax.load(tmp_path / "a").description["labels"] == ["x", "y", "z"]


def test_more_names_than_classes_are_not_used(tmp_path, caplog):
  beit_jax.save(_model(3), tmp_path / "a", format="hf")
  _rewrite(tmp_path / "a", id2label={str(i): f"name {i}" for i in range(5)})
  assert beit_jax.load(tmp_path / "a").description["labels"] == []
  assert "names 5 classes, but the model has 3" in caplog.text
