"""docs/own_data.md from an unlabeled folder to predictions, with the ready configs as they are but for their size."""

import json
import re

import numpy as np
import pytest

import beit_jax
from beit_jax import main as main_lib
from beit_jax.predict import __main__ as predict
from tests.conftest import ROOT
from tests.data.source_files import encoded

pytestmark = pytest.mark.slow  # compiles four runs

SMALL = ["--config.mesh.data=1", "--config.figures=false"]
CLASSES = "sky,0,0,255\nroad,128,64,128\ntree,0,255,0\n"


def _pairs(root, count=20):
  """Images whose class is that of most pixels: label maps, folders by class, and no labels."""
  rng = np.random.default_rng(0)
  for i in range(count):
    labels = np.full((70, 80), i % 3, np.uint8)
    labels[:20] = (i + 1) % 3
    pixels = (labels[..., None] * 80 + rng.integers(0, 40, (70, 80, 3))).astype(np.uint8)
    name = CLASSES.splitlines()[i % 3].split(",")[0]
    for file, array in (
      (f"plain/{i}.png", pixels),
      (f"classes/{name}/{i}.png", pixels),
      (f"pairs/images/train/{i}.png", pixels),
      (f"pairs/annotations/train/{i}.png", labels),
    ):
      (root / file).parent.mkdir(parents=True, exist_ok=True)
      (root / file).write_bytes(encoded(array))
  (root / "classes.csv").write_text(CLASSES)


def _commands():
  """The commands of the page: config -> its arguments."""
  text = (ROOT / "docs" / "own_data.md").read_text().replace("\\\n", " ")
  found = re.findall(r"^python -m beit_jax.main --config=configs/(\w+).py (.*)$", text, re.M)
  return {config: arguments.split() for config, arguments in found}


def test_own_data(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  _pairs(tmp_path)
  places = {"/path/to/images": "plain", "/path/to/labelled": "classes", "/path/to/pairs": "pairs"}
  sizes = {
    "own_images": [
      "--config.batch_size=4",
      "--config.total_steps=2",
      "--config.optimizer.warmup_steps=1",
      "--config.tokenizer.model.n_hid=8",
    ],
    "finetune_folder": ["--config.batch_size=9", "--config.total_epochs=4"],
    "segment_folder": [
      "--config.total_steps=2",
      "--config.optimizer.warmup_steps=1",
      "--config.segment.stride=none",
    ],
  }
  for name, arguments in _commands().items():
    for example, place in places.items():
      arguments = [argument.replace(example, place) for argument in arguments]
    assert main_lib.main([f"--config={ROOT}/configs/{name}.py", *arguments, *SMALL, *sizes[name]]) == 0, name
  assert beit_jax.load("runs/mine_ft").description["labels"] == ["road", "sky", "tree"]
  segmented = beit_jax.load("runs/mine_seg").description
  assert segmented["labels"] == ["sky", "road", "tree"] and segmented["palette"][1] == [128, 64, 128]
  capsys.readouterr()
  assert predict.main(["runs/mine_ft", "plain/0.png", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)[0]["file"] == "plain/0.png"
  assert predict.main(["runs/mine_seg", "plain/0.png", "--out=maps"]) == 0
  assert (tmp_path / "maps" / "class_maps" / "0.png").is_file()
