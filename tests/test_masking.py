"""Mask samplers against the statistics of the reference generators (tests/golden/mask_stats.json)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import masking
from tests import reference

STATS = json.loads((reference.HERE / "mask_stats.json").read_text())
DRAWS = 20_000


def _id(setting):
  h, w = setting["grid"]
  return f"{setting['generator']}-{h}x{w}-{setting['num_masking_patches']}-{setting['min_num_patches']}"


def _isolated(masks):
  """Share of masked cells without a masked 4-neighbour, over all draws."""
  p = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
  neighbours = p[:, :-2, 1:-1] | p[:, 2:, 1:-1] | p[:, 1:-1, :-2] | p[:, 1:-1, 2:]
  return (masks & ~neighbours).sum() / max(masks.sum(), 1)


QUICK = ("v1-14x14-75-16", "v2-14x14-75-16", "v1-4x6-8-4", "v1-14x14-1-16")
SETTINGS = [
  pytest.param(s, id=_id(s), marks=() if _id(s) in QUICK else pytest.mark.slow) for s in STATS["settings"]
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_statistics_of_the_reference(setting):
  sampler = masking.block_mask_at_most if setting["generator"] == "v1" else masking.block_mask
  grid, count = tuple(setting["grid"]), setting["num_masking_patches"]
  sample = jax.jit(
    jax.vmap(lambda key: sampler(key, grid, count, min_block_patches=setting["min_num_patches"]))
  )
  masks = np.asarray(sample(jax.random.split(jax.random.key(7), DRAWS)))
  counts = masks.sum((1, 2))
  slack = 5 * np.sqrt(2 / DRAWS)  # five standard deviations of a difference of two means
  assert counts.max() <= count
  if setting["generator"] == "v2":
    assert (counts == count).all()
  assert abs(counts.mean() - setting["mean"]) <= slack * max(setting["sd"], 1e-9)
  assert counts.std() == pytest.approx(setting["sd"], rel=0.05, abs=1e-9)
  for found, key in (((counts == count).mean(), "p_eq_n"), ((counts == 0).mean(), "p_zero")):
    p = setting[key]
    assert abs(found - p) <= slack * np.sqrt(p * (1 - p)) + 1e-9, key
  assert np.abs(masks.mean(0) - np.array(setting["cell_frequency"])).max() <= 0.025
  isolated = setting["isolated_fraction_pooled"]
  assert _isolated(masks) == pytest.approx(isolated, rel=0.15, abs=3e-4)


def test_uniform_masks_are_not_blocks():
  sample = jax.vmap(lambda key: masking.random_mask(key, (14, 14), 75))
  masks = np.asarray(sample(jax.random.split(jax.random.key(0), 4000)))
  assert (masks.sum((1, 2)) == 75).all()
  assert _isolated(masks) == pytest.approx(STATS["uniform_random_14x14_75_isolated_fraction"], rel=0.05)


@pytest.mark.parametrize("count", [0, 1, 5, 24])
@pytest.mark.parametrize("name", sorted(masking.MASKS))
def test_every_setting_is_accepted(name, count):
  mask = masking.MASKS[name](jax.random.key(1), (4, 6), count)
  assert mask.shape == (4, 6) and mask.dtype == jnp.bool_
  smallest = {"block_at_most": 0, "none": 0}.get(name, count)
  assert smallest <= mask.sum() <= (0 if name == "none" else count)


def test_too_many_masked_patches_is_an_error():
  with pytest.raises(ValueError, match=r"\[0, 24\].*got 25"):
    masking.block_mask(jax.random.key(0), (4, 6), 25)


def test_largest_block_is_respected():
  keys = jax.random.split(jax.random.key(3), 500)
  at_most = jax.vmap(
    lambda key: masking.block_mask_at_most(key, (14, 14), 9, min_block_patches=4, max_block_patches=9)
  )
  assert (np.asarray(at_most(keys)).sum((1, 2)) <= 9).all()


@pytest.mark.parametrize(("count", "smallest"), [(8, 16), (1, 16), (75, 16)])
def test_chance_of_empty_agrees_with_the_statistics(count, smallest):
  chance = masking.chance_of_empty((14, 14), count, min_block_patches=smallest)
  stats = next(
    s
    for s in STATS["settings"]
    if (s["generator"], s["num_masking_patches"], s["min_num_patches"]) == ("v1", count, smallest)
    and s["grid"] == [14, 14]
  )
  assert chance == pytest.approx(stats["p_zero"], abs=0.02)


@pytest.mark.parametrize("sampler", masking.MASKS.values())
def test_arguments_can_be_given_by_name(sampler):
  key = jax.random.key(3)
  named = sampler(key=key, grid_size=(6, 8), num_masked=20)
  np.testing.assert_array_equal(named, sampler(key, (6, 8), 20))
