"""Training of BEiT v2's tokenizer: the same on every mesh, resumed to the bit, with any teacher, and used by `beit`."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import tokenize, train, trees
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.models.beit import Beit
from beit_jax.objectives import OBJECTIVES, stages
from beit_jax.predict import __main__ as predict
from beit_jax.run import checkpoint, record
from beit_jax.runtime import sharding
from beit_jax.weights.kinds import module_fields
from beit_jax.weights.pretrained import Pretrained
from tests import tiny
from tests.runtime import test_distributed


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer_run):
  """The folder of a tiny masked image model, 8x8 patches of 2x2 pixels."""
  workdir = tmp_path_factory.mktemp("teacher")
  train.run(tiny.config("beit", total_steps=3, **{"tokenizer.init_from": str(tokenizer_run)}), workdir)
  return workdir


def _config(teacher, **changes):
  return tiny.config("vqkd", **{"teacher.init_from": str(teacher), **changes})


def _objective(config, model=None):
  """The objective; with a model, its teacher is one with shapes in place of parameters."""
  load = None if model is None else lambda path: model
  return OBJECTIVES["vqkd"](config, sources.make_source(config.data.to_dict()), load)


def _expected(objective, **changes):
  return OBJECTIVES[objective].expected_result(tiny.config(objective, **changes))


def _losses(workdir):
  return [row["loss"] for row in record.rows(workdir) if "loss" in row]


@pytest.fixture(scope="module")
def vqkd_run(tmp_path_factory, teacher):
  """A tokenizer with a decoder to pixels."""
  workdir = tmp_path_factory.mktemp("vqkd")
  result = train.run(_config(teacher, figures=True, **{"model.pixel_depth": 1}), workdir)
  assert result["eval"].keys() >= {
    "distillation_loss",
    "commitment_loss",
    "mae",
    "codebook_usage",
    "perplexity",
  }
  assert (workdir / "figures").is_dir()
  return workdir


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, teacher):
  """The same without that decoder, evaluated in between."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  train.run(_config(teacher, **SAVING), workdir)
  return workdir


SAVING = {"checkpoint.every_steps": 3, "checkpoint.keep": 9, "eval.every_steps": 3}


def _assert_same_run(workdir, other):
  """The same losses and codebook, also where one run was evaluated in between."""
  np.testing.assert_allclose(_losses(workdir), _losses(other), atol=1e-5)
  first, second = (beit_jax.load(path) for path in (workdir, other))
  for name, value in second.collections["codebook"].items():
    np.testing.assert_allclose(first.collections["codebook"][name], value, atol=1e-5, rtol=1e-5, err_msg=name)
  assert second.collections["codebook"]["initialized"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, microbatches", [(8, 1, 1), (2, 4, 1), (1, 1, 4), (2, 4, 2)])
def test_meshes_and_microbatches_give_the_same_losses_and_codebook(
  data, fsdp, microbatches, teacher, plain_run, tmp_path, monkeypatch
):
  """k-means too sees the same first batch, in the order of the data."""
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)
  changes = {"mesh.data": data, "mesh.fsdp": fsdp, "microbatches": microbatches}
  train.run(_config(teacher, **changes), tmp_path)
  _assert_same_run(tmp_path, plain_run)


@pytest.mark.slow
def test_two_processes_give_the_same_run(teacher, tmp_path):
  config = tmp_path / "config.py"
  changes = {
    "mesh.data": 8,
    "teacher.init_from": str(teacher),
    "codebook.replace_below": 0.5,
    "codebook.decay": 0.5,
  }
  config.write_text(f"from tests import tiny\ndef get_config():\n  return tiny.raw('vqkd', **{changes!r})\n")
  for count in (1, 2):
    test_distributed._train(config, tmp_path / str(count), count)
  _assert_same_run(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_to_the_bit(teacher, plain_run, tmp_path):
  workdir = tmp_path / "resumed"
  shutil.copytree(plain_run, workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "result.json").unlink()
  train.run(_config(teacher, **SAVING), workdir)
  assert _losses(workdir) == _losses(plain_run)
  for item in ("params", "rest"):
    found, wanted = (checkpoint.load_params(run / "checkpoints" / "6", item) for run in (workdir, plain_run))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_codebook_follows_the_first_batch():
  """k-means replaces random words; after it every word is the center of outputs of the encoder."""
  objective = _objective(_config("x"), _expected("beit", **{"model.vocab_size": 16}))
  variables = jax.jit(objective.init)(jax.random.key(0))
  batch = {name: np.zeros(s.shape, s.dtype) for name, s in objective.batch_shapes(16).items()}
  batch["token_image"] = np.random.default_rng(0).integers(0, 255, batch["token_image"].shape, np.uint8)
  found = jax.jit(objective.collections_from_batch)(variables, {}, batch)["codebook"]
  assert found["initialized"][0] == 1 and found["initial_cluster_size"].sum() == 16 * 64
  assert not np.allclose(found["weight"], variables["codebook"]["weight"])
  random = _objective(
    _config("x", **{"codebook.kmeans": False}), _expected("beit", **{"model.vocab_size": 16})
  )
  assert random.collections_from_batch is None


@pytest.mark.slow
def test_a_decoder_to_pixels_does_not_change_the_tokenizer(vqkd_run, plain_run):
  with_pixels, plain = beit_jax.load(vqkd_run), beit_jax.load(plain_run)
  for name, value in trees.flatten(plain.variables["codebook"]).items():
    np.testing.assert_allclose(with_pixels.collections["codebook"][name], value, atol=1e-5)
  assert with_pixels.can_decode and not plain.can_decode
  image = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
  ids = plain.tokenize(image)
  assert with_pixels.decode(ids).shape == (2, 16, 16, 3)
  with pytest.raises(UserError, match="trained without a decoder to pixels"):
    plain.decode(ids)


@pytest.mark.slow
def test_pixels_for_a_finished_tokenizer(plain_run, tmp_path):
  """Without a teacher only the decoder is trained."""
  config = tiny.config(
    "vqkd",
    init_from=str(plain_run),
    **{"model.pixel_depth": 1, "model.teacher_dim": 32, "optimizer.weight_decay": 0.0},
  )
  train.run(config, tmp_path)
  found, plain = beit_jax.load(tmp_path), beit_jax.load(plain_run)
  flat = trees.flatten(found.variables)
  for name, value in trees.flatten(plain.variables).items():
    np.testing.assert_array_equal(flat[name], value, err_msg=name)
  assert found.can_decode
  losses = _losses(tmp_path)
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_it_serves_masked_image_modeling(vqkd_run, plain_run, tmp_path):
  for run, figures in ((vqkd_run, True), (plain_run, True)):
    workdir = tmp_path / run.name
    config = tiny.config("beit", total_steps=3, figures=figures, **{"tokenizer.init_from": str(run)})
    result = train.run(config, workdir)
    assert np.isfinite(result["last"]["loss"]) and list((workdir / "figures").iterdir())


@pytest.mark.slow
def test_cached_tokens_are_those_of_training(plain_run, tmp_path):
  """Through the token cache, a run has the same losses; its key covers the codebook."""

  def config():
    changes = {"eval.split": "", "tokenizer.init_from": str(plain_run)}
    return tiny.config("beit", total_steps=3, **changes)

  cache = tokenize.tokenize(config(), tmp_path / "cache", 1)
  assert cache.key["tokenizer's sha256"] == beit_jax.load(plain_run).description["sha256"]
  cached = config()
  cached.tokenizer.cache = str(cache.folder)
  for run, name in ((config(), "online"), (cached, "cached")):
    train.run(run, tmp_path / name)
  np.testing.assert_allclose(_losses(tmp_path / "cached"), _losses(tmp_path / "online"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["vqkd_run", "plain_run"])
def test_predictions_are_drawn_if_there_is_a_decoder(run, request, tmp_path, capsys):
  path = tmp_path / "image.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
  assert (
    predict.main([str(request.getfixturevalue(run)), str(path), "--json", f"--out={tmp_path / 'out'}"]) == 0
  )
  facts = json.loads(capsys.readouterr().out)[0]
  assert facts["distinct_tokens"] > 0 and ("sheet" in facts) == (run == "vqkd_run")


def _error(config, model=None):
  with pytest.raises(UserError) as error:
    _objective(config, model)
  return str(error.value)


def test_a_loss_leaves_the_codebook_out():
  """The mean of its copies in several microbatches would be rounded."""
  teacher = _expected("classify", **{"model.num_classes": 8})
  objective = _objective(_config("a teacher"), teacher)
  variables = jax.eval_shape(objective.init, jax.random.key(0))
  frozen = jax.eval_shape(lambda: objective.frozen_params(sharding.make_mesh(1, 1)))
  shapes = objective.batch_shapes(16)
  arguments = (variables, {"teacher": frozen["teacher"]}, shapes, jax.eval_shape(jax.random.key, 0))
  output = jax.eval_shape(objective.loss, *arguments, jax.ShapeDtypeStruct((), np.int32))
  assert output.collections == {} and output.statistics.keys() == {"counts", "sums"}


def test_a_stage_that_adds_a_decoder_to_pixels_is_run(tmp_path):
  """Any other stage of a tokenizer with `init_from` is replaced by what that names."""
  added = tiny.config("vqkd", init_from="runs/vqkd", **{"model.pixel_depth": 1})
  replaced = _config("a teacher", init_from="runs/vqkd")
  assert not stages.Stage("pixels", added, tmp_path).is_replaced
  assert stages.Stage("tokenizer", replaced, tmp_path).is_replaced


def test_bad_teachers():
  for objective in ("dvae", "vqkd"):
    assert "which has no features to learn; give a backbone" in _error(_config("x"), _expected(objective))
  teacher = _expected("beit", **{"model.vocab_size": 16})
  found = _error(_config("x", **{"model.patch_size": 4}), teacher)
  assert "has (8, 8) patches ((16, 16) pixels, patches of 2), but the tokenizer has (4, 4) tokens" in found
  assert "data.token_image_size to (32, 32)" in found
  assert "'model.teacher_dim': 7" in _error(_config("x", **{"model.teacher_dim": 7}), teacher)
  assert "names a stage" in _error(_config("stage:x"), teacher)
  assert "not divisible by the tokenizer's stride 3" in _error(
    _config("x", **{"model.patch_size": 3}), teacher
  )
  assert "no teacher; give one" in _error(tiny.config("vqkd"))
  pixels = {"model.pixel_depth": 1, "init_from": "x"}
  assert "would change the tokenizer" in _error(tiny.config("vqkd", **pixels))


def test_a_tokenizer_of_other_sizes_does_not_start_a_run():
  objective = _objective(_config("x"), _expected("beit", **{"model.vocab_size": 16}))
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  for key, value in (("vocab_size", 17), ("teacher_dim", 7), ("num_heads", 4)):
    with pytest.raises(
      UserError, match=f"'model.{key}': (16|32|2), but the tokenizer of init_from has {value}"
    ):
      objective.adapt(_expected("vqkd", **{"model.teacher_dim": 32, f"model.{key}": value}), shapes)


def test_a_teacher_with_larger_patches_gets_a_larger_view(tmp_path):
  """The tokenizer sees 16x16 pixels in patches of 2, the teacher 24x24 in patches of 3, normalized in its own way."""
  fields = dict(
    image_size=(24, 24), patch_size=3, width=8, depth=1, num_heads=2, rel_pos="none", abs_pos=True
  )
  module = Beit(**fields)
  params = module.init(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
  preprocessing = dict(
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    image_size=(24, 24),
    crop_pct=1.0,
    interpolation="bicubic",
    resize="squash",
  )
  model = Pretrained("backbone", params, Beit(**module_fields(module)), preprocessing)
  beit_jax.save(model, tmp_path / "teacher", format="orbax")
  objective = _objective(_config(tmp_path / "teacher"))
  assert objective.views()["teacher_image"][0] == (24, 24)
  image = np.random.default_rng(0).random((2, 24, 24, 3), np.float32)
  frozen = objective.frozen_params(None)
  found = objective.teacher_features(frozen, {"teacher_image": image, "token_image": image[:, :16, :16]})
  wanted = model.forward((image - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6]))[:, 1:]
  np.testing.assert_allclose(found, wanted, atol=1e-5)
