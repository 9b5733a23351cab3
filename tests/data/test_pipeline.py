"""Crops, decoding, sources and the order of examples."""

import io
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import images, pipeline, shapes, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from tests.conftest import ROOT

VIEWS = {"image": ((16, 16), "bicubic"), "token_image": ((8, 8), "lanczos")}
OPTIONS = dict(
  crop="random_resized",
  crop_scale=(0.3, 1.0),
  crop_ratio=(3 / 4, 4 / 3),
  flip=True,
  crop_pct=1.0,
  resize="short_side",
  rand_augment="",
  scaled_decode=False,
)


def _source(count=20):
  return sources.ShapesSource("train", count, 24)


def _reader(**options):
  return ViewReader(VIEWS, {**OPTIONS, **options})


def _read(rows, batch_size, steps, start=0, seed=3, source=None, threads=1, **options):
  return list(
    pipeline.train_batches(
      source or _source(),
      _reader(**options),
      rows=np.array(rows),
      batch_size=batch_size,
      total_steps=steps,
      start_step=start,
      seed=seed,
      threads=threads,
    )
  )


def _flat(batches, key="image"):
  return np.concatenate([b[key] for b in batches])


def test_epochs_have_each_example_once_in_different_orders():
  batches = _read(range(4), 4, 10)
  keys = _flat(batches, "example_key")
  for epoch in (0, 1):
    mine = keys[keys[:, 0] == epoch]
    assert sorted(mine[:, 1]) == list(range(20))
  assert (keys[:20, 1] != keys[20:, 1]).any()


def test_views_do_not_depend_on_batch_or_process_count():
  full = _read(range(8), 8, 5)
  half = _read(range(4), 4, 10)
  np.testing.assert_array_equal(_flat(full), _flat(half))
  even, odd = _read([0, 1, 4, 5], 8, 5), _read([2, 3, 6, 7], 8, 5)
  for a, b, both in zip(even, odd, full, strict=True):
    np.testing.assert_array_equal(a["image"], both["image"][[0, 1, 4, 5]])
    np.testing.assert_array_equal(b["token_image"], both["token_image"][[2, 3, 6, 7]])


def test_starting_at_a_step_gives_the_same_batches():
  np.testing.assert_array_equal(_flat(_read(range(4), 4, 9)[6:]), _flat(_read(range(4), 4, 9, start=6)))


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_batches_do_not_depend_on_the_number_of_threads(threads):
  """Threads read pieces of batches, whose sizes do not divide that of a batch here."""
  found, wanted = _read(range(10), 10, 4, threads=threads), _read([0], 1, 40)
  assert [len(batch["image"]) for batch in found] == [10] * 4
  for key in wanted[0]:
    np.testing.assert_array_equal(_flat(found, key), _flat(wanted, key))


class _Counting(sources.Source):
  """Counts what is read."""

  description = {}

  def __init__(self):
    self.count, self._lock = 0, threading.Lock()

  def __len__(self):
    return 1000

  def __getitem__(self, index):
    with self._lock:
      self.count += 1
    return {"image": np.zeros((4, 4, 3), np.uint8)}


@pytest.mark.parametrize("threads", [1, 8])
def test_what_is_read_ahead_does_not_grow_with_the_number_of_threads(threads):
  source, size = _Counting(), 32
  options = dict(rows=np.arange(size), batch_size=size, total_steps=100, start_step=0, seed=0)
  batches = pipeline.train_batches(source, _reader(), threads=threads, **options)
  next(batches)
  count = -1
  while count != source.count:
    count = source.count
    time.sleep(0.2)
  assert 2 * size <= count <= (1 + pipeline.DEPTH) * size
  batches.close()


@pytest.mark.slow
def test_workers_leave_nothing_in_shared_memory(tmp_path):
  """Python names leaked objects at its end. One reader is used up, one still open; both give the batches of threads."""
  script = tmp_path / "script.py"
  script.write_text(
    textwrap.dedent("""
      import itertools
      import numpy as np
      from beit_jax.data import pipeline
      from tests.data import test_pipeline as this

      if __name__ == "__main__":
        options = dict(rows=np.arange(8), batch_size=8, total_steps=6, start_step=0, seed=0)
        options |= dict(source=this._source(), reader=this._reader(), threads=2)
        readers = [pipeline.train_batches(**options, workers=workers) for workers in (0, 2, 1)]
        threads, used_up, still_open = (
          list(itertools.islice(reader, count)) for reader, count in zip(readers, (7, 7, 2))
        )
        np.testing.assert_array_equal(this._flat(threads), this._flat(used_up))
        np.testing.assert_array_equal(this._flat(threads[:2]), this._flat(still_open))
    """)
  )
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr


class _Stuck(sources.Source):
  """Example 0 can be read; the others wait for a file server that does not answer."""

  description = {}

  def __len__(self):
    return 3

  def __getitem__(self, index):
    time.sleep(600 if index else 0)
    return {"image": np.zeros((4, 4, 3), np.uint8)}


def test_a_stuck_worker_is_ended_and_no_other(monkeypatch):
  monkeypatch.setattr(pipeline, "STUCK_SECONDS", 1)
  training = pipeline.eval_batches(_source(), _reader(), rows=np.arange(1), batch_size=1, workers=1)
  next(training)
  others = multiprocessing.active_children()
  batches = pipeline._batches(
    pipeline._Rows(_Stuck(), _reader(), np.arange(1), 1, 3, seed=0, train=False, replace=False), 0, 1, 1, None
  )
  next(batches)
  began = time.monotonic()
  batches.close()
  assert time.monotonic() - began < 20 and multiprocessing.active_children() == others
  training.close()
  assert not multiprocessing.active_children()


def test_seeds_give_different_images():
  first, other = _read(range(4), 4, 5), _read(range(4), 4, 5, seed=4)
  assert (_flat(first) != _flat(other)).any()


def test_evaluation_has_every_example_once_and_pads():
  batches = list(pipeline.eval_batches(_source(10), _reader(), rows=np.arange(4), batch_size=4))
  valid = _flat(batches, "valid")
  assert len(batches) == 3 and valid.sum() == 10 and not valid[10:].any()
  assert sorted(_flat(batches, "example_key")[valid][:, 1]) == list(range(10))


class _Gradient(sources.Source):
  """One image with the row in its red and the column in its green channel, so that a view shows its box."""

  description = {}

  def __len__(self):
    return 1

  def __getitem__(self, index):
    y, x = np.mgrid[:256, :256]
    return {"image": np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)}


def test_both_views_have_the_same_box():
  for batch in _read([0], 1, 12, source=_Gradient()):
    image, token = batch["image"][0].astype(float), batch["token_image"][0].astype(float)
    assert image.shape == (16, 16, 3) and token.shape == (8, 8, 3)
    pooled = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(pooled - token)[1:-1, 1:-1].max() < 6
    assert image[..., 0].std() > 0


def test_boxes_have_the_distribution_of_torchvision():
  """Area uniform in (0.2, 1), aspect log-uniform in (3/4, 4/3), where nothing is rejected."""
  rng = np.random.default_rng(0)
  boxes = np.array(
    [images.random_resized_box(rng, 600, 600, (0.2, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)]
  )
  width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  area = width * height / 360_000
  assert area.mean() == pytest.approx(0.35, abs=0.005) and area.min() > 0.19 and area.max() < 0.51
  assert np.log(width / height).mean() == pytest.approx(0.0, abs=0.01)
  assert boxes[:, :2].min() >= 0 and boxes[:, 2:].max() <= 600
  # For an image too narrow for any box, the central box with the nearest allowed aspect ratio is used.
  assert images.random_resized_box(rng, 1000, 10, (0.9, 1.0), (3 / 4, 4 / 3)) == (494, 0, 507, 10)


def _png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "png")
  return buffer.getvalue()


def test_all_modes_are_converted_to_rgb():
  gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
  deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
  rgba = np.zeros((8, 8, 4), np.uint8)
  for data in (_png(gray), _png(deep), _png(rgba), gray[..., None], np.stack([gray] * 3, -1)):
    assert images.decode(data).shape == (8, 8, 3)
  np.testing.assert_array_equal(np.asarray(images.decode(_png(gray)))[..., 0], gray)
  # 16 bits are scaled, not clipped.
  np.testing.assert_allclose(np.asarray(images.decode(_png(deep)))[..., 1], deep / 257, atol=0.51)


def test_eval_view_is_short_side_then_center_crop():
  image = np.zeros((40, 80, 3), np.uint8)
  image[:, 30:50] = 255
  view = images.eval_views(image, {"image": ((20, 20), "bilinear")}, crop_pct=1.0)["image"]
  assert view.shape == (20, 20, 3) and view[:, 7:13].min() > 250 and view[:, :2].max() < 5


def test_eval_view_squashed():
  """Both sides are resized to 20 / 0.5 = 40, then the central 20 x 20 are cropped; every second column remains."""
  image = np.zeros((40, 80, 3), np.uint8)
  image[:, 40:] = 255
  image[:10] = 128
  options = dict(crop_pct=0.5, resize="squash")
  view = images.eval_views(image, {"image": ((20, 20), "nearest")}, **options)["image"]
  np.testing.assert_array_equal(view, image[10:30, 20:60:2])
  assert images.eval_size((40, 80), (20, 20), 0.5, "squash") == (40, 40)
  assert images.eval_size((40, 80), (20, 20), 0.5, "short_side") == (40, 80)


def test_scenes_are_reproducible_and_labeled():
  first, second = shapes.render("train", 5, 32), shapes.render("train", 5, 32)
  np.testing.assert_array_equal(first["image"], second["image"])
  assert (shapes.render("test", 5, 32)["image"] != first["image"]).any()
  for index in range(40):
    scene = shapes.render("train", index, 48)
    sizes = np.bincount(scene["label_map"].ravel(), minlength=9)[1:]
    assert scene["label_map"].shape == (48, 48) and sizes[scene["label"]] > 0
  labels = [shapes.render("train", i, 8)["label"] for i in range(400)]
  assert np.bincount(labels, minlength=8).min() > 25


def _folder(tmp_path, classes=("cat", "dog")):
  for name in classes:
    (tmp_path / "train" / name).mkdir(parents=True)
    for i in range(3):
      Image.new("RGB", (20 + i, 30)).save(tmp_path / "train" / name / f"{i}.png")
  return tmp_path


def test_folder_with_classes(tmp_path):
  source = sources.FolderSource(str(_folder(tmp_path)), "train")
  assert len(source) == 6 and source.class_names == ("cat", "dog")
  assert [source[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_folder_without_classes(tmp_path):
  Image.new("L", (9, 9)).save(tmp_path / "a.png")
  source = sources.FolderSource(str(tmp_path), "train")
  assert len(source) == 1 and source.num_classes == 0 and "label" not in source[0]


def test_folder_errors(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    sources.FolderSource(str(tmp_path / "nowhere"), "train")
  with pytest.raises(UserError, match="no images in this folder"):
    sources.FolderSource(str(tmp_path), "train")
  with pytest.raises(UserError, match="data.split='test'"):
    sources.FolderSource(str(_folder(tmp_path)), "test")


def test_broken_image_is_named(tmp_path):
  (tmp_path / "broken.jpg").write_bytes(b"not an image")
  source = sources.FolderSource(str(tmp_path), "")
  with pytest.raises(UserError, match="broken.jpg cannot be decoded"):
    _read([0], 1, 1, source=source)


def test_missing_tfds_data_set_names_the_command(tmp_path):
  (tmp_path / "cifar10").mkdir()
  with pytest.raises(UserError) as error:
    sources.TfdsSource("cifar100", "train", str(tmp_path), "image", "label")
  for fact in (
    "data.name='cifar100'",
    "Did you mean 'cifar10'",
    "tfds build cifar100 --file_format=array_record",
  ):
    assert fact in str(error.value)


def test_fraction_has_the_right_size_and_is_reproducible():
  data = dict(source="shapes", split="train", num_examples=100, render_size=8, fraction=0.25, num_classes=8)
  data |= dict(mean=(0.5,) * 3, value_range=None)
  first, second = sources.make_source(data), sources.make_source(data)
  assert len(first) == 25
  assert [first[i]["label"] for i in range(25)] == [second[i]["label"] for i in range(25)]
  with pytest.raises(UserError, match="data.fraction"):
    sources.make_source({**data, "fraction": 0.0})
