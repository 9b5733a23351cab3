"""What holds for every source: the same images give the same batches, and what is damaged is named."""

import hashlib
import json
import pickle

import numpy as np
import pytest

from beit_jax.data import examples, pipeline, segmentation, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from tests import tiny
from tests.data import source_files
from tests.runtime.test_distributed import _start


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options(objective="classify", **changes):
  """The `data` section of a config, complete."""
  return tiny.config(objective, **{f"data.{key}": value for key, value in changes.items()}).data.to_dict()


def make(objective="classify", **changes):
  return sources.make_source(options(objective, **changes))


def read(source, start=0, workers=0, rows=range(6), steps=7):
  reader = ViewReader({"image": ((8, 8), "bicubic")}, options(), len(source_files.CLASSES))
  bad = BadImageTracker(source, 0.0)
  return list(
    pipeline.train_batches(
      source,
      reader,
      rows=np.array(rows),
      batch_size=6,
      total_steps=steps,
      start_step=start,
      seed=1,
      workers=workers,
      threads=2,
      bad_images=bad,
    )
  )


def assert_same(some, others):
  assert len(some) == len(others) > 0
  for one, other in zip(some, others, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


# Every value of `data.source` -> writes its files, and returns the keys of `data` that name them.
FORMATS = {**source_files.LABELED, "pairs": None, "shapes": None}


def _contract(name, tmp_path):
  if name == "shapes":
    return make(num_examples=5)
  if name == "pairs":
    return make("segment", **source_files.pairs_folder(tmp_path, source_files.pairs()))
  return make(**source_files.LABELED[name](tmp_path, source_files.labeled()))


def test_every_source_is_in_the_contract():
  assert sources.SOURCES.keys() <= FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_contract(name, tmp_path):
  """What the rest of the library relies on; see `Source`."""
  source = _contract(name, tmp_path)
  copy = pickle.loads(pickle.dumps(source))
  assert len(source) == len(copy) > 0
  assert json.loads(json.dumps(source.description))["source"] == name.removesuffix("_with_json")
  assert source.digest() == copy.digest() and (source.digest() or name == "shapes")
  assert len(source.class_names) in (0, source.num_classes)
  source[0]  # what it opens does not travel
  for index in (0, len(source) - 1, np.int64(1)):
    example, again = source[index], pickle.loads(pickle.dumps(source))[index]
    assert example.keys() == again.keys()
    assert examples.decode(example, int(index), source.pixel_rule).pixels().ndim == 3
    if source.has_labels:
      assert 0 <= example["label"] < source.num_classes
    if source.map_class_names or name == "pairs":
      labels = examples.decode_labels(example["label_map"], examples.label_map_name(example, int(index)))
      assert labels.ndim == 2


@pytest.mark.parametrize("name", source_files.LABELED)
def test_the_same_images_give_the_same_batches(name, tmp_path):
  """To the bit, in one process and in the rows of two, resumed at any step, and with a fraction and parts."""
  rows = source_files.labeled()
  wanted = make(**source_files.folder(tmp_path / "wanted", rows))
  keys = source_files.LABELED[name](tmp_path / "found", rows)
  found = make(**keys)
  assert found.class_names == wanted.class_names == source_files.CLASSES
  assert_same(read(found), read(wanted))
  assert_same(read(found, start=4), read(wanted)[4:])
  halves = read(found, rows=(0, 1, 4)), read(found, rows=(2, 3, 5))
  for first, second, whole in zip(*halves, read(wanted), strict=True):
    np.testing.assert_array_equal(first["image"], whole["image"][[0, 1, 4]])
    np.testing.assert_array_equal(second["image"], whole["image"][[2, 3, 5]])
  folder = dict(source="folder", root=str(tmp_path / "wanted"))
  assert_same(read(make(**keys, fraction=0.5)), read(make(**folder, fraction=0.5)))
  if name != "tfds":  # whose slices are contiguous
    parts = [make(**{**keys, "split": split}) for split in ("train[30%:]", "train[:30%]")]
    images = [part[i]["image"] for part in parts for i in range(len(part))]
    assert len(parts[0]) == 14 and sorted(images) == sorted(row[1] for row in rows)


def test_a_part_of_a_tar_is_that_of_the_folder(tmp_path):
  rows = source_files.labeled()
  for split in ("train[30%:]", "train[:5]"):
    some = [
      make(**{**write(tmp_path / split / write.__name__, rows), "split": split})
      for write in (source_files.folder, source_files.tar)
    ]
    assert_same(read(some[1]), read(some[0]))


@pytest.mark.parametrize("name", source_files.PAIRS)
def test_the_same_label_maps_give_the_same_batches(name, tmp_path):
  rows, config = source_files.pairs(), tiny.config("segment", **{"data.num_classes": 3})
  reader = segmentation.LabelMapReader((16, 16), 3, config.data.to_dict(), config.segment.to_dict())
  wanted, found = (
    make("segment", **source_files.PAIRS[kind](tmp_path / str(i), rows))
    for i, kind in enumerate(("pairs", name))
  )
  assert not found.has_labels and found.num_classes == 0
  batches = [
    list(
      pipeline.train_batches(s, reader, rows=np.arange(4), batch_size=4, total_steps=3, start_step=0, seed=0)
    )
    for s in (wanted, found)
  ]
  assert_same(*batches)


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("name", source_files.LABELED)
def test_workers_give_the_same_batches(name, tmp_path):
  source = make(**source_files.LABELED[name](tmp_path, source_files.labeled()))
  source[0]
  assert_same(read(source, start=4, workers=2), read(source)[4:])


def test_an_unknown_source_is_refused():
  with pytest.raises(UserError, match="data.source='zip' is unknown; there are .*'tar'"):
    make(source="zip")


PROCESS = """
import hashlib, json, sys
from pathlib import Path
import jax
from beit_jax.run import record
from beit_jax.runtime import distributed, sharding
from tests.data import test_sources

jax.config.update("jax_num_cpu_devices", 1)  # the import of the tests asked for eight

def main(argv):
  flags, (keys, out) = distributed.take_flags(argv)
  distributed.initialize(flags)
  rows = sharding.local_rows(sharding.make_mesh(data=-1), 6)
  results = {}
  for name, section in json.loads(Path(keys).read_text()).items():
    source = test_sources.make(**section)
    record.check_same_sources(name, 6, {"training": source})
    workers = 2 if name in ("tar", "arrow") else 0  # one process has them for all sources in another test
    for start, workers in ((0, 0), (3, workers)):
      batches = test_sources.read(source, start, workers, rows)
      images = [hashlib.sha256(row.tobytes()).hexdigest() for batch in batches for row in batch["image"]]
      labels = [int(label) for batch in batches for label in batch["label"]]
      results[f"{name} {start}"] = [rows.tolist(), images, labels]
  Path(f"{out}-{flags.process_id}.json").write_text(json.dumps(results))
  return 0

if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
"""


@pytest.mark.slow  # starts processes, and workers in them
def test_two_processes_give_the_batches_of_one(tmp_path):
  """Each process reads its rows, the same ones of all sources, from the start and from step 3, some with workers."""
  rows = source_files.labeled()
  sections = {
    name: write(tmp_path / name, rows) for name, write in source_files.LABELED.items() if "json" not in name
  }
  (tmp_path / "keys.json").write_text(json.dumps(sections))
  (tmp_path / "script.py").write_text(PROCESS)
  command = [str(tmp_path / "script.py"), str(tmp_path / "keys.json"), str(tmp_path / "out")]
  started = _start(command, range(2), 2, timeout=400, env={"XLA_FLAGS": ""})
  assert [status for status, _ in started] == [0, 0], started
  wanted = read(make(**sections["folder"]))
  found = [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(2)]
  assert sorted(found[0]["tar 0"][0] + found[1]["tar 0"][0]) == list(range(6))
  for process in found:
    assert len(process) == 2 * len(sections)
    for key, (mine, images, labels) in process.items():
      batches = wanted[int(key.split()[1]) :]
      whole = [hashlib.sha256(batch["image"][row].tobytes()).hexdigest() for batch in batches for row in mine]
      assert images == whole, key
      assert labels == [int(batch["label"][row]) for batch in batches for row in mine], key
