"""A folder made of everything at once: it trains, evaluates and predicts, and the log accounts for every file."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from beit_jax import main as main_lib
from beit_jax.predict import __main__ as predict
from tests import tiny
from tests.commands.test_main import _config_file

LATIN = os.fsdecode(b"k\xe4fer")  # not UTF-8


def _pixels(rng, mode):
  channels = {"RGBA": 4, "LA": 2}.get(mode, 3)
  array = rng.integers(0, 256, (int(rng.integers(18, 40)), int(rng.integers(18, 40)), channels), np.uint8)
  if mode == "I;16":
    return Image.fromarray(array[..., 0].astype(np.uint16) * 257)
  return Image.fromarray(array[..., 0] if mode == "L" else array).convert(mode)


def _save(rng, path, kind, mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as file:
    _pixels(rng, mode).save(file, kind)


def make_folder(root):
  """Writes the folder.

  Returns:
    (the number of images that are used, the number of everything else).
  """
  rng = np.random.default_rng(0)
  kinds = [
    ("1.png", "PNG", "RGBA"),
    ("2.tif", "TIFF", "I;16"),
    ("3.PNG", "PNG", "I;16"),
    ("4.png", "PNG", "P"),
    ("5.png", "PNG", "LA"),
    ("6.jfif", "JPEG", "L"),
    ("7.jpe", "JPEG", "RGB"),
    ("8", "WEBP", "RGB"),
    ("a b/9.gif", "GIF", "P"),
    ("10.bmp", "BMP", "RGB"),
  ]
  for folder in ("bee", LATIN, "../elsewhere"):
    for name, kind, mode in kinds:
      _save(rng, root / folder / name, kind, mode)
  (root / "cat").symlink_to("../elsewhere")
  (root / "bee" / "linked.png").symlink_to("../../elsewhere/1.png")
  left_out = {
    "bee/up": "../..",  # a loop
    "bee/gone.png": "nowhere",
    ".ipynb_checkpoints/1-checkpoint.png": "PNG",
    "bee/.ipynb_checkpoints/1-checkpoint.png": "PNG",
    "__MACOSX/bee/1.png": "PNG",
    "bee/._1.png": "text",
    "bee/Thumbs.db": "text",
    "labels.csv": "text",
    "README": "text",
    "drafts/notes.txt": "text",
  }
  for name, content in left_out.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == "PNG":
      _save(rng, path, "PNG")
    elif content == "text":
      path.write_text("Python and other text")
    else:
      path.symlink_to(content)
  return 3 * len(kinds) + 1, len(left_out)


def _left_out(text, folder):
  """Adds up the lines of one listing in a log, apart from that of folders without an image."""
  name = str(folder).encode(errors="backslashreplace").decode()
  lines = dict.fromkeys(re.findall(rf"{re.escape(name)}: (\d+ .*?) left out", text))
  return sum(int(line.split()[0]) for line in lines if "folders without" not in line)


@pytest.mark.slow
def test_a_folder_of_everything_trains_evaluates_and_predicts(tmp_path, capsys):
  root, run = tmp_path / LATIN / "images", tmp_path / "run"
  count, others = make_folder(root)
  changes = {
    "data.source": "folder",
    "data.root": str(root),
    "batch_size": 8,
    "total_steps": 2,
    "figures": True,
  }
  parts = {"data.split": "train[20%:]", "eval.split": "train[:20%]"}
  config = _config_file(tmp_path / "config.py", tiny.raw("classify", **changes, **parts))
  flags = [f"--config={config}", f"--workdir={run}"]
  assert main_lib.main(flags) == 0
  result = json.loads((run / "result.json").read_text())
  assert result["examples"] == count - 7 and result["bad_images"] == 0 and "acc1" in result["eval"]
  log = (run / "log.txt").read_text()
  assert _left_out(log, root) == others and "1 folders without an image left out: drafts (1)" in log

  evaluation = ["--config.eval_only=true", "--config.eval.predictions=true", "--config.eval.split=train"]
  assert main_lib.main([*flags, *evaluation]) == 0
  rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
  assert json.loads((run / "eval.json").read_text())["examples"] == count == len(rows)
  assert {row["label"] for row in rows} == {"bee", "cat", LATIN}
  table = (run / "per_class.csv").read_text()
  assert "k\\udce4fer,10," in table and "bee,11," in table

  capsys.readouterr()
  assert predict.main([str(run), str(root), "--json"]) == 0
  out, err = capsys.readouterr()
  facts = json.loads(out)
  assert len(facts) == count and not any("error" in fact for fact in facts)
  assert _left_out(err, root) == others
