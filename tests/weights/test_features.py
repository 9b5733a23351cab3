"""Tokens and attention weights of the blocks: those of transformers, on the model's own grid and on a resized one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beit_jax
from beit_jax import transfer, trees
from beit_jax.errors import UserError
from beit_jax.models import attention as attention_lib
from beit_jax.models import layers
from beit_jax.models.beit import Beit
from beit_jax.weights.kinds import KINDS, module_fields, variable_shapes
from beit_jax.weights.pretrained import Pretrained

IMAGES = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
ENCODER = dict(image_size=(64, 64), patch_size=16, width=48, depth=2, num_heads=4)


@pytest.mark.parametrize("positions, masked", [("shared", True), ("per_block", False), ("absolute", True)])
def test_hf_hidden_states_and_attentions_agree(positions, masked, tmp_path):
  from tests.peers import torch, transformers
  from tests.weights.test_peers import HF, redraw

  flags = {"shared": "shared_relative_position_bias", "per_block": "relative_position_bias"}
  flag = f"use_{flags.get(positions, 'absolute_position_embeddings')}"
  cls = transformers.BeitForMaskedImageModeling if masked else transformers.BeitForImageClassification
  config = transformers.BeitConfig(**HF, **{flag: True}, use_mask_token=masked, attn_implementation="eager")
  peer = redraw(cls(config))
  peer.save_pretrained(tmp_path)
  model = beit_jax.load(tmp_path)
  mask = np.random.default_rng(2).random((2, 4, 4)) < 0.4 if masked else None
  kwargs = dict(bool_masked_pos=torch.from_numpy(mask.reshape(2, -1))) if masked else {}
  image = torch.from_numpy(np.array(model.preprocess(IMAGES)).transpose(0, 3, 1, 2).copy())
  wanted = peer(image, output_hidden_states=True, output_attentions=True, **kwargs)
  found = model.features(IMAGES, mask=mask)
  assert len(found) == len(wanted.attentions) == 3
  for i, (tokens, weights) in enumerate(zip(wanted.hidden_states[1:], wanted.attentions, strict=True)):
    tokens, weights = tokens.detach().numpy(), weights.detach().numpy()
    np.testing.assert_allclose(found[i], tokens, atol=1e-5 * np.abs(tokens).max())
    np.testing.assert_allclose(model.attention(IMAGES, i, mask=mask), weights, atol=1e-5)


def _model(kind="mim", rel_pos="per_block", **fields):
  """A random model whose tables and positions are far from zero."""
  encoder = module_fields(Beit(**{**ENCODER, "rel_pos": rel_pos, "abs_pos": rel_pos == "none", **fields}))
  spec = KINDS[kind]
  module = spec.module(**encoder) if spec.is_encoder else spec.module(encoder=encoder)
  rng = np.random.default_rng(3)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
    variable_shapes(module, (64, 64))["params"],
  )
  usual = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(64, 64), crop_pct=1.0, interpolation="bicubic")
  return Pretrained(kind, params, module, {**usual, "resize": "squash"})


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_forms_of_features(kind):
  model = _model(kind, scan=True, remat=True)
  tokens = model.features(IMAGES)
  assert [x.shape for x in tokens] == [(2, 17, 48)] * 2
  last = model.features(IMAGES, -1)
  np.testing.assert_array_equal(last, tokens[1])
  np.testing.assert_array_equal(model.features(IMAGES, [0], "cls")[0], tokens[0][:, 0])
  np.testing.assert_allclose(model.features(IMAGES, 1, "mean"), tokens[1][:, 1:].mean(1), atol=1e-5)
  np.testing.assert_array_equal(
    model.features(IMAGES, (1, 0), "map")[0][1, 3, 2], last[1, 1 + 3 * 4 + 2]
  )  # row 3, column 2
  weights = model.attention(IMAGES)
  assert weights.shape == (2, 4, 17, 17)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_features_end_in_the_output_of_forward():
  """The last residual stream, normalized, is what a backbone returns."""
  model = _model("backbone", "shared")
  x = np.asarray(model.features(IMAGES, -1))
  norm = model.params["norm"]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.module.norm_eps)
  np.testing.assert_allclose(x * norm["scale"] + norm["bias"], model(IMAGES), atol=1e-4)


def test_the_attention_map_is_that_of_the_point():
  model = _model("classifier", image_size=(64, 64))
  maps = model.attention_map(IMAGES, point=(40, 20), block=1)
  assert maps.shape == (2, 64, 64)
  row = np.asarray(model.attention(IMAGES, 1))[:, :, 1 + 2 * 4 + 1, 1:].mean(1).reshape(2, 4, 4)
  # Bilinear resizing keeps the corners, and the mean of the pixels is near that of the patches.
  np.testing.assert_allclose(maps[:, ::63, ::63], row[:, ::3, ::3], atol=1e-6)
  np.testing.assert_allclose(maps.mean((1, 2)), row.mean((1, 2)), rtol=0.2)


@pytest.mark.parametrize("tokens, head", [(17, 8), (5, 8)])
def test_attention_weights_are_those_of_the_attention(tokens, head):
  """weights @ values is what the attention returns, also where a head is not a divisor of the tokens."""
  rng = np.random.default_rng(0)
  q, k, v = jnp.asarray(rng.normal(size=(3, 2, tokens, 3, head)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=(1, 3, tokens, tokens)), jnp.float32)
  weights = attention_lib.attention_weights(q, k, bias, "xla")
  found = np.einsum("bkts,bskh->btkh", weights, v)
  np.testing.assert_allclose(found, attention_lib.attention(q, k, v, bias, "xla"), atol=1e-5)


def test_training_does_not_trace_the_weights(monkeypatch):
  def fail(*args):
    raise AssertionError("the attention weights were computed")

  model, x = _model(), jnp.zeros((1, 64, 64, 3))
  monkeypatch.setattr(layers, "attention_weights", fail)
  jax.make_jaxpr(lambda params: model.module.apply({"params": params}, x, train=True))(model.params)
  jax.eval_shape(model.module.init, jax.random.key(0), x)
  with pytest.raises(AssertionError, match="were computed"):
    model.attention(IMAGES)


@pytest.mark.parametrize("kind, rel_pos", [("backbone", "shared"), ("classifier", "none")])
def test_other_image_sizes(kind, rel_pos, caplog):
  """A resized model computes what a module of the new size computes with the tables of `transfer`."""
  model = _model(kind, rel_pos)
  small, size = model.at(image_size=64), (96, 112)
  assert jax.tree.all(jax.tree.map(np.array_equal, small.params, model.params))
  large = model.at(image_size=size)
  fields = {**model.encoder_fields, "image_size": size}
  module = KINDS[kind].module(**(fields if kind == "backbone" else {"encoder": fields}))
  shapes = variable_shapes(module, size)["params"]
  params = transfer.encoder_params(
    {"encoder": model.encoder_params, **model.head_params},
    {"encoder": shapes} if kind == "backbone" else shapes,
    (4, 4),
    (6, 7),
  )
  params = trees.unflatten(params)
  x = large.preprocess(IMAGES)
  assert x.shape == (2, *size, 3)
  wanted = KINDS[kind].forward(
    module, {"params": params["encoder"] if kind == "backbone" else params}, x, None
  )
  np.testing.assert_allclose(large(IMAGES), wanted, atol=1e-5 * float(np.abs(wanted).max()))
  assert large.attention(IMAGES).shape == (2, 4, 43, 43)
  assert large.attention_map(IMAGES, (95, 111)).shape == (2, *size)
  assert large.features(IMAGES, 0, "map").shape == (2, 6, 7, 48)
  assert large.describe()["preprocessing"]["image_size"] == list(size)
  assert large.description["sha256"] != small.description["sha256"]
  assert not caplog.records
  model.at(image_size=(64, 32))
  assert ("crops the relative-position tables" in caplog.text) == (rel_pos != "none")


@pytest.mark.parametrize(
  "kind", [kind for kind, spec in KINDS.items() if spec.encoder_path and not spec.teacher]
)
def test_every_kind_with_an_encoder_fits_another_size(kind):
  """All parameters have the shapes of a module that was built for the new size; tables of decoders are among them."""
  depth = 12 if hasattr(KINDS[kind].module, "out_indices") else 2
  size, large = (32, 96), _model(kind, "shared", depth=depth).at(image_size=(32, 96))
  shapes = jax.tree.map(lambda leaf: leaf.shape, variable_shapes(large.module, size)["params"])
  assert jax.tree.map(lambda leaf: leaf.shape, large.params) == shapes


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: m.features(IMAGES, 3), "block 3: this model has the blocks 0 to 1"),
    (lambda m: m.attention(IMAGES, -4), "block -4: this model"),
    (lambda m: m.features(IMAGES, pool="max"), "pool='max': expected None or one of cls, mean, map"),
    (lambda m: m.attention_map(IMAGES, (64, 0)), "outside the image of 64x64 pixels"),
    (lambda m: m.attention(IMAGES, mask=np.zeros((4, 4), bool)), "a classifier takes no mask"),
    (lambda m: m.at(image_size=72), "image_size=72: expected one or two multiples of the patch size, 16"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(UserError, match=message):
    call(_model("classifier"))


def test_tokenizers_have_no_blocks():
  tokenizer = Pretrained("tokenizer", {}, KINDS["tokenizer"].module(), {})
  for call in (lambda: tokenizer.features(IMAGES), lambda: tokenizer.at(image_size=32)):
    with pytest.raises(UserError, match="a tokenizer has no BEiT encoder"):
      call()
