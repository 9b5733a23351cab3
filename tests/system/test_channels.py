"""Folders of images with four channels: training, evaluation and prediction, from the tokenizer to label maps."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import train, transfer
from beit_jax.data import pipeline, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from beit_jax.objectives import OBJECTIVES
from beit_jax.predict import __main__ as predict
from beit_jax.weights.pretrained import Pretrained
from tests import tiny

RANGE = (0.0, 4095.0)
FOUR = {"model.in_channels": 4, "data.mean": (0.5,) * 4, "data.std": (0.25,) * 4, "data.value_range": RANGE}


def _image(seed):
  """12 bits, uint16 [16, 16, 4]; the class, 0 or 1, decides which channel is bright."""
  image = np.random.default_rng(seed).integers(0, 600, (16, 16, 4))
  image[..., 3 * (seed % 2)] += 3000
  return image.astype(np.uint16)


def _write(folder, name, image):
  folder.mkdir(parents=True, exist_ok=True)
  if name.endswith(".npy"):
    np.save(folder / name, image)
  else:
    first, *others = (Image.fromarray(channel) for channel in np.moveaxis(image, 2, 0))
    first.save(folder / name, save_all=True, append_images=others)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two classes, two splits; every second image is a TIFF of four pages, the others are `.npy` files.

  Four files of the training split are no images. One image is a link.
  """
  root = tmp_path_factory.mktemp("four")
  for i in range(32):
    split = "train" if i < 20 else "val"
    _write(root / split / f"class_{i % 2}", f"{i}.{'tif' if i // 2 % 2 else 'npy'}", _image(i))
  for name in (".ipynb_checkpoints/0.npy", "__MACOSX/0.tif", "class_0/._0.npy", "class_0/notes.txt"):
    path = root / "train" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("no image")
  (root / "train" / "class_0" / "32.npy").symlink_to("0.npy")
  return root


def _config(objective, root, **changes):
  data = {"data.source": "folder", "data.root": str(root), "data.flip": False, "eval.split": "val"}
  return tiny.config(objective, **FOUR, **data, **changes)


@pytest.mark.slow
def test_classifier_trains_evaluates_and_predicts(folder, tmp_path, capsys, caplog):
  changes = {"total_steps": 12, "data.color_jitter": 0.4, "data.rand_augment": "rand-m9-mstd0.5-inc1"}
  train.run(_config("classify", folder, **changes), tmp_path / "run")
  assert (
    "images of 4 channels have no colors: data.color_jitter, data.rand_augment not applied" in caplog.text
  )
  model = beit_jax.load(tmp_path / "run")
  assert model.preprocessing["value_range"] == RANGE and len(model.preprocessing["mean"]) == 4
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["eval"]["acc1"] == 1.0 and result["examples"] == 21 and result["bad_images"] == 0
  assert "3 hidden files and files of operating systems left out" in caplog.text
  assert "1 files with other endings left out: .txt (1)" in caplog.text
  files = sorted((folder / "val").rglob("*.*"))
  assert predict.main([str(tmp_path / "run"), str(folder / "val"), "--json", "--top=1"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert len(found) == len(files) == 12
  for entry in found:
    assert entry["predictions"][0]["label"] in entry["file"]
  logits = model([str(file) for file in files])
  np.testing.assert_allclose(model(np.stack([_image(int(f.stem)) for f in files])), logits, atol=1e-4)


@pytest.mark.slow
def test_tokenizer_and_masked_image_model(folder, tmp_path, capsys):
  train.run(_config("dvae", folder, figures=True), tmp_path / "tokenizer")
  tokenizer = beit_jax.load(tmp_path / "tokenizer")
  assert tokenizer.decode(tokenizer.tokenize(_image(0))).shape == (1, 16, 16, 4)
  init = {"tokenizer.init_from": str(tmp_path / "tokenizer")}
  train.run(_config("beit", folder, figures=True, **init), tmp_path / "mim")
  assert predict.main([str(tmp_path / "mim"), str(folder / "val"), f"--out={tmp_path}"]) == 0
  assert list(tmp_path.glob("masked_image_modelling_*.png"))
  config = _config("classify", folder, total_steps=1, init_from=str(tmp_path / "mim"))
  train.run(config, tmp_path / "tuned")
  rgb = tiny.config("beit", **init)
  with pytest.raises(UserError, match="takes images of 4 channels, this run has 3"):
    OBJECTIVES["beit"](rgb, sources.make_source(rgb.data.to_dict()))


@pytest.mark.slow
def test_segmenter_trains_evaluates_and_predicts(tmp_path, capsys, caplog):
  for i in range(12):
    split = "train" if i < 8 else "val"
    _write(tmp_path / "data" / "images" / split, f"{i}.{'tif' if i % 2 else 'npy'}", _image(i))
    maps = tmp_path / "data" / "annotations" / split
    maps.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 16, 0).repeat(8, 1)).save(maps / f"{i}.png")
  changes = {"data.source": "pairs", "data.num_classes": 2, "model.num_classes": 2, "figures": True}
  config = tiny.config(
    "segment", **{**FOUR, **changes, "data.root": str(tmp_path / "data"), "eval.split": "val"}
  )
  train.run(config, tmp_path / "run")
  assert "segment.photometric not applied" in caplog.text
  out = ["--json", f"--out={tmp_path / 'maps'}"]
  assert predict.main([str(tmp_path / "run"), str(tmp_path / "data" / "images" / "val"), *out]) == 0
  found = json.loads(capsys.readouterr().out)
  assert len(found) == 4 and all(entry["size"] == [16, 16] for entry in found)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_start_from_a_checkpoint_of_three_channels(channels, caplog):
  """The patch embedding is adapted; evaluation with other channels is refused."""
  rgb = tiny.config("classify")
  three = OBJECTIVES["classify"](rgb, sources.make_source(rgb.data.to_dict()))
  variables = jax.jit(three.init)(jax.random.key(0))
  pretrained = Pretrained("classifier", variables["params"], three.module, three.describe()["preprocessing"])
  changes = {"model.in_channels": channels, "data.mean": (0.5,) * channels, "data.std": (0.5,) * channels}
  config = tiny.config("classify", **changes)
  objective = OBJECTIVES["classify"](config, sources.make_source(config.data.to_dict()))
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  name = "encoder/patch_embed/kernel"
  adapted = objective.adapt(pretrained, shapes)[name]
  assert f"{name}: adapted from 3 to {channels} channels" in caplog.text
  kernel = np.asarray(variables["params"]["encoder"]["patch_embed"]["kernel"])
  np.testing.assert_array_equal(adapted, transfer.adapt_channels(kernel, channels))
  with pytest.raises(UserError, match=f"model.in_channels=3, this run has {channels}"):
    objective.fit_params(pretrained, shapes)
  ranged = dataclasses.replace(
    pretrained, preprocessing={**pretrained.preprocessing, "value_range": [0, 4095]}
  )
  with pytest.raises(UserError, match=r"data.value_range=\(0, 4095\), this run has None"):
    three.fit_params(ranged, shapes)


@pytest.mark.parametrize("train", [True, False])
def test_data_set_of_deep_images_without_a_range_is_refused(train, tmp_path):
  for i in range(20):
    _write(tmp_path, f"{i}.npy", _image(i)[..., 0])
  config = tiny.config("classify", **{"data.source": "folder", "data.root": str(tmp_path)})
  source = sources.make_source(config.data.to_dict())
  reader = ViewReader({"image": ((16, 16), "bicubic")}, config.data.to_dict())
  bad_images = BadImageTracker(source, config.data.max_bad, shuffled=train)
  options = dict(rows=np.arange(4), batch_size=4, bad_images=bad_images)
  more = dict(total_steps=9, start_step=0, seed=0) if train else {}
  make = pipeline.train_batches if train else pipeline.eval_batches
  with pytest.raises(
    UserError, match=r"its values run from \d+ to \d+, of which only \d+ .* set data.value_range="
  ):
    for _ in make(source, reader, **options, **more):
      pass


@pytest.mark.parametrize("name", ["dvae", "classify", "linear_probe", "knn", "segment"])
def test_objectives_take_images_of_four_channels(name):
  config = tiny.config(name, **FOUR)
  objective = OBJECTIVES[name](config, sources.make_source(config.data.to_dict()))
  jax.eval_shape(objective.init, jax.random.key(0))
  view = next(iter(objective.views()))
  assert objective.batch_shapes(8)[view].shape == (8, 16, 16, 4)
  preprocessing = objective.describe()["preprocessing"]
  assert len(preprocessing["mean"]) == 4 and preprocessing["value_range"] == RANGE


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.in_channels": 4}, "'data.mean': 3 numbers, but model.in_channels=4"),
    ({"data.mean": (0.5,) * 4}, "'data.mean': 4 numbers, but model.in_channels=3"),
    ({**FOUR, "data.std": (1.0,)}, "'data.std': 1 numbers, but model.in_channels=4"),
    ({"data.mean": ()}, "data.mean': .* must be numbers in .0, 1., one for each channel"),
    ({"model.in_channels": 0}, "model.in_channels': 0 must be a whole number"),
    ({"data.value_range": (5.0, 5.0)}, r"data.value_range': .* must be two numbers \(low, high\)"),
    ({"data.value_range": (5.0,)}, "data.value_range'"),
  ],
)
def test_channels_that_disagree_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    config = tiny.config("dvae", **changes)
    OBJECTIVES["dvae"](config, sources.make_source(config.data.to_dict()))
