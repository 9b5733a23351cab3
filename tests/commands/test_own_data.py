"""The commands of docs/own_data.md and docs/data.md, with the ready configs as they are but for their size."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import beit_jax
from beit_jax import main as main_lib
from beit_jax.predict import __main__ as predict
from tests.conftest import ROOT
from tests.data import source_files
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


def _tables(root):
  """The classes as tar shards and as Parquet, with the numbers of classes.csv."""
  rows = []
  for path in sorted((root / "classes").glob("*/*.png")):
    label = [line.split(",")[0] for line in CLASSES.splitlines()].index(path.parent.name)
    rows.append((path.name, path.read_bytes(), label))
  source_files.tar(root / "shards", rows)
  found = source_files.table(rows)
  (root / "dataset").mkdir()
  found = found.rename_columns(["img", "label"]).replace_schema_metadata(found.schema.metadata)
  pq.write_table(found, root / "dataset" / "train-00000-of-00001.parquet")


def _commands(page):
  """The commands of a page: (config, its arguments)."""
  text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
  found = re.findall(r"^python -m beit_jax.main --config=configs/(\w+).py (.*)$", text, re.M)
  assert found
  return [(config, arguments.split()) for config, arguments in found]


def test_own_data(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  _pairs(tmp_path)
  _tables(tmp_path)
  places = {"/path/to/images": "plain", "/path/to/labelled": "classes", "/path/to/pairs": "pairs"}
  places |= {"/path/to/shards": "shards", "/path/to/dataset": "dataset"}
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

  def run(name, arguments):
    for example, place in places.items():
      arguments = [argument.replace(example, place) for argument in arguments]
    assert main_lib.main([f"--config={ROOT}/configs/{name}.py", *arguments, *SMALL, *sizes[name]]) == 0, name

  for command in _commands("own_data.md"):
    run(*command)
  assert beit_jax.load("runs/mine_ft").description["labels"] == ["road", "sky", "tree"]
  segmented = beit_jax.load("runs/mine_seg").description
  assert segmented["labels"] == ["sky", "road", "tree"] and segmented["palette"][1] == [128, 64, 128]
  capsys.readouterr()
  assert predict.main(["runs/mine_ft", "plain/0.png", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)[0]["file"] == "plain/0.png"
  assert predict.main(["runs/mine_seg", "plain/0.png", "--out=maps"]) == 0
  assert (tmp_path / "maps" / "class_maps" / "0.png").is_file()
  classes = ["sky", "road", "tree"], list(source_files.CLASSES)
  for wanted, (name, arguments) in zip(classes, _commands("data.md"), strict=True):
    shutil.rmtree("runs/mine_ft")
    run(name, arguments)
    assert beit_jax.load("runs/mine_ft").description["labels"] == wanted
