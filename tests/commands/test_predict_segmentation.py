"""`python -m beit_jax.predict` with a segmenter: class maps against a NumPy loop, overlays, palettes, mistakes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.data import drawing, examples, shapes, sources
from beit_jax.data.image_files import find_images
from beit_jax.errors import UserError
from beit_jax.models.upernet import BeitForSemanticSegmentation
from beit_jax.objectives import Segmentation, sliding
from beit_jax.predict import __main__ as predict
from beit_jax.predict import class_maps
from beit_jax.weights.pretrained import Pretrained
from tests import tiny

ENCODER = dict(image_size=(16, 16), patch_size=4, width=32, depth=4, num_heads=2)
COLORS = [[250, 0, 10 * i] for i in range(7)]
SIZES = {
  "a.png": (24, 24),
  "b.png": (12, 40),
  "deeper/c.png": (50, 31),
  "deeper/a.png": (9, 13),
  "z.png": (90, 70),
}
RULE = dict(resize=(40, 20), stride=(6, 8))


def _bilinear(x, size):
  """Resizes [h, w, C] to [H, W, C] with half-pixel centers, one axis after the other."""
  for axis, target in enumerate(size):
    source = x.shape[axis]
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    weight = (at - np.floor(at)).reshape([-1 if i == axis else 1 for i in range(3)])
    lower = np.floor(at).astype(int)
    x = np.take(x, lower, axis) * (1 - weight) + np.take(x, np.minimum(lower + 1, source - 1), axis) * weight
  return x


def _reference(model, forward, image, *, resize, stride):
  """Segments one image in NumPy: resize, average the logits of the windows, resize back, argmax."""
  height, width = image.shape[:2]
  factor = min(max(resize) / max(height, width), min(resize) / min(height, width))
  size = [int(side * factor + 0.5) for side in (height, width)]
  if min(size) < 16:
    size = [-(-side * 16 // min(size)) for side in size]
  pixels = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)) / 255.0
  pixels = (pixels - 0.5) / 0.25
  total, count = np.zeros((*size, 7)), np.zeros((*size, 1))
  for top, bottom, left, right in sliding.windows(size, (16, 16), stride):
    logits = np.asarray(forward(pixels[None, top:bottom, left:right].astype(np.float32)))[0]
    total[top:bottom, left:right] += _bilinear(logits.astype(np.float64), (16, 16))
    count[top:bottom, left:right] += 1
  scores = np.sort(_bilinear(total / count, (height, width)), -1)
  return _bilinear(total / count, (height, width)).argmax(-1), scores[..., -1] - scores[..., -2]


@pytest.fixture(scope="module")
def model():
  """Seven classes with random parameters and statistics, so that most classes occur in some image."""
  module = BeitForSemanticSegmentation(
    ENCODER, num_classes=7, out_indices=(0, 1, 2, 3), channels=8, aux_channels=8
  )
  made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rng = np.random.default_rng(3)

  def draw(x):
    return (rng.normal(size=x.shape) * 0.3).astype(np.float32)

  params = jax.tree.map(draw, made["params"])
  params["decode_head"]["conv_seg"]["kernel"] *= 20
  preprocessing = dict(
    **dict(mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(16, 16), crop_pct=1.0, interpolation="bicubic"),
    **dict(resize="short_side", sliding=dict(mode="slide", **RULE)),
  )
  description = dict(labels=["sky", "road", "a name\nof two lines"], palette=COLORS)
  stats = jax.tree.map(lambda x: abs(draw(x)) + 0.5, made["batch_stats"])
  return Pretrained("segmenter", params, module, preprocessing, description, {"batch_stats": stats})


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("segmenter") / "model"
  beit_jax.save(model, path, format="orbax")
  return path


def _image(seed, size):
  small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  return Image.fromarray(small).resize(size[::-1], Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Five images of different sizes, and a text file with the name of an image."""
  folder = tmp_path_factory.mktemp("images")
  (folder / "deeper").mkdir()
  for i, (name, size) in enumerate(SIZES.items()):
    _image(i, size).save(folder / name)
  (folder / "broken.png").write_text("not an image")
  return folder


@pytest.fixture(scope="module")
def results(checkpoint, folder, tmp_path_factory):
  """The JSON output of the command for the folder, and the folder that it wrote to."""
  out = tmp_path_factory.mktemp("out") / "new" / "folder"
  with pytest.MonkeyPatch.context() as patch:
    lines = []
    patch.setattr(class_maps, "BUCKETS", 2)
    patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(texts)))
    status = predict.main([str(checkpoint), str(folder), "--json", f"--out={out}"])
  found = json.loads(lines[0])
  assert status == 1 and len(lines) == 1
  assert [r["file"] for r in found] == [*map(str, find_images([str(folder)]))]
  return {str(r["file"]).removeprefix(f"{folder}/"): r for r in found}, out


def test_class_maps_match_a_plain_loop(model, folder, results):
  forward = jax.jit(lambda x: model.module.apply({"params": model.params, **model.collections}, x)["logits"])
  seen = set()
  for name, size in SIZES.items():
    found = np.asarray(Image.open(results[0][name]["class_map"]))
    wanted, margin = _reference(model, forward, np.asarray(Image.open(folder / name)), **RULE)
    assert found.shape == size == tuple(results[0][name]["size"])
    np.testing.assert_array_equal(found[margin > 1e-3], wanted[margin > 1e-3])
    assert (margin > 1e-3).mean() > 0.98
    seen |= set(np.unique(found).tolist())
  assert len(seen) >= 4


def test_class_maps_are_8_bit_palette_pngs(results):
  for name in SIZES:
    path = results[0][name]["class_map"]
    assert Path(path).read_bytes()[24:26] == bytes([8, 3])  # bit depth 8, color type palette
    image = Image.open(path)
    assert image.mode == "P" and np.reshape(image.getpalette(), (-1, 3))[:7].tolist() == COLORS
    labels = examples.decode_labels(Path(path).read_bytes(), name)  # readable as an annotation
    np.testing.assert_array_equal(labels, np.asarray(image))


def test_shares_and_names(results):
  for name in SIZES:
    facts = results[0][name]
    values, counts = np.unique(np.asarray(Image.open(facts["class_map"])), return_counts=True)
    found = {entry["class"]: entry["share"] for entry in facts["classes"]}
    assert found == dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    names = ["sky", "road", "a name of two lines", "class 3", "class 4", "class 5", "class 6"]
    assert all(entry["label"] == names[entry["class"]] for entry in facts["classes"])
  assert "not an image" in results[0]["broken.png"]["error"]


def test_overlays_have_a_legend(folder, results):
  """Below the blended image, every class that occurs has a square of exactly its color."""
  for name, (height, width) in SIZES.items():
    facts = results[0][name]
    sheet = np.asarray(Image.open(facts["overlay"]))
    factor = -(-320 // max(height, width))
    below = sheet[height * factor :]
    for entry in facts["classes"]:
      assert (below == COLORS[entry["class"]]).all(-1).sum() >= 100
    others = [COLORS[c] for c in range(7) if c not in {entry["class"] for entry in facts["classes"]}]
    assert not any((below == color).all(-1).any() for color in others)
    assert (below < 100).all(-1).sum() > 50 * len(facts["classes"])  # text
    left = (sheet.shape[1] - width * factor) // 2
    shown = sheet[: height * factor, left : left + width * factor][
      factor // 2 :: factor, factor // 2 :: factor
    ]
    table = np.array(COLORS)[np.asarray(Image.open(facts["class_map"]))]
    mixed = 0.4 * np.asarray(Image.open(folder / name)) + 0.6 * table
    np.testing.assert_allclose(shown, mixed, atol=0.51)


def test_output_paths(results):
  for name in SIZES:
    assert results[0][name]["overlay"] == str(results[1] / "overlays" / name)
    assert results[0][name]["class_map"] == str(results[1] / "class_maps" / name)


def test_text(results):
  lines = predict.as_text(results[0]["b.png"]).splitlines()[1:]
  classes = results[0]["b.png"]["classes"]
  assert [line.split(maxsplit=1)[0] for line in lines[:-1]] == [f"{entry['share']:.2%}" for entry in classes]
  assert lines[-1] == f"  overlay {results[1]}/overlays/b.png, class map {results[1]}/class_maps/b.png"


def test_colliding_output_names(tmp_path):

  def names(*files):
    return [str(name) for name in class_maps.output_names([tmp_path / file for file in files], tmp_path)]

  assert names("x/a.jpg", "x/a.png", "x/a_2.jpg") == ["a.png", "a_2.png", "a_2_2.png"]
  assert names("x/a.jpg", "x/y/a.png") == ["a.png", "y/a.png"]
  with pytest.raises(UserError, match="would overwrite"):
    names("class_maps/a.png")


def test_mistakes(checkpoint, folder, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  image = str(folder / "a.png")
  for arguments, fact in (
    ([image, f"--out={tmp_path / 'file'}"], "--out: "),
    ([image, f"--tokenizer={checkpoint}"], "this is a segmenter"),
    ([str(folder / "broken.png")], "none of the 1 images could be read"),
  ):
    assert predict.main([str(checkpoint), *arguments]) == 2
    assert fact in capsys.readouterr().err


def test_too_narrow_image(model, tmp_path):
  for width in (320, 340):
    Image.new("RGB", (width, 20)).save(tmp_path / f"{width}.png")
  assert class_maps.read(tmp_path / "320.png", class_maps.make_sliding(model)).shape == (20, 320, 3)
  with pytest.raises(ValueError, match="340x20 pixels is too narrow"):
    class_maps.read(tmp_path / "340.png", class_maps.make_sliding(model))


def test_few_programs_for_many_sizes(model):
  """40 sizes share four geometries; wide and tall images do not share a canvas that is both."""
  sliding, rng = class_maps.make_sliding(model), np.random.default_rng(0)
  sizes = [tuple(map(int, rng.integers(100, 200, 2))) for _ in range(40)]
  found = class_maps.geometries(sliding, sizes)
  assert len(set(found)) == 4
  for size, geometry in zip(sizes, found, strict=True):
    resized = sliding.resized(size)
    assert all(np.array(geometry.shape) >= size) and all(np.array(geometry.canvas) >= resized)
    assert geometry.num_windows >= len(sliding.windows(resized))
  sizes = [(20, 20 * i) for i in range(8, 14)] + [(20 * i, 20) for i in range(8, 14)]
  canvases = [geometry.canvas for geometry in class_maps.geometries(sliding, sizes)]
  assert all(min(canvas) < 60 for canvas in canvases)


@pytest.mark.parametrize("side, stride", [(512, 341), (640, 426)])
def test_default_windows_are_those_of_the_released_models(model, side, stride):
  without = {k: v for k, v in model.preprocessing.items() if k != "sliding"} | {"image_size": (side, side)}
  found = class_maps.make_sliding(dataclasses.replace(model, preprocessing=without))
  assert (found.mode, found.stride, found.resize) == ("slide", (stride, stride), (4 * side, side))


@pytest.mark.parametrize(
  "described", [{"stride": 0}, {"stride": [0, 1]}, {"resize": ["x", 1]}, {"mode": "fly"}, 3]
)
def test_invalid_windows_in_a_checkpoint(model, described):
  damaged = dataclasses.replace(model, preprocessing={**model.preprocessing, "sliding": described})
  with pytest.raises(UserError, match="sliding="):
    class_maps.make_sliding(damaged)


def test_generated_colors_without_a_palette(model):
  for palette in ([], None, [[1, 2, 3]], [[1, 2]] * 7, "nothing"):
    other = dataclasses.replace(model, description={"palette": palette})
    np.testing.assert_array_equal(class_maps.class_colors(other), drawing.palette(7))
  assert class_maps.class_names(other) == [f"class {i}" for i in range(7)]


def test_generated_colors_differ():
  assert len(np.unique(drawing.palette(256), axis=0)) == 256
  np.testing.assert_array_equal(drawing.palette(256)[:150], drawing.palette(150))
  few = drawing.palette(20).astype(float)
  distance = np.abs(few[:, None] - few).max(-1) + 255 * np.eye(20)
  assert distance.min() >= 60  # in the channel where two colors differ most


def test_known_palette():
  found = drawing.class_colors("camvid", 11)
  assert found[0].tolist() == [128, 128, 128] and found[10].tolist() == [0, 128, 192]


def test_runs_describe_what_prediction_needs():
  options = {"segment.class_names": tuple("abcdefghi"), "segment.palette": tuple((i, 2, 3) for i in range(9))}
  described = json.loads(json.dumps(_segment(**options).describe()))
  assert described["labels"] == list("abcdefghi") and described["palette"][8] == [8, 2, 3]
  assert described["preprocessing"]["sliding"] == dict(mode="slide", resize=[24, 24], stride=[8, 8])
  objective = _segment()
  assert objective.describe()["labels"] == ["background", *shapes.KINDS]
  assert objective.describe()["palette"] == []
  loaded = Pretrained("segmenter", {}, objective.module, objective.describe()["preprocessing"])
  assert class_maps.make_sliding(loaded) == objective.sliding


def _segment(**changes):
  return Segmentation(tiny.config("segment", **changes), sources.ShapesSource("train", 8, 16))


@pytest.mark.parametrize(
  "changes, facts",
  [
    ({"segment.class_names": ("a", "b")}, ("segment.class_names", "2 names", "9 classes")),
    ({"segment.class_names": tuple(range(9))}, ("segment.class_names", "name for each")),
    ({"segment.palette": "camvid"}, ("segment.palette", "11 colors for 9 classes")),
    ({"segment.palette": "camvit"}, ("segment.palette", "'camvit' is unknown", "'camvid'")),
    ({"segment.palette": ((1, 2, 300),) * 9}, ("segment.palette", "(1, 2, 300)", "0 to 255")),
    ({"segment.palette": 3}, ("segment.palette", "must be of type str or tuple", "3 (int)")),
  ],
)
def test_invalid_names_and_colors(changes, facts):
  with pytest.raises(UserError) as error:
    _segment(**changes)
  assert all(fact in str(error.value) for fact in facts), error.value
