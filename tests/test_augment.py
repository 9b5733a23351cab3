"""Colour jitter on the device, keys by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import augment


def _keys(n=4, purpose="jitter", epoch=0):
  pairs = jnp.stack([jnp.full(n, epoch, jnp.uint32), jnp.arange(n, dtype=jnp.uint32)], 1)
  return augment.example_keys(0, pairs, purpose)


def test_keys_depend_on_seed_epoch_index_and_purpose_only():
  data = lambda keys: np.asarray(jax.random.key_data(keys))
  assert len(np.unique(data(_keys()), axis=0)) == 4
  np.testing.assert_array_equal(data(_keys(2)), data(_keys(4))[:2])
  for other in (_keys(purpose="mask"), _keys(epoch=1)):
    assert (data(other) != data(_keys())).any(1).all()


def test_both_views_get_the_same_jitter():
  """Two views that hold the same pixels, in other places, stay the same pixels."""
  image = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
  flipped = image[:, ::-1]
  first, second = augment.color_jitter(_keys(), [image, flipped], 0.4)
  np.testing.assert_allclose(first[:, ::-1], second, atol=1e-6)
  assert np.abs(first - image).max() > 0.05
  assert first.min() >= 0 and first.max() <= 1


def test_jitter_range_by_hand():
  """A grey image stays grey; brightness scales it by a factor in [0.6, 1.4]; contrast and saturation keep it."""
  image = jnp.full((2000, 2, 2, 3), 0.5)
  (jittered,) = augment.color_jitter(_keys(2000), [image], 0.4)
  factor = np.asarray(jittered)[:, 0, 0, 0] / 0.5
  assert factor.min() >= 0.6 - 1e-5 and factor.max() <= 1.4 + 1e-5
  assert factor.mean() == pytest.approx(1.0, abs=0.03) and factor.std() == pytest.approx(
    0.8 / 12**0.5, rel=0.05
  )
  assert np.ptp(np.asarray(jittered), axis=(1, 2, 3)).max() < 1e-6


def test_normalize():
  found = augment.normalize(
    augment.to_float(jnp.array([[[[0, 255, 51]]]], jnp.uint8)), (0.5,) * 3, (0.5, 0.5, 0.25)
  )
  np.testing.assert_allclose(found[0, 0, 0], [-1, 1, -1.2], rtol=1e-6)
