"""How stored values become pixels: deep images, other numbers of channels, `.npy` files."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from beit_jax.data import examples, images, resize, segmentation
from beit_jax.data.pixels import PixelRule
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage
from tests.data.test_pipeline import OPTIONS

RNG = np.random.default_rng(0)
TWELVE_BITS = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)


def _saved(image, format="TIFF", **options):
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
  return buffer.getvalue()


def _npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def _tags(**values):
  tags = TiffImagePlugin.ImageFileDirectory_v2()
  for tag, value in values.items():
    tags[int(tag[1:])] = value
  return tags


def _pages(channels, **options):
  first, *others = (Image.fromarray(channel) for channel in np.moveaxis(channels, 2, 0))
  return _saved(first, save_all=True, append_images=others, **options)


HOUNSFIELD = RNG.integers(-1000, 2000, (20, 30))
WITHOUT_RANGE = {
  "12 bits in a PNG": _saved(TWELVE_BITS, "PNG"),
  "12 bits in a TIFF": _saved(TWELVE_BITS),
  "8 bits in 16": _saved((TWELVE_BITS // 16).astype(np.uint16)),
  "fractions": _saved(TWELVE_BITS.astype(np.float32) / 4095),
  "large floats": _saved(TWELVE_BITS.astype(np.float32)),
  "Hounsfield units": _saved(HOUNSFIELD.astype(np.int32)),
  "Hounsfield units, float": _saved(HOUNSFIELD.astype(np.float32)),
  "12 bits in .npy": _npy(TWELVE_BITS),
  "int16 in .npy": _npy(HOUNSFIELD.astype(np.int16)),
}


@pytest.mark.parametrize("name", WITHOUT_RANGE)
def test_deep_images_that_would_lose_their_levels_are_refused(name):
  with pytest.raises(
    BadImage, match=r"^x.tif cannot be decoded: its values run from .* set data.value_range="
  ) as e:
    examples.decode({"image": WITHOUT_RANGE[name], "file": "x.tif"}, 0).pixels()
  assert "remove or repair" not in str(e.value)


def test_message_shows_the_values_found():
  with pytest.raises(BadImage, match="values run from 7 to 4084, of which only 17 of 256 gray levels"):
    images.decode(_saved(np.maximum(TWELVE_BITS, 7)))
  with pytest.raises(BadImage, match="from -986 to 1998, which exceeds the range from 0 to 255"):
    images.decode(_saved(HOUNSFIELD.astype(np.int32)))


@pytest.mark.parametrize("name", WITHOUT_RANGE)
def test_value_range_is_mapped_linearly(name):
  stored = {"8 bits in 16": TWELVE_BITS // 16, "fractions": TWELVE_BITS / 4095}.get(name, TWELVE_BITS)
  low, high = {"8 bits in 16": (0, 255), "fractions": (0.0, 1.0)}.get(name, (0, 4095))
  if "Hounsfield" in name or "int16" in name:
    stored, low, high = HOUNSFIELD, -500, 1000
  pixels = images.decode(WITHOUT_RANGE[name], PixelRule(3, (low, high)))
  wanted = np.clip((stored - low) * 255.0 / (high - low), 0, 255)
  assert pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels[..., 2], wanted, atol=0.51)


def test_value_range_holds_for_images_of_8_bits_too():
  gray = RNG.integers(0, 256, (8, 8)).astype(np.uint8)
  for data in (_saved(gray, "PNG"), _npy(gray), gray):
    pixels = images.LazyImage(data, rule=PixelRule(3, (0, 510))).pixels()
    np.testing.assert_allclose(pixels[..., 0], gray / 2, atol=0.51)
  jpeg = _saved(np.full((8, 8, 3), 200, np.uint8), "JPEG")
  assert images.LazyImage(jpeg, rule=PixelRule(3, (100, 200))).pixels().min() == 255


def test_range_that_a_tiff_states_is_used():
  stated = _saved(TWELVE_BITS, tiffinfo=_tags(t340=0, t341=4095))
  np.testing.assert_allclose(images.decode(stated)[..., 0], TWELVE_BITS / 4095 * 255, atol=0.51)
  wrong = _saved(TWELVE_BITS, tiffinfo=_tags(t340=0, t341=1000))
  with pytest.raises(BadImage, match="exceeds the range from 0 to 1000"):
    images.decode(wrong)


def test_tiff_of_12_bits_a_sample():
  """Pillow cannot write one: 4 x 2 pixels, packed."""
  values = np.array([[0, 1000, 2000, 4095], [17, 4000, 3000, 5]])
  packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2))
  tags = _tags(t256=4, t257=2, t258=12, t259=1, t262=1, t273=0, t277=1, t278=2, t279=len(packed))
  data = b"II*\0" + (8).to_bytes(4, "little") + tags.tobytes(8) + packed
  np.testing.assert_allclose(images.decode(data)[..., 0], values / 4095 * 255, atol=0.51)


def test_images_of_few_levels_are_no_error():
  black, two = np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint16)
  two[:4] = 65535
  for stored in (black, two):
    for data in (_saved(stored, "PNG"), _npy(stored)):
      np.testing.assert_array_equal(images.decode(data)[..., 0], stored // 257)
  full = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
  np.testing.assert_allclose(images.decode(_saved(full))[..., 0], full / 257, atol=0.51)


def _deep_png(array):
  """A 16-bit RGB PNG, which Pillow reads but does not write."""
  import struct
  import zlib

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  height, width, _ = array.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
  header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
  )


def test_dark_colors_of_16_bits_are_refused():
  """Pillow keeps the upper 8 of 16 bits, which leaves 12-bit colors black."""
  colors = RNG.integers(0, 4096, (8, 8, 3))
  with pytest.raises(
    BadImage, match=r"16-bit colors are at most 4095, and Pillow reads the upper 8 bits.*npy"
  ):
    images.decode(_deep_png(colors))
  with pytest.raises(BadImage, match="npy"):
    images.decode(_deep_png(colors), PixelRule(3, (0, 4095)))
  assert images.decode(_deep_png(colors), PixelRule(3, (0, 65535))).max() == 15
  np.testing.assert_array_equal(images.decode(_deep_png(colors * 16)), colors // 16)
  assert images.decode(_npy(colors), PixelRule(3, (0, 4095))).max() > 250


FOUR = RNG.integers(0, 256, (20, 30, 4)).astype(np.uint8)


@pytest.mark.parametrize(
  ("data", "stored"),
  [
    (_saved(FOUR, "PNG"), FOUR),
    (_saved(FOUR), FOUR),
    (_saved(Image.fromarray(FOUR).convert("RGBA")), FOUR),
    (_pages(FOUR), FOUR),
    (_npy(FOUR), FOUR),
    (_npy(np.asfortranarray(FOUR)), FOUR),
    (FOUR, FOUR),
    (_saved(FOUR[..., :2], "PNG"), FOUR[..., :2]),
    (_pages(FOUR[..., :2]), FOUR[..., :2]),
    (_npy(np.concatenate([FOUR, FOUR], 2)), np.concatenate([FOUR, FOUR], 2)),
    (_pages(np.concatenate([FOUR, FOUR], 2)), np.concatenate([FOUR, FOUR], 2)),
    (_npy(FOUR[..., 0]), FOUR[..., :1]),
    (_saved(FOUR[..., 0], "PNG"), FOUR[..., :1]),
  ],
)
def test_images_of_other_channels(data, stored):
  image = images.LazyImage(data, rule=PixelRule(stored.shape[2]))
  assert image.size == (30, 20)
  np.testing.assert_array_equal(image.pixels(), stored)


def test_tiff_of_many_bands_in_a_page_is_refused_with_the_way_out():
  """Pillow reads up to four channels of a page."""
  size = 4 * 2 * 6
  tags = _tags(
    t256=4, t257=2, t258=(8,) * 6, t259=1, t262=1, t273=0, t277=6, t278=2, t279=size, t338=(0,) * 5
  )
  data = b"II*\0" + (8).to_bytes(4, "little") + tags.tobytes(8) + bytes(size)
  with pytest.raises(BadImage, match=r"one page for each channel, or as \.npy$"):
    images.LazyImage(data, "x.tif", PixelRule(6))


def test_pages_may_be_deep_and_are_turned_upright():
  deep = np.stack([TWELVE_BITS, 4095 - TWELVE_BITS], 2)
  exif = Image.Exif()
  exif[0x0112] = 6
  pixels = images.decode(_pages(deep, exif=exif), PixelRule(2, (0, 4095)))
  np.testing.assert_allclose(pixels, np.rot90(deep, -1) / 4095 * 255, atol=0.51)


def test_color_images_become_gray_for_a_model_of_one_channel():
  colors = FOUR[..., :3]
  pixels = images.decode(_saved(colors, "PNG"), PixelRule(1))
  np.testing.assert_array_equal(pixels[..., 0], np.asarray(Image.fromarray(colors).convert("L")))


@pytest.mark.parametrize(
  ("data", "channels", "message"),
  [
    (_saved(FOUR[..., :3], "PNG"), 4, "mode RGB, but the model has model.in_channels=4"),
    (_saved(FOUR[..., 0], "PNG"), 4, "mode L, but"),
    (_saved(FOUR, "PNG"), 5, "mode RGBA, but"),
    (_pages(FOUR), 5, "4 pages, but"),
    (_pages(FOUR), 1, "4 pages, but"),
    (_npy(FOUR), 3, r"uint8 \[20, 30, 4\], expected numbers \[height, width, 3\]"),
    (_npy(FOUR.transpose(2, 0, 1)), 4, r"uint8 \[4, 20, 30\], expected"),
    (_npy(np.zeros((0, 4, 4))), 4, "expected"),
    (_npy(np.array([["a"]])), 1, "expected numbers"),
    (_npy(FOUR)[:-1], 4, "buffer"),
    (_npy(np.array([[{}]], object)), 1, "OBJECT"),
  ],
)
def test_images_of_the_wrong_channels_are_refused(data, channels, message):
  with pytest.raises(BadImage, match=f"x.npy cannot be decoded: .*{message}"):
    images.LazyImage(data, "x.npy", PixelRule(channels)).pixels()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_every_channel_is_resized_like_a_gray_image(channels, fast, monkeypatch):
  if not fast:
    monkeypatch.setattr(resize, "fast", None)
  pixels = RNG.integers(0, 256, (40, 50, channels)).astype(np.uint8)
  box, views = (3, 4, 43, 34), [((20, 16), "bicubic"), ((30, 40), "lanczos")]
  made = resize.resize(pixels, box, views)
  for c in range(channels):
    gray = resize.resize(np.repeat(pixels[..., c : c + 1], 3, 2), box, views)
    for view, other in zip(made, gray, strict=True):
      assert view.shape[2] == channels
      np.testing.assert_array_equal(view[..., c], other[..., 0])
  view = images.eval_views(pixels, {"x": ((16, 16), "bicubic")}, crop_pct=1.0)["x"]
  gray = Image.fromarray(pixels[..., -1]).resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
  np.testing.assert_array_equal(view[..., -1], gray)


def test_views_of_other_channels_have_no_color_augmentation():
  options = {**OPTIONS, "rand_augment": "rand-m9-mstd0.5-inc1", "mean": (0.5,) * 4}
  reader = ViewReader({"image": ((16, 16), "bicubic")}, options)
  image, key = images.LazyImage(FOUR, rule=PixelRule(4)), (0, 0, 0)
  plain = ViewReader({"image": ((16, 16), "bicubic")}, {**options, "rand_augment": ""})
  assert reader.eval(image, {})["image"].shape == (16, 16, 4)
  np.testing.assert_array_equal(reader.train(image, {}, key)["image"], plain.train(image, {}, key)["image"])


def test_label_maps_of_images_of_other_channels():
  data = dict(interpolation="bicubic", mean=(0.0,) * 4, flip=True)
  options = dict(reduce_zero_label=False, ignore_label=255, resize=(30, 20), resize_ratio=(1.0, 1.0))
  reader = segmentation.LabelMapReader(
    (16, 40), 3, data, {**options, "cat_max_ratio": 1.0, "photometric": True}
  )
  example = {"label_map": RNG.integers(0, 3, (20, 30)).astype(np.uint8)}
  for arrays in (reader.train(images.LazyImage(FOUR, rule=PixelRule(4)), example, (0, 0, 0)),):
    assert arrays["image"].shape == (16, 40, 4)
    assert arrays["image"][:, 30:].max() == 0
  shown = arrays["image"][:, :30]
  assert any(np.array_equal(side[t : t + 16], shown) for side in (FOUR, FOUR[:, ::-1]) for t in range(5))
