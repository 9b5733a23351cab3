"""Which attention runs, and that padding for cuDNN changes neither outputs nor gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.errors import UserError
from beit_jax.models import attention, beit, layers
from beit_jax.objectives import OBJECTIVES
from tests import tiny

B, T, K, H = 3, 17, 2, 8  # 4x4 patches and cls


@pytest.mark.parametrize(
  "dtype, head_dim, platform, capability, fact",
  [
    ("bfloat16", 64, "gpu", "8.0", ""),
    ("float16", 128, "gpu", "8.9", ""),
    ("bfloat16", 256, "gpu", "10.0", ""),
    ("bfloat16", 64, "cpu", "", "CUDA GPU, this is cpu"),
    ("bfloat16", 64, "tpu", "", "CUDA GPU, this is tpu"),
    ("bfloat16", 64, "gpu", "gfx942", "CUDA GPU, this is gpu gfx942"),  # ROCm
    ("bfloat16", 64, "gpu", "7.5", "8.0"),
    ("float32", 64, "gpu", "9.0", "not in float32"),
    ("bfloat16", 60, "gpu", "9.0", "multiple of 8"),
    ("bfloat16", 256, "gpu", "8.9", "up to 128"),
    ("bfloat16", 264, "gpu", "9.0", "up to 256"),
  ],
)
def test_where_cudnn_can_run(dtype, head_dim, platform, capability, fact):
  reason = attention.why_not_cudnn(dtype, head_dim, platform, capability)
  assert fact in reason and bool(reason) == bool(fact)


class _Device:
  platform, compute_capability, device_kind = "gpu", "9.0", "a GPU"


@pytest.mark.parametrize(
  "requested, dtype, chosen",
  [("auto", "bfloat16", "cudnn"), ("cudnn", "float32", "xla"), ("xla", "bfloat16", "xla")],
)
def test_the_choice(requested, dtype, chosen, monkeypatch):
  assert attention.choose("auto", dtype, 64)[0] == "xla"  # of this machine
  monkeypatch.setattr(jax, "local_devices", lambda: [_Device])
  assert attention.choose(requested, dtype, 64)[0] == chosen


def _inputs(with_bias, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  query, key, value, weight = (jax.random.normal(k, (B, T, K, H), dtype) for k in keys[:4])
  table = jax.random.normal(keys[4], (7 * 7 + 3, K)) if with_bias else None
  return (query, key, value, table), weight


def _value_and_gradients(attend, inputs, weight):
  """The output and the gradients of query, key, value and, where there is one, the table of relative positions."""

  def run(query, key, value, table):
    index = layers.relative_position_index((4, 4))
    bias = None if table is None else table[index].transpose(2, 0, 1)[None].astype(query.dtype)
    out = attend(query, key, value, bias)
    return (out * weight).astype(jnp.float32).sum(), out

  which = (0, 1, 2) if inputs[3] is None else (0, 1, 2, 3)
  (_, out), grads = jax.jit(jax.value_and_grad(run, which, has_aux=True))(*inputs)
  return [out, *grads]


def _xla(query, key, value, bias):
  return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation="xla")


def _padded(implementation):
  return lambda query, key, value, bias: attention.padded_attention(query, key, value, bias, implementation)


@pytest.mark.parametrize("with_bias", [True, False])
def test_padding_changes_nothing(with_bias):
  inputs, weight = _inputs(with_bias)
  wanted, found = (_value_and_gradients(f, inputs, weight) for f in (_xla, _padded("xla")))
  for want, have in zip(wanted, found, strict=True):
    assert want.shape == have.shape and jnp.abs(want).max() > 1e-2
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=2e-6)


def test_lengths_are_padded_to_a_multiple_of_8(monkeypatch):
  lengths = []

  def attend(query, key, value, bias, implementation):
    assert implementation == "cudnn" and bias.shape[2:] == (query.shape[1],) * 2
    lengths.append(query.shape[1])
    return query

  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  for tokens in (197, 577, 1025, 200):
    x = jnp.zeros((1, tokens, 1, 8), jnp.bfloat16)
    assert attention.padded_attention(x, x, x, jnp.zeros((1, 1, tokens, tokens)), "cudnn").shape == x.shape
  assert lengths == [200, 584, 1032, 200]


def test_the_encoder_takes_the_chosen_attention(monkeypatch):
  """On a GPU the blocks call the padded one, in the dtype of the computation; the numbers stay."""
  fields = dict(image_size=(16, 16), patch_size=4, width=16, depth=1, num_heads=2)
  image = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  run = lambda **more: jax.jit(beit.Beit(**fields, **more).apply)(params, image)[0]
  params = jax.jit(beit.Beit(**fields).init)(jax.random.key(1), image)
  wanted = run()
  calls = []

  def attend(query, key, value, bias, implementation):
    calls.append((query.dtype.name, bias.dtype.name, implementation))
    return padded(query, key, value, bias, "xla")

  padded = attention.padded_attention
  monkeypatch.setattr(attention, "padded_attention", attend)
  monkeypatch.setattr(jax, "local_devices", lambda: [_Device])
  run(), run(dtype="bfloat16", attention="xla")
  assert calls == []
  found = run(dtype="bfloat16")
  assert calls == [("bfloat16", "bfloat16", "cudnn")]
  np.testing.assert_allclose(found.astype(np.float32), wanted, atol=0.1)


def test_a_run_says_which_and_refuses_what_it_cannot_have(tokenizer_run, caplog):
  changes = {"tokenizer.init_from": str(tokenizer_run)}
  OBJECTIVES["beit"](tiny.config("beit", **changes), None)
  assert [r.message for r in caplog.records if "attention: xla (cuDNN: it needs a CUDA GPU" in r.message]
  with pytest.raises(UserError, match="'model.attention'.*CUDA GPU.*'auto' or 'xla'"):
    OBJECTIVES["beit"](tiny.config("beit", **changes, **{"model.attention": "cudnn"}), None)


@pytest.mark.skipif(
  attention.choose("auto", "bfloat16", 64)[0] != "cudnn", reason="no CUDA GPU of capability 8.0"
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_cudnn_is_xla(with_bias):
  """bfloat16 against bfloat16, and the distance of both from float32."""
  inputs, weight = _inputs(with_bias, jnp.bfloat16)
  wanted, found = (_value_and_gradients(f, inputs, weight) for f in (_xla, _padded("cudnn")))
  exact = _value_and_gradients(_xla, [x if x is None else x.astype(jnp.float32) for x in inputs], weight)
  for want, have, true in zip(wanted, found, exact, strict=True):
    scale = float(jnp.abs(true).max())
    for value in (want, have):
      np.testing.assert_allclose(value.astype(np.float32), true, atol=0.03 * scale)
