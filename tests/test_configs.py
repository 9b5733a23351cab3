"""Every config and variant in `configs/` is complete and documented, and its full-size steps can be traced."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from beit_jax import evaluate, objectives, train
from beit_jax import step as step_lib
from beit_jax.config import parse as config_lib
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.objectives import stages as stages_lib
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests.conftest import ROOT


def _variants(path):
  sys.path.insert(0, str(path.parent))
  try:
    spec = importlib.util.spec_from_file_location(f"variants_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
  return [f"{path.stem}:{name}" for name in getattr(module, "VARIANTS", ())] or [path.stem]


SPECS = [spec for path in sorted((ROOT / "configs").glob("*.py")) for spec in _variants(path)]
# Traced in the quick tests too; the others are slow.
QUICK = {
  "quickstart",
  "cifar10",
  "finetune_cifar10:full",
  "probe_cifar10",
  "own_images",
  "knn",
  "linear_probe",
  "finetune_folder",
  "segment_folder",
}
QUICK |= {"finetune_imagenet:base_pt1k", "finetune_imagenet:base_ft22k,384"}
CLASSES = {"imagenet2012": 1000, "cifar10": 10, "cifar100": 100}


def _load(spec):
  name, _, variant = spec.partition(":")
  path = f"{ROOT}/configs/{name}.py" + (f":{variant}" if variant else "")
  return config_lib.load(path, [], objectives.schemas())


def _stages(config):
  return {name: config[name] for name in config.stages} if "stages" in config else {"run": config}


@pytest.mark.parametrize("spec", SPECS)
def test_complete(spec):
  for stage in _stages(_load(spec)).values():
    assert stage.objective in objectives.OBJECTIVES


@pytest.mark.parametrize("name", ["beit_base", "configs/beit_base.py"])
def test_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(f"{name}:paper", [], objectives.schemas()).stages
  with pytest.raises(UserError, match="no such file; the ready-made ones are beit_base, .* quickstart"):
    config_lib.load("configs/beit_bas.py", [], objectives.schemas())
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "beit_base.py").write_text("def get_config():\n  return {'batch_size': 7}\n")
  assert config_lib.load_file("configs/beit_base.py") == {"batch_size": 7}  # the user's own file comes first


def test_a_built_package_has_the_configs(tmp_path):
  pytest.importorskip("setuptools")
  command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", "build"]
  subprocess.run([*command, f"--build-base={tmp_path}", f"--build-lib={tmp_path}/lib"], cwd=ROOT, check=True)
  code = "from beit_jax.config import parse; print(*parse.shipped().values(), sep='\\n')"
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path / "lib",
    env={**os.environ, "PYTHONPATH": ""},
    capture_output=True,
    text=True,
  )
  folder = (tmp_path / "lib" / "beit_jax" / "configs").resolve()
  assert found.stdout.split() == [
    str(folder / path.name) for path in sorted((ROOT / "configs").glob("*.py"))
  ], found


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_documented(path):
  """The docstring has the command and what to expect, and the recipes page lists the file."""
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert f"python -m beit_jax.main --config=configs/{path.stem}.py" in text
  assert "xpected" in text
  assert path.name in (ROOT / "docs" / "recipes.md").read_text()


def _commands():
  for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
    for block in re.findall(r"```\n(.*?)```", path.read_text(), re.S):
      for line in block.replace("\\\n", " ").splitlines():
        for command in re.findall(r"python3? -m beit_jax\.main ([^#|]*)", line):
          yield pytest.param(command, id=f"{path.name}: {command[:60]}")


@pytest.mark.parametrize("command", list(_commands()))
def test_documented_commands_have_configs(command, monkeypatch):
  """Every command in the documentation names an existing config, variant and keys, with values of the right type."""
  monkeypatch.chdir(ROOT)
  spec, _, overrides = config_lib.parse_args([a for a in shlex.split(command) if a != "..."])
  config_lib.load(spec, overrides, objectives.schemas())


class _Source(sources.Source):
  """A data source with as many classes as the config expects, and without images."""

  has_labels = True

  def __init__(self, data):
    self.num_classes = data.num_classes or CLASSES.get(data.name, 8) if data.label_key else 0
    self.class_names = tuple(map(str, range(self.num_classes)))
    self.map_class_names = ("a", "b", "c")
    self.description = {"source": "none"}

  def __len__(self):
    return 1_281_167


def _traced(module, kind, config, size):
  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
  data = config.data
  preprocessing = dict(mean=data.mean, std=data.std, image_size=size, crop_pct=data.crop_pct)
  preprocessing |= dict(interpolation=data.interpolation, resize=data.resize)
  return Pretrained(kind, params, module, preprocessing, {"path": "none"})


@pytest.mark.parametrize(
  "spec", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SPECS]
)
def test_a_train_step_and_an_eval_step_are_traced(spec, monkeypatch):
  """Frozen parts are replaced by shapes: of the tokenizer that the config trains, and of the encoder of a probe."""
  config, seen = _load(spec), set()
  runs = stages_lib.resolve(config, Path("runs"))
  stages = {run.name: run.config for run in runs}
  mesh = sharding.make_mesh(data=1)
  for run in runs:
    stage = run.config
    if (kind := _without_start_and_seed(run)) in seen:
      continue
    seen.add(kind)
    if stage.objective == "beit" and not run.uses:
      stage.tokenizer.init_from = "earlier stage"

    def load(path, stage=stage, run=run, **_):
      for earlier in run.uses.values():
        if str(earlier.folder) == path:
          return earlier.objective.expected_result(earlier.config)
      if stage.objective == "beit":
        # upernet_camvid uses the tokenizer of cifar10.
        own = stages if "tokenizer" in stages else _stages(_load("cifar10"))
        return objectives.objective_of(own["tokenizer"]).expected_result(own["tokenizer"])
      size = config_lib.pair(stage.data.image_size, "data.image_size")
      if stage.objective == "vqkd":  # of CLIP and DINO
        fields = dict(image_size=size, rel_pos="none", abs_pos=True, layer_scale_init=0.0)
        return _traced(make_module("backbone", fields), "backbone", stage, size)
      fields = objectives.encoder.encoder_fields(stage.model, size, pretrain=True)
      return _traced(make_module("mim", dict(encoder=fields)), "mim", stage, size)

    monkeypatch.setattr(weights_io, "load", load)
    _trace(stage, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["table1", "table4", "table8"])
def test_stages_of_the_papers_tables_fit_together(table):
  """Each starts from the result of an earlier one, whose model and pixels are those of its config."""
  runs = stages_lib.resolve(_load(f"{table}:imagenet"), Path("runs"))
  assert table != "table8" or all("path/to" not in json.dumps(run.config.to_dict()) for run in runs)
  checked = 0
  for run in runs:
    if "init_from" in run.uses:
      load = stages_lib.loader(run.uses.values())
      objective = run.objective(run.config, _Source(run.config.data), load)
      checked += bool(train.check_start(run, objective))
  assert checked >= 6


def _without_start_and_seed(run):
  """What decides the programs of a run: its config, but for its seed and for which run it starts from."""
  config = {**run.config.to_dict(), "seed": 0, "init_from": bool(run.config.init_from)}
  for section in ("tokenizer", "teacher"):  # these decide shapes
    if (earlier := run.uses.get(f"{section}.init_from")) is not None:
      config[section] = {**config[section], "init_from": earlier.config.objective}
  return json.dumps(config, default=str, sort_keys=True)


def _trace(config, mesh):
  source = _Source(config.data)
  objective = objectives.objective_of(config)(config, source)

  with jax.set_mesh(mesh):
    frozen = objective.frozen_params(mesh) if config.objective != "knn" else _bank(objective)
    frozen = jax.eval_shape(lambda: frozen) if not _abstract(frozen) else frozen

    def init():
      return objective.init(jax.random.key(0))

    variables = dict(jax.eval_shape(init))
    params = variables["params"]
    if objective.trains:
      per_epoch = len(source) // config.batch_size
      total = config_lib.duration(config, "total", per_epoch)
      schedules = step_lib.make_schedules(config, per_epoch, total)
      tx = step_lib.make_optimizer(config, schedules, params, objective.depth, objective.delayed)
      _, shapes, shardings = train_state.abstract(init, tx, mesh, ema=config.optimizer.ema_decay > 0)
      step = step_lib.make_train_step(objective, tx, config.microbatches, jax.random.key(0), shardings)
      state, metrics = jax.eval_shape(step, shapes, frozen, objective.batch_shapes(config.batch_size))
      assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, shapes)
      assert metrics["loss"].shape == ()
    eval_step, batch = (
      evaluate.make_eval_step(objective, mesh),
      objective.batch_shapes(config.eval.batch_size),
    )
    output = jax.eval_shape(eval_step, variables, frozen, batch)
    assert any(name.startswith(("loss", "acc1")) for name in output.metrics)


def _abstract(tree):
  return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _bank(objective):
  shape = (len(objective.blocks), 50_000, 2 * objective.encoder.width)
  bank, label = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((50_000,), jnp.int32)
  encoder = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), objective.encoder_params)
  return {"encoder": encoder, "bank": bank, "label": label}
