"""Training images: decoding is identical to Pillow's, resizing close to it; unusual files are left to Pillow."""

import io
import random
import re
import types

import numpy as np
import pytest
from PIL import Image, ImageOps

from beit_jax.data import bad_images, images, jpeg, pipeline, resize, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage, UserError
from beit_jax.run import meter as meter_lib
from tests import tiny
from tests.conftest import ROOT
from tests.data.test_pipeline import OPTIONS

VIEWS = {"image": ((32, 32), "bicubic"), "token_image": ((16, 16), "lanczos")}
CROP = dict(crop="random_resized", scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True)
FAST = pytest.mark.skipif(resize.fast is None, reason="cykooz-resizer has no wheel for this platform")


def _scene(width=150, height=100, seed=0):
  """An image with edges and smooth colors, like a photograph."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
  image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
  image.paste((250, 240, 10), (width // 4, height // 3, width // 2, height // 2))
  return image


def _encoded(image, format="JPEG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def _exif(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif.tobytes()


def _psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-10))


@pytest.fixture
def decoded(monkeypatch):
  """The results of the fast decoder, in the order of its calls; None for a file that it refused."""
  results, original = [], jpeg.decode

  def decode(*arguments):
    results.append(original(*arguments))
    return results[-1]

  monkeypatch.setattr(jpeg, "decode", decode)
  return results


PLAIN = {
  "4:2:0": dict(quality=90),
  "4:4:4": dict(quality=97, subsampling=0),
  "4:2:2": dict(subsampling=1),
  "progressive": dict(progressive=True),
  "restarts": dict(restart_marker_rows=1),
  "with a profile and a comment": dict(icc_profile=b"x" * 70_000, comment=b"hello"),
  **{f"orientation {i}": dict(exif=_exif(i)) for i in range(1, 9)},
  "invalid orientation": dict(exif=_exif(9)),
}


def test_very_narrow_image_is_cropped_before_it_is_resized(monkeypatch):
  """Resizing an image of 16,777,216 x 2 pixels, which fuzzing produced, took 1.6 GiB."""
  boxes = []
  monkeypatch.setattr(
    images, "resize", lambda pixels, box, views: boxes.append(box) or [np.zeros((8, 8, 3), np.uint8)]
  )
  options = dict(crop="pad", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=False)
  images.train_views(
    np.zeros((2, 1000, 3), np.uint8), np.random.default_rng(0), {"image": ((8, 8), "bicubic")}, **options
  )
  assert boxes[0] == (436, 0, 564, 2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_are_identical_to_pillow(name, mode, decoded):
  for size in ((150, 100), (33, 17), (8, 64), (1, 5)):
    data = _encoded(_scene(*size).convert(mode), **PLAIN[name])
    image, plain = images.LazyImage(data), np.asarray(images.decode(data))
    assert image.size == plain.shape[1::-1]
    np.testing.assert_array_equal(image.pixels(), plain)
  assert len(decoded) == 4 and all(pixels is not None for pixels in decoded)


OTHERS = {
  "CMYK": lambda: _encoded(_scene().convert("CMYK")),
  "two images in one file": lambda: _encoded(_scene(), "MPO", save_all=True, append_images=[_scene(seed=1)]),
  "PNG with an orientation": lambda: _encoded(_scene(), "PNG", exif=_exif(6)),
  "16-bit PNG": lambda: _encoded(
    Image.fromarray((np.arange(600, dtype=np.uint16) * 99).reshape(20, 30)), "PNG"
  ),
  "WebP": lambda: _encoded(_scene(), "WEBP"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_images_are_left_to_pillow(name, decoded):
  data = OTHERS[name]()
  image, plain = images.LazyImage(data), np.asarray(images.decode(data))
  assert image.size == plain.shape[1::-1]
  np.testing.assert_array_equal(image.pixels(), plain)
  assert not decoded


def _damaged(rng, data):
  at, length = rng.randrange(len(data)), rng.randrange(1, 60)
  junk = rng.choice((b"", b"\xff", bytes(length), rng.randbytes(length), data[at : at + length] * 2))
  return rng.choice((data[:at], data[:at] + junk + data[at + length :]))


def test_damaged_files_give_the_result_of_pillow(decoded):
  """Files truncated or changed at a random place give the same pixels or the same message."""
  outcomes = {"read": 0, "refused": 0}
  intact = [_encoded(_scene(60, 40), **PLAIN[name]) for name in ("4:2:0", "progressive", "orientation 6")]
  for i in range(400):
    rng = random.Random(i)
    data = _damaged(rng, rng.choice(intact))
    try:
      wanted, reason = np.asarray(images.decode(data)), None
    except Exception as error:
      wanted, reason = None, str(error) or type(error).__name__
      if isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image of a supported format"
    if reason is None:
      np.testing.assert_array_equal(images.LazyImage(data).pixels(), wanted)
    else:
      with pytest.raises(
        BadImage, match=f"^x.jpg cannot be decoded: {re.escape(reason)}; remove or repair it$"
      ):
        images.LazyImage(data, "x.jpg").pixels()
    outcomes["read" if reason is None else "refused"] += 1
  assert min(outcomes.values()) > 50
  # The fast decoder refuses some files that Pillow reads, and never the reverse.
  assert sum(pixels is not None for pixels in decoded) < outcomes["read"]


def _with_size(data, width, height):
  at = re.search(rb"\xff[\xc0-\xc2]\0.\x08", data, re.S).start() + 5
  return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def test_sizes_are_checked_before_decoding(decoded, monkeypatch):
  data = _encoded(_scene())
  for size in ((9_000, 9_000), (65_500, 1_100)):
    with pytest.raises(BadImage, match="pixels are more than 67,108,864"):
      images.LazyImage(_with_size(data, *size))
  assert not decoded
  assert jpeg.decode(data, (150, 100)).shape == (100, 150, 3)
  monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("the image was decoded"))
  assert jpeg.decode(data, (150, 101)) is None  # the size is not the one that was checked


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("box", [(10, 20, 90, 95), (0, 0, 150, 100), (30, 30, 50, 45), (149, 0, 150, 100)])
def test_resize_is_close_to_pillow(how, box):
  image = _scene()
  for size in ((32, 48), (100, 20), (16, 16)):
    (view,) = resize.resize(np.asarray(image), box, [(size, how)])
    wanted = np.asarray(image.crop(box).resize(size[::-1], resize.RESAMPLE[how]))
    assert view.shape == wanted.shape and view.dtype == np.uint8
    assert _psnr(view, wanted) > 49


def test_nearest_and_identity_are_exact():
  image = _scene()
  pixels, box = np.asarray(image), (10, 20, 90, 80)
  near, same = resize.resize(pixels, box, [((30, 40), "nearest"), ((60, 80), "lanczos")])
  np.testing.assert_array_equal(near, np.asarray(image.crop(box).resize((40, 30), 0)))
  np.testing.assert_array_equal(same, pixels[20:80, 10:90])


def test_pixels_outside_the_box_have_no_influence():
  pixels = np.asarray(_scene())
  other = 255 - pixels
  other[20:80, 10:90] = pixels[20:80, 10:90]
  for first, second in zip(
    *(resize.resize(p, (10, 20, 90, 80), VIEWS.values()) for p in (pixels, other)), strict=True
  ):
    np.testing.assert_array_equal(first, second)


@FAST
def test_resizing_does_not_depend_on_the_processor(monkeypatch):
  pixels, box = np.asarray(_scene()), (10, 20, 90, 80)
  native, original, made = resize.resize(pixels, box, VIEWS.values()), resize.fast.Resizer, []

  def plain():
    made.append(original())
    made[-1].cpu_extensions = resize.fast.CpuExtensions.none
    return made[-1]

  monkeypatch.setattr(resize.fast, "Resizer", plain)
  for view, without_simd in zip(native, resize.resize(pixels, box, VIEWS.values()), strict=True):
    np.testing.assert_array_equal(view, without_simd)
  assert len(made) == 2


def test_pillow_replaces_a_missing_resizer_on_arm_only(monkeypatch, caplog):
  image, box = _scene(), (10, 20, 90, 80)
  monkeypatch.setattr(resize, "fast", None)
  for (size, how), view in zip(
    VIEWS.values(), resize.resize(np.asarray(image), box, VIEWS.values()), strict=True
  ):
    np.testing.assert_array_equal(view, np.asarray(image.crop(box).resize(size[::-1], resize.RESAMPLE[how])))
  check = resize.check.__wrapped__
  monkeypatch.setattr(resize, "sys", types.SimpleNamespace(platform="linux"))
  monkeypatch.setattr(resize.platform, "machine", lambda: "aarch64")
  check()
  assert "resized by Pillow" in caplog.text
  monkeypatch.setattr(resize.platform, "machine", lambda: "x86_64")
  with pytest.raises(UserError, match="pip install 'cykooz-resizer"):
    check()


def test_mirrored():
  pixels = np.asarray(_scene())
  np.testing.assert_array_equal(resize.mirrored(pixels), pixels[:, ::-1])


def _pillow_views(image, rng, views):
  """The same steps, with Pillow only."""
  box = images.random_resized_box(rng, *image.size, CROP["scale"], CROP["ratio"])
  flip = rng.random() < 0.5
  for size, how in views.values():
    view = image.crop(box).resize(size[::-1], resize.RESAMPLE[how])
    yield np.asarray(ImageOps.mirror(view) if flip else view)


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_views_are_close_to_pillow(orientation):
  data = _encoded(_scene(200, 160), quality=95, exif=_exif(orientation))
  for i in range(20):
    made = images.train_views(data, np.random.default_rng(i), VIEWS, **CROP)
    wanted = _pillow_views(Image.fromarray(images.decode(data)), np.random.default_rng(i), VIEWS)
    assert all(_psnr(view, other) > 49 for view, other in zip(made.values(), wanted, strict=True)), i


def test_padded_crops_are_close_to_pillow():
  image, views = _scene(40, 30), {"image": ((32, 48), "bicubic")}
  for i in range(10):
    rng = np.random.default_rng(i)
    (made,) = images.train_views(image, np.random.default_rng(i), views, **{**CROP, "crop": "pad"}).values()
    left, top = int(rng.integers(0, 13)) - 6, int(rng.integers(0, 9)) - 4
    view = image.resize((48, 32), Image.Resampling.BICUBIC).crop((left, top, left + 48, top + 32))
    view = ImageOps.mirror(view) if rng.random() < 0.5 else view
    assert _psnr(made, np.asarray(view)) > 45


SHARED = ROOT.parent / "shared" / "data" / "tfds"


@pytest.mark.skipif(not (SHARED / "imagenet_sample").is_dir(), reason="the sample of ImageNet is missing")
def test_psnr_on_imagenet_is_above_50_db():
  source = sources.TfdsSource("imagenet_sample", "train", str(SHARED), "image", "")
  views = {"image": ((224, 224), "bicubic"), "token_image": ((112, 112), "lanczos")}
  found = []
  for i in range(0, len(source), 20):
    data, made = (
      source[i]["image"],
      images.train_views(source[i]["image"], np.random.default_rng(i), views, **CROP),
    )
    wanted = _pillow_views(Image.fromarray(images.decode(data)), np.random.default_rng(i), views)
    found.append([_psnr(view, other) for view, other in zip(made.values(), wanted, strict=True)])
  assert np.median(found, 0).min() > 52 and np.min(found) > 45


def test_evaluation_views_are_identical_to_pillow():
  for options in (dict(), dict(exif=_exif(8))):
    data = _encoded(_scene(200, 160), **options)
    view = images.eval_views(images.LazyImage(data), {"image": ((32, 32), "bicubic")}, crop_pct=0.875)[
      "image"
    ]
    image = Image.fromarray(images.decode(data))
    height, width = images.eval_size(image.size[::-1], (32, 32), 0.875, "short_side")
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    np.testing.assert_array_equal(view, np.asarray(resized.crop((left, top, left + 32, top + 32))))


# Scaled decoding.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 480), (333, 501)])
def test_scaled_decoding_shows_the_same_box(orientation, size, decoded):
  data = _encoded(_scene(*size), quality=95, exif=_exif(orientation))
  for i in range(6):
    exact, fewer = (
      images.train_views(data, np.random.default_rng(i), VIEWS, scaled=scaled, **CROP)
      for scaled in (False, True)
    )
    assert all(_psnr(exact[name], fewer[name]) > 30 for name in VIEWS), (
      i,
      [_psnr(exact[n], fewer[n]) for n in VIEWS],
    )
  rows = sorted({pixels.shape[0] for pixels in decoded})
  if size == (640, 480) or orientation == 1:
    assert rows[0] < size[1] // 3  # some were decoded at a lower resolution


def test_scaled_decoding_does_not_change_small_images():
  data = _encoded(_scene(60, 62))
  for i in range(5):
    exact, fewer = (
      images.train_views(data, np.random.default_rng(i), VIEWS, scaled=scaled, **CROP)
      for scaled in (False, True)
    )
    assert all((exact[name] == fewer[name]).all() for name in VIEWS)


def test_scaled_decoding_of_a_damaged_image_has_the_pixels_of_pillow():
  """A file that the fast decoder refuses is decoded at full resolution, and the factor is 1."""
  data = bytearray(_encoded(_scene(640, 480), quality=95))
  data[-400:-380] = bytes(20)
  image = images.LazyImage(bytes(data))
  pixels, factor = image.shrunk(4)
  assert factor == 1 and pixels.shape == (480, 640, 3)
  np.testing.assert_array_equal(pixels, np.asarray(images.decode(bytes(data))))


def test_scaled_decoding_is_a_config_key():
  source = _Images([_encoded(_scene(640, 480))] * 4)
  exact, fewer = (_batch(source, scaled_decode=scaled) for scaled in (False, True))
  assert (exact["image"] != fewer["image"]).any()
  assert tiny.config("beit").data.scaled_decode is False


# In the pipeline.


class _Images(sources.Source):
  description = {}

  def __init__(self, encoded):
    self._encoded = encoded

  def __len__(self):
    return len(self._encoded)

  def __getitem__(self, index):
    data = self._encoded[index]
    if isinstance(data, OSError):
      raise data
    return {"image": data}


def _batch(source, threads=1, steps=1, bad_images=None, **options):
  options = dict(OPTIONS, **options)
  batches = pipeline.train_batches(
    source,
    ViewReader(VIEWS, options),
    rows=np.arange(len(source)),
    batch_size=len(source),
    total_steps=steps,
    start_step=0,
    seed=3,
    threads=threads,
    bad_images=bad_images,
  )
  batches = list(batches)
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_threads_do_not_change_the_images():
  source = _Images([_encoded(_scene(90 + i, 70, seed=i)) for i in range(8)])
  one, four = _batch(source, steps=6), _batch(source, threads=4, steps=6)
  for key in one:
    np.testing.assert_array_equal(one[key], four[key])


def test_truncated_and_unreadable_files_are_replaced(tmp_path):
  good = [_encoded(_scene(90, 70, seed=i)) for i in range(8)]
  source = _Images([*good, good[0][:900], OSError(5, "Input/output error")])
  tracker = bad_images.BadImageTracker(source, 1.0, tmp_path / "bad.jsonl")
  batch = _batch(source, bad_images=tracker)
  assert sorted(tracker.reasons) == [8, 9]
  assert "example 8 cannot be decoded: image file is truncated" in tracker.reasons[8]
  assert "Input/output error" in tracker.reasons[9]
  assert batch["image"].shape == (10, 32, 32, 3) and batch["valid"].all()
  with pytest.raises(BadImage, match="example 8 cannot be decoded|Input/output error"):
    _batch(source)


def test_error_in_a_reader_is_not_taken_for_a_bad_image(tmp_path):
  class Broken(ViewReader):
    def train(self, image, example, key):
      raise OSError("an error that has nothing to do with images")

  source = _Images([_encoded(_scene())] * 2)
  batches = pipeline.train_batches(
    source,
    Broken(VIEWS, OPTIONS),
    rows=np.arange(2),
    batch_size=2,
    total_steps=1,
    start_step=0,
    seed=0,
    bad_images=bad_images.BadImageTracker(source, 1.0),
  )
  with pytest.raises(OSError, match="nothing to do"):
    list(batches)


# The share of time that the loop waits for data.


class _RecordingLogger:
  def __init__(self):
    self.rows = []

  def write(self, step, row):
    self.rows.append((step, row))

  def completed(self, step):
    pass

  def show(self, step, row):
    pass


def test_share_of_time_waiting_for_data_is_logged(monkeypatch, tmp_path):
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(meter_lib.time, "monotonic", lambda: clock.now)

  def batches():
    for seconds in (1.0, 2.0, 0.0, 5.0):
      clock.now += seconds
      yield seconds

  logger, source = _RecordingLogger(), batches()
  meter = meter_lib.Meter(
    tiny.config("beit"), logger, logger, tmp_path, "run", {"learning_rate": lambda step: 0.1}, 0
  )
  for step in (1, 2, 3, 4):
    meter.next_batch(source)
    clock.now += 1.0
    meter.enqueue(step, {"loss": 1.0, "grad_norm": 1.0}, None, step != 1)
    meter.drain()
    if step == 3:
      clock.now += 100.0  # an evaluation
      meter.restart(step)
  shares = {step: row["data_wait"] for step, row in logger.rows}
  assert shares == {2: pytest.approx(3 / 5), 3: 0.0, 4: pytest.approx(5 / 6)}
