"""Schedules, weight-decay rule, layer decay: golden tables and formulas written by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import optim, trees
from beit_jax.models import beit, upernet
from tests import reference


def _schedule_arguments(case):
  total = case["epochs"] * case["niter_per_ep"]
  warmup = case.get("warmup_steps", case.get("warmup_epochs", 0) * case["niter_per_ep"])
  return dict(
    peak=case["base_value"],
    end=case["final_value"],
    start=case.get("start_warmup_value", 0.0),
    warmup_steps=warmup,
    total_steps=total,
  )


_ARRAYS, _CONFIG = reference.load("schedule")


@pytest.mark.parametrize("name", sorted(_CONFIG["cases"]))
def test_schedules_golden(name):
  arguments = _schedule_arguments(_CONFIG["cases"][name])
  steps = np.arange(arguments["total_steps"])
  np.testing.assert_allclose(optim.warmup_cosine(steps, **arguments), _ARRAYS[name], atol=1e-12, rtol=0)
  jitted = jax.jit(lambda step: optim.warmup_cosine(step, xp=jnp, **arguments))
  found = np.array([jitted(step) for step in steps[::7]])
  np.testing.assert_allclose(found, _ARRAYS[name][::7], atol=1e-6 * arguments["peak"], rtol=0)


def test_schedule_is_exact_over_a_full_run():
  """Over 500,000 steps float32 values differ from float64 ones by at most 1e-6 of the peak."""
  arguments = dict(peak=1.5e-3, end=1e-5, warmup_steps=6250, total_steps=500_000)
  steps = np.linspace(0, 499_999, 997).astype(np.int32)
  found = jax.jit(lambda s: optim.warmup_cosine(s, xp=jnp, **arguments))(steps)
  np.testing.assert_allclose(found, optim.warmup_cosine(steps, **arguments), atol=1.5e-9, rtol=0)
  assert optim.warmup_cosine(10**6, **arguments) == pytest.approx(1e-5, rel=1e-6)


def _shapes(name):
  table = json.loads((reference.HERE / "layer_decay.json").read_text())[name]
  config = table["config"]
  fields = dict(
    reference.encoder_fields(
      {
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": False,
        **config,
        "img_size": [config["img_size"]] * 2,
      }
    )
  )
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  if "vocab_size" in config:
    module = beit.BeitForMaskedImageModeling(fields, config["vocab_size"])
  else:
    module = beit.BeitForImageClassification(fields, config["num_classes"])
  return table, config, jax.eval_shape(module.init, jax.random.key(0), image)["params"]


@pytest.mark.parametrize(
  "name", ["beit_base_patch16_224", "beit_large_patch16_224", "beit_base_patch16_224_8k_vocab"]
)
def test_layer_decay_table_golden(name):
  """Compares layer, learning-rate scale and weight decay of every parameter."""
  table, config, params = _shapes(name)
  wanted = {reference.beit_name(key): value for key, value in table["params"].items()}
  decays = trees.flatten(optim.weight_decay_tree(params))
  assert wanted.keys() == decays.keys()
  decay = table["layer_decay"] or 1.0
  for key, row in wanted.items():
    if row["layer_id"] is not None:
      assert optim.layer_id(key, config["depth"]) == row["layer_id"], key
    assert optim.layer_scale(key, config["depth"], decay) == pytest.approx(row["lr_scale"], rel=1e-9), key
    assert decays[key] * table["weight_decay"] == row["weight_decay"], key


def test_layer_decay_of_segmentation_golden():
  """Equals mmseg's constructor in unilm except for the cls token, which that decays because its rule lacks a prefix."""
  table = json.loads((reference.HERE / "layer_decay.json").read_text())["segmentation_constructor"]
  fields = dict(width=16, depth=12, num_heads=2, patch_size=16, image_size=(64, 64), rel_pos="per_block")
  module = upernet.BeitForSemanticSegmentation(
    {**fields, "layer_scale_init": 0.1}, 5, channels=8, aux_channels=8
  )
  params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
  decays = trees.flatten(optim.weight_decay_tree(params["params"]))
  for key, row in table["params"].items():
    name = reference.beit_name(key.removeprefix("backbone.")) if key.startswith("backbone.") else None
    name = name or key.replace(".", "/").replace("/weight", "/kernel")
    assert optim.layer_id(name, 12) == row["layer_id"], key
    assert optim.layer_scale(name, 12, table["layer_decay"]) == pytest.approx(row["lr_scale"], rel=1e-9), key
    wanted = 0.0 if name.endswith("cls_token") else row["weight_decay"]
    assert decays.pop(name) * table["weight_decay"] == wanted, key
  assert not [name for name in decays if name.startswith("encoder/")]
  assert {optim.layer_id(name, 12) for name in decays} == {13}  # heads and necks: the full learning rate


def test_layer_decay_works_without_weight_decay():
  """The reference silently ignores layer decay when weight decay is 0."""
  params = {"encoder": {"patch_embed": {"kernel": jnp.ones((2, 2))}}, "head": {"kernel": jnp.ones((2, 2))}}
  tx = optim.make_optimizer(params, schedule=lambda _: 1.0, weight_decay=0.0, layer_decay=0.5, depth=3)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["head"]["kernel"], -1.0, rtol=1e-4)
  np.testing.assert_allclose(updates["encoder"]["patch_embed"]["kernel"], -(0.5**4), rtol=1e-4)


def test_weight_decay_follows_its_schedule_and_no_decay():
  params = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.ones(3)}, "c": {"bias": jnp.ones(3)}}
  weight_decay = lambda step: jnp.asarray([0.1, 0.3])[step]
  tx = optim.make_optimizer(params, schedule=lambda _: 1.0, weight_decay=weight_decay, no_decay=("^b/",))
  state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
  for wanted in (0.1, 0.3):
    updates, state = tx.update(zeros, state, params)
    np.testing.assert_allclose(updates["a"]["kernel"], -wanted, rtol=1e-6)
    assert not updates["b"]["kernel"].any() and not updates["c"]["bias"].any()


def test_schedules_follow_the_step_that_is_given():
  params = {"a": {"kernel": jnp.ones(3)}}
  rates = jnp.asarray([1.0, 10.0, 100.0])
  tx = optim.make_optimizer(params, schedule=lambda s: rates[s], weight_decay=lambda s: 0.1 * rates[s])
  updates, state = tx.update(
    jax.tree.map(jnp.zeros_like, params), optim.at_step(tx.init(params), jnp.asarray(2)), params
  )
  np.testing.assert_allclose(updates["a"]["kernel"], -100 * 10, rtol=1e-6)
  counts = {str(path): int(leaf) for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim == 0}
  assert sorted(counts.values()) == [1, 3, 3], counts  # Adam counts its updates


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(KeyError, match="head/strange"):
    optim.weight_decay_tree({"head": {"strange": jnp.ones(2)}})


def test_clipping_uses_the_global_norm():
  """Adam's first update does not depend on the scale of the gradient, so the test reads the first moment."""
  params = {"a": {"kernel": jnp.zeros(2)}}
  grads = {"a": {"kernel": jnp.array([30.0, 40.0])}}
  tx = optim.make_optimizer(params, schedule=lambda _: 1.0, weight_decay=0.0, clip_norm=5.0)
  _, state = tx.update(grads, tx.init(params), params)
  adam = next(
    s
    for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
    if isinstance(s, optax.ScaleByAdamState)
  )
  np.testing.assert_allclose(adam.mu["a"]["kernel"], [0.3, 0.4], rtol=1e-5)


def test_group_report_adds_up():
  _, config, params = _shapes("beit_base_patch16_224")
  report = optim.group_report(params, depth=12, layer_decay=0.65, weight_decay=0.05)
  assert f"{86_530_984:,}" in report.splitlines()[-1]
  assert "0.00369721" in report.splitlines()[1]
