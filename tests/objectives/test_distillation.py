"""Runs of DINO: what does not change them, what they save, what a run starts from, and mistakes in their config."""

import shutil
import textwrap

import jax
import numpy as np
import pytest

import beit_jax
from beit_jax import train, trees
from beit_jax.data import sources, views
from beit_jax.data.images import LazyImage, train_views
from beit_jax.errors import UserError
from beit_jax.objectives.dino import SelfDistillation
from beit_jax.run import checkpoint, record
from beit_jax.runtime import sharding
from beit_jax.weights import dino as weights_dino
from beit_jax.weights import orbax
from tests import reference, tiny
from tests.runtime import test_distributed

STEPS = 7  # 6 steps an epoch


def _config(**changes):
  common = {"model.drop_path_rate": 0.0, "eval.split": "", "checkpoint.every_steps": 3, "checkpoint.keep": 9}
  return tiny.config("dino", **{**common, **changes})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """7 steps on one device; the last layer moves in the last one."""
  workdir = tmp_path_factory.mktemp("dino") / "run"
  train.run(_config(), workdir)
  return workdir


def _losses(workdir):
  return [row["loss"] for row in record.rows(workdir) if "loss" in row]


def _assert_same_run(workdir, other):
  np.testing.assert_allclose(_losses(workdir), _losses(other), rtol=1e-5)
  mine, theirs = (orbax.load_collections(folder)["teacher"] for folder in (workdir, other))
  np.testing.assert_allclose(mine["center"], theirs["center"], atol=1e-5)
  mine, theirs = trees.flatten(mine["params"]), trees.flatten(theirs["params"])
  for name in theirs:
    np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, err_msg=name)


# What does not change a run.


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, microbatches", [(8, 1, 1), (2, 4, 1), (1, 1, 4), (2, 4, 2)])
def test_mesh_and_microbatches_do_not_change_the_run(
  data, fsdp, microbatches, whole_run, tmp_path, monkeypatch
):
  """Losses, center and teacher. The center is one of the global batch."""
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)
  train.run(_config(**{"mesh.data": data, "mesh.fsdp": fsdp, "microbatches": microbatches}), tmp_path)
  _assert_same_run(tmp_path, whole_run)


@pytest.mark.slow
def test_two_processes_give_the_same_run(tmp_path):
  config = tmp_path / "config.py"
  text = """
    from tests import tiny

    def get_config():
      return tiny.raw("dino", **{"mesh.data": 8, "model.drop_path_rate": 0.0})
  """
  config.write_text(textwrap.dedent(text))
  for count in (1, 2):
    test_distributed._train(config, tmp_path / str(count), count)
  _assert_same_run(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("stop", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_stop_and_resume_is_bit_identical(stop, whole_run, tmp_path):
  workdir = tmp_path / "resumed"
  shutil.copytree(whole_run, workdir)
  for step in checkpoint.steps(workdir / "checkpoints"):
    if step > stop:
      shutil.rmtree(workdir / "checkpoints" / str(step))
  (workdir / "result.json").unlink()
  train.run(_config(), workdir)
  assert _losses(workdir) == _losses(whole_run)
  for item in ("params", "rest"):
    mine, theirs = (
      checkpoint.load_params(folder / "checkpoints" / str(STEPS), item) for folder in (workdir, whole_run)
    )
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_the_last_layer_is_frozen_in_the_first_epoch(whole_run):
  """Neither weights nor moments of it change; the rest does, and the teacher is not the student."""
  three, six, end = (orbax.load(whole_run, step=step, whole=True) for step in (3, 6, STEPS))

  def same(one, other, name):
    return np.array_equal(*(trees.flatten(model.params)[name] for model in (one, other)))

  assert same(three, six, "head/last_layer/kernel") and not same(six, end, "head/last_layer/kernel")
  assert not same(three, six, "head/mlp_2/kernel")
  teacher, student = end.collections["teacher"]["params"], end.params
  assert not np.array_equal(teacher["encoder"]["pos_embed"], student["encoder"]["pos_embed"])


# What a run saves, and what it starts from.


def test_a_run_loads_as_the_backbone_of_its_teacher(whole_run, tmp_path):
  model = beit_jax.load(whole_run)
  assert model.kind == "backbone" and model.description["part_of"] == "dino"
  teacher = orbax.load_collections(whole_run)["teacher"]["params"]["encoder"]
  jax.tree.map(np.testing.assert_array_equal, model.params, teacher)
  image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  features = model(image)
  assert features.shape == (2, 65, 32)
  beit_jax.save(model, tmp_path / "model.pth", format="timm")
  again = beit_jax.load(tmp_path / "model.pth", num_heads=2)
  np.testing.assert_allclose(again(image), features, atol=1e-5)


@pytest.mark.slow
def test_fine_tuning_and_probes_start_from_a_run(whole_run, tmp_path):
  changes = {"total_steps": 1, "init_from": str(whole_run), "model.preset": "paper"}
  config = tiny.config("classify", **changes, **{"eval.split": ""})
  train.run(config, tmp_path / "finetune")
  knn = tiny.config("knn", **{"encoder.init_from": str(whole_run), "model.preset": "paper"})
  assert 0 <= train.run(knn, tmp_path / "knn")["eval"]["acc1"] <= 1


def _start(path, **changes):
  """The state in which a run with `init_from` starts, by collection."""
  config = _config(**changes)
  objective = SelfDistillation(config, sources.make_source(config.data.to_dict()))
  fresh = jax.jit(objective.init)(jax.random.key(7))
  pretrained = objective.load_start(str(path))
  found = objective.adapt(pretrained, fresh["params"])
  params = trees.unflatten(
    {name: found.get(name, leaf) for name, leaf in trees.flatten(fresh["params"]).items()}
  )
  return {"params": params, **objective.adapt_collections(pretrained, params, {"teacher": fresh["teacher"]})}


def test_a_run_goes_on_with_the_state_of_another(whole_run):
  whole, start = weights_dino.load(str(whole_run)), _start(whole_run)
  jax.tree.map(np.testing.assert_array_equal, start["params"], whole.params)
  jax.tree.map(np.testing.assert_array_equal, start["teacher"], whole.collections["teacher"])
  with pytest.raises(UserError, match="the head of .* does not fit, since head/last_layer/kernel differ"):
    _start(whole_run, **{"model.outputs": 41})


def test_a_run_from_a_backbone_starts_with_equal_networks(whole_run, tmp_path):
  beit_jax.save(beit_jax.load(whole_run), tmp_path / "backbone", format="orbax")
  start = _start(tmp_path / "backbone")
  jax.tree.map(np.testing.assert_array_equal, start["params"], start["teacher"]["params"])
  assert not np.any(start["teacher"]["center"])


@pytest.mark.slow
def test_training_starts_from_a_run(whole_run, tmp_path):
  train.run(
    _config(**{"total_steps": 1, "init_from": str(whole_run), "checkpoint.every_steps": None}), tmp_path
  )
  start, end = (
    weights_dino.load(str(whole_run)).collections["teacher"],
    orbax.load_collections(tmp_path)["teacher"],
  )
  difference = np.abs(end["center"] - 0.9 * start["center"]).max()
  assert 0 < difference < 0.11 and np.any(start["center"])  # outputs lie in [-1, 1]


@pytest.mark.slow
def test_evaluation_of_a_checkpoint(whole_run, tmp_path):
  config = _config(**{"eval_only": True, "init_from": str(whole_run), "eval.split": "test"})
  first = train.run(config, tmp_path)["eval"]
  assert np.isfinite(first["loss"]) and first["teacher_entropy"] > 0
  assert train.run(config, tmp_path / "again")["eval"] == first


# The full checkpoint of the reference.


def _full_checkpoint(path, **changes):
  """The golden weights in the form in which main_dino.py saves them."""
  torch = pytest.importorskip("torch")
  arrays, config = reference.load("dino")
  parts = {}
  for who, wrapper in (("student", "module."), ("teacher", "")):
    state = {**reference.section(arrays, f"param/{who}/"), **changes.get(who, {})}
    parts[who] = {wrapper + name: torch.tensor(value) for name, value in state.items()}
  center = {"center": torch.tensor(arrays["in/center"])}
  torch.save({**parts, "optimizer": {"state": {}}, "epoch": 3, "dino_loss": center}, path)
  return arrays, config


GOLDEN = {
  "data.image_size": 32,
  "local.image_size": 16,
  "model.width": 48,
  "model.num_heads": 4,
  "model.patch_size": 8,
}


def test_a_full_checkpoint_of_the_reference(tmp_path, monkeypatch):
  """Loads as a backbone, and as a run to go on with, whose outputs are the golden ones."""
  path = tmp_path / "dino_full_checkpoint.pth"
  arrays, config = _full_checkpoint(path)
  image = arrays["in/global_0"].transpose(0, 2, 3, 1)
  backbone = beit_jax.load(path, num_heads=4)
  assert backbone.kind == "backbone"
  load = weights_dino.weights_io.load
  monkeypatch.setattr(weights_dino.weights_io, "load", lambda path, **k: load(path, **{**k, "num_heads": 4}))
  whole = weights_dino.load(str(path))
  assert whole.kind == "dino"
  views = [np.stack([arrays["in/global_0"], arrays["in/global_1"]], 1).transpose(0, 1, 3, 4, 2)]
  for params, name in ((whole.collections["teacher"]["params"], "teacher"), (whole.params, "student")):
    found = np.asarray(jax.jit(whole.module.project)(params, views)).swapaxes(0, 1).reshape(-1, config["out"])
    np.testing.assert_allclose(found, arrays[f"out/{name}"][: len(found)], atol=5e-5)
  np.testing.assert_array_equal(whole.collections["teacher"]["center"], arrays["in/center"][0])
  cls = backbone.forward(image)[:, 0]
  np.testing.assert_array_equal(cls, whole.loaded.forward(image)[:, 0])
  start = _start(path, **GOLDEN, **{"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)})
  jax.tree.map(np.testing.assert_array_equal, start["params"], whole.params)
  jax.tree.map(np.testing.assert_array_equal, start["teacher"], whole.collections["teacher"])


def test_a_trained_gain_is_refused(tmp_path, monkeypatch):
  path = tmp_path / "full.pth"
  _full_checkpoint(path, student={"head.last_layer.weight_g": np.full((40, 1), 1.5, np.float32)})
  load = weights_dino.weights_io.load
  monkeypatch.setattr(weights_dino.weights_io, "load", lambda path, **k: load(path, **{**k, "num_heads": 4}))
  with pytest.raises(
    UserError, match=r"the student's head has a gain that was trained \(norm_last_layer=False\)"
  ):
    weights_dino.load(str(path))
  assert beit_jax.load(path, num_heads=4).kind == "backbone"


def test_what_later_stages_expect_is_the_backbone(whole_run):
  expected, found = SelfDistillation.expected_result(_config()).loaded, beit_jax.load(whole_run)
  assert (expected.kind, expected.module) == (found.kind, found.module)
  assert jax.tree.map(lambda x: x.shape, expected.params) == jax.tree.map(lambda x: x.shape, found.params)


# Views.

CROPS = {"global": views.Crops(2, (16, 12), (0.4, 1.0)), "local": views.Crops(3, (8, 8), (0.05, 0.4))}


def _options(**changes):
  return {**tiny.config("dino").data.to_dict(), **changes}


def test_every_crop_has_its_own_box(monkeypatch):
  """The crops are those of `train_views` with one generator, and a function of (seed, epoch, index)."""
  pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
  reader = views.MultiCropReader(CROPS, _options())
  found = reader.train(LazyImage(pixels), {}, (0, 1, 2))
  assert {name: value.shape for name, value in found.items()} == {
    "global": (2, 16, 12, 3),
    "local": (3, 8, 8, 3),
  }
  rng = np.random.default_rng((0, 1, 2, 2))
  how = dict(crop="random_resized", ratio=(3 / 4, 4 / 3), flip=True)
  for name, crops in CROPS.items():
    for crop in found[name]:
      one = train_views(pixels, rng, {"x": (crops.size, "bicubic")}, scale=crops.scale, **how)
      np.testing.assert_array_equal(crop, one["x"])
  other = reader.train(LazyImage(pixels), {}, (0, 2, 2))
  assert not np.array_equal(found["global"], other["global"])
  again = [reader.eval(LazyImage(pixels), {"index": 5})["local"] for _ in range(2)]
  np.testing.assert_array_equal(*again)


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"local.image_size": 7}, r"'local.image_size': \(7, 7\) is not divisible by model.patch_size=2; .* \(8, 8\)"),
    ({"model.preset": "plus"}, "'model.rel_pos': 'shared', but views of several sizes need absolute positions: 'none'"),
    ({"model.abs_pos": False}, "'model.abs_pos': False, but"),
    ({"local.image_size": -8}, "'local.image_size': -8 must be a whole number from 1"),
    ({"optimizer.ema_decay": 0.9}, "'optimizer.ema_decay': the teacher is the average"),
    ({"data.crop": "pad"}, "'data.crop': 'pad', but with several crops of an image it must be 'random_resized'"),
    ({"data.rand_augment": "rand-m9"}, "'data.rand_augment': 'rand-m9', but with several crops"),
    ({"optimizer.clip": "layer"}, "'optimizer.clip': 'layer' must be one of global, tensor"),
    ({"augment.solarize": (0.0, 2.0, 0.0)}, r"'augment.solarize': \(0.0, 2.0, 0.0\) must be three numbers in \[0, 1\]"),
    ({"loss.teacher_temperature": 0.0}, "'loss.teacher_temperature': 0.0 must"),
  ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_step(changes, fact):
  with pytest.raises(UserError, match=fact):
    train.prepare(_config(**changes), sharding.make_mesh(1, 1))


def test_without_local_views():
  config = _config(**{"local.count": 0, "local.image_size": 7})
  objective = SelfDistillation(config, sources.make_source(config.data.to_dict()))
  assert set(objective.batch_shapes(4)) == {"global_crops", "example_key", "valid"}
