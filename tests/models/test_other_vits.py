"""Settings of `Beit` for other ViTs: the same compiled as a scan, trainable, refused where they do not fit."""

import jax
import numpy as np
import pytest

import beit_jax
from beit_jax import train
from beit_jax.errors import UserError
from beit_jax.models.beit import POOLS, Beit, BeitForImageClassification
from tests import tiny

FIELDS = dict(image_size=(8, 8), patch_size=4, width=8, depth=2, num_heads=2, rel_pos="none", abs_pos=True)
OTHERS = dict(pre_norm=True, register_tokens=3, activation="quick_gelu")
IMAGE = np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32)


def _drawn(module):
  shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGE)
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def test_scan_gives_the_same_and_register_tokens_are_not_returned():
  encoder = Beit(**FIELDS, **OTHERS)
  variables = _drawn(encoder)
  tokens, blocks = encoder.apply(variables, IMAGE)
  assert tokens.shape == (2, 5, 8) and blocks["block_01"].shape == (2, 5, 8)
  assert blocks["registers"].shape == (2, 3, 8)
  again, scanned = encoder.clone(scan=True).apply(variables, IMAGE)
  np.testing.assert_allclose(again, tokens, atol=1e-5)
  np.testing.assert_allclose(scanned["registers"], blocks["registers"], atol=1e-5)
  plain = {name: value for name, value in variables["params"].items() if name != "register_tokens"}
  without, _ = encoder.clone(register_tokens=0).apply({"params": plain}, IMAGE)
  assert np.abs(without - tokens).max() > 0.01  # the patches attend to them


@pytest.mark.parametrize("pool", POOLS)
def test_pools_see_their_tokens(pool):
  module = BeitForImageClassification({**FIELDS, **OTHERS}, num_classes=3, pool=pool)
  variables = _drawn(module)
  assert module.apply(variables, IMAGE).shape == (2, 3)
  parts = {"cls": 1, "mean": 1, "registers": 3}
  width = 8 * sum(parts[part] for part in POOLS[pool])
  assert variables["params"]["head"]["kernel"].shape == (width, 3)
  assert ("fc_norm" in variables["params"]) == (pool == "mean")
  assert ("norm" in variables["params"]["encoder"]) == (pool not in ("mean", "plain_mean"))


def _config(**model):
  fields = {"rel_pos": "none", "abs_pos": True, **model}
  return tiny.config("classify", total_steps=1, **{f"model.{name}": value for name, value in fields.items()})


def test_other_vits_are_trained_and_started_from(tmp_path):
  others = dict(OTHERS, pool="cls_registers")
  train.run(_config(**others), tmp_path / "a")
  loaded = beit_jax.load(tmp_path / "a" / "checkpoints")
  assert loaded.params["encoder"]["register_tokens"].shape == (1, 3, 32)
  config = _config(**others)
  config.init_from = str(tmp_path / "a" / "checkpoints")
  train.run(config, tmp_path / "b")
  config = _config(pool="cls")
  config.init_from = str(tmp_path / "a" / "checkpoints")
  with pytest.raises(UserError, match=r"(?s)model.pre_norm.*model.register_tokens.*model.activation"):
    train.run(config, tmp_path / "c")


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (dict(register_tokens=2, rel_pos="per_block"), "model.register_tokens.*rel_pos='none'"),
    (dict(pool="cls_registers"), "model.pool.*needs model.register_tokens"),
    (dict(activation="relu"), "model.activation.*gelu"),
  ],
)
def test_what_does_not_fit_is_refused(model, message, tmp_path):
  with pytest.raises(UserError, match=message):
    train.run(_config(**model), tmp_path)
