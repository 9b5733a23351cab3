"""Optimizers by name: what each does to gradients, and its state on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import optim, step, train, trees
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from tests import tiny

RATES = {"adamw": 1e-3, "lion": 3e-4, "muon": 5e-3, "lamb": 1e-2, "sgd": 1e-1}


def _updates(name, params, grads, **changes):
  tx = optim.make_optimizer(params, schedule=lambda _: 1.0, weight_decay=0.0, name=name, **changes)
  return jax.jit(tx.update)(grads, tx.init(params), params)


def _matrices():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "block_00": {"qkv": {"kernel": jax.random.normal(keys[0], (48, 96)), "bias": jnp.ones(96)}},
    "patch_embed": {"kernel": jax.random.normal(keys[1], (2, 2, 3, 8))},
    "table": {"relative_position_bias_table": jnp.ones((12, 4))},
  }
  return params, jax.tree.map(lambda p: 3.0 * jax.random.normal(keys[2], p.shape), params)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_trains_and_keeps_its_sharding(name, monkeypatch):
  """Five steps on one batch, on a mesh of 4 x 2 devices with small kernels sharded too."""
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 2**8)
  changes = {
    "model.drop_path_rate": 0.0,
    "model.depth": 1,
    "model.head_init_scale": 1.0,
    "optimizer.learning_rate": RATES[name],
    "optimizer.layer_decay": 1.0,
  }
  config = tiny.config("classify", **{"optimizer.name": name, "mesh.data": 4, "mesh.fsdp": 2, **changes})
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  rng, size = np.random.default_rng(0), config.batch_size
  batch = {
    "image": rng.integers(0, 256, (size, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 5, size).astype(np.int32),
    "example_key": np.stack([np.zeros(size), np.arange(size)], 1).astype(np.uint32),
    "valid": np.ones(size, bool),
  }
  with jax.set_mesh(mesh):
    plan = train.prepare(config, mesh)
    init = functools.partial(plan.objective.init, jax.random.key(0))
    state, shapes, shardings = train_state.create(init, plan.tx, mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    update = step.make_train_step(plan.objective, plan.tx, 1, jax.random.key(1), shardings)
    losses = []
    for _ in range(5):
      state, metrics = update(state, {}, sharding.put_batch(mesh, batch, size))
      losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.02, losses
  assert jax.tree.map(lambda leaf: leaf.sharding, state.opt_state) == before
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state.opt_state) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), shapes.opt_state
  )
  moments = {key: leaf for key, leaf in trees.flatten(state.opt_state).items() if key.endswith("qkv/kernel")}
  assert moments and not any(leaf.sharding.is_fully_replicated for leaf in moments.values())


def test_lion_updates_are_signs():
  params, grads = _matrices()
  updates, _ = _updates("lion", params, grads, betas=(0.9, 0.99))
  jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -np.sign(g)), updates, grads)


def test_sgd_accumulates_momentum():
  params, grads = _matrices()
  for momentum, factors in ((0.0, (1.0, 1.0)), (0.5, (1.0, 1.5))):
    tx = optim.make_optimizer(params, schedule=lambda _: 1.0, weight_decay=0.0, name="sgd", momentum=momentum)
    state = tx.init(params)
    for factor in factors:
      updates, state = tx.update(grads, state, params)
      jax.tree.map(lambda u, g, f=factor: np.testing.assert_allclose(u, -f * g, rtol=1e-6), updates, grads)


def test_lamb_scales_updates_to_the_norm_of_the_parameter():
  """The trust ratio applies to the sum of Adam's update and the weight decay, and precedes the layer scale."""
  params, grads = _matrices()
  params = {"encoder": params}
  tx = optim.make_optimizer(
    params, schedule=lambda _: 1.0, weight_decay=0.1, name="lamb", layer_decay=0.5, depth=1
  )
  updates, _ = tx.update({"encoder": grads}, tx.init(params), params)
  wanted = {"block_00/qkv/kernel": 0.5, "patch_embed/kernel": 0.25, "block_00/qkv/bias": 0.5}
  for key, scale in wanted.items():
    update, value = (trees.flatten(tree["encoder"])[key] for tree in (updates, params))
    assert jnp.linalg.norm(update) == pytest.approx(scale * float(jnp.linalg.norm(value)), rel=1e-5), key


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adam():
  params, grads = _matrices()
  updates, _ = _updates("muon", params, grads)
  adam, _ = _updates("adamw", params, grads)
  matrix = updates["block_00"]["qkv"].pop("kernel")
  del adam["block_00"]["qkv"]["kernel"]
  singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * 96**0.5)
  assert (
    singular.min() > 0.6 and singular.max() < 1.3
  )  # five Newton-Schulz steps; those of the gradient: 12 to 50
  jax.tree.map(np.testing.assert_array_equal, updates, adam)


def test_an_unknown_optimizer_is_refused_with_the_names():
  with pytest.raises(UserError, match="'optimizer.name': 'adam' must be one of adamw, lion, muon, lamb, sgd"):
    tiny.config("classify", **{"optimizer.name": "adam"})


def test_the_default_optimizer_is_adamw():
  assert config_lib.DEFAULTS["optimizer"]["name"] == "adamw"
  params, grads = _matrices()
  tx = optim.make_optimizer(params, schedule=lambda _: 0.1, weight_decay=0.0)
  wanted = optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.scale(-0.1))
  found, _ = tx.update(grads, tx.init(params), params)
  adam, _ = wanted.update(grads, wanted.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, found, adam)
