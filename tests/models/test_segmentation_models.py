"""UPerNet and SETR-PUP: golden values, exact sizes, batch statistics over a mesh, resampling by hand formulas."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import losses, trees
from beit_jax.models import beit, convolutions, resampling, upernet
from beit_jax.runtime import sharding
from tests import reference

# mmseg's names -> ours; the docstring of upernet.py says the same.
MMSEG_NAMES = (
  (r"^backbone\.fpn1\.0\.", r"fpn1/up_0/"),
  (r"^backbone\.fpn1\.1\.", r"fpn1/bn/"),
  (r"^backbone\.fpn1\.3\.", r"fpn1/up_1/"),
  (r"^backbone\.fpn2\.0\.", r"fpn2/"),
  (r"^backbone\.(.*)$", lambda m: reference.beit_name(m.group(1))),
  (r"\.psp_modules\.(\d)\.1\.", r"/psp_\1/"),
  (r"\.(lateral|fpn)_convs\.(\d)\.", r"/\1_\2/"),
  (r"\.convs\.(\d)\.", r"/conv_\1/"),
  (r"[./]running_(mean|var)$", r"/\1"),
  (r"\.", "/"),
  (r"(bn|norm)/weight$", r"\1/scale"),
  (r"/weight$", "/kernel"),
)
TINY = dict(
  image_size=(64, 64),
  patch_size=16,
  width=8,
  depth=4,
  num_heads=2,
  rel_pos="per_block",
  scan=True,
)
GRADIENT_TOLERANCE = 2e-5


def _mmseg_name(name):
  for pattern, replacement in MMSEG_NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def _flat(arrays, prefix):
  """mmseg's tensors under a prefix -> flat, our names and layouts (a transposed conv has its inputs first)."""
  result = {}
  for name, value in reference.section(arrays, prefix).items():
    ours = _mmseg_name(name)
    if ours.endswith("kernel"):
      transposed = re.match(r"fpn[12]/", ours)
      value = value.T if value.ndim == 2 else value.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))
    result[ours] = value
  return result


nchw = lambda x: np.asarray(x).transpose(0, 3, 1, 2)


def _golden_loss(module, params, stats, image, label):
  out = module.apply({"params": params, "batch_stats": stats}, image)
  parts = {}
  for name in ("logits", "aux"):
    parts[name] = losses.segmentation_cross_entropy(
      resampling.resize_bilinear(out[name], label.shape[1:]), label
    )
  (decode, valid, _), (aux, _, _) = parts["logits"], parts["aux"]
  return (decode + 0.4 * aux) / valid, (out, parts)


@functools.cache
def _golden():
  """seg.npz, the module, its variables, and one compiled evaluation of loss, outputs and gradients."""
  arrays, config = reference.load("seg")
  backbone, decode, aux = config["backbone"], config["decode_head"], config["auxiliary_head"]
  module = upernet.BeitForSemanticSegmentation(
    reference.encoder_fields(backbone),
    decode["num_classes"],
    tuple(backbone["out_indices"]),
    channels=decode["channels"],
    aux_channels=aux["channels"],
  )
  params, stats = (trees.unflatten(_flat(arrays, prefix)) for prefix in ("param/", "buffer/"))
  image, label = jnp.asarray(arrays["in/image"].transpose(0, 2, 3, 1)), jnp.asarray(arrays["in/label"])
  loss = functools.partial(_golden_loss, module)
  result = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, image, label)
  return arrays, module, params, stats, image, result


def test_golden_names_cover_the_whole_model():
  _, module, params, stats, image, _ = _golden()
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  for found, wanted in ((params, shapes["params"]), (stats, shapes["batch_stats"])):
    found, wanted = trees.flatten(found), trees.flatten(wanted)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}


def test_golden_blocks_and_levels():
  arrays, module, params, stats, image, _ = _golden()
  encoder = beit.Beit(**module.encoder | dict(use_mask_token=False, final_norm=False))
  _, out = encoder.apply({"params": params["encoder"]}, image)
  for i in module.out_indices:
    np.testing.assert_allclose(out[f"block_{i:02d}"], arrays[f"out/block_{i}"], atol=2e-5)
  taps = upernet.tapped_maps(out, module.out_indices, encoder.grid_size)
  fpn1 = {"params": params["fpn1"], "batch_stats": stats["fpn1"]}
  levels = (
    upernet.Upsample4(jnp.float32).apply(fpn1, taps[0]),
    convolutions.TransposedConv(encoder.width, jnp.float32).apply({"params": params["fpn2"]}, taps[1]),
    taps[2],
    resampling.max_pool_2x2(taps[3]),
  )
  for i, level in enumerate(levels):
    np.testing.assert_allclose(nchw(level), arrays[f"out/feature_{i}"], atol=5e-5)


def test_golden_logits_and_losses():
  arrays, *_, ((value, (out, parts)), _) = _golden()
  np.testing.assert_allclose(nchw(out["logits"]), arrays["out/logits"], atol=1e-4)
  np.testing.assert_allclose(nchw(out["aux"]), arrays["out/aux_logits"], atol=1e-4)
  (decode, valid, correct), (aux, aux_valid, _) = parts["logits"], parts["aux"]
  label = arrays["in/label"]
  assert float(valid) == float(aux_valid) == (label != 255).sum()
  np.testing.assert_allclose(decode / valid, arrays["out/loss_decode_valid_mean"], atol=2e-5)
  np.testing.assert_allclose(aux / valid, arrays["out/loss_aux_valid_mean_unweighted"], atol=2e-5)
  np.testing.assert_allclose(value, arrays["out/loss_total_valid_mean"], atol=5e-5)
  np.testing.assert_allclose(decode / label.size, arrays["out/loss_decode_mmseg"], atol=2e-5)
  np.testing.assert_allclose(aux / label.size, arrays["out/loss_aux_mmseg_unweighted"], atol=2e-5)
  clear = arrays["out/pred_margin"] > 1e-3
  pred = np.asarray(resampling.resize_bilinear(out["logits"], label.shape[1:])).argmax(-1)
  np.testing.assert_array_equal(pred[clear], arrays["out/pred"][clear])
  assert abs(float(correct) - (arrays["out/pred"] == label).sum()) <= (~clear).sum()


@pytest.mark.slow
def test_golden_gradients():
  arrays, *_, (_, grads) = _golden()
  wanted, found = _flat(arrays, "grad/"), trees.flatten(grads)
  assert len(wanted) == 11
  reference.assert_gradients_close({n: found[n] for n in wanted}, wanted, GRADIENT_TOLERANCE)
  assert all(np.isfinite(g).all() for g in found.values())


def test_loss_ignores_and_refuses_labels():
  logits = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
  label = np.array([[[0, 3, 255], [255, 1, 2]]], np.uint8)
  total, valid, correct = losses.segmentation_cross_entropy(logits, label)
  keep = label != 255
  log_probs = np.asarray(jax.nn.log_softmax(logits))[keep]
  np.testing.assert_allclose(total, -log_probs[np.arange(4), label[keep]].sum(), rtol=1e-6)
  assert (float(valid), float(correct)) == (4, (log_probs.argmax(-1) == label[keep]).sum())
  grad = jax.grad(lambda x: losses.segmentation_cross_entropy(x, label)[0])(logits)
  assert not np.asarray(grad)[~keep].any() and np.isfinite(grad).all()
  assert np.isnan(losses.segmentation_cross_entropy(logits, np.full_like(label, 4))[0])
  assert [float(x) for x in losses.segmentation_cross_entropy(logits, np.full_like(label, 255))] == [0, 0, 0]


# Batch normalisation.


def _batch_norm_by_hand(x, cotangent, stats, scale, bias):
  """torch.nn.BatchNorm2d in training, float64: (output, running mean, running variance: unbiased, gradient of x)."""
  x = x.astype(np.float64)
  mean, std = x.mean((0, 1, 2)), np.sqrt(x.var((0, 1, 2)) + 1e-5)
  running = 0.9 * stats["mean"] + 0.1 * mean, 0.9 * stats["var"] + 0.1 * x.var((0, 1, 2), ddof=1)
  unit = (x - mean) / std
  slope = cotangent - cotangent.mean((0, 1, 2)) - unit * (cotangent * unit).mean((0, 1, 2))
  return unit * scale + bias, *running, slope * scale / std


def _on_mesh(devices, function, *args):
  """function(*args) jitted, axis 0 of the last argument spread over that many devices."""
  mesh = sharding.make_mesh(devices)
  with jax.set_mesh(mesh):
    spread = jax.device_put(args[-1], sharding.batch_sharding(mesh))
    return jax.device_get(jax.jit(function)(*args[:-1], spread))


@pytest.mark.parametrize("devices", [1, 8])
def test_batch_norm_is_that_of_torch_on_any_mesh(devices):
  """A mean of 300 with a deviation of 1: E[x^2] - E[x]^2 in float32 would be off by several per cent."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(8, 3, 2, 5)) + 300 + 2 * np.arange(8)[:, None, None, None]).astype(np.float32)
  scale, bias, mean, var = (rng.uniform(0.5, 2, 5).astype(np.float32) for _ in range(4))
  variables = {"params": dict(scale=scale, bias=bias), "batch_stats": dict(mean=mean, var=var)}
  cotangent = rng.normal(size=x.shape).astype(np.float32)

  def apply(x):
    run = lambda x: convolutions.BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    y, vjp, new = jax.vjp(run, x, has_aux=True)
    return y, new["batch_stats"], vjp(jnp.asarray(cotangent))[0]

  y, new, grad = _on_mesh(devices, apply, x)
  wanted = _batch_norm_by_hand(x, cotangent, variables["batch_stats"], scale, bias)
  np.testing.assert_allclose(y, wanted[0], atol=1e-4)  # 300 has a float32 step of 3e-5
  np.testing.assert_allclose(new["mean"], wanted[1], rtol=1e-5)
  np.testing.assert_allclose(new["var"], wanted[2], rtol=1e-5)
  np.testing.assert_allclose(grad, wanted[3], atol=1e-4)
  y = convolutions.BatchNorm().apply(variables, x)
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5)


def test_batch_norm_against_torch():
  torch = pytest.importorskip("torch")
  x = np.random.default_rng(0).normal(2, 3, (2, 3, 4, 5)).astype(np.float32)
  layer = torch.nn.BatchNorm2d(5)
  wanted = layer(torch.from_numpy(x.transpose(0, 3, 1, 2)))
  module = convolutions.BatchNorm()
  variables = module.init(jax.random.key(0), x)
  y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(nchw(y), wanted.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(new["batch_stats"]["mean"], layer.running_mean, atol=1e-6)
  np.testing.assert_allclose(new["batch_stats"]["var"], layer.running_var, rtol=1e-5)


def test_batch_norm_of_one_value_is_refused():
  module = convolutions.BatchNorm()
  variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)))
  with pytest.raises(ValueError, match="2 images"):
    module.apply(variables, jnp.zeros((1, 1, 1, 3)), train=True, mutable=["batch_stats"])


def _redrawn(variables, seed=0):
  """Every parameter and statistic drawn anew, so that none is zero or one; variances stay positive."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return np.exp(0.3 * noise) if name.endswith(("scale", "var")) else 0.2 * noise

  return trees.named_map(draw, variables)


@pytest.fixture(scope="module")
def tiny_upernet():
  module = upernet.BeitForSemanticSegmentation(TINY, 5, (0, 1, 2, 3), aux_channels=6)
  image = np.random.default_rng(1).normal(size=(8, 64, 64, 3)).astype(np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  return module, _redrawn(shapes), image


def _train_pass(module, variables, image):
  """Outputs and new statistics in training mode."""
  rngs = {"dropout": jax.random.key(3)}
  out, new = module.apply(variables, image, train=True, mutable=["batch_stats"], rngs=rngs)
  return out, new["batch_stats"]


def _train_gradients(module, variables, image):
  """Outputs, new statistics and the gradients of a loss on all outputs."""

  def loss(params):
    result = _train_pass(module, {**variables, "params": params}, image)
    return sum((x**2).mean() for x in jax.tree.leaves(result[0])), result

  (_, result), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return *result, trees.flatten(grads)


@pytest.mark.slow
def test_upernet_trains_alike_on_one_and_eight_devices(tiny_upernet):
  """SyncBN through the whole model: the same outputs and running statistics; every parameter gets a gradient."""
  module, variables, image = tiny_upernet
  one = _on_mesh(1, functools.partial(_train_pass, module), variables, image)
  *eight, grads = _on_mesh(8, functools.partial(_train_gradients, module), variables, image)
  assert one[0]["logits"].shape == (8, 16, 16, 5) and one[0]["aux"].shape == (8, 4, 4, 5)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
  for name, value in grads.items():
    # A constant before a batch normalisation has no effect, up to rounding; mmseg has these biases too.
    assert np.isfinite(value).all() and (np.abs(value).max() > 1e-6) != bool(
      re.match(r"fpn(1/up_[01]|2)/bias", name)
    ), name
  old = trees.flatten(variables["batch_stats"])
  assert all((old[name] != value).all() for name, value in trees.flatten(one[1]).items())


def test_dropout_takes_whole_channels():
  class Drop(convolutions.nn.Module):
    @convolutions.nn.compact
    def __call__(self, x, train):
      return convolutions.drop_channels(x, train=train)

  x = jnp.ones((40, 3, 3, 50))
  y = np.asarray(Drop().apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
  assert (y == y[:, :1, :1]).all()
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.9)}
  assert (y[:, 0, 0] == 0).mean() == pytest.approx(0.1, abs=0.03)
  assert (np.asarray(Drop().apply({}, x, False)) == 1).all()


# Resampling.


def _bilinear_by_hand(x, size):
  """F.interpolate(bilinear, align_corners=False), pixel by pixel."""
  _, h, w, _ = x.shape
  y = np.empty((len(x), *size, x.shape[-1]))
  for i, j in np.ndindex(*size):
    a, b = max((i + 0.5) * h / size[0] - 0.5, 0), max((j + 0.5) * w / size[1] - 0.5, 0)
    i0, j0 = int(a), int(b)
    i1, j1 = min(i0 + 1, h - 1), min(j0 + 1, w - 1)
    a, b = a - i0, b - j0
    top = x[:, i0, j0] * (1 - b) + x[:, i0, j1] * b
    y[:, i, j] = top * (1 - a) + (x[:, i1, j0] * (1 - b) + x[:, i1, j1] * b) * a
  return y


def _pool_by_hand(x, size):
  _, h, w, _ = x.shape
  y = np.empty((len(x), *size, x.shape[-1]))
  for i, j in np.ndindex(*size):
    rows = slice(int(np.floor(i * h / size[0])), int(np.ceil((i + 1) * h / size[0])))
    columns = slice(int(np.floor(j * w / size[1])), int(np.ceil((j + 1) * w / size[1])))
    y[:, i, j] = x[:, rows, columns].mean((1, 2))
  return y


SIZES = [
  ((3, 4), (6, 8)),
  ((6, 6), (16, 20)),
  ((7, 5), (3, 2)),
  ((2, 1), (6, 6)),
  ((1, 3), (1, 3)),
  ((16, 17), (6, 3)),
]


@pytest.mark.parametrize("source, target", SIZES, ids=str)
def test_resampling_by_hand(source, target):
  x = np.random.default_rng(0).normal(size=(2, *source, 3)).astype(np.float32)
  np.testing.assert_allclose(resampling.resize_bilinear(x, target), _bilinear_by_hand(x, target), atol=1e-6)
  np.testing.assert_allclose(resampling.adaptive_average_pool(x, target), _pool_by_hand(x, target), atol=1e-6)


def test_resampling_against_torch():
  torch = pytest.importorskip("torch")
  for source, target in SIZES:
    x = np.random.default_rng(0).normal(size=(2, *source, 3)).astype(np.float32)
    t = torch.from_numpy(nchw(x).copy())
    wanted = torch.nn.functional.interpolate(t, target, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(nchw(resampling.resize_bilinear(x, target)), wanted, atol=5e-6)
    wanted = torch.nn.functional.adaptive_avg_pool2d(t, target)
    np.testing.assert_allclose(nchw(resampling.adaptive_average_pool(x, target)), wanted, atol=5e-6)


def test_max_pool_drops_an_odd_edge():
  x = np.arange(15, dtype=np.float32).reshape(1, 3, 5, 1)
  np.testing.assert_array_equal(np.asarray(resampling.max_pool_2x2(x))[0, ..., 0], [[6, 8]])
  with pytest.raises(ValueError, match="1x5"):
    resampling.max_pool_2x2(x[:, :1])


# SETR-PUP.


@pytest.fixture(scope="module")
def tiny_setr():
  fields = TINY | dict(image_size=(32, 48))
  module = upernet.BeitForSemanticSegmentation(fields, 5, (0, 1, 2, 3), 6, 7, head="setr_pup")
  image = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
  variables = _redrawn(jax.eval_shape(module.init, jax.random.key(0), image), 2)
  return module, variables, image, jax.jit(module.apply)(variables, image)


def _setr_by_torch(torch, flat, x, num_convs, scale):
  """mmseg's order: LayerNorm, (3x3 conv, BN, ReLU, x2) n times, classifier."""
  f, t = torch.nn.functional, lambda name: torch.from_numpy(np.array(flat[name], np.float64))
  conv = lambda name: t(f"{name}/kernel").permute(3, 2, 0, 1)
  x = torch.from_numpy(np.array(x, np.float64))
  x = f.layer_norm(x, x.shape[-1:], t("norm/scale"), t("norm/bias"), 1e-6).permute(0, 3, 1, 2)
  for i in range(num_convs):
    bn = [t(f"up_{i}/bn/{name}") for name in ("mean", "var", "scale", "bias")]
    x = f.relu(f.batch_norm(f.conv2d(x, conv(f"up_{i}/conv"), padding=1), *bn, False, 0.1, 1e-5))
    if scale > 1:
      x = f.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
  return f.conv2d(x, conv("conv_seg"), t("conv_seg/bias")).permute(0, 2, 3, 1).numpy()


def test_setr_pup_against_torch(tiny_setr):
  torch = pytest.importorskip("torch")
  module, variables, image, out = tiny_setr
  encoder = beit.Beit(**module.encoder | dict(use_mask_token=False, final_norm=False))
  _, blocks = encoder.apply({"params": variables["params"]["encoder"]}, image)
  taps = upernet.tapped_maps(blocks, (0, 1, 2, 3), (2, 3))
  flat = lambda name: {
    key: value
    for part in variables.values()
    if name in part
    for key, value in trees.flatten(part[name]).items()
  }
  wanted = _setr_by_torch(torch, flat("decode_head"), taps[3], 4, 2)
  assert wanted.shape == (2, 32, 48, 5)
  np.testing.assert_allclose(out["logits"], wanted, atol=2e-5)
  assert len(out["aux"]) == 3
  for i, found in enumerate(out["aux"]):
    wanted = _setr_by_torch(torch, flat(f"auxiliary_head_{i}"), taps[i], 1, 1)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.slow
def test_setr_pup_trains(tiny_setr):
  module, variables, image, _ = tiny_setr
  _, stats, grads = jax.device_get(jax.jit(functools.partial(_train_gradients, module))(variables, image))
  old = trees.flatten(variables["batch_stats"])
  assert all((old[name] != value).all() for name, value in trees.flatten(stats).items())
  for name, value in grads.items():
    assert np.isfinite(value).all() and np.abs(value).max() > 0, name


# Sizes.


def _setr_size(width, classes, channels, aux_channels):
  head = lambda n, c: 2 * width + 9 * width * c + (n - 1) * 9 * c * c + n * 2 * c + (c + 1) * classes
  return head(4, channels) + 3 * head(1, aux_channels)


def _upernet_size(width, classes, channels, aux_channels):
  necks = 3 * (4 * width * width + width) + 2 * width
  module = lambda inputs, outputs, kernel: kernel * kernel * inputs * outputs + 2 * outputs
  decode = 4 * module(width, channels, 1) + module(width + 4 * channels, channels, 3)
  decode += (
    3 * module(width, channels, 1) + 3 * module(channels, channels, 3) + module(4 * channels, channels, 3)
  )
  aux = module(width, aux_channels, 3) + (aux_channels + 1) * classes
  return necks + decode + (channels + 1) * classes + aux


def _encoder_size(variant, image_size):
  """The classifier's count (test_models.py) without its norm and head, with larger tables."""
  width, depth, heads = (beit.VARIANTS[variant][name] for name in ("width", "depth", "num_heads"))
  classifier = {"base": 86_530_984, "large": 304_430_568}[variant]
  rows = lambda side: (2 * side - 1) ** 2 + 3
  grow = depth * heads * (rows(image_size // 16) - rows(14))
  return classifier - 2 * width - (width + 1) * 1000 + grow


@pytest.mark.parametrize("variant, millions", [("base", 163), ("large", 441)])
def test_exact_parameter_counts_of_upernet(variant, millions):
  """mmseg says 163M and 441M, with 150 classes at 640 pixels."""
  fields = {
    **beit.VARIANTS[variant],
    **beit.preset_fields("plus", variant, pretrain=False),
    "image_size": (640, 640),
  }
  indices = (3, 5, 7, 11) if variant == "base" else (7, 11, 15, 23)
  module = upernet.BeitForSemanticSegmentation(fields, 150, indices)
  image = jax.ShapeDtypeStruct((2, 640, 640, 3), jnp.float32)
  found = trees.num_params(jax.eval_shape(module.init, jax.random.key(0), image)["params"])
  width = fields["width"]
  assert found == _encoder_size(variant, 640) + _upernet_size(width, 150, width, 256)
  assert round(found / 1e6) == millions


def test_exact_parameter_count_of_setr_pup(tiny_setr):
  params = dict(tiny_setr[1]["params"])
  params.pop("encoder")
  assert trees.num_params(params) == _setr_size(8, 5, 6, 7)
  assert upernet.setr.SETR_CHANNELS == 256


def test_starting_values():
  """mmcv's and PyTorch's defaults: kaiming normal by fan out, uniform, N(0, 0.01)."""
  x = jnp.zeros((1, 1, 1, 32))
  init = lambda module: jax.device_get(module.init(jax.random.key(0), x))
  for size, fan_out in ((3, 9 * 64), (1, 64)):
    variables = init(convolutions.ConvModule(64, size, jnp.float32))
    kernel = variables["params"]["conv"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)
    assert (variables["batch_stats"]["bn"]["mean"] == 0).all() and (
      variables["batch_stats"]["bn"]["var"] == 1
    ).all()
  params = init(convolutions.TransposedConv(64, jnp.float32))["params"]
  bound = 1 / np.sqrt(4 * 64)
  assert params["kernel"].std() == pytest.approx(bound / np.sqrt(3), rel=0.03)
  assert np.abs(params["kernel"]).max() <= bound and params["bias"].std() > 0
  params = init(upernet.FcnHead(150, 16, jnp.float32))["params"]["conv_seg"]
  assert params["kernel"].std() == pytest.approx(0.01, rel=0.05) and not params["bias"].any()


@pytest.mark.slow
def test_bfloat16_ends_in_float32(tiny_upernet, tiny_setr):
  module, variables, image = tiny_upernet
  half = module.clone(encoder=TINY | dict(dtype="bfloat16"))
  shapes = jax.eval_shape(half.apply, variables, image)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
  module, variables, image, full = tiny_setr
  half = module.clone(encoder=module.encoder | dict(dtype="bfloat16"))
  out = jax.jit(half.apply)(variables, image)
  for found, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(full), strict=True):
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
  "fields", [dict(out_indices=(0, 1, 1, 3)), dict(out_indices=(0, 1, 2, 4)), dict(head="fcn")]
)
def test_wrong_fields_are_refused(fields):
  module = upernet.BeitForSemanticSegmentation(TINY, 5, **dict(dict(out_indices=(0, 1, 2, 3)), **fields))
  with pytest.raises(ValueError, match="out_indices|head 'fcn'"):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
