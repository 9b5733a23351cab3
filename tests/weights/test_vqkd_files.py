"""unilm's VQ-KD files: the reference's tokens, and the same file back."""

import jax
import numpy as np
import pytest

import beit_jax
from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.weights import contents
from beit_jax.weights.files import torchfile
from tests import reference


def _state():
  arrays, _ = reference.load("vqkd")
  buffers = {
    "quantize.cluster_size": np.arange(64, dtype="f4"),
    "quantize.embedding.initted": np.ones(1, "f4"),
  }
  return arrays, {**reference.section(arrays, "vqkd/param/"), **buffers}


def _tensors(path):
  return {name: value.read() for name, value in contents.read(path).state.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("files") / "vqkd.pth"
  state = {
    **_state()[1],
    "teacher_model.visual.proj": np.ones((3, 2), "f4"),
    "scaling_layer.shift": np.ones(3, "f4"),
  }
  torchfile.save(path, state, {}, under="model")
  return beit_jax.load(path, num_heads=4)


def test_tokens_of_the_reference(model):
  arrays, _ = _state()
  image = arrays["vqkd/in_image"].transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(model.tokenize(image), arrays["vqkd/out_ids"])
  assert model.preprocessing["mean"] == (0.5, 0.5, 0.5) and model.can_tokenize and not model.can_decode
  assert model.description["left_out"] == ["teacher_model.visual.proj", "scaling_layer.shift"]
  features = model.module.apply(model.variables, 2 * image - 1)["features"]
  np.testing.assert_allclose(features, arrays["vqkd/out_reconstruction"], atol=1e-5)


def test_written_back_to_the_bit(model, tmp_path):
  wanted = _state()[1]
  for format in ("unilm", "orbax"):
    beit_jax.save(model, tmp_path / format, format=format)
    model = beit_jax.load(tmp_path / format)  # the second file is made of the orbax folder
  assert model.description["sha256"]
  beit_jax.save(model, tmp_path / "again.pth", format="unilm")
  for path in (tmp_path / "unilm", tmp_path / "again.pth"):
    found = _tensors(path)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
      assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name
  with pytest.raises(UserError, match="a vqkd cannot be saved as hf"):
    beit_jax.save(model, tmp_path / "hf", format="hf")


def test_the_fingerprint_covers_the_codebook(model):
  from beit_jax.weights.pretrained import fingerprint

  other = jax.tree.map(lambda x: x + 1, model.collections)
  assert (
    fingerprint(model.params, other)
    != model.description["sha256"]
    == fingerprint(model.params, model.collections)
  )


def test_damaged_files_are_named(tmp_path):
  state = _state()[1]
  del state["decoder.blocks.0.mlp.fc1.bias"]
  state["quantize.cluster_size"] = np.ones(63, "f4")
  torchfile.save(tmp_path / "x.pth", state, {}, under="model")
  with pytest.raises(UserError) as error:
    beit_jax.load(tmp_path / "x.pth", num_heads=4)
  assert "missing     decoder.blocks.0.mlp.fc1.bias" in str(error.value)
  assert "mis-shaped  quantize.cluster_size (63,), expected (64,)" in str(error.value)


def test_another_grid(model):
  wider = model.at((32, 48))
  assert wider.tokenize(np.zeros((1, 32, 48, 3), np.float32)).shape == (1, 24)
  assert trees.num_params(wider.params) == trees.num_params(model.params) + 2 * 8 * 48
