"""`beit_jax.load` reads the runs of this version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import train
from beit_jax.errors import UserError
from beit_jax.models import dvae
from beit_jax.models.beit import Beit
from beit_jax.weights.pretrained import Pretrained
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


def _backbone(channels=3, **preprocessing):
  """A random backbone for images of 8x12 pixels, a grid of 2x3 patches."""
  module = Beit(image_size=(8, 12), patch_size=4, in_channels=channels, width=16, depth=1, num_heads=2)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 12, channels)))["params"]
  usual = dict(mean=(0.5,) * channels, std=(0.5,) * channels, image_size=(8, 12), crop_pct=1.0)
  usual |= dict(interpolation="bicubic", resize="squash")
  return Pretrained("backbone", params, module, {**usual, **preprocessing})


@pytest.fixture(scope="module")
def backbone():
  return _backbone()


def test_masks_of_the_grid_are_accepted(backbone):
  x = np.random.default_rng(0).normal(size=(2, 8, 12, 3))
  mask = np.array([[True, False, False], [False, False, True]])
  wanted = backbone.forward(x, np.stack([mask, mask]))
  assert np.abs(wanted - backbone.forward(x)).max() > 1e-3
  for other in (mask, np.stack([mask, mask]).reshape(2, 6), np.stack([mask, mask]).astype(np.int32)):
    np.testing.assert_array_equal(backbone.forward(x, other), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 2), (6,), (1, 2, 3), (3, 2), (12,), (2, 2, 3, 1), (2, 5)])
def test_masks_of_another_shape_are_refused(backbone, shape):
  with pytest.raises(UserError, match=r"grid of 2x3 patches need bool \[2, 2, 3\], \[2, 6\] or \[2, 3\]"):
    backbone.forward(np.zeros((2, 8, 12, 3)), np.zeros(shape, bool))


def test_masks_of_fractions_are_refused(backbone):
  with pytest.raises(UserError, match="mask: float32"):
    backbone.forward(np.zeros((2, 8, 12, 3)), np.full((2, 2, 3), 0.5))


# Images in Python.

IMAGE = np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_one_image_is_a_batch_of_one(backbone, tmp_path):
  Image.fromarray(IMAGE).save(tmp_path / "x.png")
  wanted = backbone.preprocess(IMAGE[None])
  assert wanted.shape == (1, 8, 12, 3)
  path = tmp_path / "x.png"
  for image in (IMAGE, Image.fromarray(IMAGE), path, str(path), [IMAGE], (path,), IMAGE.astype(np.int64)):
    np.testing.assert_array_equal(backbone.preprocess(image), wanted)
  mixed = backbone.preprocess([path, IMAGE, Image.fromarray(IMAGE), IMAGE / np.float32(255)])
  assert mixed.shape == (4, 8, 12, 3)
  np.testing.assert_allclose(mixed, np.repeat(wanted, 4, 0), atol=0.02)


def test_gray_images_become_rgb(backbone):
  gray = IMAGE[..., :1]
  wanted = backbone.preprocess(np.repeat(gray, 3, 2))
  for image in (gray, gray[..., 0], Image.fromarray(gray[..., 0]), [gray], gray[None]):
    np.testing.assert_array_equal(backbone.preprocess(image), wanted)


def test_deep_images_use_their_full_range(backbone):
  deep = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
  wanted = backbone.preprocess((deep / 65535).astype(np.float32))
  np.testing.assert_allclose(backbone.preprocess(deep), wanted, atol=0.02)


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (IMAGE.transpose(2, 0, 1), r"uint8 \[3, 20, 30\], expected numbers \[height, width, 3\]"),
    (np.zeros((2, 3, 20, 30), np.uint8), r"uint8 \[3, 20, 30\], expected"),
    (np.zeros((20, 30, 4), np.uint8), r"uint8 \[20, 30, 4\], expected"),
    (np.zeros(5, np.uint8), r"uint8 \[5\], expected"),
    (IMAGE.astype(np.float32), r"float values from 0 to 255; expected \[0, 1\]"),
    (IMAGE / 127.5 - 1, r"float values from -1 to 1; expected \[0, 1\]"),
    (np.full((20, 30, 3), np.nan), "float values from nan"),
    (IMAGE.astype(np.int32) - 128, "values run from -128 to 127, which exceeds"),
    (IMAGE.astype(np.int64) * 16, "values run from 0 to 4080, which exceeds"),
    (IMAGE.astype(np.uint16), "values run from 0 to 255, of which only 2 of 256 gray levels"),
    (IMAGE.astype(np.uint16) * 16, "values run from 0 to 4080, of which only 17"),
    ("nowhere.png", "nowhere.png: No such file"),
    (["a", IMAGE], "a: No such file"),
    (None, "expected numbers"),
    ([[1, 2], [3]], "expected numbers"),
    ([], "none given"),
    (np.zeros((0, 20, 30, 3), np.uint8), "none given"),
  ],
)
def test_images_that_cannot_be_meant_are_refused(backbone, images, message):
  with pytest.raises(UserError, match=message):
    backbone.preprocess(images)


def test_value_range_of_a_checkpoint_applies_to_stored_values(tmp_path):
  model = _backbone(value_range=[0, 4095])
  deep = np.random.default_rng(1).integers(0, 4096, (20, 30)).astype(np.uint16)
  Image.fromarray(deep).save(tmp_path / "x.tif")
  wanted = _backbone().preprocess(np.repeat((deep / 4095).astype(np.float32)[..., None], 3, 2))
  for image in (deep, tmp_path / "x.tif", Image.fromarray(deep), deep.astype(np.float32)):
    np.testing.assert_allclose(model.preprocess(image), wanted, atol=0.02)
  with pytest.raises(UserError, match="float values from 0 to 1; expected stored values, .*4095"):
    model.preprocess(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30))


def test_models_of_four_channels(tmp_path):
  model = _backbone(4)
  image = np.random.default_rng(1).integers(0, 256, (20, 30, 4)).astype(np.uint8)
  np.save(tmp_path / "x.npy", image)
  assert model(image).shape == (1, 7, 16)
  np.testing.assert_array_equal(model.preprocess(tmp_path / "x.npy"), model.preprocess(image))
  with pytest.raises(UserError, match=r"\[20, 30, 3\], expected numbers \[height, width, 4\]"):
    model(image[..., :3])
  beit_jax.save(model, tmp_path / "model", format="orbax")
  np.testing.assert_array_equal(beit_jax.load(tmp_path / "model")(image), model(image))
  with pytest.raises(UserError, match="is for images of 3 channels"):
    beit_jax.save(model, tmp_path / "other", format="hf")
