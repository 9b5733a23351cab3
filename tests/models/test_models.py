"""The encoder and the dVAE: golden values, exact sizes, options that must not change the result."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import losses, optim, trees
from beit_jax.models import beit, dvae, layers
from tests import reference

MIM = ("mim_plus", "mim_paper", "nonsquare")
COUNTS = {  # (pre-training, fine-tuning with 1000 classes), ../shared facts and unilm#383
  ("tiny", "plus"): (7_072_340, 5_708_248),
  ("tiny", "paper"): (7_103_360, 5_715_112),
  ("small", "plus"): (24_753_320, 22_032_328),
  ("small", "paper"): (24_815_360, 22_046_056),
  ("base", "plus"): (91_965_776, 86_530_984),
  ("base", "paper"): (92_089_856, 86_558_440),
  ("large", "plus"): (311_534_016, 304_430_568),
  ("large", "paper"): (311_674_880, 304_302_056),
}
COUNTS_NOTE = "every variant and preset needs an exact parameter count here"


def _mim(name):
  arrays, config = reference.load(name)
  module = beit.BeitForMaskedImageModeling(reference.encoder_fields(config), config["vocab_size"])
  params = reference.beit_tree(reference.section(arrays, "param/"))
  image = jnp.asarray(arrays["in/image"].transpose(0, 2, 3, 1))
  mask = jnp.asarray(arrays["in/mask"]).reshape(len(image), *config["grid"])
  return arrays, config, module, params, image, mask


def _mim_loss(module, params, image, mask, targets, slots):
  index, weight = beit.masked_slots(mask, slots)
  logits = module.apply({"params": params}, image, mask, slots=index)
  total, correct, count = losses.masked_cross_entropy(logits, jnp.take_along_axis(targets, index, 1), weight)
  return total / count, (logits, weight, correct / count)


@pytest.mark.parametrize("name", MIM)
def test_masked_image_modelling_golden(name):
  arrays, config, module, params, image, mask = _mim(name)
  logits = module.apply({"params": params}, image, mask)
  np.testing.assert_allclose(logits, arrays["out/logits_all"], atol=5e-5)
  x, out = beit.Beit(**module.encoder).apply({"params": params["encoder"]}, image, mask)
  np.testing.assert_allclose(x, arrays["out/features_norm"], atol=5e-5)
  for i in range(config["depth"]):
    np.testing.assert_allclose(out[f"block_{i:02d}"], arrays[f"out/block_{i}"], atol=2e-5)

  targets = jnp.asarray(arrays["in/target_ids"])
  loss = lambda p: _mim_loss(module, p, image, mask, targets, max(config["masked_per_image"]))
  (value, (logits, weight, accuracy)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(
    np.asarray(logits)[np.asarray(weight) == 1], arrays["out/logits_masked"], atol=5e-5
  )
  np.testing.assert_allclose(value, arrays["out/loss"], atol=1e-5)
  assert float(accuracy) == pytest.approx(float(arrays["out/mlm_acc"]), abs=1e-6)
  reference.assert_gradients_close(grads, reference.beit_tree(reference.section(arrays, "grad/")))
  np.testing.assert_allclose(optax.tree.norm(grads), arrays["out/grad_norm"], rtol=1e-5)


def _aggregation():
  arrays, config, module, _, image, mask = _mim("mim_v2")
  module = module.clone(early_block=config["early_layers"], head_blocks=config["head_layers"])
  params = reference.beit_tree(reference.section(arrays, "param/"))
  return arrays, config, module, params, image, mask


@pytest.mark.parametrize(
  "options", [{}, pytest.param(dict(scan=True, remat=True), marks=pytest.mark.slow)], ids=str
)
def test_patch_aggregation_golden(options):
  """Both logits, both losses and all gradients; rematerialization and the scan over blocks do not change them."""
  arrays, config, module, params, image, mask = _aggregation()
  module = module.clone(encoder={**module.encoder, **options})
  targets = jnp.asarray(arrays["in/target_ids"])

  def loss(params):
    index, weight = beit.masked_slots(mask, max(config["masked_per_image"]))
    outputs = module.apply({"params": params}, image, mask, slots=index, aggregated=True)
    wanted = jnp.take_along_axis(targets, index, 1)
    parts = [losses.masked_cross_entropy(logits, wanted, weight) for logits in outputs]
    values = [total / count for total, _, count in parts]
    return sum(values), (outputs, values, weight)

  (value, (outputs, values, weight)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  for logits, name in zip(outputs, ("logits_masked", "cls_pt_logits_masked"), strict=True):
    np.testing.assert_allclose(np.asarray(logits)[np.asarray(weight) == 1], arrays[f"out/{name}"], atol=5e-5)
  for found, name in zip((value, *values), ("loss", "loss_main", "loss_cls_pt"), strict=True):
    np.testing.assert_allclose(found, arrays[f"out/{name}"], atol=1e-5)
  reference.assert_gradients_close(grads, reference.beit_tree(reference.section(arrays, "grad/")))


def test_patch_aggregation_of_all_patches_golden():
  arrays, _, module, params, image, mask = _aggregation()
  found = module.apply({"params": params}, image, mask, aggregated=True)
  np.testing.assert_allclose(found[0], arrays["out/logits_all"], atol=5e-5)
  np.testing.assert_allclose(found[1], arrays["out/cls_pt_logits_all"], atol=5e-5)
  np.testing.assert_array_equal(module.apply({"params": params}, image, mask), found[0])


@pytest.mark.parametrize("name", ["mim_plus", "finetune_plus"])
def test_one_optimizer_step_golden(name):
  """With clipping (mim_plus) and with layer decay 0.65 (finetune_plus)."""
  arrays, config = reference.load(name)
  settings = config["optimizer"]
  params = reference.beit_tree(reference.section(arrays, "param/"))
  grads = reference.beit_tree(reference.section(arrays, "grad/"))
  tx = optim.make_optimizer(
    params,
    schedule=lambda _: settings["lr"],
    weight_decay=settings["weight_decay"],
    betas=settings["betas"],
    eps=settings["eps"],
    clip_norm=settings["clip_grad"] or 0.0,
    layer_decay=settings.get("layer_decay") or 1.0,
    depth=config["depth"],
  )
  updates, _ = tx.update(grads, tx.init(params), params)
  stepped = optax.apply_updates(params, updates)
  reference.assert_stepped_close(stepped, reference.beit_tree(reference.section(arrays, "stepped/")))


def test_three_steps_golden():
  """mim_plus_steps: warm-up from lr 0, some steps clipped and some not."""
  path = reference.HERE.parents[2] / "shared" / "golden" / "mim_plus_steps.npz"
  path = (
    path if path.exists() else reference.HERE.parents[1].parent / "shared" / "golden" / "mim_plus_steps.npz"
  )
  if not path.exists():
    pytest.skip(f"{path} is not here; it is not part of the repository")
  arrays = dict(np.load(path))
  settings = json.loads(str(arrays["meta/config"]))["optimizer"]
  _, config, module, params, _, _ = _mim("mim_plus")
  rates = jnp.asarray(settings["lr"])
  tx = optim.make_optimizer(
    params,
    schedule=lambda step: rates[step],
    weight_decay=settings["weight_decay"],
    clip_norm=settings["clip_grad"],
  )
  state = tx.init(params)

  @jax.jit
  def step(params, state, image, mask, targets):
    slots = mask.shape[1] * mask.shape[2]
    loss = lambda p: _mim_loss(module, p, image, mask, targets, slots)[0]
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

  for i in range(3):
    image = arrays["in/image"][i].transpose(0, 2, 3, 1)
    mask = arrays["in/mask"][i].reshape(-1, *config["grid"])
    params, state, value, norm = step(params, state, image, mask, arrays["in/target_ids"][i])
    assert float(value) == pytest.approx(float(arrays["out/loss"][i]), abs=1e-4)
    assert float(norm) == pytest.approx(float(arrays["out/grad_norm"][i]), rel=1e-4)
  reference.assert_stepped_close(params, reference.beit_tree(reference.section(arrays, "stepped/")))


@pytest.mark.parametrize("name", ["finetune_plus", "finetune_cls_pool"])
def test_classification_golden(name):
  arrays, config = reference.load(name)
  pool = "mean" if config["use_mean_pooling"] else "cls"
  module = beit.BeitForImageClassification(reference.encoder_fields(config), config["num_classes"], pool)
  params = reference.beit_tree(reference.section(arrays, "param/"))
  image = jnp.asarray(arrays["in/image"].transpose(0, 2, 3, 1))

  def loss(params):
    logits = module.apply({"params": params}, image)
    targets = losses.smooth_labels(
      jnp.asarray(arrays["in/label"]), config["num_classes"], config["label_smoothing"]
    )
    return losses.soft_target_cross_entropy(logits, targets).mean(), logits

  (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, arrays["out/logits"], atol=2e-5)
  np.testing.assert_allclose(value, arrays["out/loss_smooth"], atol=1e-5)
  plain = losses.soft_target_cross_entropy(logits, jax.nn.one_hot(arrays["in/label"], config["num_classes"]))
  np.testing.assert_allclose(plain.mean(), arrays["out/loss_ce"], atol=1e-5)
  soft = losses.soft_target_cross_entropy(logits, arrays["in/soft_target"].astype(np.float32))
  np.testing.assert_allclose(soft.mean(), arrays["out/loss_soft_target"], atol=1e-5)
  reference.assert_gradients_close(grads, reference.beit_tree(reference.section(arrays, "grad/")))


def _dalle(path):
  arrays = dict(np.load(path))
  config = json.loads(str(arrays["meta/config"]))
  encoder, decoder = config["encoder"], config["decoder"]
  module = dvae.Dvae(
    encoder["n_hid"],
    decoder["n_init"],
    encoder["n_blk_per_group"],
    encoder["group_count"],
    encoder["vocab_size"],
  )
  params = reference.dalle_tree(reference.section(arrays, "param/"))
  image = jnp.asarray(arrays["in/image"].transpose(0, 2, 3, 1))
  variables = {"params": params}
  nchw = lambda x: np.asarray(x).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(nchw(dvae.map_pixels(image)), arrays["in/mapped"], atol=1e-7)
  logits = module.apply(variables, dvae.map_pixels(image), method="logits")
  np.testing.assert_allclose(nchw(logits), arrays["out/logits"], atol=1e-4)
  ids = module.apply(variables, image, method="tokenize")
  np.testing.assert_array_equal(ids, arrays["out/ids"].reshape(len(ids), -1))
  grid = arrays["out/ids"].shape[1:]
  one_hot = jax.nn.one_hot(ids.reshape(-1, *grid), module.vocab_size)
  decoded = jnp.concatenate(module.apply(variables, one_hot, method="decode_soft"), -1)
  np.testing.assert_allclose(nchw(decoded), arrays["out/decoder"], atol=2e-5)
  reconstruction = module.apply(variables, ids, grid, method="decode")
  np.testing.assert_allclose(nchw(reconstruction), arrays["out/reconstruction"], atol=1e-5)


def test_dalle_golden_narrow():
  """Two blocks per group, as published."""
  _dalle(reference.HERE / "dalle_pkl.npz")


def test_dalle_golden_wide():
  path = reference.HERE.parents[2] / "shared" / "golden" / "dalle.npz"
  if not path.exists():
    pytest.skip(f"{path} is not here; it is not part of the repository")
  _dalle(path)


def test_relative_position_index_golden():
  arrays, _ = reference.load("nonsquare")
  wanted = arrays["buffer/rel_pos_bias.relative_position_index"]
  np.testing.assert_array_equal(layers.relative_position_index((4, 6)), wanted)


@pytest.mark.parametrize(("variant", "shared"), [("base", True), ("large", True), ("base", False)])
def test_exact_parameter_counts_of_beit_v2(variant, shared):
  """Those of BEiT, two blocks more, and a second vocabulary head if it is not shared."""
  fields = {**beit.VARIANTS[variant], **beit.preset_fields("plus", variant, pretrain=True)}
  width, depth = fields["width"], fields["depth"]
  qkv, proj = 3 * width**2 + 2 * width, width**2 + width  # q and v have biases
  mlp = 8 * width**2 + 5 * width
  block = qkv + proj + mlp + 4 * width + 2 * width  # two norms, LayerScale
  embedding = (16 * 16 * 3 + 1) * width + 2 * width  # patches; cls and mask tokens
  head = (width + 1) * 8192
  bias_table = (27 * 27 + 3) * fields["num_heads"]
  wanted = embedding + bias_table + (depth + 2) * block + 2 * width + (1 if shared else 2) * head
  module = beit.BeitForMaskedImageModeling(fields, 8192, depth - 3, 2, shared)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
  assert trees.num_params(shapes) == wanted
  assert wanted - 2 * block - (0 if shared else head) == COUNTS[variant, "plus"][0]


def test_initial_values_of_patch_aggregation():
  """The output kernels of its blocks are scaled like those of the blocks that would follow the early one."""
  encoder = dict(image_size=(32, 32), patch_size=16, width=64, depth=3, num_heads=2)
  module = beit.BeitForMaskedImageModeling(encoder, 16, 2, 2)
  params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  for i in range(2):
    block = params[f"head_block_{i:02d}"]
    ratio = block["mlp"]["fc2"]["kernel"].std() / block["mlp"]["fc1"]["kernel"].std()
    assert float(ratio) == pytest.approx((2 * (2 + i + 1)) ** -0.5, rel=0.05)


@pytest.mark.parametrize("preset", ["plus", "paper"])
@pytest.mark.parametrize("variant", sorted(beit.VARIANTS))
def test_exact_parameter_counts(variant, preset):
  assert (variant, preset) in COUNTS, COUNTS_NOTE
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  fields = lambda pretrain: {
    **beit.VARIANTS[variant],
    **beit.preset_fields(preset, variant, pretrain=pretrain),
  }
  mim = beit.BeitForMaskedImageModeling(fields(True))
  classifier = beit.BeitForImageClassification(fields(False))
  found = tuple(trees.num_params(jax.eval_shape(m.init, jax.random.key(0), image)) for m in (mim, classifier))
  assert found == COUNTS[variant, preset]


def test_published_tokenizer_has_the_published_size():
  image = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
  shapes = jax.eval_shape(dvae.Dvae().init, jax.random.key(0), image)["params"]
  logits = jax.eval_shape(lambda p, x: dvae.Dvae().apply({"params": p}, x, method="logits"), shapes, image)
  assert logits.shape == (1, 14, 14, 8192)
  assert {n.split("/")[1] for n in trees.flatten(shapes["encoder"])} >= {"block_1", "block_2"}


@pytest.mark.parametrize("rel_pos", [pytest.param("shared", marks=pytest.mark.slow), "per_block"])
def test_scan_and_remat_change_nothing(rel_pos):
  """Same parameters, same output, same gradients, with stochastic depth on."""
  fields = dict(
    image_size=(16, 24), patch_size=8, width=8, depth=2, num_heads=2, rel_pos=rel_pos, drop_path_rate=0.3
  )
  image = jax.random.normal(jax.random.key(0), (4, 16, 24, 3))
  plain = beit.Beit(**fields)
  params = plain.init(jax.random.key(1), image)["params"]

  def run(module):
    def loss(params):
      x, out = module.apply({"params": params}, image, train=True, rngs={"drop_path": jax.random.key(2)})
      return (x**2).mean() + (out["block_01"] ** 3).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  value, grads = run(plain)
  for options in (dict(remat=True), dict(scan=True, remat=True)):
    module = beit.Beit(**fields, **options)
    assert (
      trees.flatten(params).keys() == trees.flatten(module.init(jax.random.key(1), image)["params"]).keys()
    )
    other, other_grads = run(module)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    reference.assert_gradients_close(other_grads, jax.device_get(grads), 1e-5)


def _init(weight_init, **fields):
  fields = dict(
    image_size=(64, 64), patch_size=8, width=192, depth=4, num_heads=3, weight_init=weight_init, **fields
  )
  module = beit.Beit(**fields)
  return trees.flatten(module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])


def test_init_of_pre_training():
  """Truncated at one sigma: std 0.0108, nothing beyond 0.02; output matrices divided by sqrt(2 * layer)."""
  params = _init("pretrain", abs_pos=True)
  for name in ("block_00/attn/qkv/kernel", "block_02/mlp/fc1/kernel", "patch_embed/kernel", "pos_embed"):
    assert params[name].std() == pytest.approx(0.010785, rel=0.03), name
    assert np.abs(params[name]).max() <= 0.02
  for i in range(4):
    for name in ("attn/proj/kernel", "mlp/fc2/kernel"):
      wanted = 0.010785 / np.sqrt(2 * (i + 1))
      assert params[f"block_{i:02d}/{name}"].std() == pytest.approx(wanted, rel=0.03)
    assert (params[f"block_{i:02d}/gamma_1"] == np.float32(0.1)).all()
  assert not params["rel_pos_bias/relative_position_bias_table"].any()


def test_init_of_fine_tuning():
  """Plain N(0, 0.02); PyTorch's default for the patch convolution; head 1000 times smaller."""
  params = _init("finetune")
  assert params["block_00/attn/qkv/kernel"].std() == pytest.approx(0.02, rel=0.02)
  assert params["block_03/mlp/fc2/kernel"].std() == pytest.approx(0.02 / np.sqrt(8), rel=0.02)
  bound = 1 / np.sqrt(8 * 8 * 3)
  assert params["patch_embed/kernel"].std() == pytest.approx(bound / np.sqrt(3), rel=0.03)
  assert np.abs(params["patch_embed/kernel"]).max() <= bound
  module = beit.BeitForImageClassification(
    dict(image_size=(32, 32), patch_size=8, width=192, depth=1, num_heads=3, weight_init="finetune"), 100
  )
  head = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["head"]["kernel"]
  assert head.std() == pytest.approx(2e-5, rel=0.05)


def test_drop_path_keeps_the_mean():
  x = jnp.ones((20_000, 1, 1))
  dropped = layers.drop_path(x, 0.25, jax.random.key(0))
  assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
  assert dropped.mean() == pytest.approx(1.0, abs=0.02)
  assert layers.drop_path(x, 0.25, None) is x


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32():
  arrays, config, module, params, image, mask = _mim("mim_plus")
  half = beit.BeitForMaskedImageModeling({**module.encoder, "dtype": "bfloat16"}, module.vocab_size)
  logits = half.apply({"params": params}, image, mask)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - arrays["out/logits_all"])
  assert 1e-4 < error.max() < 1.0


def test_wrong_image_size_names_both():
  module = beit.Beit(image_size=(32, 32), patch_size=8, width=16, depth=1, num_heads=2)
  params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  with pytest.raises(ValueError, match=r"\(32, 32, 3\).*\(32, 40, 3\)"):
    module.apply(params, jnp.zeros((1, 32, 40, 3)))
