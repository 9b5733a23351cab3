"""Targets of masked image modeling: pixels, all patches, no mask; runs with pixels and with patch aggregation."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import beit_jax
from beit_jax import optim, tokenize, train, trees
from beit_jax.config import parse
from beit_jax.data import drawing, sources
from beit_jax.errors import UserError
from beit_jax.models import layers
from beit_jax.models.beit import BeitForMaskedImageModeling
from beit_jax.objectives import objective_of, schemas, stages
from beit_jax.predict import __main__ as predict_main
from beit_jax.run import checkpoint
from beit_jax.runtime import sharding
from tests import tiny
from tests.test_train import _assert_bit_identical, _assert_same_run, _losses


def _objective(name, **changes):
  config = tiny.config(name, **changes)
  return objective_of(config)(config, sources.make_source(config.data.to_dict()))


def _batch(objective, size=4):
  """Random pixels; the last example does not count."""
  rng = np.random.default_rng(0)
  batch = {
    name: rng.integers(0, 256, spec.shape).astype(spec.dtype)
    for name, spec in objective.batch_shapes(size).items()
  }
  return {name: jnp.asarray(value) for name, value in batch.items()} | {"valid": jnp.arange(size) < size - 1}


def test_patches_are_in_row_major_order():
  image = np.random.default_rng(0).random((2, 6, 8, 3), np.float32)
  patches = layers.patches_of(jnp.asarray(image), 2)
  assert patches.shape == (2, 12, 12)
  np.testing.assert_array_equal(patches[1, 5], image[1, 2:4, 2:4].ravel())
  np.testing.assert_array_equal(layers.image_from_patches(patches, image.shape, 2), image)


@pytest.mark.parametrize("recover", ["masked", "all"])
@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("normalize", [False, True])
def test_loss_of_pixels_by_hand(kind, normalize, recover):
  """Patch by patch in float64, with the predictions of the model."""
  changes = {"loss.pixels": kind, "model.normalize_patches": normalize, "recover": recover}
  objective = _objective("beit_pixels", **changes)
  variables, batch = objective.init(jax.random.key(0)), _batch(objective)
  metrics = objective.eval_step(variables, {}, batch).metrics
  data = objective.config.data
  image = (np.asarray(batch["image"], np.float64) / 255 - np.array(data.mean)) / np.array(data.std)
  mask = np.asarray(objective.masks(batch))
  predicted = np.asarray(objective.module.apply(variables, jnp.asarray(image, jnp.float32), mask), np.float64)
  total, count = 0.0, 0
  for b in range(3):
    for i, (y, x) in enumerate(np.ndindex(8, 8)):
      if recover == "masked" and not mask[b, y, x]:
        continue
      wanted = image[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel()
      if normalize:
        wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var() + 1e-6)
      difference = predicted[b, i] - wanted
      total += (np.abs(difference) if kind == "l1" else difference**2).mean()
      count += 1
  assert float(metrics["loss"].n) == count == 3 * (64 if recover == "all" else 25)
  assert float(metrics["loss"].total) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_true_targets_give_back_the_image(normalize):
  module = _objective("beit_pixels", **{"model.normalize_patches": normalize}).module
  image = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)
  np.testing.assert_allclose(module.recovered(module.targets(image), image), image, atol=1e-5)


def test_without_masking(tokenizer_run):
  """The encoder sees every patch, and the head predicts the tokens of all."""
  changes = {"mask.kind": "none", "recover": "all", "tokenizer.init_from": str(tokenizer_run)}
  changes["mask.num_masked"] = 75  # the default, more than there are patches; it has no meaning here
  objective = _objective("beit", **changes)
  variables, batch = objective.init(jax.random.key(0)), _batch(objective)
  frozen = objective.frozen_params(None)
  metrics = objective.eval_step(variables, frozen, batch).metrics
  logits = objective.module.apply(variables, objective.normalized(batch["image"] / 255.0))
  assert not objective.masks(batch).any()
  targets = objective._tokens(frozen, batch["token_image"] / 255.0)
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[:3]
  assert float(metrics["loss"].n) == 3 * 64
  assert float(metrics["loss"].total) == pytest.approx(float(nll.sum()), rel=1e-5)


def test_figures_show_what_is_recovered(monkeypatch):
  shown = {}
  monkeypatch.setattr(
    drawing, "labeled_rows", lambda rows: shown.update(rows) or np.zeros((1, 1, 3), np.uint8)
  )
  for recover in ("masked", "all"):
    objective = _objective("beit_pixels", recover=recover)
    batch = _batch(objective)
    objective.figures(objective.init(jax.random.key(0)), {}, batch)
    kept = (shown["recovered pixels"] == shown["image"]).all(-1)
    mask = np.asarray(objective.masks(batch)).repeat(2, 1).repeat(2, 2)
    assert kept[~mask].all() == (recover == "masked") and not kept[mask].all()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("beit_pixels", {"mask.kind": "none"}, "'mask.kind': 'none' masks no patch.* set recover='all'"),
    ("beit_pixels", {"tokenizer.cache": "x"}, "'tokenizer.cache': 'x' belongs to target='tokens'"),
    ("beit_pixels", {"model.head_blocks": 2}, "'model.head_blocks': 2 belongs to target='tokens'"),
    ("beit_pixels", {"model.vocab_size": 16}, "'model.vocab_size': 16 belongs to target='tokens'"),
    ("beit", {"model.normalize_patches": True}, "'model.normalize_patches': True belongs to target='pixels'"),
    ("beit_v2", {"recover": "all"}, "'recover': 'all' with model.head_blocks=2.* masked patches only"),
    ("beit_v2", {"model.early_block": 3}, "'model.early_block': 3 .* early block from 1 to 2"),
    ("beit_v2", {"model.early_block": 0}, "'model.early_block': 0 with model.head_blocks=2"),
    ("beit_v2", {"model.head_blocks": 0}, "'model.early_block': 1 with model.head_blocks=0"),
  ],
)
def test_mistakes_are_found_before_the_first_step(name, changes, message, tokenizer_run):
  changes = {"tokenizer.init_from": str(tokenizer_run), **changes}
  with pytest.raises(UserError, match=f"config key {message}"):
    _objective(name, **changes)


@pytest.mark.parametrize("key", ["target", "recover", "loss.pixels", "mask.kind"])
def test_unknown_choices_are_refused(key):
  with pytest.raises(UserError, match=f"config key '{key}': 'x' must be one of"):
    tiny.config("beit_pixels", **{key: "x"})


def test_pixels_need_no_tokenizer(tmp_path):
  """Neither a stage for it, although `tokenizer.init_from` names one by default, nor its view, nor a cache."""
  config = ConfigDict({"stages": ("pretrain",), "summary": (), "seed": 0})
  config.pretrain = parse.complete(tiny.raw("beit_pixels"), schemas(), "pretrain")
  (stage,) = stages.resolve(config, tmp_path)
  assert not stage.uses and stage.objective.frozen_sections == ()
  objective = _objective("beit_pixels")
  assert objective.views().keys() == {"image"} and objective.frozen_params(None) == {}
  assert "tokenizer" not in objective.describe()
  with pytest.raises(UserError, match="--stage=: name one of the stages that use a tokenizer, "):
    tokenize._choose_run(config, "", tmp_path)
  with pytest.raises(UserError, match="'beit' with target='pixels' uses no visual tokens"):
    tokenize._choose_run(config.pretrain, "", tmp_path)


# --- runs -----------------------------------------------------------------------------------------

RUNS = ("beit_pixels", "beit_v2")


@pytest.fixture(scope="module", params=RUNS)
def run(request, tokenizer_run, tmp_path_factory):
  """(config of a change, folder of 6 steps with a checkpoint at 3, result)."""

  def config(**changes):
    return tiny.config(
      request.param,
      **{"tokenizer.init_from": str(tokenizer_run), "checkpoint.every_steps": 3, "figures": True, **changes},
    )

  workdir = tmp_path_factory.mktemp(request.param)
  return config, workdir, train.run(config(), workdir)


@pytest.mark.slow
def test_stop_and_resume_is_bit_identical(run, tmp_path):
  config, workdir, result = run
  resumed = tmp_path / "resumed"
  shutil.copytree(workdir, resumed)
  shutil.rmtree(resumed / "checkpoints" / "6")
  (resumed / "result.json").unlink()
  assert train.run(config(), resumed)["eval"] == result["eval"]
  _assert_bit_identical(resumed, workdir)
  np.testing.assert_array_equal(_losses(resumed), _losses(workdir))


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes", [{"mesh.data": 2, "mesh.fsdp": 4}, {"model.scan": True, "model.remat": True}], ids=str
)
def test_mesh_scan_and_remat_do_not_change_the_run(changes, run, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)
  config, workdir, _ = run
  train.run(config(**changes), tmp_path / "other")
  _assert_same_run(tmp_path / "other", workdir)


@pytest.mark.slow
def test_fine_tuning_starts_from_it(run, tmp_path):
  """The encoder is copied; the heads, and the blocks of patch aggregation, are dropped."""
  _, workdir, _ = run
  changes = {"optimizer.learning_rate": 0.0, "optimizer.min_lr": 0.0}
  train.run(tiny.config("classify", init_from=str(workdir), total_steps=1, **changes), tmp_path)
  before, after = (
    trees.flatten(checkpoint.load_params(checkpoint.find(path))) for path in (workdir, tmp_path)
  )
  for name in ("encoder/block_01/mlp/fc1/kernel", "encoder/patch_embed/kernel"):
    np.testing.assert_array_equal(before[name], after[name])
  assert not [name for name in after if name.startswith(("head_", "pixel_head", "lm_head"))]


def test_what_a_run_says_of_its_model(run):
  config, workdir, result = run
  text = json.loads((checkpoint.find(workdir) / "description.json").read_text())
  model = beit_jax.load(workdir)
  assert model.kind == text["kind"] and (workdir / "figures" / "masked_image_modelling.png").exists()
  uses_pixels = config().target == "pixels"
  assert text["kind"] == ("mim_pixels" if uses_pixels else "mim")
  wanted = dict(normalize_patches=True) if uses_pixels else dict(early_block=1, head_blocks=2)
  assert wanted.items() <= text["module"].items() and ("tokenizer" in text) != uses_pixels
  names = {"loss"} if uses_pixels else {"loss", "mim_acc", "head_loss", "head_acc"}
  assert names == set(result["eval"])
  outputs = 12 if uses_pixels else 16
  assert model(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 64, outputs)


def test_predicted_pixels_are_drawn(run, tmp_path, capsys):
  config, workdir, _ = run
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / "a.png")
  argv = [str(workdir), str(tmp_path / "a.png"), f"--out={tmp_path / 'out'}", "--json"]
  assert predict_main.main(argv) == 0
  (facts,) = json.loads(capsys.readouterr().out)
  key = "mean_absolute_error" if config().target == "pixels" else "tokens_right"
  assert facts["masked_patches"] > 0 and facts[key] >= 0 and (tmp_path / "out").is_dir()


def test_rules_for_the_blocks_of_patch_aggregation():
  """As for other heads: the full learning rate, weight decay of kernels only, kernels sharded."""
  encoder = dict(image_size=(8, 8), patch_size=4, width=8, depth=2, num_heads=2)
  module = BeitForMaskedImageModeling(encoder, 16, 1, 2)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  names = [name for name in trees.flatten(shapes) if name.startswith("head_block_")]
  assert len(names) == 2 * 15 and {optim.layer_id(name, 2) for name in names} == {3}
  decays = trees.flatten(optim.weight_decay_tree(shapes))
  assert {name.split("/")[-1] for name in names if decays[name]} == {"kernel"}
