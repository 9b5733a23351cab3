"""Evaluation counts every image once, on any mesh and any number of processes; report files; several labels."""

import csv
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import evaluate, metrics, train
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import tiny
from tests.conftest import ROOT

COUNT = 1003  # with batches of 64: the last one has 43
SETTINGS = {"eval_only": True, "eval.num_examples": COUNT, "eval.batch_size": 64, "eval.predictions": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A classifier of shapes with random weights and an unscaled head, so that its outputs differ clearly."""
  encoder = dict(image_size=(16, 16), patch_size=2, width=32, depth=2, num_heads=2, weight_init="finetune")
  encoder |= dict(rel_pos="per_block", layer_scale_init=0.1)
  module = make_module("classifier", dict(encoder=encoder, num_classes=8, head_init_scale=20.0))
  params = module.init(jax.random.key(3), np.zeros((1, 16, 16, 3)))["params"]
  half = (0.5,) * 3
  look = dict(mean=half, std=half, image_size=(16, 16), crop_pct=1.0)
  look |= dict(interpolation="bicubic", resize="short_side")
  path = tmp_path_factory.mktemp("weights") / "model"
  weights_io.save(Pretrained("classifier", params, module, look), path, format="orbax")
  return path


@pytest.fixture(scope="module")
def one_device(weights, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  return workdir, train.run(tiny.config("classify", init_from=str(weights), **SETTINGS), workdir)


def _assert_same(found, wanted):
  assert found["examples"] == wanted["examples"] == COUNT
  for key in ("acc1", "acc5"):
    assert found["eval"][key] == wanted["eval"][key]
  assert found["eval"]["loss"] == pytest.approx(wanted["eval"]["loss"], rel=1e-6)


@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_mesh_counts_the_same(devices, weights, one_device, tmp_path):
  changes = {"mesh.data": devices, **SETTINGS}
  _assert_same(train.run(tiny.config("classify", init_from=str(weights), **changes), tmp_path), one_device[1])


def test_the_batch_size_does_not_matter(weights, one_device, tmp_path):
  changes = {**SETTINGS, "eval.batch_size": 37}
  _assert_same(train.run(tiny.config("classify", init_from=str(weights), **changes), tmp_path), one_device[1])


PROCESS = """
import sys, pathlib, jax
from beit_jax import train
from tests import tiny, test_evaluate
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
changes = {"mesh.data": 8, "init_from": sys.argv[3], **test_evaluate.SETTINGS}
train.run(tiny.config("classify", **changes), pathlib.Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_two_processes_count_the_same(weights, one_device, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", PROCESS, address]
  both = [
    subprocess.Popen([*command, str(i), weights, tmp_path / "run"], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    for i in range(2)
  ]
  errors = [process.communicate(timeout=300)[1].decode() for process in both]
  assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
  _assert_same(json.loads((tmp_path / "run" / "eval.json").read_text()), one_device[1])
  lines = [(folder / "predictions.jsonl").read_text() for folder in (tmp_path / "run", one_device[0])]
  top = [[json.loads(line)["top"] for line in text.splitlines()] for text in lines]
  assert top[0] == top[1] and len(top[0]) == COUNT


def test_files_agree_with_the_metrics(one_device):
  """Accuracy, confusion matrix and predictions are three views of the same 1,003 guesses."""
  workdir, result = one_device
  rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
  right = sum(row["top"][0] == row["label"] for row in rows)
  assert right / COUNT == pytest.approx(result["eval"]["acc1"], abs=1e-9)
  assert 0 < right < COUNT and len({row["top"][0] for row in rows}) > 1
  assert sum(row["label"] in row["top"] for row in rows) / COUNT == pytest.approx(result["eval"]["acc5"])
  with (workdir / "confusion.csv").open() as file:
    names, *table = list(csv.reader(file))
  matrix = np.array([[int(cell) for cell in row[1:]] for row in table])
  wanted = np.zeros_like(matrix)
  for row in rows:
    wanted[names.index(row["label"]) - 1, names.index(row["top"][0]) - 1] += 1
  np.testing.assert_array_equal(matrix, wanted)
  with (workdir / "per_class.csv").open() as file:
    per_class = list(csv.DictReader(file))
  assert [int(row["correct"]) for row in per_class] == list(np.diag(matrix))
  assert [int(row["examples"]) for row in per_class] == list(matrix.sum(1))


def test_average_precision_by_hand():
  """Ranks 1, 3 and 4 of 5 are positive: (1/1 + 2/3 + 3/4) / 3."""
  score = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
  assert metrics.average_precision(score, np.array([1, 0, 1, 1, 0])) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
  # All scores alike enter together: precision = share of positives.
  assert metrics.average_precision(np.ones(5), np.array([1, 0, 1, 1, 0])) == pytest.approx(0.6)
  label = np.array([[1, 0], [0, 0], [1, 0], [1, 0], [0, 0]])
  both = np.stack([score, score], 1)
  assert metrics.mean_average_precision(both, label) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def _many_labels(folder):
  """40 images: red, green, blue, two of these, or none."""
  rng, rows = np.random.default_rng(0), []
  folder.mkdir()
  for i in range(40):
    present = rng.random(3) < 0.5
    pixels = (present * 200 + rng.integers(0, 40, (16, 16, 3))).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    rows.append(",".join([f"{i:02d}.png", *np.array(["red", "green", "blue"])[present]]))
  (folder / "labels.csv").write_text("\n".join(rows) + "\n")


MANY = {
  "data.source": "folder", "data.label_file": "labels.csv", "data.split": "", "eval.split": "train",
  "loss.label_smoothing": 0.0, "batch_size": 8,
}  # fmt: skip


@pytest.mark.slow
def test_several_labels_per_image(tmp_path):
  """60 steps memorize the data: mAP is near 1; the files list classes and scores."""
  _many_labels(tmp_path / "data")
  changes = {**MANY, "data.root": str(tmp_path / "data")}
  training = {"total_steps": 60, "data.crop": "center", "loss.mixup_alpha": 0.2, "optimizer.layer_decay": 1.0}
  result = train.run(
    tiny.config("classify", **changes, **training, **{"optimizer.learning_rate": 1e-2}), tmp_path / "run"
  )
  assert result["eval"]["mAP"] > 0.95 and "acc1" not in result["eval"]
  only = {**changes, "eval_only": True, "eval.predictions": True}
  again = train.run(tiny.config("classify", **only), tmp_path / "run")
  assert again["eval"]["mAP"] == pytest.approx(result["eval"]["mAP"])
  with (tmp_path / "run" / "per_class.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["class"] for row in rows] == ["blue", "green", "red"]
  assert np.mean([float(row["average_precision"]) for row in rows]) == pytest.approx(again["eval"]["mAP"])
  predictions = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
  assert len(predictions) == 40 and set(json.loads(predictions[0])) == {"index", "labels", "scores"}


def test_a_label_file_with_unknown_names(tmp_path):
  _many_labels(tmp_path / "data")
  (tmp_path / "data" / "labels.csv").write_text("99.png,red\n")
  with pytest.raises(UserError, match="99.png"):
    train.run(tiny.config("classify", **MANY, **{"data.root": str(tmp_path / "data")}), tmp_path / "run")


def test_rows_of_one_file_are_one_example(tmp_path):
  """Several rows per image, and a byte-order mark, as spreadsheets write them."""
  _many_labels(tmp_path / "data")
  (tmp_path / "data" / "labels.csv").write_text(
    "\ufeff00.png,red\n01.png,blue\n00.png,green\n", encoding="utf-8"
  )
  source = sources.FolderSource(str(tmp_path / "data"), "", "labels.csv")
  assert len(source) == 2 and source.class_names == ("blue", "green", "red")
  np.testing.assert_array_equal(source[0]["label"], [0, 1, 1])


def _by_class(folder, split, names):
  for name in names:
    (folder / split / name).mkdir(parents=True)
    for i in range(8):
      Image.new("RGB", (16, 16), {"a": "red", "b": "lime", "c": "blue", "d": "grey"}[name]).save(
        folder / split / name / f"{i}.png"
      )


@pytest.mark.slow
def test_classes_keep_their_numbers_in_another_split(tmp_path):
  """A model of a, b, c is evaluated on a folder with b and c only; a folder with d is refused."""
  _by_class(tmp_path / "data", "train", "abc")
  _by_class(tmp_path / "data", "val", "bc")
  _by_class(tmp_path / "data", "odd", "bd")
  data = {"data.source": "folder", "data.root": str(tmp_path / "data"), "eval.split": "val", "batch_size": 8}
  changes = {**data, "data.crop": "center", "total_steps": 40, "optimizer.layer_decay": 1.0}
  config = tiny.config("classify", **changes, **{"optimizer.learning_rate": 1e-2})
  result = train.run(config, tmp_path / "run")
  assert result["eval"]["acc1"] == 1.0
  again = train.run(tiny.config("classify", **data, eval_only=True), tmp_path / "run")
  assert again["eval"]["acc1"] == 1.0
  assert (tmp_path / "run" / "confusion.csv").read_text().splitlines()[0].endswith("a,b,c")
  for only in (True, False):
    with pytest.raises(UserError, match="'d'.* not among the 3"):
      odd = tiny.config("classify", **{**data, "eval.split": "odd"}, eval_only=only)
      train.run(odd, tmp_path / ("run" if only else "other"))


def test_another_number_of_classes_is_refused(tmp_path):
  with pytest.raises(UserError, match="data.num_classes.*21841 classes expected, found 8"):
    train.run(tiny.config("classify", **{"data.num_classes": 21841}), tmp_path)


def test_a_metric_that_is_not_finite_is_no_result(caplog):
  """During training it is a warning: an error would end each restart of the run at the same evaluation."""
  source = sources.ShapesSource("test", 4, 16)
  evaluate.check_finite({"loss": 1.0}, source)
  evaluate.check_finite({"loss": 1.0, "mIoU": float("nan")}, source, is_result=False)
  assert "mIoU=nan" in caplog.text
  with pytest.raises(UserError, match="mIoU=nan; either no example has a label that counts"):
    evaluate.check_finite({"loss": 1.0, "mIoU": float("nan")}, source)
