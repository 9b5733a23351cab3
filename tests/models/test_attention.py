"""Which attention runs, that padding for cuDNN changes no output and no gradient, and that it is cut along the batch.

On a machine with a GPU see docs/benchmarks.md for the command: the tests are then of cuDNN itself.
"""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from beit_jax.errors import UserError
from beit_jax.models import attention, beit, layers
from beit_jax.objectives import OBJECTIVES
from beit_jax.runtime import sharding
from tests import tiny
from tests.conftest import ON_GPU

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
    ("bfloat16", 256, "gpu", "8.9", "at most 128"),
    ("bfloat16", 264, "gpu", "9.0", "at most 256"),
  ],
)
def test_where_cudnn_can_run(dtype, head_dim, platform, capability, fact):
  reason = attention.cudnn_obstacle(dtype, head_dim, platform, capability)
  assert fact in reason and bool(reason) == bool(fact)


class _Device:
  platform, compute_capability, device_kind = "gpu", "9.0", "a GPU"


class _Cpu:
  platform, device_kind = "cpu", "cpu"


@pytest.mark.parametrize(
  "requested, dtype, chosen",
  [("auto", "bfloat16", "cudnn"), ("cudnn", "float32", "xla"), ("xla", "bfloat16", "xla")],
)
def test_the_choice(requested, dtype, chosen, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [_Cpu])
  assert attention.choose_implementation("auto", dtype, 64)[0] == "xla"
  monkeypatch.setattr(jax, "local_devices", lambda: [_Device])
  assert attention.choose_implementation(requested, dtype, 64)[0] == chosen


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
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_lengths_are_padded_to_a_multiple_of_8(monkeypatch):
  lengths = []

  def attend(query, key, value, bias, implementation):
    assert implementation == "cudnn" and bias.shape[2:] == (query.shape[1],) * 2
    lengths.append(query.shape[1])
    return query

  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  for tokens in (197, 577, 1025, 200, 57, 192, 320):
    x = jnp.zeros((1, tokens, 1, 8), jnp.bfloat16)
    assert attention.padded_attention(x, x, x, jnp.zeros((1, 1, tokens, tokens)), "cudnn").shape == x.shape
  assert lengths == [200, 584, 1032, 200, 72, 200, 328]  # never 64 above a multiple of 128


@pytest.mark.parametrize("dtype, nothing", [("bfloat16", -(2.0**41)), ("float16", -(2.0**15))])
@pytest.mark.parametrize("with_bias", [True, False])
def test_added_keys_have_the_bias_of_masked_ones(with_bias, dtype, nothing, monkeypatch):
  """The very numbers of JAX's cuDNN wrapper, in a bias for every head."""
  seen = []
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, bias, **_: seen.append(bias) or q)
  x = jnp.zeros((B, T, K, H), dtype)
  attention.padded_attention(x, x, x, jnp.ones((1, K, T, T), dtype) if with_bias else None, "cudnn")
  (bias,) = seen
  assert bias.shape == (1, K, 24, 24) and bias.dtype == dtype
  assert (bias[..., T:] == nothing).all() and (bias[..., :T, :T] == int(with_bias)).all()


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
  assert [r.message for r in caplog.records if "attention: xla (cuDNN: it " in r.message]
  fact = "needs a CUDA GPU|computes in bfloat16"  # the model is in float32
  with pytest.raises(UserError, match=f"'model.attention'.*cuDNN: it ({fact}).*'auto' or 'xla'"):
    OBJECTIVES["beit"](tiny.config("beit", **changes, **{"model.attention": "cudnn"}), None)


def _in_layers(attend):
  """Three layers of it as the encoder has them with `model.scan` and `model.remat`."""

  def layers_of(query, key, value, bias):
    layer = jax.checkpoint(lambda x, _: (x + attend(x, key, value, bias), None), prevent_cse=False)
    return jax.lax.scan(layer, query, None, length=3)[0]

  return layers_of


@pytest.mark.parametrize("depth", ["one", "scan"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_cudnn_is_xla(implementation, with_bias, depth):
  """In bfloat16, at the size that trains, against XLA in float32: outputs and gradients, the bias's among them."""
  if implementation == "cudnn":
    if not ON_GPU:
      pytest.skip("needs a CUDA GPU of capability 8.0, and BEIT_JAX_TEST_GPU=1")
    chosen, reason = attention.choose_implementation("auto", "bfloat16", 64)
    assert chosen == "cudnn", f"BEIT_JAX_TEST_GPU=1, but {reason}"
  tokens, heads, numbers = 197, 12, 64
  keys = jax.random.split(jax.random.key(0), 5)
  inputs = [jax.random.normal(k, (2, tokens, heads, numbers)) for k in keys[:4]]
  inputs.append(jax.random.normal(keys[4], (1, heads, tokens, tokens)))
  *inputs, bias = (x.astype(jnp.bfloat16) for x in inputs)
  query, key, value, weight = inputs

  def found(attend, dtype):
    attend = attend if depth == "one" else _in_layers(attend)
    given = [x.astype(dtype) for x in ((query, key, value, bias) if with_bias else (query, key, value))]

    def run(*given):
      out = attend(*given) if with_bias else attend(*given, None)
      return (out.astype(jnp.float32) * weight).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, tuple(range(len(given))), has_aux=True))(*given)
    return [np.asarray(x, np.float32) for x in (out, *grads)]

  for have, want in zip(found(_padded(implementation), jnp.bfloat16), found(_xla, jnp.float32), strict=True):
    np.testing.assert_allclose(have, want, rtol=0, atol=0.03 * np.abs(want).max())


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
  """JAX's cuDNN attention with its own rules of partitioning, and a plain program in place of the kernel.

  Returns the shapes of the query that the kernel was given, forwards and backwards.
  """
  if ON_GPU:
    pytest.skip("runs on 8 CPU devices, without BEIT_JAX_TEST_GPU")
  try:
    wrapper = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    mlir = importlib.import_module("jax._src.interpreters.mlir")
    forward, backward = wrapper._dot_product_attention_fwd_p, wrapper._dot_product_attention_bwd_p
    monkeypatch.setattr(wrapper, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(wrapper, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(wrapper, "is_cuda_compute_capability_equal", lambda capability: False)
  except (ImportError, AttributeError) as error:
    pytest.skip(f"this JAX's cuDNN attention has other private names: {error}")
  shapes = []

  def plain(query, key, value, bias, scale):
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32) * scale + bias
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value.astype(jnp.float32))
    return out.astype(query.dtype), jax.nn.logsumexp(logits, -1)

  def run_forward(query, key, value, bias, *_, scale, is_training, **__):
    shapes.append(query.shape)
    return plain(query, key, value, bias, scale)[: 1 + is_training]

  def run_backward(query, key, value, bias, *rest, scale, **_):
    shapes.append(query.shape)
    return jax.vjp(lambda *x: plain(*x, scale)[0], query, key, value, bias)[1](rest[-1])

  for primitive, run in ((forward, run_forward), (backward, run_backward)):
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform="cpu")
  monkeypatch.setattr(
    attention, "choose_implementation", lambda asked, *_: ("xla", "") if asked == "xla" else ("cudnn", "")
  )
  return shapes


@pytest.mark.parametrize("mesh", [(2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("sharded", ["kernel", pytest.param("table", marks=pytest.mark.slow)])
def test_cudnn_is_cut_along_the_batch(sharded, mesh, cudnn_on_cpu):
  """Whatever of the weights FSDP spreads: the kernel runs on one example a device, with the numbers of one device."""
  heads, width = 8, 64
  module = lambda asked: layers.Attention(
    width, heads, *(nn.initializers.normal(0.1),) * 2, jnp.bfloat16, (4, 4), asked
  )
  x = jax.random.normal(jax.random.key(0), (8, T, width))
  params = module("xla").init(jax.random.key(1), x)["params"]
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)

  def gradients(asked, params, x):
    apply = jax.checkpoint(lambda p, x: module(asked).apply({"params": p}, x.astype(jnp.bfloat16)))
    return jax.grad(lambda p: (apply(p, x).astype(jnp.float32) ** 2).sum())(params)

  wanted = jax.jit(gradients, static_argnums=0)("xla", params, x)
  mesh = sharding.make_mesh(*mesh)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), params)
    last = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    if sharded == "kernel":
      shardings["qkv"]["kernel"] = last
    else:
      shardings["relative_position_bias_table"] = last  # [R, K]
    found = jax.jit(gradients, static_argnums=0, out_shardings=shardings)(
      "auto", jax.device_put(params, shardings), jax.device_put(x, sharding.batch_sharding(mesh))
    )
  assert set(cudnn_on_cpu) == {(1, 24, heads, width // heads)}
  for want, have in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(have, want, rtol=0, atol=0.05 * np.abs(want).max())
