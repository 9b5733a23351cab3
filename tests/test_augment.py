"""Augmentation on the device: keys per example, color jitter, random erasing, mixup, cutmix."""

import colorsys
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from beit_jax import augment, losses
from beit_jax.config import ranges
from beit_jax.config.defaults import DEFAULTS
from tests import reference


def _keys(n=4, purpose="color_jitter", epoch=0):
  pairs = jnp.stack([jnp.full(n, epoch, jnp.uint32), jnp.arange(n, dtype=jnp.uint32)], 1)
  return augment.example_keys(0, pairs, purpose)


def test_keys_depend_on_seed_epoch_index_and_purpose_only():

  def data(keys):
    return np.asarray(jax.random.key_data(keys))

  assert len(np.unique(data(_keys()), axis=0)) == 4
  np.testing.assert_array_equal(data(_keys(2)), data(_keys(4))[:2])
  for other in (_keys(purpose="mask"), _keys(epoch=1)):
    assert (data(other) != data(_keys())).any(1).all()


def test_both_views_get_the_same_jitter():
  """Two views with the same pixels in different places still have the same pixels after the jitter."""
  image = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
  flipped = image[:, ::-1]
  first, second = augment.color_jitter(_keys(), [image, flipped], 0.4)
  np.testing.assert_allclose(first[:, ::-1], second, atol=1e-6)
  assert np.abs(first - image).max() > 0.05
  assert first.min() >= 0 and first.max() <= 1


def test_jitter_range_of_a_gray_image():
  """A gray image stays gray; brightness scales it by a factor in [0.6, 1.4]; contrast and saturation keep it."""
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


def test_augmentations_have_a_purpose_and_a_config_key_that_is_off_by_default():
  for name in augment.AUGMENTATIONS:
    assert name in augment.PURPOSES and DEFAULTS["data"][name] == 0
    assert any(re.fullmatch(pattern, f"data.{name}") for pattern, _ in ranges.COMMON), f"{name} has no range"
  assert len(set(augment.PURPOSES.values())) == len(augment.PURPOSES)


def test_augment_views_applies_the_rows_of_the_table(monkeypatch):
  darken = augment.Augmentation(lambda keys, views, strength: [view * (1 - strength) for view in views])
  monkeypatch.setitem(augment.AUGMENTATIONS, "darken", darken)
  monkeypatch.setitem(augment.PURPOSES, "darken", 99)
  views = {"image": jnp.ones((2, 4, 4, 3)), "token_image": jnp.ones((2, 2, 2, 3))}

  def first_pixels(strength=0.25, names=("darken",), normalized=False):
    data = {name: 0.0 for name in augment.AUGMENTATIONS} | {"darken": strength}
    keys = jnp.zeros((2, 2), jnp.uint32)
    result = augment.augment_views(views, keys, seed=0, data=data, names=names, normalized=normalized)
    return {name: float(view[0, 0, 0, 0]) for name, view in result.items()}

  assert first_pixels() == {"image": 0.75, "token_image": 0.75}
  for options in (dict(strength=0.0), dict(names=()), dict(normalized=True)):
    assert first_pixels(**options) == {"image": 1.0, "token_image": 1.0}


MIX, _ = reference.load("mixup")


def _nhwc(x):
  return jnp.asarray(x.transpose(0, 2, 3, 1))


def _smoothed():
  return losses.smooth_labels(jnp.asarray(MIX["in/label"]), 10, 0.1)


def test_mixup_golden():
  image, target = augment.mix(_nhwc(MIX["in/x"]), _smoothed(), jnp.float32(MIX["mixup/lam"]), None)
  np.testing.assert_allclose(image, _nhwc(MIX["mixup/out_x"]), atol=1e-6)
  np.testing.assert_allclose(target, MIX["mixup/out_target"], atol=1e-6)
  np.testing.assert_allclose(_smoothed(), MIX["none/out_target"], atol=1e-7)


@pytest.mark.parametrize("case", ["cutmix_inside", "cutmix_clipped", "cutmix_odd"])
def test_cutmix_golden(case):
  found = {key: MIX[f"{case}/{key}"] for key in ("lam_drawn", "centre_y_x", "box_yl_yh_xl_xh")}
  box = augment.cutmix_box(tuple(found["centre_y_x"]), jnp.float32(found["lam_drawn"]), 16, 16)
  np.testing.assert_array_equal(np.array(box), found["box_yl_yh_xl_xh"])
  image, target = augment.mix(_nhwc(MIX["in/x"]), _smoothed(), jnp.float32(found["lam_drawn"]), box)
  np.testing.assert_allclose(image, _nhwc(MIX[f"{case}/out_x"]), atol=1e-6)
  np.testing.assert_allclose(target, MIX[f"{case}/out_target"], atol=1e-6)


def test_distribution_of_random_mix():
  """Batches of two images: the frequency of cutmix, the distribution of lam, targets that match the pixels."""
  image = jnp.stack([jnp.zeros((8, 8, 3)), jnp.ones((8, 8, 3))])
  target = jnp.eye(2)
  keys = jax.random.split(jax.random.key(0), 4000)

  def run(**options):
    return jax.jit(jax.vmap(lambda key: augment.random_mix(key, image, target, **{**ON, **options})))(keys)

  pixels, targets = run()
  share = np.asarray(pixels[:, 0].mean((1, 2, 3)))  # of the other image in the first
  np.testing.assert_allclose(share, targets[:, 0, 1], atol=1e-5)
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  pure = np.asarray(
    [len(np.unique(p)) <= 2 and set(np.unique(p)) <= {0, 1} for p in np.asarray(pixels[:, 0])]
  )
  assert abs(pure.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000) + 0.01
  _, none = run(prob=0.0)
  np.testing.assert_array_equal(none, np.broadcast_to(target, none.shape))
  _, blended = run(cutmix_alpha=0.0)
  lam = np.asarray(blended[:, 0, 0])
  assert lam.mean() == pytest.approx(0.5, abs=0.03)
  assert lam.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.06)  # Beta(0.8, 0.8)
  pixels, _ = run(mixup_alpha=0.0)
  assert set(np.unique(pixels)) == {0.0, 1.0}


ON = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)


def test_distribution_of_erased_boxes():
  """20,000 boxes on 224x224: area uniform in [0.02, 1/3], aspect log-uniform in [0.3, 1/0.3], all inside."""
  n, size = 20_000, 224
  boxes = jax.jit(jax.vmap(lambda key: augment.erase_box(key, size, size)))
  top, left, h, w = (np.asarray(x) for x in boxes(jax.random.split(jax.random.key(1), n)))
  assert h.min() > 0 and (top >= 0).all() and (left >= 0).all()
  assert (h < size).all() and (w < size).all() and (top + h <= size).all() and (left + w <= size).all()
  area, log_aspect = h * w / size**2, np.log(h / w)
  # The largest boxes of extreme aspect do not fit: sqrt(area * aspect) < 1, worth 0.3 % of all draws.
  rng = np.random.default_rng(0)
  a, b = rng.uniform(0.02, 1 / 3, 2 * n), rng.uniform(np.log(0.3), -np.log(0.3), 2 * n)
  fits = (np.round(size * np.sqrt(a * np.exp(b))) < size) & (np.round(size * np.sqrt(a / np.exp(b))) < size)
  for found, expected in ((area, a[fits]), (log_aspect, b[fits])):
    points = np.quantile(expected, np.linspace(0.02, 0.98, 49))
    gap = np.abs(np.searchsorted(np.sort(found), points) / n - np.linspace(0.02, 0.98, 49)).max()
    assert gap < 1.95 * np.sqrt(1 / n + 1 / fits.sum()) + 0.004  # Kolmogorov-Smirnov at 0.1 %, rounding
  for start, side in ((top, h), (left, w)):  # the position is uniform over the rest
    assert (start / np.maximum(size - side, 1)).mean() == pytest.approx(0.5, abs=0.012)


def test_erasing_is_noise_in_a_quarter_of_the_images():
  image = jnp.full((2000, 16, 16, 3), 7.0)
  erased = np.asarray(
    jax.jit(augment.random_erasing, static_argnums=2)(_keys(2000, "random_erasing"), image, 0.25)
  )
  touched = (erased != 7).any((1, 2, 3))
  assert abs(touched.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
  noise = erased[erased != 7]
  assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
  assert (erased != 7).any(3).sum() * 3 == (erased != 7).sum()  # all channels of a pixel


@pytest.mark.parametrize("rand_augment, jittered", [("", True), ("rand-m9-mstd0.5-inc1", False)])
def test_rand_augment_replaces_color_jitter_only(rand_augment, jittered, monkeypatch):
  darken = augment.Augmentation(lambda keys, views, strength: [view * strength for view in views])
  monkeypatch.setitem(augment.AUGMENTATIONS, "darken", darken)
  monkeypatch.setitem(augment.PURPOSES, "darken", 99)
  data = {name: 0.0 for name in augment.AUGMENTATIONS} | {"color_jitter": 0.4, "darken": 0.5}
  data["rand_augment"] = rand_augment
  views, keys = {"image": jnp.full((1, 4, 4, 3), 0.5)}, jnp.zeros((1, 2), jnp.uint32)
  pixel = augment.augment_views(views, keys, seed=0, data=data, names=augment.ON_PIXELS + ("darken",))[
    "image"
  ]
  assert (abs(float(pixel[0, 0, 0, 0]) - 0.25) > 1e-3) == jittered


# Augmentations of crops.


def test_hue_is_shifted_as_by_colorsys():
  image = np.random.default_rng(0).random((50, 3)).astype(np.float32)
  image[:4] = [(0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (0.7, 0.2, 0.7)]
  for shift in (-0.1, 0.0, 0.07, 0.5):
    wanted = []
    for pixel in image:
      hue, saturation, value = colorsys.rgb_to_hsv(*map(float, pixel))
      wanted.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    np.testing.assert_allclose(augment.shift_hue(jnp.asarray(image), shift), wanted, atol=1e-5)


def _photo(size=48):
  rng = np.random.default_rng(3)
  small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
  return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def test_grayscale_and_solarization_are_pillows():
  pixels, key = _photo(), jax.random.key(0)
  image = augment.to_float(jnp.asarray(pixels))
  found = augment.crop_grayscale(key, image) * 255
  wanted = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[..., None]
  np.testing.assert_allclose(found, np.broadcast_to(wanted, pixels.shape), atol=1)
  found = augment.crop_solarize(key, image) * 255
  np.testing.assert_allclose(found, np.asarray(ImageOps.solarize(Image.fromarray(pixels))), atol=1e-3)


@pytest.mark.parametrize("std", [0.1, 0.8, 2.0])
def test_blur_is_close_to_pillows(std):
  """Borders included. Pillow approximates the Gaussian and rounds."""
  pixels = _photo()
  weights = np.asarray(augment.blur_matrix(len(pixels), std))
  np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
  found = np.einsum("yi,xj,ijc->yxc", weights, weights, pixels.astype(np.float32))
  wanted = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(std)), np.float32)
  assert np.abs(found - wanted).max() < 4
  if std > 0.5:
    assert np.abs(found - pixels).max() > 5


def test_crop_color_jitter_of_a_gray_image():
  """Hue and saturation keep it; brightness scales it by a factor in [0.6, 1.4]."""
  image = jnp.full((2, 2, 3), 0.5)
  found = np.asarray(jax.vmap(lambda key: augment.crop_color_jitter(key, image))(_keys(1000)))
  factor = found[:, 0, 0, 0] / 0.5
  assert 0.6 - 1e-5 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.4 + 1e-5
  assert np.ptp(found, axis=(1, 2, 3)).max() < 1e-6


def _augmented(n=400, first=0, epoch=0, **probabilities):
  crops = jnp.broadcast_to(augment.to_float(jnp.asarray(_photo(8))), (n, 3, 8, 8, 3))
  pairs = jnp.stack([jnp.full(n, epoch, jnp.uint32), jnp.arange(n, dtype=jnp.uint32)], 1)
  none = dict.fromkeys(augment.CROP_AUGMENTATIONS, (0.0, 0.0, 0.0))
  options = dict(seed=0, first=first, probabilities={**none, **probabilities})
  found = jax.jit(lambda crops, pairs: augment.augment_crops(crops, pairs, **options))(crops, pairs)
  return np.asarray(found), np.asarray(crops)


@pytest.mark.parametrize("name", augment.CROP_AUGMENTATIONS)
def test_probabilities_of_crops(name):
  found, crops = _augmented(**{name: (0.0, 0.3, 1.0)})
  share = (np.abs(found - crops).max((2, 3, 4)) > 1e-6).mean(0)
  # A blur with a standard deviation of 0.1 changes nothing.
  assert share[0] == 0 and share[1] == pytest.approx(0.3, abs=0.08) and share[2] > 0.9
  assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


def test_every_crop_has_random_numbers_of_its_own():
  """They depend on epoch, index and number of the crop, and on nothing else in the batch."""
  blur = {"gaussian_blur": (1.0, 1.0, 1.0)}
  found, _ = _augmented(4, **blur)
  assert len({crop.tobytes() for crop in found.reshape(-1, 8, 8, 3)}) == 12
  np.testing.assert_allclose(_augmented(2, **blur)[0], found[:2], atol=1e-6)
  np.testing.assert_allclose(_augmented(4, first=1, **blur)[0][:, :2], found[:, 1:], atol=1e-6)
  assert np.abs(_augmented(4, epoch=1, **blur)[0] - found).max() > 0.01
