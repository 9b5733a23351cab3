"""Segmentation from label maps to mIoU: formulas, the reference's windows and metrics, whole images, bad input."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import metrics, optim, train
from beit_jax.data import examples, images, pipeline, resize, segmentation, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.doctor import runs
from beit_jax.errors import BadImage, UserError
from beit_jax.objectives import Segmentation, sliding
from beit_jax.objectives.stages import Stage
from beit_jax.runtime import sharding
from tests import reference, tiny

ARRAYS, _ = reference.load("seg")
RULE = dict(num_classes=150, reduce_zero_label=True, ignore_label=255)


@pytest.mark.parametrize("name", [key for key in ARRAYS if key.startswith("slide/windows_")])
def test_windows_golden(name):
  size, crop, stride = name.removeprefix("slide/windows_").split("_")
  size = tuple(map(int, size.split("x")))
  side, step = int(crop.removeprefix("crop")), int(stride.removeprefix("stride"))
  found = sliding.windows(size, (side, side), (step, step))
  np.testing.assert_array_equal(np.array(found)[:, [0, 1, 2, 3]], ARRAYS[name])


@pytest.mark.parametrize("case", ["reduce_off", "reduce_on"])
def test_mean_iou_golden(case):
  """Summed over three images; zero-label reduction on the labels only; ignored pixels; absent classes."""
  total = np.zeros((3, 8))
  for i in range(3):
    guess, label = ARRAYS[f"miou/pred_{case}_{i}"], ARRAYS[f"miou/label_{case}_{i}"]
    label = segmentation.to_classes(
      label, "x", num_classes=8, reduce_zero_label=case == "reduce_on", ignore_label=255
    )
    seen = label != 255
    for c in range(8):
      total[:, c] += [((guess == c) & (label == c)).sum(), ((guess == c) & seen).sum(), (label == c).sum()]
  for row, name in zip(total, ("intersect", "pred", "label"), strict=True):
    np.testing.assert_array_equal(row, ARRAYS[f"miou/{case}_area_{name}"])
  found = metrics.mean_iou(*total)
  for key in ("IoU", "Acc", "mIoU", "mAcc", "aAcc"):
    np.testing.assert_allclose(found[key], ARRAYS[f"miou/{case}_{key}"], atol=1e-9)


def test_zero_label_reduction_by_formula():
  labels = np.array([[0, 1, 150, 255]], np.uint8)
  np.testing.assert_array_equal(segmentation.to_classes(labels, "x", **RULE), [[255, 0, 149, 255]])
  camvid = dict(num_classes=11, reduce_zero_label=False, ignore_label=11)
  np.testing.assert_array_equal(
    segmentation.to_classes(np.array([[0, 10, 11, 255]]), "x", **camvid), [[0, 10, 255, 255]]
  )


def test_a_crop_is_not_filled_by_one_class():
  """If one class fills half of the map, a crop of a single class is redrawn, but not with ratio 1."""
  labels = np.zeros((40, 40), np.uint8)
  labels[:, 20:] = 1
  labels[:, 39] = 255
  rng, filled = np.random.default_rng(0), {0.75: 0, 1.0: 0}
  for ratio in filled:
    for _ in range(300):
      top, left, height, width = segmentation.crop_box(rng, labels, (8, 8), ratio)
      assert 0 <= top <= 32 and 0 <= left <= 32 and (height, width) == (8, 8)
      part = labels[top : top + 8, left : left + 8]
      counts = np.bincount(part[part != 255], minlength=2)
      filled[ratio] += counts.max() > 0.75 * counts.sum()
  # 33 columns to start from: at 3 of them the larger class has 4 or 5 of 8 columns and ends the search, at 2 more it
  # has exactly three quarters, which does not.
  assert filled[1.0] / 300 == pytest.approx(28 / 33, abs=0.09)
  assert filled[0.75] / 300 == pytest.approx((30 / 33) ** 9 * 28 / 33, abs=0.09)


def test_distortion_keeps_the_shape_and_sometimes_the_image():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  found = [segmentation.distort(np.random.default_rng(i), image) for i in range(200)]
  assert all(f.shape == image.shape and f.dtype == np.uint8 for f in found)
  same = sum(np.array_equal(f, image) for f in found) / 200
  assert same == pytest.approx(1 / 16, abs=0.06)
  brighter = np.array([f.mean() for f in found])
  assert brighter.min() < image.mean() - 20 and brighter.max() > image.mean() + 20


def test_labels_move_with_their_pixels():
  """The image shows its own label map: after resize, crop and flip both still agree."""
  labels = np.random.default_rng(0).integers(0, 9, (12, 18)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
  image = images.LazyImage(np.stack([labels * 25] * 3, -1))
  data = dict(mean=(0.5,) * 3, interpolation="nearest", flip=True)
  segment = dict(
    reduce_zero_label=False, ignore_label=255, resize=(72, 48), resize_ratio=(0.5, 2.0), cat_max_ratio=0.75,
    photometric=False,
  )  # fmt: skip
  reader = segmentation.LabelMapReader((32, 32), 9, data, segment)
  padded = 0
  for i in range(30):
    out = reader.train(image, {"label_map": labels}, (0, 0, i))
    valid = out["label_map"] != 255
    np.testing.assert_array_equal(out["image"][..., 0][valid], out["label_map"][valid] * 25)
    assert (out["image"][~valid] == 128).all()
    padded += not valid.all()
  assert 0 < padded < 30


def test_poly_schedule_by_formula():
  """(peak - end) (1 - i/n) + end, times a warm-up from 1e-6 to 1 (mmcv)."""
  rate = lambda step: optim.warmup_poly(step, peak=1e-3, end=1e-5, warmup_steps=10, total_steps=100)
  assert rate(0) == pytest.approx(1e-3 * 1e-6)
  assert rate(5) == pytest.approx((0.99e-3 * 0.95 + 1e-5) * (1 - 0.5 * (1 - 1e-6)))
  assert rate(50) == pytest.approx(0.99e-3 * 0.5 + 1e-5) and rate(100) == pytest.approx(1e-5)


class _Sized(sources.Source):
  """Images of many sizes with random label maps."""

  num_classes = 9
  description: dict = {}

  def __init__(self, sizes):
    rng = np.random.default_rng(0)
    self._examples = [
      {
        "image": rng.integers(0, 255, (*size, 3)).astype(np.uint8),
        "label_map": rng.integers(0, 9, size).astype(np.uint8),
      }
      for size in sizes
    ]

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    return self._examples[index]


def _plain_histogram(objective, variables, source):
  """One image at a time, in NumPy, as mmseg does it: windows, average, resize, argmax."""
  from beit_jax.models.resampling import bilinear_matrix

  total, crop = np.zeros((3, 9)), objective.image_size
  forward = jax.jit(lambda x: objective.module.apply(variables, x)["logits"][0])
  for i in range(len(source)):
    image, label = segmentation.read_full_size(source, objective.reader(), i)
    size = objective.sliding.resized(image.shape[:2], 1.0)
    pixels = resize.resize_with_pillow(image, size, "bicubic")
    logits, count = np.zeros((*size, 9)), np.zeros((*size, 1))
    for top, bottom, left, right in sliding.windows(size, crop, objective.stride):
      x = objective._image(pixels[None, top:bottom, left:right])
      out = np.asarray(forward(x))
      rows, columns = (bilinear_matrix(n, side) for n, side in zip(out.shape[:2], crop, strict=True))
      logits[top:bottom, left:right] += np.einsum("yi,xj,ijc->yxc", rows, columns, out)
      count[top:bottom, left:right] += 1
    rows, columns = (bilinear_matrix(n, side) for n, side in zip(size, label.shape, strict=True))
    guess = np.einsum("yi,xj,ijc->yxc", rows, columns, logits / count).argmax(-1)
    for c in range(9):
      total[:, c] += [((guess == c) & (label == c)).sum(), (guess == c).sum(), (label == c).sum()]
  return total


@pytest.mark.slow
def test_images_that_all_differ_in_size_compile_eight_programs():
  config = tiny.config("segment", **{"segment.resize": (40, 20)})
  rng = np.random.default_rng(1)
  source = _Sized([tuple(rng.integers(12, 40, 2)) for _ in range(12)])
  objective = Segmentation(config, source)
  variables = objective.init(jax.random.key(0))
  variables = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)
  variables["batch_stats"] = jax.tree.map(lambda x: abs(x) + 0.5, variables["batch_stats"])
  mesh = sharding.make_mesh(data=1)
  with jax.set_mesh(mesh):
    found, rows = objective.evaluate_images(variables, source, mesh)
  assert objective.sliding.probabilities._cache_size() + objective._histogram._cache_size() <= 8
  wanted = metrics.mean_iou(*_plain_histogram(objective, variables, source))
  for key in ("mIoU", "mAcc", "aAcc"):
    assert found[key] == pytest.approx(wanted[key], abs=1e-5)
  assert len(set(np.round(rows["IoU"], 6))) > 2
  mesh = sharding.make_mesh(data=4)
  with jax.set_mesh(mesh):
    again, _ = Segmentation(config, source).evaluate_images(variables, source, mesh)
  assert again == pytest.approx(found, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "setr_pup"])
def test_a_run_learns_and_loads(head, tmp_path):
  """1,000 steps on scenes beat any constant; the loaded model gives a class for every pixel."""
  easy = {"segment.photometric": False, "segment.cat_max_ratio": 1.0, "segment.resize_ratio": (1.0, 1.0)}
  rate = {"optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 20, "optimizer.weight_decay": 0.0}
  changes = {**easy, **rate, "model.head": head, "data.num_examples": 512, "eval.num_examples": 24}
  changes |= {"total_steps": 1000, "log_every_steps": 200}
  config = tiny.config("segment", **changes, figures=True)
  result = train.run(config, tmp_path)
  assert (tmp_path / "figures" / "segmentation.png").exists()
  source = sources.make_source({**config.data.to_dict(), "split": "test", "num_examples": 24})
  pixels = np.concatenate([source[i]["label_map"].ravel() for i in range(24)])
  shares = np.bincount(pixels, minlength=9) / len(pixels)
  constant = shares.max() / (shares > 0).sum()
  assert result["eval"]["mIoU"] > 1.5 * constant and result["eval"]["aAcc"] > shares.max()
  loaded = beit_jax.load(tmp_path)
  assert loaded.kind == "segmenter" and loaded.collections["batch_stats"]
  assert loaded(np.zeros((2, 20, 30, 3), np.uint8)).shape[-1] == 9
  again = train.run(tiny.config("segment", **changes, eval_only=True), tmp_path)
  assert again["eval"]["mIoU"] == pytest.approx(result["eval"]["mIoU"], abs=1e-6)
  assert (tmp_path / "per_class.csv").read_text().count("\n") == 10


def _pairs(folder, label, *, mode="L", size=(20, 16)):
  for name in ("images", "annotations"):
    (folder / name / "training").mkdir(parents=True)
  Image.new("RGB", (20, 16), (200, 10, 10)).save(folder / "images" / "training" / "a.jpg")
  Image.new(mode, size, label).save(folder / "annotations" / "training" / "a.png")
  return sources.make_source(
    {**tiny.config("segment").data.to_dict(), "source": "pairs", "root": str(folder), "split": "training"}
  )


@pytest.mark.parametrize(
  "label, options, facts",
  [
    (151, {}, ("a.png", "value 151", "150 classes", "SceneParse150")),
    ((1, 2, 3), dict(mode="RGB"), ("a.png", "mode RGB", "color image")),
    (1, dict(size=(10, 8)), ("a.png", "10x8", "20x16")),
  ],
)
def test_invalid_label_maps_are_refused(label, options, facts, tmp_path):
  source = _pairs(tmp_path, label, **options)
  data, segment = tiny.config("segment").data.to_dict(), tiny.config("segment").segment.to_dict()
  reader = segmentation.LabelMapReader((16, 16), 150, data, {**segment, "reduce_zero_label": True})
  with pytest.raises(UserError) as error:
    segmentation.read_full_size(source, reader, 0)
  assert all(fact in str(error.value) for fact in facts), error.value
  assert not isinstance(error.value, BadImage)  # a mistake, and no damage


def _scenes(folder, *broken):
  """Twelve images with their label maps, some of which are empty files."""
  rng = np.random.default_rng(0)
  for name in ("images", "annotations"):
    (folder / name / "training").mkdir(parents=True)
  for i in range(12):
    pixels, labels = (
      rng.integers(0, high, (20, 24, *more), np.uint8) for high, more in ((256, (3,)), (9, ()))
    )
    Image.fromarray(pixels).save(folder / "images" / "training" / f"{i:02d}.png")
    Image.fromarray(labels).save(folder / "annotations" / "training" / f"{i:02d}.png")
  for i in broken:
    (folder / "annotations" / "training" / f"{i:02d}.png").write_bytes(b"")
  return sources.PairsSource(str(folder), "training")


def test_a_broken_label_map_is_a_broken_image(tmp_path):
  """Another example, image and map, takes its place."""
  source, config = _scenes(tmp_path, 3), tiny.config("segment")
  reader = segmentation.LabelMapReader((16, 16), 9, config.data.to_dict(), config.segment.to_dict())
  noted = BadImageTracker(source, 0.1)
  options = dict(rows=np.arange(12), batch_size=12, bad_images=noted)
  (batch,) = pipeline.train_batches(source, reader, total_steps=1, start_step=0, seed=0, **options)
  assert batch["valid"].all() and list(noted.reasons) == [3]
  assert "annotations/training/03.png: the label map cannot be decoded: the file is empty" in noted.reasons[3]
  (batch,) = pipeline.eval_batches(source, reader, **options)
  assert batch["valid"].tolist() == [i != 3 for i in range(12)]
  (place,) = [i for i in range(12) if i != 3 and np.array_equal(batch["image"][i], batch["image"][3])]
  np.testing.assert_array_equal(batch["label_map"][3], batch["label_map"][place])


def test_an_evaluation_leaves_broken_label_maps_out(tmp_path, monkeypatch):
  """One of twelve is left out; two are too many."""
  source, seen = _scenes(tmp_path, 3), []
  objective = Segmentation(tiny.config("segment", **{"data.max_bad": 0.1}), source)
  monkeypatch.setattr(
    objective, "_evaluate_bucket", lambda *args: seen.extend(args[3]) or np.ones((3, 9), int)
  )
  objective.evaluate_images(None, source, None)
  assert sorted(seen) == [i for i in range(12) if i != 3]
  (tmp_path / "images" / "training" / "04.png").write_bytes(b"")
  with pytest.raises(UserError, match=r"2 of 5 examples could not be read \(there are 12\)"):
    objective.evaluate_images(None, source, None)


def test_the_doctor_tolerates_a_broken_label_map(tmp_path):
  """Like a run; but a map of another size is an error."""
  source, config = _scenes(tmp_path, 3), tiny.config("segment")
  reader = segmentation.LabelMapReader((16, 16), 9, config.data.to_dict(), config.segment.to_dict())
  Image.new("L", (8, 8), 1).save(tmp_path / "annotations" / "training" / "04.png")
  run = Stage("", config, tmp_path)
  found = [runs.problem_of(run, source, index, reader) for index in (2, 3, 4)]
  assert found[0] is None and [tolerable for tolerable, _ in found[1:]] == [True, False]


@pytest.mark.slow
def test_examples_left_out_do_not_count(tmp_path):
  """The metrics are those of a set without it."""
  source, mesh = _scenes(tmp_path, 3), sharding.make_mesh(data=1)
  objective = Segmentation(
    tiny.config("segment", **{"segment.resize": (40, 20), "data.max_bad": 0.1}), source
  )
  with jax.set_mesh(mesh):
    variables = objective.init(jax.random.key(0))
    found, rows = objective.evaluate_images(variables, source, mesh)
    for name in ("images", "annotations"):
      (tmp_path / name / "training" / "03.png").unlink()
    rest = sources.PairsSource(str(tmp_path), "training")
    wanted, _ = objective.evaluate_images(variables, rest, mesh)
  assert rows["labelled"].sum() == 11 * 20 * 24 and found == pytest.approx(wanted, abs=1e-6)


def test_an_image_without_its_annotation(tmp_path):
  _pairs(tmp_path, 1)
  (tmp_path / "annotations" / "training" / "a.png").unlink()
  with pytest.raises(UserError, match="a.png: missing; 1 of 1"):
    sources.PairsSource(str(tmp_path), "training")


def test_a_label_map_of_noise_is_named():
  with pytest.raises(BadImage, match="b.png: the label map cannot be decoded"):
    examples.decode_labels(b"nothing", "b.png")
  buffer = io.BytesIO()
  Image.fromarray(np.full((2, 2), 300, np.uint16)).save(buffer, "PNG")
  assert examples.decode_labels(buffer.getvalue(), "c.png").max() == 300
