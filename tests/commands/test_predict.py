"""`python -m beit_jax.predict`: all formats of models but segmenters, image formats, and files that cannot be read."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import beit_jax
from beit_jax.data import images
from beit_jax.data.image_files import find_images, read_image
from beit_jax.models import dvae
from beit_jax.models.beit import Beit, BeitForImageClassification, BeitForMaskedImageModeling
from beit_jax.predict import __main__ as predict
from beit_jax.weights.pretrained import Pretrained
from tests.conftest import ROOT

ENCODER = dict(image_size=(16, 16), patch_size=2, width=32, depth=2, num_heads=2)
PREPROCESSING = dict(
  mean=(0.5,) * 3,
  std=(0.5,) * 3,
  image_size=(16, 16),
  crop_pct=1.0,
  interpolation="bicubic",
  resize="short_side",
)
LABELS = ["disc", "square", "ring"]
ORIENTATION = 0x0112


def _random_model(kind, module, **description):
  """A model with random parameters, large enough for its outputs to differ between images."""
  params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: (rng.normal(size=p.shape) * 0.3).astype(np.float32), params)
  return Pretrained(kind, params, module, PREPROCESSING, description)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
  """Five classes; three of them have names."""
  path = tmp_path_factory.mktemp("classifier") / "model"
  beit_jax.save(
    _random_model("classifier", BeitForImageClassification(ENCODER, 5), labels=LABELS), path, format="orbax"
  )
  return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """16 words, stride 2, 16x16 pixels -> 8x8 tokens."""
  path = tmp_path_factory.mktemp("tokenizer") / "model"
  module = dvae.Dvae(n_hid=8, n_init=8, n_blk_per_group=1, group_count=2, vocab_size=16)
  pixels = {**PREPROCESSING, "mean": (-0.125,) * 3, "std": (1.25,) * 3}
  beit_jax.save(
    dataclasses.replace(_random_model("tokenizer", module), preprocessing=pixels), path, format="orbax"
  )
  return path


def _mim(path, *, vocab_size=16, **description):
  model = _random_model("mim", BeitForMaskedImageModeling(ENCODER, vocab_size), **description)
  beit_jax.save(model, path, format="orbax")
  return path


def _image(seed, height=20, width=30):
  """A smooth image: JPEG changes it little."""
  small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def formats(tmp_path):
  """A folder with one image of every format and mode."""
  folder = tmp_path / "formats"
  (folder / "deeper").mkdir(parents=True)
  image = _image(1)
  image.save(folder / "a.jpg")
  image.convert("CMYK").save(folder / "cmyk.jpg")
  image.convert("L").save(folder / "grey.png")
  image.convert("P").save(folder / "palette.gif")
  Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
  rgba = np.dstack([np.asarray(image), np.full((20, 30), 7, np.uint8)])
  Image.fromarray(rgba).save(folder / "deeper" / "ALPHA.PNG")
  (folder / "notes.txt").write_text("not an image")
  return folder


@pytest.fixture
def broken(tmp_path):
  """A folder of files that cannot be read, and the reason that the command gives for each."""
  folder = tmp_path / "broken"
  folder.mkdir()
  (folder / "empty.png").write_bytes(b"")
  (folder / "text.jpg").write_text("not an image")
  _image(2, 200, 300).save(folder / "cut.jpg")
  whole = (folder / "cut.jpg").read_bytes()
  (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
  Image.new("L", (5000, 2)).save(folder / "thin.png")
  (folder / "gone.png").symlink_to("nowhere.png")
  reasons = {
    "cut.jpg": "truncated",
    "empty.png": "the file is empty",
    "huge.png": "exceeds limit",
    "text.jpg": "not an image",
    "thin.png": "too narrow",
    "gone.png": "No such file",
  }
  return folder, reasons


def _run(capsys, *arguments):
  status = predict.main([str(a) for a in arguments])
  out, err = capsys.readouterr()
  assert "Traceback" not in err
  return status, out, err


def _fails(capsys, facts, *arguments):
  status, out, err = _run(capsys, *arguments)
  assert status == 2 and not out and err.count("error: ") == 1
  for fact in facts:
    assert fact in err, err


def _upright_pixels(path):
  return np.asarray(Image.open(path).convert("RGB"))


def test_classifier_probabilities(classifier, formats, capsys):
  for i in range(5):
    _image(i).save(formats / f"{i}.png")
  status, out, _ = _run(capsys, classifier, *(formats / f"{i}.png" for i in range(5)), "--json", "--top=9")
  assert status == 0
  model, results = beit_jax.load(classifier), json.loads(out)
  expected = jax.nn.softmax(model([_upright_pixels(formats / f"{i}.png") for i in range(5)]))
  assert [r["file"] for r in results] == [str(formats / f"{i}.png") for i in range(5)]
  for result, row in zip(results, np.asarray(expected), strict=True):
    found = result["predictions"]
    assert [p["class"] for p in found] == np.argsort(-row).tolist()  # --top=9 is more than the five classes
    np.testing.assert_allclose([p["probability"] for p in found], np.sort(row)[::-1], atol=1e-5)
    names = {p["class"]: p["label"] for p in found}
    assert names == {0: "disc", 1: "square", 2: "ring", 3: "class 3", 4: "class 4"}
  assert len({tuple(p["class"] for p in r["predictions"]) for r in results}) > 1


def test_csv_has_one_row_for_each_class(classifier, formats, broken, capsys):
  """The same facts as JSON; a file that cannot be read has a row with its error."""
  files = [formats / "a.jpg", broken[0] / "empty.png", formats / "grey.png"]
  status, out, _ = _run(capsys, classifier, *files, "--csv", "--top=2")
  rows = list(csv.DictReader(io.StringIO(out)))
  assert status == 1 and list(rows[0]) == ["file", "class", "label", "probability", "error"]
  results = json.loads(_run(capsys, classifier, *files, "--json", "--top=2")[1])
  assert [row["file"] for row in rows] == [str(files[i]) for i in (0, 0, 1, 2, 2)]
  wanted = [entry for result in results for entry in result.get("predictions", [result])]
  for row, entry in zip(rows, wanted, strict=True):
    assert {key: value for key, value in row.items() if value and key != "file"} == {
      key: str(value) for key, value in entry.items() if key != "file"
    }
  _fails(capsys, ["--csv: not allowed with argument --json"], classifier, files[0], "--json", "--csv")


def test_csv_of_contact_sheets(tokenizer, formats, tmp_path, capsys):
  status, out, _ = _run(capsys, tokenizer, formats / "a.jpg", "--csv", f"--out={tmp_path}")
  (row,) = csv.DictReader(io.StringIO(out))
  assert status == 0 and list(row) == ["file", "mean_absolute_error", "distinct_tokens", "sheet"]


def test_folder_with_all_formats(classifier, formats, capsys):
  status, out, err = _run(capsys, classifier, formats, "--top=2", "--batch_size=4")
  names = ["a.jpg", "cmyk.jpg", "deep.png", "deeper/ALPHA.PNG", "grey.png", "palette.gif"]
  lines = out.splitlines()
  assert status == 0 and "skipped" not in err
  assert lines[::3] == [str(formats / name) for name in names]
  assert all(line.startswith("  ") and "%  " in line for i, line in enumerate(lines) if i % 3)
  grey, deep = (lines[3 * names.index(name) + 1 :][:2] for name in ("grey.png", "deep.png"))
  assert grey == deep


def test_transparency_is_dropped(formats):
  data = (formats / "deeper" / "ALPHA.PNG").read_bytes()
  np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(_image(1)))


def test_patterns_and_duplicates(formats, monkeypatch):
  monkeypatch.chdir(formats)

  def find(*names):
    return [str(path) for path in find_images(list(names))]

  assert find("*.png", "./grey.png", str(formats / "deep.png")) == ["deep.png", "grey.png"]
  assert find("**/*.PNG") == ["deeper/ALPHA.PNG"]
  assert find("a.jpg", "deeper", "**/*a*.*g") == ["a.jpg", "deeper/ALPHA.PNG"]
  (formats / "x[1].png").write_bytes((formats / "grey.png").read_bytes())
  assert find("x[1].png") == ["x[1].png"]
  assert find("notes.txt") == ["notes.txt"]  # named explicitly


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_broken_images_do_not_affect_the_others(batch_size, classifier, formats, broken, capsys):
  folder, reasons = broken
  status, out, err = _run(capsys, classifier, formats, folder, "--json", f"--batch_size={batch_size}")
  results = {r["file"]: r for r in json.loads(out)}
  assert status == 1 and list(results) == [*map(str, find_images([str(formats), str(folder)]))]
  assert sum("predictions" in r for r in results.values()) == 6
  for name in set(reasons) - {"gone.png"}:
    assert reasons[name] in results[str(folder / name)]["error"]
    assert f"skipped {folder / name}: " in err
  alone = json.loads(_run(capsys, classifier, formats / "grey.png", "--json")[1])[0]
  both = [r["predictions"] for r in (alone, results[str(formats / "grey.png")])]
  assert [p["class"] for p in both[0]] == [p["class"] for p in both[1]]
  np.testing.assert_allclose(*([p["probability"] for p in r] for r in both), atol=1e-6)


def test_only_broken_images(classifier, broken, capsys):
  folder, reasons = broken
  status, out, err = _run(capsys, classifier, f"{folder}/*", "--json")
  assert status == 2 and "error: none of the 6 images could be read" in err
  errors = {os.path.basename(r["file"]): r["error"] for r in json.loads(out)}
  assert errors.keys() == reasons.keys()
  for name, reason in reasons.items():
    assert reason in errors[name]


# EXIF orientation -> the transposition that turns an upright image into the stored one.
STORED = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_90,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_270,
}


def _encoded(image, format, orientation, **options):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  buffer = io.BytesIO()
  image.save(buffer, format, exif=exif.tobytes(), **options)
  return buffer.getvalue()


@pytest.mark.parametrize("format", ["png", "tiff", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(format, orientation):
  image = _image(3)
  stored = image.transpose(STORED[orientation])
  options = {"png": {}, "tiff": {}, "webp": dict(lossless=True), "jpeg": dict(quality=100, subsampling=0)}
  found = np.asarray(images.decode(_encoded(stored, format, orientation, **options[format])), np.int32)
  np.testing.assert_allclose(found, np.asarray(image), atol=8 if format == "jpeg" else 0)


def test_prediction_of_a_rotated_image(classifier, tmp_path, capsys):
  image = _image(3)
  image.save(tmp_path / "upright.png")
  (tmp_path / "turned.png").write_bytes(_encoded(image.transpose(STORED[6]), "png", 6))
  image.transpose(STORED[6]).save(tmp_path / "without.png")
  files = (tmp_path / f"{name}.png" for name in ("upright", "turned", "without"))
  upright, turned, without = (
    r["predictions"] for r in json.loads(_run(capsys, classifier, *files, "--json")[1])
  )
  assert upright == turned != without


@pytest.mark.parametrize(
  "exif",
  [
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"Exif\0\0garbage of some length",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(40)),
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x09\0\0\0\xf0",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
    b"Exif\0\0MM\0*\xff\xff\xff\xff",
  ],
)
def test_images_with_damaged_exif_are_read(exif, tmp_path):
  for format in ("jpeg", "png", "webp"):
    _image(3).save(tmp_path / "image", format, exif=exif)
    assert read_image(tmp_path / "image").shape == (20, 30, 3)


def test_exif_text_chunk_that_is_not_hexadecimal():
  text = PngImagePlugin.PngInfo()
  text.add_text("Raw profile type exif", "\nexif\n  8\nnot hexadecimal")
  buffer = io.BytesIO()
  _image(3).save(buffer, "png", pnginfo=text)
  assert images.decode(buffer.getvalue()).shape == (20, 30, 3)


def test_truncated_image_is_an_error():
  data = _encoded(_image(2, 200, 300), "jpeg", 6)
  with pytest.raises(OSError, match="truncated"):
    images.decode(data[: len(data) // 2])


def _sheet(path):
  sheet = np.asarray(Image.open(path))
  assert sheet.ndim == 3 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
  return sheet


def test_tokenizer_draws_reconstructions(tokenizer, tmp_path, capsys):
  paths = [tmp_path / f"{i:02d}.png" for i in range(18)]
  for i, path in enumerate(paths):
    _image(i).save(path)
  (tmp_path / "03.png").write_text("broken")
  out_folder = tmp_path / "a" / "sheets"
  arguments = (tokenizer, tmp_path / "*.png", f"--out={out_folder}", "--batch_size=5")
  status, out, err = _run(capsys, *arguments)
  assert status == 1 and err.count("skipped") == 1
  lines = out.splitlines()
  assert len(lines) == 34 and lines[0] == str(paths[0]) and lines[6] == str(paths[4])
  assert lines[1].endswith(str(out_folder / "reconstructions_001.png"))
  assert lines[-1].endswith(str(out_folder / "reconstructions_002.png"))
  first, second = (_sheet(out_folder / f"reconstructions_00{i}.png") for i in (1, 2))
  assert first.shape[1] > 16 * 96 and second.shape[1] < 2 * 110

  results = [r for r in json.loads(_run(capsys, *arguments, "--json")[1]) if "error" not in r]
  model = beit_jax.load(tokenizer)
  pixels = [_upright_pixels(paths[i]) for i in (0, 17)]
  ids = model.tokenize(pixels)
  shown = np.asarray(model.preprocess(pixels)) * 1.25 - 0.125
  errors = np.abs(np.asarray(model.decode(ids)) - shown).mean((1, 2, 3))
  for result, row, error in zip((results[0], results[-1]), ids, errors, strict=True):
    assert result["distinct_tokens"] == len(set(row.tolist()))
    assert result["mean_absolute_error"] == pytest.approx(error, abs=1e-5)
  assert f"mean absolute error {errors[0]:.4f}, " in lines[1]


def test_tokenizer_without_decoder(tokenizer, formats, tmp_path, capsys, monkeypatch):
  loaded = beit_jax.load(tokenizer)
  half = dataclasses.replace(loaded, params={"encoder": loaded.params["encoder"]})
  monkeypatch.setattr(predict.weights_io, "load", lambda path, **_: half)
  status, out, err = _run(capsys, "encoder.pkl", formats / "a.jpg", "--json", f"--out={tmp_path / 'out'}")
  assert status == 0 and list(json.loads(out)[0]) == ["file", "distinct_tokens"]
  assert "tokens are not drawn: it was loaded without its decoder; load a folder with both" in err
  assert not (tmp_path / "out").exists()


def test_masked_image_model_predicts_masked_tokens(tokenizer, formats, tmp_path, capsys):
  loaded = beit_jax.load(tokenizer)
  recorded = {name: loaded.description[name] for name in ("path", "sha256")}
  model = _mim(tmp_path / "mim", tokenizer=recorded)
  out_folder = tmp_path / "sheets"
  status, out, err = _run(capsys, model, formats, f"--out={out_folder}")
  assert status == 0 and "other weights" not in err
  lines = out.splitlines()
  assert len(lines) == 12 and lines[0] == str(formats / "a.jpg")
  assert all("masked patches 25, tokens right " in line for line in lines[1::2])
  sheet = _sheet(out_folder / "masked_image_modelling_001.png")
  rows = [
    sheet[y : y + 96, 4:100].astype(float) for y in (20, 136, 252, 368)
  ]  # the column of the first image
  assert (rows[1] == 128).all(-1).mean() == 25 / 64 and not (rows[0] == 128).all(-1).any()
  different = (rows[2] != rows[3]).any(-1)
  assert different[~(rows[1] == 128).all(-1)].mean() < different.mean() > 0.1
  # The same with --tokenizer: masks depend on the position of the file only.
  second = _run(capsys, model, formats, f"--out={out_folder}", f"--tokenizer={tokenizer}")
  assert second[:2] == (0, out)
  np.testing.assert_array_equal(_sheet(out_folder / "masked_image_modelling_001.png"), sheet)


def test_masks_do_not_depend_on_broken_images(tokenizer_run, formats, tmp_path, capsys):
  path = beit_jax.load(tokenizer_run).description["path"]  # as a pre-training run records it
  model = _mim(tmp_path / "mim", tokenizer={"path": path, "sha256": "0" * 64})
  arguments = (model, formats, f"--out={tmp_path / 'sheets'}", "--json", "--batch_size=2")
  status, out, err = _run(capsys, *arguments)
  assert status == 0 and "not the tokenizer that the model was trained with" in err
  first = json.loads(out)
  (formats / "cmyk.jpg").write_text("broken")
  second = json.loads(_run(capsys, *arguments)[1])
  assert "error" in second[1] and second[2:] == first[2:] and second[0] == first[0]


def test_unsuitable_tokenizers(tokenizer, classifier, formats, tmp_path, capsys):
  nowhere = _mim(tmp_path / "nowhere", tokenizer={"path": str(tmp_path / "deleted")})
  _fails(capsys, ["deleted", "no longer exists", "--tokenizer=PATH"], nowhere, formats)
  unnamed = _mim(tmp_path / "unnamed")
  _fails(capsys, ["does not say where its tokenizer is", "--tokenizer=PATH"], unnamed, formats)
  _fails(capsys, ["no such file"], unnamed, formats, "--tokenizer=missing")
  _fails(capsys, ["is a classifier, not a tokenizer"], unnamed, formats, f"--tokenizer={classifier}")
  words = _mim(tmp_path / "words", vocab_size=32, tokenizer={"path": str(tokenizer)})
  _fails(capsys, ["16 words", "predicts 32"], words, formats)
  _fails(capsys, ["--tokenizer", "a classifier"], classifier, formats, f"--tokenizer={tokenizer}")


def test_backbone_has_no_output_to_show(formats, tmp_path, capsys):
  beit_jax.save(_random_model("backbone", Beit(**ENCODER)), tmp_path / "model", format="orbax")
  _fails(capsys, ["no output to show", "fine-tune", "beit_jax.load"], tmp_path / "model", formats)


@pytest.mark.parametrize(
  ("arguments", "facts"),
  [
    (["nowhere.jpg"], ["'nowhere.jpg'", "no such file"]),
    (["formats", "formats/*.bmp"], ["formats/*.bmp'", "no match"]),
    ([""], ["''"]),
    (["void"], ["void: no images in this folder", ".jpeg"]),
    (["formats", "--top=0"], ["--top: '0'", "from 1"]),
    (["formats", "--batch_size=-1"], ["--batch_size: '-1'", "from 1"]),
    (["formats", "--ema"], ["no averaged weights"]),
  ],
)
def test_mistakes(arguments, facts, classifier, formats, capsys, monkeypatch):
  monkeypatch.chdir(formats.parent)
  (formats.parent / "void").mkdir()
  _fails(capsys, facts, classifier, *arguments)


def test_more_mistakes(tokenizer, formats, capsys, tmp_path):
  _fails(capsys, ["no such file"], tmp_path / "nothing", formats)
  (tmp_path / "file").write_text("")
  status, _, err = _run(capsys, tokenizer, formats, f"--out={tmp_path / 'file'}")
  assert status == 2 and "error: --out: " in err
  _fails(
    capsys,
    ["unrecognized arguments: --frobnicate", "usage: python -m"],
    "checkpoint",
    "image",
    "--frobnicate",
  )


def test_the_command(classifier, formats):
  """Standard output holds nothing but JSON; a mistake gives one line on standard error."""
  command = [sys.executable, "-m", "beit_jax.predict", str(classifier)]
  options = dict(cwd=ROOT, capture_output=True, text=True, timeout=600)
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  (formats / "broken.png").write_text("broken")
  done = subprocess.run([*command, str(formats), "--json", "--top=1"], env=env, **options)
  assert done.returncode == 1, done.stderr
  assert len(json.loads(done.stdout)) == 7 and done.stderr.count("skipped") == 1
  assert "Traceback" not in done.stderr
  done = subprocess.run([*command, "no/such.jpg"], env=env, **options)
  assert done.returncode == 2 and done.stderr.startswith("error: 'no/such.jpg'")
  assert done.stderr.count("\n") == 1 and not done.stdout
