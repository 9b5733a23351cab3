"""`beit_jax.load` reads the runs of this version."""

import jax.numpy as jnp
import numpy as np
import pytest

import beit_jax
from beit_jax import train
from beit_jax.errors import UserError
from beit_jax.models import dvae
from tests import tiny


def test_tokenizer_encodes_and_decodes(tokenizer_run):
  tokenizer = beit_jax.load(tokenizer_run)
  assert tokenizer.kind == "tokenizer" and len(tokenizer.description["sha256"]) == 64
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  ids = tokenizer.tokenize(images)
  assert ids.shape == (3, 64) and ids.dtype == jnp.int32
  logits = tokenizer.forward(dvae.map_pixels(images / 255.0))
  assert logits.shape == (3, 8, 8, 16)
  np.testing.assert_array_equal(ids, logits.argmax(-1).reshape(3, -1))
  np.testing.assert_array_equal(ids, tokenizer.tokenize(images.astype(np.float32) / 255))
  images = tokenizer.decode(ids)
  assert images.shape == (3, 16, 16, 3) and 0 <= images.min() and images.max() <= 1


@pytest.mark.slow
def test_masked_image_model_and_classifier_run(tokenizer_run, tmp_path):
  config = tiny.config("beit", total_steps=3, **{"tokenizer.init_from": str(tokenizer_run)})
  train.run(config, tmp_path / "mim")
  mim = beit_jax.load(tmp_path / "mim")
  x = mim.preprocess(np.zeros((2, 40, 30, 3), np.uint8))
  assert x.shape == (2, 16, 16, 3) and float(x.max()) == -1.0
  mask = np.zeros((2, 8, 8), bool)
  mask[:, :3] = True
  assert mim.forward(x, mask).shape == (2, 64, 16)
  assert np.abs(mim.forward(x, mask) - mim.forward(x)).max() > 0
  train.run(tiny.config("classify", total_steps=1), tmp_path / "classifier")
  classifier = beit_jax.load(tmp_path / "classifier" / "checkpoints")
  assert classifier(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 8)
  assert classifier.description["labels"][0] == "disc"
  with pytest.raises(UserError, match="takes no mask"):
    classifier.forward(x, mask)
  with pytest.raises(UserError, match="needs a tokenizer"):
    classifier.tokenize(x)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda path: path / "nowhere", "no such file"),
    (lambda path: path, "no usable checkpoint"),
    (lambda path: (path / "x.bin").write_bytes(b"x") and path / "x.bin", "not a format this version reads"),
  ],
)
def test_unusable_paths_are_refused(make, message, tmp_path):
  with pytest.raises(UserError, match=message):
    beit_jax.load(make(tmp_path))


def test_step_selects_a_checkpoint(tokenizer_run):
  assert beit_jax.load(tokenizer_run, step=6).description["step"] == 6
  with pytest.raises(UserError, match="of step 5"):
    beit_jax.load(tokenizer_run, step=5)
  with pytest.raises(UserError, match="num_heads=3"):
    beit_jax.load(tokenizer_run, num_heads=3)


def test_relative_paths_work(tokenizer_run, monkeypatch):
  monkeypatch.chdir(tokenizer_run.parent)
  assert beit_jax.load(tokenizer_run.name).kind == "tokenizer"
