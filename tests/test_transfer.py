"""Position tables and embeddings on other grids; pre-training -> fine-tuning."""

import numpy as np
import pytest
from scipy.interpolate import RectBivariateSpline

from beit_jax import transfer, trees
from beit_jax.errors import UserError
from tests import reference

ARRAYS, CONFIG = reference.load("rel_pos_resize")


def _grid(side):
  return ((side + 1) // 2,) * 2


@pytest.mark.parametrize(("source", "target"), CONFIG["pairs"])
def test_table_resize_golden(source, target):
  table = ARRAYS[f"in/table_{source}_{target}"]
  wanted = ARRAYS[f"out/table_{source}_{target}"]
  assert transfer.geometric_ratio(source, target) == pytest.approx(
    float(ARRAYS[f"out/q_{source}_{target}"]), abs=1e-12
  )
  found = transfer.resize_rel_pos_table(table.astype(np.float64), _grid(source), _grid(target))
  np.testing.assert_allclose(found, wanted, atol=1e-12)
  found = transfer.resize_rel_pos_table(table, _grid(source), _grid(target))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_table_resize_golden_not_square():
  table = ARRAYS["ext/in_table_9x13"]
  found = transfer.resize_rel_pos_table(table.astype(np.float64), (5, 7), (9, 14))
  np.testing.assert_allclose(found, ARRAYS["ext/out_table_17x27"], atol=1e-12)


@pytest.mark.parametrize(
  ("source", "target"), [((5, 7), (9, 14)), ((14, 14), (24, 30)), ((3, 8), (3, 12)), ((9, 6), (5, 11))]
)
def test_table_resize_against_scipy(source, target):
  """FITPACK's bivariate spline on coordinates made by the formula of the geometric series, each axis its own ratio."""
  rows, cols = (2 * side - 1 for side in source)
  table = np.random.default_rng(0).standard_normal((rows * cols + 3, 2))

  def coordinates(src, dst):
    q = transfer.geometric_ratio(src, dst) if src != dst else 1.0
    steps = np.array([sum(q**i for i in range(n)) for n in range(1, src // 2 + 1)])
    known = np.concatenate([-steps[::-1], [0.0], steps])
    return known, np.clip(np.arange(-(dst // 2), dst // 2 + 1), known[0], known[-1])

  (y, new_y), (x, new_x) = (coordinates(2 * s - 1, 2 * t - 1) for s, t in zip(source, target, strict=True))
  found = transfer.resize_rel_pos_table(table, source, target)
  for head in range(2):
    spline = RectBivariateSpline(y, x, table[:-3, head].reshape(rows, cols), kx=3, ky=3, s=0)
    np.testing.assert_allclose(found[:-3, head], spline(new_y, new_x).ravel(), atol=1e-9)
  np.testing.assert_array_equal(found[-3:], table[-3:])


def test_table_of_another_grid_is_refused():
  with pytest.raises(ValueError, match="732"):
    transfer.resize_rel_pos_table(np.zeros((10, 2)), (14, 14), (24, 24))


def test_pos_embed_golden():
  found = transfer.resize_pos_embed(ARRAYS["in/abs_pos_14_24"], (14, 14), (24, 24))
  np.testing.assert_allclose(found, ARRAYS["out/abs_pos_14_24"], atol=1e-5)


def _mim_params():
  arrays, config = reference.load("mim_plus")
  return reference.beit_tree(reference.section(arrays, "param/")), config


def _classifier_shapes(grid, num_classes=10):
  params, _ = _mim_params()
  flat = trees.flatten(params)
  rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
  target = {
    n: np.zeros_like(v)
    for n, v in flat.items()
    if n.startswith("encoder/")
    and "rel_pos_bias" not in n
    and "mask_token" not in n
    and "encoder/norm" not in n
  }
  for i in range(3):
    target[f"encoder/block_{i:02d}/attn/relative_position_bias_table"] = np.zeros((rows, 4), np.float32)
  target |= {"fc_norm/scale": np.ones(48), "head/kernel": np.zeros((48, num_classes))}
  return trees.unflatten(target)


def test_shared_table_goes_to_every_block_resized():
  params, _ = _mim_params()
  said = []
  found = transfer.encoder_params(params, _classifier_shapes((12, 12)), (8, 8), (12, 12), said.append)
  for i in range(3):
    table = found[f"encoder/block_{i:02d}/attn/relative_position_bias_table"]
    np.testing.assert_allclose(table, ARRAYS["out/mim_plus_converted_table"], atol=1e-6)
  assert not any(name.startswith(("head", "fc_norm")) for name in found)
  text = "\n".join(said)
  for fact in (
    "head/kernel: starts fresh",
    "copied to every block",
    "resized from grid (8, 8) to (12, 12)",
    "lm_head",
  ):
    assert fact in text


def test_every_problem_is_listed_at_once():
  params, _ = _mim_params()
  del params["encoder"]["block_01"]["mlp"]["fc1"]
  params["encoder"]["cls_token"] = np.zeros((1, 1, 7))
  params["encoder"]["block_07"] = {"gamma_1": np.zeros(3)}
  with pytest.raises(UserError) as error:
    transfer.encoder_params(params, _classifier_shapes((8, 8)), (8, 8), (8, 8))
  for fact in (
    "block_01/mlp/fc1/kernel: expected",
    "cls_token: expected (1, 1, ",
    "block_07/gamma_1: unexpected",
  ):
    assert fact in str(error.value)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
def test_patch_embedding_of_other_channels_is_that_of_timm(channels):
  from tests.peers import timm, torch

  kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 8)).astype(np.float32)
  wanted = timm.models.adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
  found = transfer.adapt_channels(kernel, channels)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted.numpy().transpose(2, 3, 1, 0), rtol=1e-5)


def test_channels_of_a_gray_image_add_up_to_those_of_its_rgb():
  kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 8))
  gray = np.random.default_rng(1).normal(size=(2, 2, 1))
  wanted = (np.repeat(gray, 3, 2)[..., None] * kernel).sum((0, 1, 2))
  np.testing.assert_allclose((gray[..., None] * transfer.adapt_channels(kernel, 1)).sum((0, 1, 2)), wanted)
