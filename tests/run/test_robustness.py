"""A run keeps its results despite NaN, bad images, bad checkpoints, another recipe, a second run and disk errors."""

import errno
import io
import json
import logging
import pathlib
import shutil
import struct
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import evaluate, train, trees
from beit_jax.data import bad_images, examples, images, pipeline, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage, UserError
from beit_jax.objectives import Classification
from beit_jax.run import checkpoint, files, record
from beit_jax.run.checkpointer import Checkpointer
from beit_jax.run.metric_writer import MetricWriter
from beit_jax.runtime import lock, logs, sharding
from tests import tiny
from tests.conftest import ROOT

# A save that fails leaves Orbax's event loop and threads to the garbage collector, which warns at any later time.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def _rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _params(workdir, step=None):
  return trees.flatten(checkpoint.load_params(checkpoint.find(workdir, step)))


def _config(**changes):
  return tiny.config(
    "classify", **{"total_steps": 6, "checkpoint.every_steps": 1, "checkpoint.keep": 99, **changes}
  )


# Steps that are not finite.


def inject_nan(monkeypatch, where, steps):
  """Puts NaN into the loss, the gradient or the batch at `steps` (numbers of updates made before)."""
  original = Classification.loss

  def loss(self, variables, frozen, batch, key, step):
    bad = jnp.isin(step, jnp.array(steps))
    if where == "batch":
      batch = {**batch, "image": jnp.where(bad, jnp.nan, batch["image"].astype(jnp.float32))}
    output = original(self, variables, frozen, batch, key, step)
    total = output.metrics["loss"].total
    if where == "loss":
      total = jnp.where(bad, jnp.nan, total)
    if where == "gradient":  # the derivative of sqrt at 0 is infinite, and infinity times 0 is NaN
      leaf = variables["params"]["head"]["kernel"]
      total = total + jnp.sqrt(jnp.where(bad, jnp.sum(leaf * 0.0), 1.0)) - jnp.where(bad, 0.0, 1.0)
    return output._replace(metrics={**output.metrics, "loss": output.metrics["loss"]._replace(total=total)})

  monkeypatch.setattr(Classification, "loss", loss)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "where", ["loss", pytest.param("gradient", marks=SLOW), pytest.param("batch", marks=SLOW)]
)
def test_a_step_that_is_not_finite_is_skipped(where, monkeypatch, tmp_path):
  inject_nan(monkeypatch, where, [2])
  result = train.run(_config(total_steps=4, **{"optimizer.ema_decay": 0.5}), tmp_path)
  assert result["skipped_steps"] == 1 and result["step"] == 4
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows if "skipped_step" in row] == [3]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4]
  assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
  before, after, later = (_params(tmp_path, step) for step in (2, 3, 4))
  assert all(np.array_equal(before[name], after[name]) for name in before)
  assert not all(np.array_equal(before[name], later[name]) for name in before)
  rest = [trees.flatten(checkpoint.load_params(checkpoint.find(tmp_path, step), "rest")) for step in (2, 3)]
  differ = [name for name in rest[0] if not np.array_equal(rest[0][name], rest[1][name])]
  assert differ == ["step"]
  averages = [
    trees.flatten(checkpoint.load_params(checkpoint.find(tmp_path, step), "ema")) for step in (2, 3)
  ]
  assert all(np.array_equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_five_bad_steps_in_a_row_stop_the_run_and_save_the_batch(monkeypatch, tmp_path):
  inject_nan(monkeypatch, "loss", [1, 3, 4, 5, 6, 7])
  with pytest.raises(UserError) as error:
    train.run(_config(total_steps=20, **{"checkpoint.every_steps": 2}), tmp_path)
  for fact in ("5 steps in a row", "bad_batch_8.npz", "optimizer.learning_rate"):
    assert fact in str(error.value)
  batch = np.load(tmp_path / "bad_batch_8.npz")
  assert batch["image"].shape == (16, 16, 16, 3) and batch["example_key"].shape == (16, 2)
  assert record.count(tmp_path, "skipped_step") == 6
  assert max(checkpoint.steps(tmp_path / "checkpoints")) == 6


# Bad images.


def _png(seed, size=(24, 20)):
  buffer = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def _bomb(side=50_000):
  """A PNG whose header claims side x side pixels."""
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _jpeg(seed):
  buffer = io.BytesIO()
  Image.open(io.BytesIO(_png(seed, (64, 64)))).save(buffer, "JPEG")
  return buffer.getvalue()


BROKEN = {
  "empty": b"",
  "text": b"<html>404</html>",
  "truncated_png": _png(0)[:300],
  "truncated_jpeg": _jpeg(0)[:700],
  "header_only": _png(0)[:20],
  "flipped": _png(0)[:60] + bytes(b ^ 0xFF for b in _png(0)[60:200]) + _png(0)[200:],
  "bomb": _bomb(),
  "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
  "zeros": bytes(4096),
  "noise": np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8).tobytes(),
}


def _folder(root, count, broken):
  for i in range(count):
    folder = root / "train" / "ab"[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i:04d}.png").write_bytes(broken.get(i) if i in broken else _png(i))
  return {"data.source": "folder", "data.root": str(root), "data.num_examples": 8192, "eval.split": "train"}


@pytest.mark.slow
def test_a_run_trains_with_two_percent_of_broken_images(tmp_path, caplog):
  """Ten kinds of damage: counted, left out of the evaluation, and the same result with data workers to the bit."""
  broken = dict(zip(range(7, 500, 50), BROKEN.values(), strict=True))
  changes = _folder(tmp_path / "data", 500, broken)
  results = []
  for name, workers in (("one", 0), ("two", 2)):
    config = _config(total_steps=32, **{**changes, "data.workers": workers, "checkpoint.every_steps": None})
    results.append(train.run(config, tmp_path / name))
    known = [json.loads(line) for line in (tmp_path / name / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in known) == sorted(
      i // 2 if i % 2 == 0 else 250 + i // 2 for i in broken
    )
    assert all(".png" in row["reason"] for row in known)
  assert [result["bad_images"] for result in results] == [10, 10]
  assert results[0]["eval"] == results[1]["eval"]
  one, two = (_params(tmp_path / name) for name in ("one", "two"))
  assert all(np.array_equal(one[name], two[name]) for name in one)
  assert "0007.png cannot be decoded: the file is empty" in caplog.text


def test_half_of_the_images_being_broken_stops_the_run(tmp_path):
  changes = _folder(tmp_path / "data", 200, {i: b"no image" for i in range(0, 200, 2)})
  with pytest.raises(UserError) as error:
    train.run(_config(total_steps=32, **changes), tmp_path / "run")
  for fact in ("examples could not be read", "data.max_bad=0.05", "data/train/a/0", "bad_images.jsonl"):
    assert fact in str(error.value)


def test_a_broken_image_is_replaced_by_another(tmp_path):
  changes = _folder(tmp_path, 8, {2: b""})
  source = sources.FolderSource(changes["data.root"], "train", "")  # a: 0 2 4 6, b: 1 3 5 7
  reader = ViewReader({"image": ((16, 16), "bicubic")}, tiny.config("classify").data.to_dict())
  seen = bad_images.BadImageTracker(source, 1.0)
  options = dict(rows=np.arange(8), batch_size=8)
  batch = next(pipeline.eval_batches(source, reader, bad_images=seen, **options))
  assert batch["valid"].tolist() == [True, False] + [True] * 6 and list(seen.reasons) == [1]
  assert sum(np.array_equal(batch["image"][1], batch["image"][i]) for i in range(8)) == 2
  with pytest.raises(BadImage, match="0002.png"):
    next(pipeline.eval_batches(source, reader, **options))


class _GrayImages(sources.Source):
  """A source of `count` gray images that raises the error which `fault` returns for an index, if any."""

  description: dict = {}

  def __init__(self, count, fault=lambda index: None):
    self._count, self._fault = count, fault

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    error = self._fault(index)
    if error is not None:
      raise error
    return {"image": np.full((8, 8, 3), index % 256, np.uint8)}


def _broken(indices):
  return lambda index: BadImage(f"{index} is broken") if index in indices else None


def _examples_until_stop(source, order, batch_size=16, **options):
  """Returns the number of examples read until the tracker stops the run, or None if it never does."""
  tracker = bad_images.BadImageTracker(source, 0.05, **options)
  bad = np.array([source._fault(int(index)) is not None for index in order])
  for start in range(0, len(order), batch_size):
    part = np.s_[start : start + batch_size]
    try:
      tracker.update(order[part], bad[part])
    except UserError:
      return start + batch_size
  return None


@pytest.fixture
def quiet(monkeypatch):
  monkeypatch.setattr(bad_images, "read_error", lambda *_: "broken")


@pytest.mark.parametrize("share, batch_size", [(0.02, 16), (0.04, 16), (0.04, 64)])
def test_a_share_below_the_limit_does_not_stop_the_run(share, batch_size, quiet):
  """The run sees 20,000 examples of a much larger data set."""
  for seed in range(100):
    rng = np.random.default_rng(seed)
    bad = rng.random(20_000) < share
    source = _GrayImages(10**6, lambda index, bad=bad: bad[index] or None)
    assert _examples_until_stop(source, np.arange(20_000), batch_size) is None, seed


def test_a_share_above_the_limit_soon_stops_the_run(quiet):
  for seed in range(20):
    bad = np.random.default_rng(seed).random(20_000)
    for share, soon in ((0.5, 48), (0.1, 2000), (0.07, 10_000)):
      source = _GrayImages(10**6, lambda index, share=share, bad=bad: bad[index] < share or None)
      seen = _examples_until_stop(source, np.arange(20_000))
      assert seen is not None and seen <= soon, (seed, share)


def test_the_limit_applies_to_the_whole_of_a_small_data_set(quiet):
  """Five of 100 examples may be bad, in every epoch, in any order and from any resumed position."""
  for seed in range(100):
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(100) for _ in range(8)])[rng.integers(100) :]
    some = set(rng.choice(100, 50, replace=False).tolist())
    few = set(list(some)[:5])
    assert _examples_until_stop(_GrayImages(100, _broken(few)), order) is None, seed
    assert _examples_until_stop(_GrayImages(100, _broken(few | {min(set(range(100)) - few)})), order) <= 224
    assert _examples_until_stop(_GrayImages(100, _broken(some)), order) <= 48


def test_transient_errors_do_not_add_up(quiet):
  """Two different examples of 100 fail in each of fifty epochs."""
  source, rng = _GrayImages(100), np.random.default_rng(0)
  tracker = bad_images.BadImageTracker(source, 0.05)
  for epoch in range(50):
    order = rng.permutation(100)
    bad = np.isin(order, (np.arange(2) + 2 * epoch) % 100)
    for start in range(0, 100, 20):
      tracker.update(order[start : start + 20], bad[start : start + 20])
  assert len(tracker.reasons) == 100 and tracker.count <= 4


@pytest.mark.parametrize("count", [7, 35, 36])
def test_evaluation_compares_a_broken_folder_with_the_whole_set(count, tmp_path):
  """An evaluation reads in order. Its first folder is broken: 1 % or 5 % of 700 examples pass, more is an error."""
  config = _config(**{"eval.batch_size": 16})
  source, mesh = _GrayImages(700, _broken(range(count))), sharding.make_mesh(1, 1)
  reader = ViewReader({"image": ((8, 8), "bicubic")}, config.data.to_dict())
  objective = type("Objective", (), {"reader": lambda self: reader})()
  batches = evaluate.eval_batches(config, objective, source, mesh, 16)
  if count <= 35:
    assert sum(int(batch["valid"].sum()) for batch in batches) == 700 - count
    return
  with pytest.raises(UserError) as error:
    list(batches)
  for fact in ("36 of 48 examples could not be read (there are 700)", "data.max_bad=0.05", "0 is broken"):
    assert fact in str(error.value)


def test_bad_examples_of_all_processes_are_summed():
  tracker = bad_images.BadImageTracker(_GrayImages(700, _broken({3})), 0.05, shuffled=False)
  tracker.update(np.arange(350), np.arange(350) == 3)
  tracker.check(35)
  for known in (tracker, bad_images.BadImageTracker(_GrayImages(700), 0.05, shuffled=False)):
    with pytest.raises(UserError, match="36 of 700 examples could not be read"):
      known.check(36)


def test_a_file_is_read_again_before_it_counts_as_broken(monkeypatch):
  """Errors of network mounts may be transient and are retried; a missing file is not retried."""
  monkeypatch.setattr(examples, "PAUSES", (0.0, 0.0))
  asked = []

  def fault(index):
    asked.append(index)
    if index == 1:
      return FileNotFoundError(2, "gone")
    return OSError(5, "I/O error") if index == 2 and asked.count(2) < 3 else None

  source = _GrayImages(4, fault)
  reader = ViewReader({"image": ((8, 8), "bicubic")}, tiny.config("classify").data.to_dict())
  tracker = bad_images.BadImageTracker(source, 1.0)
  batch = next(pipeline.eval_batches(source, reader, rows=np.arange(4), batch_size=4, bad_images=tracker))
  assert batch["valid"].tolist() == [True, False, True, True] and list(tracker.reasons) == [1]
  assert asked.count(2) >= 3 and asked[:3] == [0, 1, asked[2]] and asked[2] != 1


TFDS = ROOT.parent / "shared" / "data" / "tfds"


@pytest.mark.skipif(not (TFDS / "cifar10").is_dir(), reason="no prepared CIFAR-10 beside the repository")
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_record_file_is_named(damage, tmp_path):
  """ArrayRecord verifies checksums; its errors become a UserError."""
  shutil.copytree(TFDS / "cifar10", tmp_path / "cifar10", ignore=shutil.ignore_patterns("*train*"))
  (path,) = (tmp_path / "cifar10").rglob("*test.array_record*")
  data = bytearray(path.read_bytes())
  if damage == "cut":
    del data[1_000_000:]
  else:  # damages one record in twenty-five and leaves the index at the end intact
    for at in range(100_000, len(data) - 200_000, 20_000):
      data[at] ^= 0xFF
  path.chmod(0o600)
  path.unlink()
  path.write_bytes(data)
  changes = {
    "data.source": "tfds",
    "data.name": "cifar10",
    "data.data_dir": str(tmp_path),
    "data.split": "test",
  }
  config = _config(**changes, **{"data.max_bad": 0.01, "eval.split": "", "total_steps": 40})
  with pytest.raises(UserError) as error:
    train.run(config, tmp_path / "run")
  for fact in ("cifar10", "cannot be read: Corrupted", "copy or build the data set again"):
    assert fact in str(error.value)


def test_a_data_set_of_only_broken_images_stops_the_run(tmp_path):
  changes = _folder(tmp_path, 6, {i: b"" for i in range(6)})
  with pytest.raises(UserError, match="nor could any"):
    train.run(_config(**{**changes, "batch_size": 6, "mesh.data": 1}), tmp_path / "run")


def test_the_size_is_checked_before_decoding():
  with pytest.raises(Image.DecompressionBombError):
    images.decode(BROKEN["bomb"])
  with pytest.raises(ValueError, match="9000x9000 pixels are more than 67,108,864"):
    images.decode(_bomb(9000))


def test_max_bad_must_be_a_share(tmp_path):
  with pytest.raises(UserError, match="data.max_bad"):
    train.run(_config(**{"data.max_bad": 2.0}), tmp_path)


# Checkpoints.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("robust") / "run"
  train.run(_config(), workdir)
  return workdir


def _cases(path, rng):
  """Yields damaged contents of a file (longer, truncated, flipped bits, missing bytes); None deletes it."""
  data = path.read_bytes()
  yield None
  yield data + b"\0"
  for size in {0, len(data) // 2, max(len(data) - 1, 0)}:
    if size < len(data):
      yield data[:size]
  for _ in range(8):
    if data:
      at = int(rng.integers(len(data)))
      yield data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
      end = min(at + int(rng.integers(1, 64)), len(data))
      yield data[:at] + data[end:]


def _same_json(one, other):
  try:
    return json.loads(one) == json.loads(other)
  except ValueError:
    return False


def test_every_damage_falls_back_to_the_previous_checkpoint(run, tmp_path):
  """In over 200 cases, the damaged newest checkpoint is not restored, and the run does not restart."""
  rng, count = np.random.default_rng(0), 0
  workdir = tmp_path / "run"
  shutil.copytree(run, workdir)
  newest = workdir / "checkpoints" / "6"
  for path in sorted(p for p in newest.rglob("*") if p.is_file()):
    original = path.read_bytes()
    for case in _cases(path, rng):
      if case == original or (path.name == "digest.json" and case and _same_json(case, original)):
        continue
      path.unlink() if case is None else path.write_bytes(case)
      assert checkpoint.fault(newest) is not None, (path, case)
      assert checkpoint.find(workdir).name == "5", (path, case)
      path.write_bytes(original)
      count += 1
  assert count >= 200
  assert checkpoint.find(workdir).name == "6"


def test_a_run_without_a_good_checkpoint_does_not_restart(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run, workdir)
  (workdir / "result.json").unlink()
  for step in checkpoint.steps(workdir / "checkpoints"):
    (workdir / "checkpoints" / str(step) / "description.json").write_text("{}")
  for _ in range(2):  # the second attempt does not restart either
    with pytest.raises(UserError, match="no checkpoint of this run can be used"):
      train.run(_config(), workdir)
  assert len(checkpoint.steps(workdir / "checkpoints")) == 6


@pytest.mark.slow
def test_old_checkpoints_are_deleted_after_the_new_one_is_sealed(run, tmp_path, monkeypatch):
  order = []
  original = files.write_json

  def write_json(path, value):
    original(path, value)
    order.append((path.name, checkpoint.steps(path.parent.parent)))

  monkeypatch.setattr(files, "write_json", write_json)
  train.run(_config(total_steps=3, **{"checkpoint.keep": 1}), tmp_path)
  assert ("digest.json", [1, 2]) in order and ("digest.json", [2, 3]) in order
  assert checkpoint.steps(tmp_path / "checkpoints") == [3]


@pytest.mark.slow
def test_resuming_refuses_another_recipe_and_accepts_other_logging(run, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(run, workdir)
  with pytest.raises(UserError) as error:
    train.run(_config(**{"optimizer.learning_rate": 5e-4, "data.flip": False}), workdir)
  for fact in ("optimizer.learning_rate: 0.001 in the checkpoint, 0.0005", "data.flip", "--workdir"):
    assert fact in str(error.value)
  result = train.run(_config(total_steps=7, log_every_steps=2, **{"data.threads": 1}), workdir)
  assert result["step"] == 7 and "total_steps: 6 in the checkpoint, 7 in the config" in caplog.text


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_restart(run, tmp_path):
  """If the folder was renamed or the digests were deleted, both attempts are refused and leave the log unchanged."""
  for gone in ("renamed", "unsealed"):
    workdir = tmp_path / gone
    shutil.copytree(run, workdir)
    (workdir / "result.json").unlink()
    if gone == "renamed":
      (workdir / "checkpoints").rename(workdir / "checkpoints_old")
    else:
      for step in checkpoint.steps(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / "digest.json").unlink()
    before = (workdir / "metrics.jsonl").read_bytes()
    for _ in range(2):
      with pytest.raises(UserError, match=r"metrics.jsonl has 6 steps.*another --workdir, or move"):
        train.run(_config(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_first_checkpoint_restarts_with_a_warning(tmp_path, caplog):
  rows = "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 41))
  (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 10000, "lo')
  record.check_not_lost(tmp_path)
  assert "reached step 40 without a checkpoint" in caplog.text


def test_one_complete_checkpoint_is_never_forgotten(tmp_path):
  """This holds even if the run ended soon after its first checkpoint and the folder was renamed."""

  def stop(self, step, *_):
    if step == 4:
      raise UserError("the end")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.loop.Trace, "before", stop)
    with pytest.raises(UserError, match="the end"):
      train.run(_config(**{"checkpoint.every_steps": 2, "eval.every_steps": None}), tmp_path)
  assert checkpoint.steps(tmp_path / "checkpoints") == [2] and (tmp_path / "saved.json").is_file()
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match=r"had complete checkpoints .*move saved.json and metrics.jsonl away"):
    train.run(_config(), tmp_path)
  for name in ("saved.json", "metrics.jsonl"):
    (tmp_path / name).unlink()
  assert train.run(_config(), tmp_path)["step"] == 6 and _rows(tmp_path)[0]["step"] == 1


def test_an_evaluated_step_counts_as_saved(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 3, "eval_loss": 1.0}\n')
  with pytest.raises(UserError, match="has 3 steps"):
    record.check_not_lost(tmp_path)


def test_steps_are_counted_from_the_resumed_step(tmp_path, caplog):
  """A run with `resume` that was killed before its own first checkpoint can be started again."""
  (tmp_path / "metrics.jsonl").write_text('{"step": 101, "loss": 1.0}\n{"step": 102, "loss": 1.0}\n')
  record.check_not_lost(tmp_path, 100)
  assert "reached step 102 without a checkpoint; this one starts at step 100" in caplog.text
  (tmp_path / "saved.json").write_text("{}")
  with pytest.raises(UserError, match="has 102 steps"):
    record.check_not_lost(tmp_path, 100)


def test_a_new_run_is_accepted_without_a_warning(tmp_path, caplog):
  record.check_not_lost(tmp_path)
  (tmp_path / "metrics.jsonl").write_text("")
  record.check_not_lost(tmp_path)
  assert not caplog.text


def test_incomplete_lines_after_a_kill_or_a_power_cut_are_ignored(tmp_path):
  """metrics.jsonl has truncated, empty, zeroed and foreign lines; bad_images.jsonl has a truncated one."""
  rows = b'{"step": 1, "loss": 2.0}\n\n\0\0\0\xff\n[1]\n7\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
  (tmp_path / "metrics.jsonl").write_bytes(rows)
  assert [row["step"] for row in record.rows(tmp_path)] == [1, 2]
  assert record.first_and_last(tmp_path)[1]["loss"] == 1.0 and record.count(tmp_path, "loss") == 2
  MetricWriter(tmp_path, start_step=1).close()
  assert _rows(tmp_path) == [{"step": 1, "loss": 2.0}]

  path = tmp_path / "bad_images.jsonl"
  path.write_text('{"index": 4, "reason": "a"}\n{"index": 5, "rea')
  source = sources.make_source(_config().data.to_dict())
  for index in (0, 1):  # the first new line does not continue the truncated one
    seen = bad_images.BadImageTracker(source, 1.0, path)
    assert sorted(seen.reasons) == sorted([4, *range(index)])
    seen.update(np.array([index]), np.array([True]))
  assert sorted(bad_images.BadImageTracker(source, 1.0, path).reasons) == [0, 1, 4]


@pytest.mark.slow
def test_a_kill_at_the_very_end_does_not_change_the_result(tmp_path, monkeypatch):
  """A kill in the last evaluation, in the figures, or before the result: these are repeated, with the same numbers."""
  reference = train.run(_config(total_steps=3, figures=True), tmp_path / "reference")
  workdir = tmp_path / "run"
  parts = ((Classification, "check_eval"), (train.loop, "_write_figures"), (record, "write_result"))
  for owner, name in parts:

    def stop(*_, **__):
      raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(owner, name, stop)
      train.run(_config(total_steps=3, figures=True), workdir)
    assert not (workdir / "result.json").exists()
  assert train.run(_config(total_steps=3, figures=True), workdir)["eval"] == reference["eval"]
  timeless = [
    [{**row, "images_per_second": 0, "data_wait": 0} for row in _rows(path)]
    for path in (tmp_path / "reference", workdir)
  ]
  assert timeless[0] == timeless[1]


def test_a_digest_without_entries_counts_as_damage(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run / "checkpoints", workdir / "checkpoints")
  for text in ("[]", "7", '"x"', "null"):
    (workdir / "checkpoints" / "6" / "digest.json").write_text(text)
    assert checkpoint.find(workdir).name == "5"


def test_json_files_are_replaced_atomically(tmp_path, monkeypatch):
  """A failed write leaves the previous file unchanged."""
  record.write_result(tmp_path, {"step": 1})

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", fail)
  with pytest.raises(OSError, match="space"):
    record.write_result(tmp_path, {"step": 2})
  assert json.loads((tmp_path / "result.json").read_text()) == {"step": 1}


@pytest.mark.slow
def test_a_data_set_that_has_shrunk_is_logged(tmp_path, caplog):
  changes = _folder(tmp_path / "data", 40, {})
  config = _config(total_steps=2, **changes)
  train.run(config, tmp_path / "run")
  (tmp_path / "data" / "train" / "a" / "0004.png").unlink()
  train.run(_config(total_steps=4, **changes), tmp_path / "run")
  assert "had 40 examples before and has 39 now" in caplog.text


# Writers, locks and disks.


def test_tensorboard_on_a_full_disk_raises_and_does_not_hang(tmp_path, monkeypatch):
  """tensorboardX's own writer thread ends at such an error, and the next write waits forever."""
  from tensorboardX import record_writer

  logger = MetricWriter(tmp_path)
  logger.write(1, {"loss": 1.0})

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(record_writer.RecordWriter, "write", fail)
  with pytest.raises(OSError, match="space"):
    logger.write(2, {"loss": 1.0})
  logger.close()


def test_tensorboard_can_read_the_event_file(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  logger = MetricWriter(tmp_path, start_step=4)
  logger.write(5, {"loss": 1.5, "nothing": float("nan")})
  logger.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  assert events[0].file_version == "brain.Event:2"
  assert (events[1].step, events[1].session_log.status) == (5, 1)  # START discards events of later steps
  assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events[2:]] == [
    (5, "loss", 1.5)
  ]


def test_the_log_reports_a_full_disk_once(tmp_path, capsys, monkeypatch):
  logs.setup(tmp_path)
  (handler,) = [h for h in logs.log.handlers if isinstance(h, logging.FileHandler)]

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(handler, "flush", fail)
  for i in range(3):
    logs.log.warning("message %d", i)
  monkeypatch.undo()
  text = capsys.readouterr().err
  assert text.count("No space left") == 1 and "Traceback" not in text and "message 2" in text


def test_the_lock_refuses_a_second_run_unless_the_first_one_died(tmp_path, caplog):
  script = (
    "import sys, time, pathlib\nfrom beit_jax.runtime import lock\n"
    "with lock.exclusive_lock(pathlib.Path(sys.argv[1])):\n  print('held', flush=True)\n  time.sleep(600)\n"
  )
  other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
  try:
    assert other.stdout.readline() == b"held\n"
    assert lock.held(tmp_path)
    with pytest.raises(UserError) as error:
      train.run(_config(), tmp_path)
    assert str(other.pid) in str(error.value) and "another run writes here" in str(error.value)
  finally:
    other.kill()
    other.wait()
    other.stdout.close()
  assert not lock.held(tmp_path)
  with lock.exclusive_lock(tmp_path):
    pass
  assert f"process {other.pid}" in caplog.text and "taken over" in caplog.text


def _fail_saves(monkeypatch, error, times):
  original, calls = Checkpointer._seal, []

  def seal(self, step, description):
    calls.append(step)
    if len(calls) <= times:
      self._orbax.wait_until_finished()
      shutil.rmtree(self.root / str(step))
      raise error
    original(self, step, description)

  monkeypatch.setattr(Checkpointer, "_seal", seal)
  return calls


@pytest.mark.slow
def test_a_save_with_a_transient_error_is_repeated(monkeypatch, tmp_path, caplog):
  calls = _fail_saves(monkeypatch, OSError(5, "Input/output error"), 2)
  result = train.run(_config(**{"checkpoint.every_steps": 2}), tmp_path)
  assert result["step"] == 6 and len(calls) >= 3 and "tried again" in caplog.text
  assert max(checkpoint.steps(tmp_path / "checkpoints")) == 6


def test_a_transient_error_while_sealing_the_last_checkpoint_is_repeated(monkeypatch, tmp_path, caplog):
  """The failed save has its final name but no digest; it does not prevent the second attempt."""
  write, calls = files.write_json, []

  def fails_once(path, value):
    calls.append(path)
    if len(calls) == 2:  # the second write is the digest, after the description
      raise OSError(5, "Input/output error")
    write(path, value)

  monkeypatch.setattr(files, "write_json", fails_once)
  assert train.run(_config(total_steps=2, **{"checkpoint.every_steps": 1000}), tmp_path)["step"] == 2
  assert [path.parent.name for path in calls] == ["2"] * 4 + [tmp_path.name] and "tried again" in caplog.text
  assert checkpoint.find(tmp_path).name == "2"


def test_an_error_after_the_digest_does_not_repeat_the_save(monkeypatch, tmp_path, caplog):
  """The checkpoint is complete, so a second save of the same step would fail for good."""
  write = files.write_json

  def fails_once(path, value):
    if path.name == "saved.json" and "saved.json" not in caplog.text:
      raise OSError(5, "Input/output error")
    write(path, value)

  monkeypatch.setattr(files, "write_json", fails_once)
  assert train.run(_config(total_steps=2, **{"checkpoint.every_steps": 1000}), tmp_path)["step"] == 2
  assert "saved.json could not be written" in caplog.text and checkpoint.find(tmp_path).name == "2"


def test_a_digest_on_a_defective_sector_counts_as_damage(tmp_path, monkeypatch):
  folder = tmp_path / "checkpoints" / "1"
  checkpoint.write_model(folder, {"w": np.zeros(3)}, {})

  def defective(path, *args, **kwargs):
    raise OSError(errno.EIO, "Input/output error", str(path))

  monkeypatch.setattr(pathlib.Path, "read_text", defective)
  assert "digest.json cannot be read" in checkpoint.fault(folder)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints(monkeypatch, tmp_path):
  train.run(_config(total_steps=2), tmp_path)
  _fail_saves(monkeypatch, OSError(28, "No space left on device"), 99)
  with pytest.raises(UserError) as error:
    train.run(_config(), tmp_path)
  assert "No space left" in str(error.value) and "go on from the newest" in str(error.value)
  assert checkpoint.find(tmp_path).name == "2"


def test_a_workdir_that_cannot_be_created_is_an_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file"):
    train.run(_config(), tmp_path / "file" / "run")


@pytest.mark.slow
def test_a_real_small_disk_that_fills_up_stops_the_run(tmp_path):
  """A tmpfs of 2 MiB fills up: the run ends with one clear error, and the earlier checkpoints are intact."""
  mount = tmp_path / "small"
  mount.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
  if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("file systems cannot be mounted here")
  try:
    with pytest.raises(UserError) as error:
      train.run(_config(total_steps=40), mount / "run")
    assert "space" in str(error.value).lower(), error.value
    newest = checkpoint.find(mount / "run")
    assert int(newest.name) >= 1 and jax.tree.leaves(checkpoint.load_params(newest))
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    with pytest.raises(UserError, match="[Rr]ead-only"):
      train.run(_config(total_steps=40), mount / "run")
  finally:
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_a_workdir_that_is_removed_during_the_run_stops_it(monkeypatch, tmp_path):
  original = Checkpointer.save

  def save(self, step, *args):
    if step == 3:
      self.wait()
      shutil.rmtree(tmp_path / "run")
    original(self, step, *args)

  monkeypatch.setattr(Checkpointer, "save", save)
  with pytest.raises(UserError, match="run is no longer there"):
    train.run(_config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()  # no part of the workdir is created again


def test_no_space_for_the_batches_of_data_workers_is_an_error(monkeypatch, tmp_path):
  def fail(*_, **__):
    raise OSError(28, "No space left on device")
    yield

  monkeypatch.setattr("grain.IterDataset.mp_prefetch", fail)
  with pytest.raises(UserError, match="no space left in /dev/shm.*--shm-size"):
    train.run(_config(**{"data.workers": 1}), tmp_path)


@pytest.mark.slow
def test_the_log_records_command_environment_config_and_errors(tmp_path):
  """log.txt has the command, host, versions, devices, the whole config and the error."""
  from beit_jax import main

  arguments = [f"--config={ROOT}/tests/kills_config.py", f"--workdir={tmp_path}", "--config.total_steps=5"]
  assert main.main([*arguments, "--config.data.workers=0", "--config.data.color_jitter=0.3"]) == 0
  assert main.main([*arguments, "--config.optimizer.learning_rate=2e-3"]) == 2
  text = (tmp_path / "log.txt").read_text()
  for fact in (
    "command: ",
    "host: ",
    "jaxlib=",
    "devices: ",
    '"label_smoothing": 0.1',
    "color_jitter",
    "error: ",
  ):
    assert fact in text, fact
