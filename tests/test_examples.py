"""The notebooks in examples/ run, and the console script runs every command."""

import inspect
import os
import runpy
import subprocess
import sys
import sysconfig
import venv

import jax
import numpy as np
import pytest

import beit_jax
from beit_jax import __main__ as console
from beit_jax.weights.kinds import make_module, variable_shapes
from beit_jax.weights.pretrained import Pretrained
from tests.conftest import ROOT
from tests.test_layout import ROWS

SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "beit_jax", "configs")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_look_inside(tokenizer_run, tmp_path, monkeypatch, capsys):
  fields = dict(image_size=(16, 16), patch_size=2, width=16, depth=2, num_heads=2)
  module = make_module("mim", dict(encoder=fields, vocab_size=16))
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32)
  params = jax.tree.map(draw, variable_shapes(module, (16, 16))["params"])
  preprocessing = dict(
    mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(16, 16), crop_pct=1.0, resize="short_side"
  )
  model = Pretrained("mim", params, module, {**preprocessing, "interpolation": "bicubic"})
  beit_jax.save(model, tmp_path / "pretrain", format="orbax")
  (tmp_path / "tokenizer").symlink_to(tokenizer_run)
  monkeypatch.setenv("RUN", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  found = runpy.run_path(str(ROOT / "examples" / "look_inside.py"))
  assert found["sheet"].size[0] > 300 and (tmp_path / "look_inside.png").exists()
  assert list(found["rows"]) == [
    "image",
    "decoded from its tokens",
    "masked",
    "predicted",
    "attention of the middle",
  ]
  text = capsys.readouterr().out
  assert (
    "64 tokens per image" in text
    and "block 1: nearest neighbor" in text
    and "sums of rows from 1.000 to 1.000" in text
  )


@pytest.mark.slow
def test_own_loop(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("STEPS", "12")
  monkeypatch.setenv("OUT", str(tmp_path / "own"))
  runpy.run_path(str(ROOT / "examples" / "own_loop.py"))
  text = capsys.readouterr().out
  assert (
    "step 11: loss" in text and "accuracy on 32 test scenes" in text and f"from: {tmp_path / 'own'}" in text
  )
  assert beit_jax.load(tmp_path / "own").description["labels"][0] == "disc"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_in_percent_format(path):
  """Each cell begins with a marker; a title comes first."""
  cells = path.read_text().split("# %%")
  assert cells[0] == "" and cells[1].startswith(" [markdown]\n# # ")
  assert all(
    line.startswith("#") for cell in cells if "[markdown]" in cell for line in cell.split("\n")[1:] if line
  )


# What a notebook shows of a model.


def test_repr_has_three_lines():
  preprocessing = dict(mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(16, 24))
  encoder = dict(image_size=(16, 24), patch_size=2, width=16, depth=2, num_heads=4)
  module = make_module("classifier", dict(encoder=encoder, num_classes=1200))
  model = Pretrained(
    "classifier", {"a": np.zeros((1000, 2))}, module, preprocessing, dict(path="runs/x", step=6)
  )
  assert repr(model).split("\n") == [
    "classifier: 2 blocks of width 16, 4 heads, patches of 2, 1,200 classes; 2,000 parameters",
    "images: 16x24x3, mean 0.5 0.5 0.5, std 0.25 0.25 0.25",
    "from: runs/x, step 6",
  ]
  tokenizer = Pretrained("tokenizer", {}, make_module("tokenizer", dict(vocab_size=16)), preprocessing)
  assert repr(tokenizer).startswith("tokenizer: Dvae, 16 words; 0 parameters") and repr(tokenizer).endswith(
    "from: memory"
  )


def test_help_is_complete():
  """Every argument of `load`, `save` and the methods of a model is described."""
  methods = [
    value for name, value in vars(Pretrained).items() if name[0] != "_" and inspect.isfunction(value)
  ]
  for function in (beit_jax.load, beit_jax.save, *methods):
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    text = inspect.getdoc(function) or ""
    assert text, function
    missing = [name for name in names if f"{name}:" not in text and len(names) > 1]
    assert not missing, (function, missing)


# The console script.


def test_every_command_is_listed(monkeypatch, capsys):
  assert set(console.COMMANDS) == set(ROWS[0]) - {"__init__", "__main__"}
  monkeypatch.setattr(sys, "argv", ["beit-jax"])
  console.main()
  text = capsys.readouterr().out
  assert all(f"  {name} " in text for name in console.COMMANDS)


def test_unknown_commands_are_refused(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["beit-jax", "trian"])
  with pytest.raises(SystemExit) as stopped:
    console.main()
  assert stopped.value.code == 2 and "error: 'trian' is not a command" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_of_an_installed_wheel_runs_every_command(tmp_path):
  """A wheel, built here and installed in a fresh environment, which takes only its dependencies from this one."""
  pytest.importorskip("setuptools", reason="setuptools builds the wheel")
  build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  source = tmp_path / "source"  # a build writes beside the sources
  source.mkdir()
  subprocess.run(["cp", "-r", "--parents", *SOURCES, source], cwd=ROOT, check=True)
  subprocess.run([*build, "-w", tmp_path, source], check=True)
  (wheel,) = tmp_path.glob("*.whl")
  venv.create(tmp_path / "venv", with_pip=False)
  folder = tmp_path / "venv" / "bin"
  target = [f"--prefix={tmp_path / 'venv'}", "--quiet", "--no-deps", "--ignore-installed"]
  subprocess.run([sys.executable, "-m", "pip", "install", *target, wheel], check=True)
  script = (folder / "beit-jax").read_text().split("\n", 1)[1]
  (folder / "beit-jax").write_text(f"#!{folder / 'python'}\n{script}")
  env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "JAX_PLATFORMS": "cpu"}

  code = "import beit_jax; print(beit_jax.__file__)"
  where = subprocess.check_output([folder / "python", "-c", code], cwd=tmp_path, env=env, text=True)
  assert where.startswith(str(tmp_path / "venv"))

  def run(*words):
    done = subprocess.run(
      [folder / "beit-jax", *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr

  for name in console.COMMANDS:
    status, text = run(name, "--help")
    assert status == 0 and f"beit_jax.{name}" in text, (name, text)
  assert run("convert", "nowhere", "out", "--format=orbax")[0] == 2
  config = {"total_steps": 2, "optimizer.warmup_steps": 0, "figures": False}
  config |= {"data.num_examples": 64, "eval.num_examples": 32}
  flags = [f"--config.{key}={value}" for key, value in config.items()]
  status, text = run("main", "--config=quickstart", "--config.stages=('scratch',)", "--workdir=run", *flags)
  assert status == 0 and "done in" in text, text
