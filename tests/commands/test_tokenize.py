"""`python -m beit_jax.tokenize`: cached tokens equal computed ones, and a cache that does not fit a run is refused."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import objectives, tokenize, train
from beit_jax.config import parse as config_lib
from beit_jax.data import examples, pipeline, shapes, sources, token_cache
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import UserError
from beit_jax.models.dvae import map_pixels
from beit_jax.objectives import MaskedImageModeling
from beit_jax.run import record
from beit_jax.runtime import sharding
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import tiny
from tests.conftest import ROOT

COMMAND = "python -m beit_jax.tokenize --config=X --out=Y"
MARGIN = 1e-3  # between the two largest logits; below it, rounding on another batch or device may swap them


def _config(tokenizer, **changes):
  return tiny.config("beit", **{"tokenizer.init_from": str(tokenizer), **changes})


def _make(config, folder, epochs=None, shard_size=40):
  folder.mkdir(exist_ok=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(token_cache, "SHARD_SIZE", shard_size)
    return tokenize.tokenize(config, folder, epochs, COMMAND)


def _tokenizer(folder, seed=0):
  """Random weights; the last layer is normalized to logits of mean 0 and deviation 1, so that all 16 words occur."""
  module = make_module("tokenizer", dict(n_hid=8, n_init=8, n_blk_per_group=1, group_count=2, vocab_size=16))
  images = jnp.asarray(np.stack([shapes.render("train", i, 16)["image"] for i in range(32)])) / 255
  params = jax.jit(module.init)(jax.random.key(seed), map_pixels(images[:1]))["params"]
  logits = module.apply({"params": params}, map_pixels(images), method="logits").reshape(-1, 16)
  last = params["encoder"]["output"]
  last["kernel"] /= logits.std(0)
  last["bias"] -= logits.mean(0) / logits.std(0)
  look = dict(mean=(-0.125,) * 3, std=(1.25,) * 3, image_size=(16, 16), crop_pct=1.0)
  look |= dict(interpolation="lanczos", resize="short_side")
  weights_io.save(Pretrained("tokenizer", params, module, look), folder, format="orbax")
  return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return _tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
  """Two epochs of 96 examples in shards of 40, made in batches of 24; the runs use batches of 16."""
  return _make(_config(tokenizer, batch_size=24), tmp_path_factory.mktemp("tokens"), 2)


@pytest.fixture
def copy(cache, tmp_path):
  return token_cache.TokenCache(shutil.copytree(cache.folder, tmp_path / "copy"))


def _batches(objective, steps, bad_images=None, workers=0):
  size = objective.config.batch_size
  return pipeline.train_batches(
    objective.source,
    objective.reader(),
    rows=np.arange(size),
    batch_size=size,
    total_steps=steps,
    start_step=0,
    seed=objective.config.seed,
    workers=workers,
    bad_images=bad_images,
  )


def _check_tokens(objective, cache, steps, bad_images=None):
  """Compares cached tokens with logits of the run's batches, where the largest logit is clear."""
  module = objective.tokenizer.module

  @jax.jit
  def logits(params, batch):
    view = objective.pixels(batch, train=True)["token_image"]
    return module.apply({"params": params}, map_pixels(view), method="logits")

  compared = 0
  for batch in _batches(objective, steps, bad_images):
    found = np.asarray(logits(objective.tokenizer.params, batch)).reshape(
      len(batch["valid"]), cache.num_tokens, -1
    )
    second, first = np.sort(found, -1)[..., -2:].transpose(2, 0, 1)
    clear = first - second > MARGIN
    cached = np.stack(
      [cache.lookup(objective.config.seed, *map(int, key))[1] for key in batch["example_key"]]
    )
    np.testing.assert_array_equal(cached[clear], found.argmax(-1)[clear])
    compared += clear.mean()
  assert compared > 0.9 * steps


def _losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([row["loss"] for row in rows if "loss" in row])


def test_cached_tokens_equal_computed_tokens(cache, tokenizer):
  """In both epochs, with other batches and color jitter; the epochs differ."""
  config = _config(tokenizer)
  objective = MaskedImageModeling(config, sources.make_source(config.data.to_dict()))
  _check_tokens(objective, cache, 12)
  ids = np.stack([[cache.lookup(0, epoch, index)[1] for index in range(96)] for epoch in (0, 1)])
  assert (np.bincount(ids.ravel(), minlength=16) > 100).all()
  assert 0.1 < (ids[0] == ids[1]).mean() < 0.5
  assert cache.lookup(0, 0, 5)[1].dtype == np.uint16 and cache.lookup(0, 0, 5)[1].shape == (64,)
  names = sorted(path.name for path in cache.folder.glob("tokens-*"))
  assert names == [f"tokens-{i:06d}.array_record" for i in range(5)]


@pytest.fixture(scope="module")
def online(tokenizer, tmp_path_factory):
  """(workdir, result) of ten steps that compute their tokens."""
  workdir = tmp_path_factory.mktemp("online")
  return workdir, train.run(
    _config(tokenizer, **{"checkpoint.every_steps": 4, "checkpoint.keep": 9}), workdir
  )


def test_losses_and_evaluation_with_cached_tokens(cache, online, tokenizer, tmp_path, monkeypatch):
  """They equal those of a run that computes its tokens; the tokenizer runs in the evaluation only."""
  original, traced = MaskedImageModeling._tokens, []
  monkeypatch.setattr(MaskedImageModeling, "_tokens", lambda *args: traced.append(args[2]) or original(*args))
  cached = train.run(_config(tokenizer, **{"tokenizer.cache": str(cache.folder)}), tmp_path)
  assert len(traced) == 1  # by the evaluation
  np.testing.assert_allclose(_losses(tmp_path), _losses(online[0]), rtol=1e-5)
  for name, value in online[1]["eval"].items():
    np.testing.assert_allclose(cached["eval"][name], value, rtol=1e-4)


@pytest.mark.slow
def test_resume_with_cached_tokens(cache, online, tokenizer, tmp_path):
  workdir = shutil.copytree(online[0], tmp_path / "run")
  for step in (8, 10):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  (workdir / "result.json").unlink()
  train.run(_config(tokenizer, **{"tokenizer.cache": str(cache.folder)}), workdir)
  assert len(_losses(workdir)) == 10
  np.testing.assert_allclose(_losses(workdir), _losses(online[0]), rtol=1e-5)


def test_tokenizer_is_only_on_the_device_for_evaluation(cache, tokenizer):
  mesh = sharding.make_mesh(1, 1)
  for split, leaves in (("", 0), ("test", 1)):
    config = _config(tokenizer, **{"tokenizer.cache": str(cache.folder), "eval.split": split})
    frozen = train.prepare(config, mesh).objective.frozen_params(mesh)
    assert bool(jax.tree.leaves(frozen)) == bool(leaves)
    assert "decoder" not in frozen.get("params", {})  # only figures need it, and they bring it


@pytest.mark.slow
def test_eight_devices_write_and_read_the_same_tokens(cache, online, tokenizer, tmp_path):
  other = _make(_config(tokenizer, batch_size=32, **{"mesh.data": 4, "mesh.fsdp": 2}), tmp_path / "eight", 2)
  keys = [(epoch, index) for epoch in (0, 1) for index in range(96)]
  mine, theirs = (np.stack([c.lookup(0, *key)[1] for key in keys]) for c in (cache, other))
  assert (mine == theirs).mean() > 0.999
  config = _config(tokenizer)
  objective = MaskedImageModeling(config, sources.make_source(config.data.to_dict()))
  _check_tokens(objective, other, 12)
  changes = {"tokenizer.cache": str(cache.folder), "mesh.data": 8}
  train.run(_config(tokenizer, **changes), tmp_path / "cached")
  np.testing.assert_allclose(_losses(tmp_path / "cached"), _losses(online[0]), rtol=1e-5)


def test_cache_of_an_earlier_version(copy, tokenizer, monkeypatch):
  """It does not say on which platform its float32 convolutions ran. On a CPU they were what they are now."""
  about = json.loads((copy.folder / token_cache.DESCRIPTION).read_text())
  assert about["key"].pop("platform") == "cpu"
  (copy.folder / token_cache.DESCRIPTION).write_text(json.dumps(about))
  config = _config(tokenizer, **{"tokenizer.cache": str(copy.folder)})
  assert train.prepare(config, sharding.make_mesh(1, 1)).objective.cache is not None
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  _refused(tokenizer, copy.folder, "platform: the cache was made with 'cpu', this run has 'tpu'")


def test_dtype_of_the_tokenizer(copy, tokenizer):
  """The run's own, else that of the checkpoint; a cache belongs to one of them."""
  text = "tokenizer's dtype: the cache was made with 'float32', this run has 'bfloat16, sums in float32'"
  _refused(tokenizer, copy.folder, text, **{"tokenizer.dtype": "bfloat16"})
  prepare = lambda **changes: train.prepare(_config(tokenizer, **changes), sharding.make_mesh(1, 1)).objective
  found = [prepare().tokenizer, prepare(**{"tokenizer.dtype": "bfloat16"}).tokenizer]
  assert [model.module.dtype for model in found] == ["float32", "bfloat16"]


# Caches that are refused.


def _refused(tokenizer, folder, *facts, **changes):
  with pytest.raises(UserError) as caught:
    train.prepare(_config(tokenizer, **{"tokenizer.cache": str(folder), **changes}), sharding.make_mesh(1, 1))
  for fact in ("tokenizer.cache", *facts):
    assert fact in str(caught.value), caught.value


@pytest.mark.parametrize(
  "changes, name",
  [
    ({"seed": 1}, "seed: the cache was made with 0, this run has 1"),
    ({"data.color_jitter": 0.3}, "data.color_jitter: the cache was made with 0.4, this run has 0.3"),
    ({"data.crop": "center"}, "data.crop:"),
    ({"data.crop_scale": (0.08, 1.0)}, "data.crop_scale:"),
    ({"data.crop_ratio": (1.0, 1.0)}, "data.crop_ratio:"),
    ({"data.flip": False}, "data.flip:"),
    ({"data.interpolation": "bilinear"}, "data.interpolation:"),
    ({"data.token_interpolation": "bicubic"}, "data.token_interpolation:"),
    ({"data.image_size": 32, "model.patch_size": 4}, "data.image_size:"),
    ({"data.num_examples": 97}, "examples: the cache was made with 96, this run has 97"),
    ({"data.fraction": 0.5}, "data: "),
    ({"data.split": "test"}, "sha256 of some examples:"),
    ({"data.render_size": 32}, "sha256 of some examples:"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_augmentation_or_data_is_refused(changes, name, cache, tokenizer):
  _refused(tokenizer, cache.folder, name, "make another cache", **changes)


def test_other_tokenizer_is_refused(cache, tokenizer, tmp_path):
  _refused(
    _tokenizer(tmp_path / "other", seed=1), cache.folder, "tokenizer's sha256: the cache was made with"
  )


@pytest.mark.parametrize(
  "name, value", [("pixels", "other"), ("tokenizer's dtype", "bfloat16"), ("platform", "tpu")]
)
def test_other_backend_or_dtype_is_refused(name, value, copy, tokenizer):
  about = json.loads((copy.folder / token_cache.DESCRIPTION).read_text())
  about["key"][name] = value
  (copy.folder / token_cache.DESCRIPTION).write_text(json.dumps(about))
  _refused(tokenizer, copy.folder, f"{name}: the cache was made with {value!r}")


def test_too_few_epochs_are_refused(cache, tokenizer):
  _refused(tokenizer, cache.folder, "holds 2 epochs", "sees 3", f"{COMMAND} --epochs=3", total_steps=13)


def test_unfinished_cache_is_refused(copy, tokenizer):
  copy.path(2).unlink()
  _refused(tokenizer, copy.folder, "1 of the 4 shards", "tokens-000002", f"{COMMAND} --epochs=2")


def test_truncated_shard_is_refused(copy, tokenizer):
  copy.path(1).write_bytes(copy.path(1).read_bytes()[:-1])
  _refused(tokenizer, copy.folder, "not finished", "tokens-000001")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', "\0"])
def test_broken_description_is_refused(text, copy, tokenizer):
  (copy.folder / token_cache.DESCRIPTION).write_text(text)
  _refused(tokenizer, copy.folder, "cache.json cannot be read")


def test_folder_without_cache_is_refused(tmp_path, tokenizer):
  _refused(tokenizer, tmp_path, "no token cache", "python -m beit_jax.tokenize")


def test_other_version_is_refused(copy, tokenizer):
  about = json.loads((copy.folder / token_cache.DESCRIPTION).read_text())
  (copy.folder / token_cache.DESCRIPTION).write_text(json.dumps({**about, "version": 2}))
  _refused(tokenizer, copy.folder, "version 2")


def _flip(path):
  data = bytearray(path.read_bytes())
  data[200] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_shard_stops_the_run(workers, copy, tokenizer, tmp_path):
  _flip(copy.path(1))
  changes = {"tokenizer.cache": str(copy.folder), "data.workers": workers, "eval.split": ""}
  with pytest.raises(UserError, match=r"tokens-000001.array_record is damaged.*repairs it: python -m"):
    train.run(_config(tokenizer, **changes), tmp_path / "run")


def test_record_of_another_example_is_detected(copy):
  other = token_cache.TokenCache(copy.folder)
  shutil.copy(copy.path(0), copy.path(1))
  lines = [
    json.loads(line) for line in (copy.folder / token_cache.SHARD_LIST).read_text().split("\n") if line
  ]
  (copy.folder / token_cache.SHARD_LIST).write_text(
    "\n".join(json.dumps({**line, **_size_and_hash(lines[0], line)}) for line in lines)
  )
  order = np.argsort(pipeline.places(0, 0, 96)).tolist()
  pairs = zip(order[40:80], order, strict=False)
  # The copied record must not be a possible replacement of the example.
  index = next(i for i, copied in pairs if copied not in examples.candidates(i, 96))
  with pytest.raises(UserError, match="another order of examples"):
    other.lookup(0, 0, index)


def _size_and_hash(first, line):
  return {name: first[name] for name in ("size", "sha256")} if line["shard"] == 1 else {}


# Making a cache.


def _same_files(cache, other):
  for shard in range(cache.num_shards):
    assert cache.path(shard).read_bytes() == other.path(shard).read_bytes(), shard


def test_interrupted_cache_is_continued(cache, tokenizer, tmp_path, monkeypatch):
  """Interrupted in the third shard, with a half-written file and a truncated line."""
  config, folder = _config(tokenizer, batch_size=24), tmp_path / "tokens"
  written, original = [], token_cache.TokenCache.write

  def write(self, shard, *arrays):
    if shard == 2 and shard not in written:
      self.path(2).with_suffix(".tmp").write_bytes(b"half" * 10**5)
      with (self.folder / token_cache.SHARD_LIST).open("a") as file:
        file.write('\n{"shard": 2, "reco')
      written.append(shard)
      raise KeyboardInterrupt
    written.append(shard)
    original(self, shard, *arrays)

  monkeypatch.setattr(token_cache.TokenCache, "write", write)
  with pytest.raises(KeyboardInterrupt):
    _make(config, folder, 2)
  _refused(tokenizer, folder, "2 of the 4 shards")
  _make(config, folder, 2)
  assert written == [0, 1, 2, 2, 3, 4]
  assert not token_cache.TokenCache(folder).faults(verify=True)
  _same_files(cache, token_cache.TokenCache(folder))
  assert not list(folder.glob("*.tmp"))


def test_damaged_and_missing_shards_are_repaired(cache, copy, tokenizer, monkeypatch):
  _flip(copy.path(1))
  copy.path(4).unlink()
  written, original = [], token_cache.TokenCache.write

  def write(self, shard, *arrays):
    written.append(shard)
    original(self, shard, *arrays)

  monkeypatch.setattr(token_cache.TokenCache, "write", write)
  _make(_config(tokenizer, batch_size=24), copy.folder, 2)
  assert written == [1, 4]
  _same_files(cache, copy)


def test_more_epochs_extend_a_cache(cache, tokenizer, tmp_path):
  config, folder = _config(tokenizer, batch_size=24), tmp_path / "tokens"
  assert _make(config, folder, 1).num_shards == 3
  _make(config, folder, 2)
  assert _make(config, folder, 1).epochs == 2  # fewer epochs change nothing
  _same_files(cache, token_cache.TokenCache(folder))


def test_cache_is_extended_while_a_run_reads(tokenizer, tmp_path, monkeypatch):
  """A longer shard replaces the last one; its line in shards.jsonl may follow a moment later."""
  config, folder = _config(tokenizer, batch_size=24), tmp_path / "tokens"
  key = _make(config, folder, 1).key
  running, late = (token_cache.open_for_run(folder, key, 96) for _ in range(2))
  order = np.argsort(pipeline.places(0, 0, 96))
  before = running.lookup(0, 0, int(order[0]))[1], running.lookup(0, 0, int(order[90]))[1]
  late.lookup(0, 0, int(order[0]))
  few = (folder / token_cache.SHARD_LIST).read_text()
  assert few.count("records") == 3
  token_cache.create(folder, key, 2, COMMAND)  # the first step of the other process
  beginning = token_cache.open_for_run(folder, key, 96)
  np.testing.assert_array_equal(beginning.lookup(0, 0, int(order[90]))[1], before[1])
  _make(config, folder, 2)
  many = (folder / token_cache.SHARD_LIST).read_text()
  (folder / token_cache.SHARD_LIST).write_text(few)

  def sleep(pause):
    if pause:
      (folder / token_cache.SHARD_LIST).write_text(many)

  monkeypatch.setattr(token_cache.time, "sleep", sleep)
  for reader in (running, late, pickle.loads(pickle.dumps(running))):
    np.testing.assert_array_equal(reader.lookup(0, 0, int(order[90]))[1], before[1])
  np.testing.assert_array_equal(running.lookup(0, 0, int(order[0]))[1], before[0])


def test_default_number_of_epochs(tokenizer, tmp_path):
  assert _make(_config(tokenizer, total_steps=7), tmp_path / "tokens").epochs == 2


def test_cache_of_another_run_is_not_overwritten(copy, tokenizer):
  with pytest.raises(UserError, match="has the cache of another run:\n  seed: the cache was made with 0"):
    _make(_config(tokenizer, seed=3), copy.folder, 2)


def test_low_disk_space_is_logged(tokenizer, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
  _make(_config(tokenizer), tmp_path / "tokens", 1)
  assert "0.0 GB of free space" in caplog.text


def test_full_disk(copy):
  copy.path(0).with_suffix(".tmp").symlink_to("/dev/full")
  with pytest.raises(UserError, match="tokens-000000.*No space left.*same command again"):
    copy.write(0, np.zeros((40, 2)), np.zeros((40, 64)))
  assert not copy.faults(verify=True)


def test_large_vocabulary(copy):
  copy.dtype = np.dtype("<u4")
  order = np.argsort(pipeline.places(0, 0, 96))[:40]
  ids = np.arange(40 * 64).reshape(40, 64) + 70_000
  copy.write(0, np.stack([np.zeros(40, int), order], 1), ids)
  np.testing.assert_array_equal(copy.lookup(0, 0, int(order[7]))[1], ids[7])


def _images(folder, *broken):
  """24 images, some of them broken: (folder, changes of the config)."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(24):
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i:02d}.png")
  for i in broken:
    (folder / f"{i:02d}.png").write_bytes(b"broken")
  return folder, {
    "data.source": "folder",
    "data.root": str(folder),
    "data.max_bad": 0.5,
    "eval.split": "",
    "total_steps": 3,
  }


def test_replacements_have_their_own_tokens(tokenizer, tmp_path):
  images, data = _images(tmp_path / "images", 3, 11, 12)
  config = _config(tokenizer, **data, batch_size=8)
  made = _make(config, tmp_path / "tokens", shard_size=10)
  source = sources.make_source(config.data.to_dict())
  bad_images = BadImageTracker(source, 0.5)
  _check_tokens(MaskedImageModeling(config, source), made, 3, bad_images)
  assert sorted(bad_images.reasons) == [3, 11, 12]
  moved = shutil.copytree(images, tmp_path / "moved")  # the location of the data does not matter
  replay = _config(tokenizer, **{**data, "data.root": str(moved)}, **{"tokenizer.cache": str(made.folder)})
  replay.batch_size = 8
  assert train.prepare(replay, sharding.make_mesh(1, 1)).objective.cache.epochs == 1


def _rows(tokenizer, data, **changes):
  """All rows of three steps, and the reasons why examples were replaced."""
  config = _config(tokenizer, **data, **changes, batch_size=8)
  source = sources.make_source(config.data.to_dict())
  bad_images = BadImageTracker(source, 0.5)
  batches = list(_batches(MaskedImageModeling(config, source), 3, bad_images))
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, bad_images.reasons


def test_image_replaced_in_the_cache_is_replaced_in_the_run(tokenizer, tmp_path):
  """The image was unreadable only when the cache was made; pixels and tokens still belong to the same image."""
  images, data = _images(tmp_path / "images", 3)
  good = (images / "05.png").read_bytes()  # not one of the sampled images
  (images / "05.png").write_bytes(b"broken")
  made = _make(_config(tokenizer, **data, batch_size=8), tmp_path / "tokens", shard_size=10)
  wanted, reasons = _rows(tokenizer, data)
  assert sorted(reasons) == [3, 5]
  (images / "05.png").write_bytes(good)
  repaired, reasons = _rows(tokenizer, data)
  assert sorted(reasons) == [3] and not np.array_equal(repaired["image"], wanted["image"])
  found, reasons = _rows(tokenizer, data, **{"tokenizer.cache": str(made.folder)})
  np.testing.assert_array_equal(found["image"], wanted["image"])
  assert sorted(reasons) == [3, 5] and "or when its tokens were cached" in reasons[5]
  number, targets = made.lookup(0, 0, 5)
  assert number == next(i for i in examples.candidates(5, 24) if i not in (3, 5))
  (row,) = np.flatnonzero(found["example_key"][:, 1] == 5)
  np.testing.assert_array_equal(found["targets"][row], targets)


def test_image_that_can_no_longer_be_read_stops_the_run(tokenizer, tmp_path):
  """Its replacement would get the tokens of other pixels."""
  images, data = _images(tmp_path / "images", 3)
  made = _make(_config(tokenizer, **data, batch_size=8), tmp_path / "tokens", shard_size=10)
  (images / "05.png").write_bytes(b"broken")
  with pytest.raises(UserError) as error:
    _rows(tokenizer, data, **{"tokenizer.cache": str(made.folder)})
  for fact in (
    "tokenizer.cache",
    "tokens of example 5 in epoch 0",
    "cannot be read now",
    "05.png",
    "same command",
  ):
    assert fact in str(error.value)


def _cached(tokenizer, cache):
  config = _config(tokenizer, **{"tokenizer.cache": str(cache.folder)})
  return MaskedImageModeling(config, sources.make_source(config.data.to_dict()))


def test_batches_have_targets_instead_of_the_token_view(cache, tokenizer):
  objective = _cached(tokenizer, cache)
  reader = pickle.loads(pickle.dumps(objective.reader()))
  image = sources.make_source(objective.config.data.to_dict())[5]
  found = reader.train(examples.decode(image, 5), image, (0, 1, 5))
  assert set(found) == {"image", "targets", "label"}
  np.testing.assert_array_equal(found["targets"], cache.lookup(0, 1, 5)[1])
  assert set(reader.eval(examples.decode(image, 5), image)) == {"image", "token_image", "label"}


@pytest.mark.slow
def test_data_workers_read_the_same_batches(cache, tokenizer):
  objective = _cached(tokenizer, cache)
  for mine, theirs in zip(*(_batches(objective, 10, workers=n) for n in (0, 2)), strict=True):
    for name in ("image", "targets", "example_key"):
      np.testing.assert_array_equal(mine[name], theirs[name])


# The command.


def _file(tmp_path, **runs):
  plain = {key: value.to_dict() if isinstance(value, ConfigDict) else value for key, value in runs.items()}
  path = tmp_path / "config.py"
  path.write_text(
    f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({plain!r})\n"
  )
  return f"--config={path}"


def test_the_command_with_stages(tokenizer, cache, tmp_path, capsys):
  (tmp_path / "run").mkdir()  # as if the stage had been trained
  shutil.copytree(tokenizer, tmp_path / "run" / "tokenizer")
  stages = {"stages": ("tokenizer", "pretrain"), "tokenizer": tiny.raw("dvae"), "pretrain": tiny.raw("beit")}
  spec, out = _file(tmp_path, **stages), tmp_path / "tokens"
  flags = [
    spec,
    f"--workdir={tmp_path / 'run'}",
    f"--out={out}",
    "--epochs=2",
    "--config.pretrain.batch_size=24",
  ]
  assert tokenize.main(flags) == 0
  made = token_cache.TokenCache(out)
  assert made.key == cache.key
  np.testing.assert_array_equal(made.lookup(0, 1, 7)[1], cache.lookup(0, 1, 7)[1])
  assert made.command.startswith(f"python -m beit_jax.tokenize {spec}") and "epochs" not in made.command
  assert f"--config.pretrain.tokenizer.cache={out}" in capsys.readouterr().err
  assert tokenize.main([*flags, "--config.pretrain.seed=5"]) == 2
  assert "has the cache of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, fact",
  [
    ([], "required: --out; usage:"),
    (["--out=gs://bucket/x"], "mount the bucket"),
    (["--out=OUT", "--epochs=0"], "--epochs: '0': expected an integer from 1"),
    (["--out=OUT", "--epochs=two"], "--epochs: 'two': expected an integer"),
    (["--out=OUT", "--stage=x"], "the config has no stages"),
    (["--out=OUT", "--outt=x"], "beit_jax.tokenize"),
    (["--out=OUT", "--config.objective=beit"], "tokenizer.init_from"),
  ],
)
def test_mistakes_of_the_command(flags, fact, tmp_path, capsys):
  flags = [flag.replace("OUT", str(tmp_path / "tokens")) for flag in flags]
  assert tokenize.main([_file(tmp_path, **tiny.raw("beit")), *flags]) == 2
  error = capsys.readouterr().err
  assert fact in error and error.count("error: ") == 1 and "Traceback" not in error


def test_run_without_tokens_is_refused(tmp_path, capsys):
  assert tokenize.main([_file(tmp_path, **tiny.raw("classify")), f"--out={tmp_path / 'tokens'}"]) == 2
  assert "'classify' uses no visual tokens" in capsys.readouterr().err


CHILD = """
import sys, time
from beit_jax.data import token_cache
token_cache.SHARD_SIZE = 40
write = token_cache.TokenCache.write
def slow(self, *arguments):
  write(self, *arguments)
  time.sleep(0.3)
token_cache.TokenCache.write = slow
from beit_jax import tokenize
sys.exit(tokenize.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_twice(tokenizer, cache, tmp_path):
  run = tiny.raw("beit", batch_size=24, **{"tokenizer.init_from": str(tokenizer)})
  out = tmp_path / "tokens"
  command = [sys.executable, "-c", CHILD, _file(tmp_path, **run), f"--out={out}", "--epochs=2"]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  for shards in (1, 3):
    child = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("tokens-*.array_record"))) < shards and time.monotonic() < deadline:
      assert child.poll() is None
      time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
  assert len(token_cache.TokenCache(out).faults()) in (1, 2)
  assert subprocess.run(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0
  made = token_cache.TokenCache(out)
  assert not made.faults(verify=True)
  keys = [(epoch, index) for epoch in (0, 1) for index in range(96)]
  same = [(made.lookup(0, *key)[1] == cache.lookup(0, *key)[1]).mean() for key in keys]
  assert np.mean(same) > 0.999


@pytest.mark.slow
def test_two_processes_write_one_cache(tokenizer, cache, tmp_path):
  """Each has 4 devices; process 0 writes what both compute."""
  changes = {"batch_size": 24, "tokenizer.init_from": str(tokenizer), "mesh.data": 8}
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    place = f"--coordinator=localhost:{probe.getsockname()[1]}"
  command = [sys.executable, "-m", "beit_jax.tokenize", _file(tmp_path, **tiny.raw("beit", **changes))]
  command += [f"--out={tmp_path / 'tokens'}", "--epochs=2", place, "--num_processes=2"]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"}
  options = dict(env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  both = [subprocess.Popen([*command, f"--process_id={i}"], **options) for i in range(2)]
  try:
    errors = [process.communicate(timeout=300)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], errors
  made = token_cache.TokenCache(tmp_path / "tokens")
  assert not made.faults(verify=True) and made.key == cache.key
  keys = [(epoch, index) for epoch in (0, 1) for index in range(96)]
  assert np.mean([made.lookup(0, *key)[1] == cache.lookup(0, *key)[1] for key in keys]) > 0.999


def test_config_key_may_change_on_resume():
  assert record.MAY_CHANGE.fullmatch("tokenizer.cache")
  run = config_lib.complete({"objective": "beit", "tokenizer": {"cache": "somewhere"}}, objectives.schemas())
  assert run.tokenizer.cache == "somewhere" and run.tokenizer.init_from == "stage:tokenizer"


def test_an_augmentation_that_is_newer_than_the_cache():
  """If it is off, the cache stays valid."""
  old = {"data.flip": True, "seed": 0}
  assert token_cache._differences(old, {**old, "data.new": 0.0}) == ""
  assert "data.new: the cache was made with None" in token_cache._differences(old, {**old, "data.new": 0.5})
  assert "data.flip" in token_cache._differences(old, {**old, "data.flip": False})
