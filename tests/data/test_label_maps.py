"""Label maps: what is read, what is refused, colors, and sets without labels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import examples, label_maps, segmentation, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import BadImage, UserError
from tests import tiny

VALUES = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)


def encoded(image, format="PNG", **options):
  buffer = io.BytesIO()
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image.save(buffer, format, **options)
  return buffer.getvalue()


def gray_png(values, depth):
  """A gray PNG of 1, 2 or 4 bits, which Pillow cannot write."""
  per_byte = 8 // depth
  rows = b""
  for row in values:
    row = [*row, *[0] * (-len(row) % per_byte)]
    packed = [
      sum(int(v) << (8 - depth * (k + 1)) for k, v in enumerate(row[i : i + per_byte]))
      for i in range(0, len(row), per_byte)
    ]
    rows += bytes([0, *packed])

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", len(values[0]), len(values), depth, 0, 0, 0, 0)
  parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def channels(*planes):
  return np.stack(planes, -1).astype(np.uint8)


OPAQUE = np.full_like(VALUES, 255)
PALETTE = Image.fromarray(VALUES).convert("P")
READ = {
  "gray PNG": encoded(VALUES),
  "palette PNG": encoded(PALETTE),
  "gray BMP": encoded(VALUES, "BMP"),
  "gray TIFF": encoded(VALUES, "TIFF"),
  "packed TIFF": encoded(VALUES, "TIFF", compression="tiff_lzw"),
  "16-bit PNG": encoded(VALUES.astype(np.uint16)),
  "16-bit TIFF": encoded(VALUES.astype(np.uint16), "TIFF"),
  "32-bit TIFF": encoded(VALUES.astype(np.int32), "TIFF"),
  "float TIFF": encoded(VALUES.astype(np.float32), "TIFF"),
  "equal RGB PNG": encoded(channels(VALUES, VALUES, VALUES)),
  "equal RGB BMP": encoded(channels(VALUES, VALUES, VALUES), "BMP"),
  "equal RGB TIFF": encoded(channels(VALUES, VALUES, VALUES), "TIFF"),
  "gray and alpha": encoded(channels(VALUES, OPAQUE)),
  "equal RGBA": encoded(channels(VALUES, VALUES, VALUES, OPAQUE)),
  "4-bit PNG": gray_png(VALUES, 4),
  "array": VALUES,
  "array, one channel": VALUES[..., None],
  "array, three equal channels": channels(VALUES, VALUES, VALUES),
  "whole floats": VALUES.astype(np.float32),
}


@pytest.mark.parametrize("name", READ)
def test_read(name):
  found = label_maps.decode_labels(READ[name], name, size=(3, 2))
  np.testing.assert_array_equal(found, VALUES)
  assert found.dtype.kind in "ui"


def test_few_bits():
  for depth in (1, 2):
    values = np.arange(8).reshape(2, 4) % 2**depth
    np.testing.assert_array_equal(label_maps.decode_labels(gray_png(values, depth), "x"), values)


ONE_HOT = np.eye(3, dtype=np.uint8)[VALUES % 3]
REFUSED = {
  "RGB": (encoded(channels(VALUES, VALUES, VALUES + 1)), "color image"),
  "RGBA, transparent": (encoded(channels(VALUES, VALUES, VALUES, VALUES)), "not opaque"),
  "gray and alpha": (encoded(channels(VALUES, OPAQUE - 1)), "not opaque"),
  "CMYK": (encoded(Image.fromarray(channels(*[VALUES] * 4), "CMYK"), "TIFF"), "mode CMYK"),
  "JPEG": (encoded(VALUES, "JPEG"), "JPEG does not"),
  "GIF": (encoded(VALUES, "GIF"), "expected one PNG"),
  "two pages": (encoded(VALUES, "TIFF", save_all=True, append_images=[Image.fromarray(VALUES)]), "2 pages"),
  "fractions in a TIFF": (encoded(VALUES.astype(np.float32) + 0.5, "TIFF"), "no whole numbers"),
  "one-hot": (ONE_HOT, "channels differ"),
  "one-hot, two classes": (np.eye(2, dtype=np.uint8)[VALUES % 2], "not opaque"),
  "one-hot, six classes": (np.eye(6, dtype=np.uint8)[VALUES], "6 channels"),
  "fractions": (VALUES + 0.5, "no whole numbers"),
  "not a number": (np.full((2, 3), np.nan), "no whole numbers"),
  "text": (np.full((2, 3), "a"), "array of <U1"),
  "one row": (VALUES[0], "array of uint8 \\(3,\\)"),
  "another size": (VALUES.T, "2x3 pixels, its image 3x2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
  label_map, fact = REFUSED[name]
  with pytest.raises(UserError, match=f"x.png: the label map .*{fact}") as error:
    label_maps.decode_labels(label_map, "x.png", size=(3, 2))
  assert not isinstance(error.value, BadImage)


def test_color_image_of_16_bits_is_refused():
  """Pillow would keep the upper eight bits of each channel, which are 0."""
  data = bytearray(encoded(np.zeros((2, 3, 3), np.uint8)))

  def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

  header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
  rows = zlib.compress((b"\0" + struct.pack(">9H", *[3] * 9)) * 2)
  data = data[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
  with pytest.raises(UserError, match="RGB;16B.*color image"):
    label_maps.decode_labels(bytes(data), "x.png")


@pytest.mark.parametrize("mode, format", [("CMYK", "TIFF"), ("L", "JPEG")])
def test_refused_before_the_pixels_are_decoded(mode, format, monkeypatch):
  data = encoded(Image.new(mode, (3, 2)), format)
  monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
  with pytest.raises(UserError):
    label_maps.decode_labels(data, "x.png")


def test_a_map_of_another_size_is_refused_before_its_pixels_are_decoded(monkeypatch):
  data = encoded(channels(VALUES, VALUES, VALUES))
  monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
  with pytest.raises(UserError, match="3x2 pixels, its image 2x2"):
    label_maps.decode_labels(data, "x.png", size=(2, 2))


COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [7, 8, 9], [255, 255, 255], [1, 0, 0]], np.uint8)


def test_colors_are_positions_in_the_palette():
  pixels = COLORS[VALUES]
  as_palette = Image.fromarray(VALUES)
  as_palette.putpalette(COLORS.tobytes())
  forms = [pixels, encoded(pixels), encoded(pixels, "BMP"), encoded(as_palette), np.dstack([pixels, OPAQUE])]
  for form in forms:
    np.testing.assert_array_equal(label_maps.decode_labels(form, "x", colors=COLORS), VALUES)
  gray = np.array([[0, 255, 0]], np.uint8)
  for form in (gray, encoded(gray), encoded(gray > 0), encoded(gray, "BMP")):
    np.testing.assert_array_equal(label_maps.decode_labels(form, "x", colors=COLORS), [[0, 4, 0]])


@pytest.mark.parametrize("color", [(2, 0, 0), (255, 255, 254), (0, 0, 1)])
def test_an_unknown_color_is_named(color):
  pixels = COLORS[VALUES]
  pixels[1, 2] = color
  with pytest.raises(UserError) as error:
    label_maps.decode_labels(encoded(pixels), "x.png", colors=COLORS)
  assert all(fact in str(error.value) for fact in ("x.png", str(color), "row 1, column 2"))


def test_large_values_do_not_wrap():
  for value in (2**32 + 1, 2**63, -(2**31), 256 + 1):
    labels = np.full((2, 2), value, np.uint64 if value > 0 else np.int64)
    with pytest.raises(UserError, match="the label map has the value"):
      segmentation.to_classes(labels, "x", num_classes=3, reduce_zero_label=False, ignore_label=255)


def test_random_arrays_and_files_are_read_or_refused():
  """Whatever is read has the values of the first channel, and nothing else about it was dropped."""
  rng = np.random.default_rng(0)
  counts = {"read": 0, "refused": 0}
  for _ in range(400):
    high = int(rng.choice([2, 5, 256]))
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 5)), *rng.choice([0, 1, 2, 3, 4, 5], 1))
    array = rng.integers(0, high, shape if shape[2] else shape[:2])
    if shape[2] > 1 and rng.random() < 0.6:  # often equal channels, and an opaque alpha
      array = np.repeat(array[..., :1], shape[2], -1)
      if shape[2] in (2, 4):
        array[..., -1] = 255
    dtype = rng.choice(["bool", "uint8", "uint16", "int32", "int64", "float32", "float64"])
    array = array.astype(dtype)
    if dtype.startswith("float") and rng.random() < 0.3:
      array = array + array.dtype.type(rng.choice([0.5, np.nan, np.inf]))
    form = array
    if rng.random() < 0.5:
      try:
        form = encoded(array, str(rng.choice(["PNG", "BMP", "TIFF"])))
      except (TypeError, OSError, ValueError, KeyError):  # Pillow cannot write such an image
        pass
    try:
      found = label_maps.decode_labels(form, "x.png")
    except (UserError, BadImage) as error:
      assert "x.png" in str(error)
      counts["refused"] += 1
      continue
    counts["read"] += 1
    planes = array if array.ndim == 3 else array[..., None]
    np.testing.assert_array_equal(found, planes[..., 0])
    color = planes[..., :-1] if planes.shape[-1] in (2, 4) else planes
    assert (color == color[..., :1]).all() and found.shape == array.shape[:2]
    try:
      rule = dict(
        num_classes=4, reduce_zero_label=bool(rng.integers(2)), ignore_label=int(rng.choice([255, 3, 0]))
      )
      classes = segmentation.to_classes(found, "x.png", **rule)
    except UserError:
      stored = found.astype(np.int64)[(found != 255) & (found != rule["ignore_label"])]
      assert (stored > 4 if rule["reduce_zero_label"] else stored > 3).any()
      continue
    shift = int(rule["reduce_zero_label"])
    ignored = (found == 255) | (found == rule["ignore_label"]) | (shift & (found == 0))
    np.testing.assert_array_equal(classes, np.where(ignored, 255, found.astype(np.int64) - shift))
  assert min(counts.values()) > 50


# Sets of label maps.


def pairs(folder, maps, split="training", ending=".png", format="PNG"):
  for name in ("images", "annotations"):
    (folder / name / split).mkdir(parents=True)
  for i, label_map in enumerate(maps):
    array = np.asarray(label_map, np.uint8)
    Image.new("RGB", array.shape[1::-1], (30 * i % 256, 0, 0)).save(
      folder / "images" / split / f"{i:02d}.png"
    )
    Image.fromarray(array).save(folder / "annotations" / split / f"{i:02d}{ending}", format)
  return sources.PairsSource(str(folder), split)


def reader(**segment):
  config = tiny.config("segment", **{f"segment.{key}": value for key, value in segment.items()})
  return segmentation.LabelMapReader((16, 16), 2, config.data.to_dict(), config.segment.to_dict())


@pytest.mark.parametrize(
  "ending, format", [(".bmp", "BMP"), (".tif", "TIFF"), (".TIFF", "TIFF"), (".PNG", "PNG")]
)
def test_pairs_have_label_maps_of_several_formats(ending, format, tmp_path):
  source = pairs(tmp_path, [VALUES, VALUES + 1], ending=ending, format=format)
  np.testing.assert_array_equal(label_maps.decode_labels(source[1]["label_map"], "x"), VALUES + 1)
  assert source[1]["label_file"].endswith(f"01{ending}")


def test_pairs_account_for_files_without_an_image(tmp_path, caplog):
  pairs(tmp_path, [VALUES, VALUES])
  folder = tmp_path / "annotations" / "training"
  Image.fromarray(VALUES).save(folder / "00.bmp")
  Image.fromarray(VALUES).save(folder / "07.png")
  source = sources.PairsSource(str(tmp_path), "training")
  assert source[0]["label_file"].endswith("00.png")  # as before
  assert "2 files that are the label map of no image left out: 00.bmp (1), 07.png (1)" in caplog.text


@pytest.mark.parametrize("maps", [[[[0, 255]], [[255, 0]]], [[[255]]], [[[0]], [[255]]]])
@pytest.mark.parametrize("reduce_zero_label", [True, False])
def test_a_set_of_0_and_255_is_named(maps, reduce_zero_label, tmp_path):
  source = pairs(tmp_path, maps)
  with pytest.raises(
    UserError, match="all . label maps hold only the values .*255.*segment.label_colors=true"
  ):
    segmentation.check_not_only_255(source, reader(reduce_zero_label=reduce_zero_label))


def test_the_way_out_of_0_and_255(tmp_path):
  source = pairs(tmp_path, [[[0, 255]], [[255, 0]]])
  colors = reader(label_colors=True, palette=((0, 0, 0), (255, 255, 255)))
  segmentation.check_not_only_255(source, colors)
  _, labels = segmentation.read_full_size(source, colors, 0)
  np.testing.assert_array_equal(labels, [[0, 1]])


def test_a_good_set_is_not_searched(tmp_path, monkeypatch):
  source = pairs(tmp_path, [[[0, 1, 255]], [[255, 0]]])
  monkeypatch.setattr(
    segmentation, "read", lambda source, index: examples.read(source, index) if not index else 1 / 0
  )
  segmentation.check_not_only_255(source, reader())
  source = pairs(tmp_path / "b", [[[0]]] * 5)
  monkeypatch.setattr(segmentation, "MAX_ZERO", 3)
  monkeypatch.setattr(
    segmentation, "read", lambda source, index: examples.read(source, index) if index < 4 else 1 / 0
  )
  segmentation.check_not_only_255(source, reader())


def test_a_map_without_a_labelled_pixel_is_a_bad_example(tmp_path):
  source = pairs(tmp_path, [[[0, 1]], [[255, 255]]])
  example = source[1]
  with pytest.raises(BadImage, match="01.png: no pixel of the label map has a class"):
    reader().train(examples.decode(example, 1), example, (0, 0, 1))
  tracker = BadImageTracker(source, 1.0, reader=reader())
  tracker.update(np.array([1]), np.array([True]))
  assert "no pixel of the label map has a class" in tracker.reasons[1]
