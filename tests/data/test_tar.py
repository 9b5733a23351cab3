"""Tar shards: the index, labels, which members form an example, and files that are cut off."""

import json
import os
import tarfile

import pytest

from beit_jax.data import labels, sources, tar_index
from beit_jax.errors import BadImage, UserError
from tests.data.source_files import write_tar
from tests.data.test_folders import PNG
from tests.data.test_sources import make

SET = [("a.png", PNG), ("a.cls", b"1\n"), ("b.png", PNG), ("b.cls", b"0")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "beit_jax"


def _source(root, split="train", label_key="label"):
  return sources.TarSource(str(root), split, label_key)


def _shard(tmp_path, members=SET, name="train-0.tar"):
  return write_tar(tmp_path / "data" / name, members)


def _scans(monkeypatch):
  """The files whose members are searched from now on."""
  seen, scan = [], tar_index._scan
  monkeypatch.setattr(tar_index, "_scan", lambda path: seen.append(path.name) or scan(path))
  return seen


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
  path, scans = _shard(tmp_path), _scans(monkeypatch)
  assert [_source(path.parent)[i]["label"] for i in range(2)] == [1, 0] and scans == [path.name]
  assert (path.parent / (path.name + tar_index.ENDING)).is_file()
  _shard(tmp_path, [*SET, ("c.png", PNG), ("c.cls", b"7")])
  assert _source(path.parent)[2]["label"] == 7 and len(scans) == 2
  os.utime(path, ns=(1, 1))
  _source(path.parent)
  assert len(scans) == 3
  index = path.parent / (path.name + tar_index.ENDING)
  for text in ("", "{", "[]", json.dumps({**json.loads(index.read_text()), "members": [1]})):
    index.write_text(text)
    assert len(_source(path.parent)) == 3
  assert len(scans) == 7


def test_the_index_of_a_folder_that_cannot_be_written_is_cached(tmp_path, monkeypatch, cache, caplog):
  path, scans = _shard(tmp_path), _scans(monkeypatch)
  write = tar_index._write
  monkeypatch.setattr(tar_index, "_write", lambda place, text: place.parent == cache and write(place, text))
  for _ in range(2):
    _source(path.parent)
  assert len(scans) == 1 and len(os.listdir(cache)) == 1 and os.listdir(path.parent) == [path.name]
  monkeypatch.setattr(tar_index, "_write", lambda *_: False)
  os.utime(path, ns=(1, 1))
  assert len(_source(path.parent)) == 2 and "each start makes it anew" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
  (tmp_path / "file").write_text("")
  assert not tar_index._write(tmp_path / "file" / "x", "")


def test_every_cut_is_found_and_named(tmp_path):
  """At every block, and within blocks: the error names the file and a place at or before the cut."""
  members = [("a/" + "long" * 40 + ".png", PNG), ("a/b.cls", b"1")]  # a name of several header blocks
  data = _shard(tmp_path, members).read_bytes()
  end = data.rstrip(b"\0").rfind(b"1") // 512 * 512 + 512  # of the last member
  path = tmp_path / "cut" / "train.tar"
  path.parent.mkdir()
  for size in [*range(0, end + 1, 256), 1, end - 511, end + 100, end + 511]:
    path.write_bytes(data[:size])
    with pytest.raises(
      UserError, match=rf"{path}: expected a complete tar file .*found {size} bytes, .*byte \d+"
    ) as error:
      _source(path.parent)
    place = int(str(error.value).split("at byte ")[1].split(",")[0])
    assert place <= max(size, 0) + 512
  assert not os.path.exists(f"{path}{tar_index.ENDING}")


def test_a_damaged_header_is_no_end(tmp_path):
  path = _shard(tmp_path)
  data = bytearray(path.read_bytes())
  offset = tar_index.read_index(path)[2].offset - 512
  data[offset + 3] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"at byte {offset}, after the member 'a.cls', a header is damaged"):
    _source(path.parent)


def test_joined_and_compressed_files_are_refused(tmp_path):
  path = _shard(tmp_path)
  data = path.read_bytes()
  path.write_bytes(data + data)
  with pytest.raises(UserError, match="data follow the end mark at byte .*--ignore-zeros"):
    _source(path.parent)
  with tarfile.open(path, "w:gz"):
    pass
  with pytest.raises(UserError, match="if it is compressed, unpack it with gunzip"):
    _source(path.parent)


def test_a_file_cut_off_after_the_start_is_a_bad_image(tmp_path):
  path = _shard(tmp_path)
  source = _source(path.parent)
  os.truncate(path, 600)
  with pytest.raises(BadImage, match=r"train-0.tar/b.png: \d+ bytes from byte \d+ expected, found 0"):
    source[1]


def test_names_of_several_folders_and_shards(tmp_path):
  """Sorted by the path of the image; equal names of different shards are different examples."""
  _shard(
    tmp_path, [("b/x.png", PNG), ("b/x.cls", b"1"), ("0000.png", PNG), ("0000.cls", b"2")], "train-1.tar"
  )
  _shard(
    tmp_path, [("0000.png", PNG), ("0000.cls", b"0"), ("a.b/x.JPG", PNG), ("a.b/x.cls", b"3")], "train-0.tar"
  )
  source = _source(tmp_path / "data")
  names = [source[i]["file"].removeprefix(f"{tmp_path}/data/") for i in range(4)]
  assert names == [
    "train-0.tar/0000.png",
    "train-1.tar/0000.png",
    "train-0.tar/a.b/x.JPG",
    "train-1.tar/b/x.png",
  ]
  assert [source[i]["label"] for i in range(4)] == [0, 2, 3, 1]


def test_members_that_are_left_out_are_named(tmp_path, caplog):
  more = [("a.txt", b"x"), ("._a.png", PNG), ("__MACOSX/b.png", PNG), ("c.v2.png", PNG), ("d.cls", b"0")]
  assert len(_source(_shard(tmp_path, [*SET, *more]).parent)) == 2
  assert "2 hidden files" in caplog.text
  assert "3 files with other endings left out: .cls (1), .txt (1), .v2.png (1)" in caplog.text


@pytest.mark.parametrize(
  "members, fact",
  [
    ([("a.cls", b"1")], "no images in this folder"),
    ([*SET, ("c.png", PNG)], "'c.png' has no label, and the first example .cls; .*found 2 .cls, 1 no label"),
    ([("a.png", PNG), ("a.cls", b"cat")], "'a.cls' holds 'cat'; expected the number of a class"),
    ([("a.png", PNG), ("a.cls", b"")], "'a.cls' holds ''"),
    ([*SET, ("a.PNG", PNG)], "train-0.tar: 'a.png' and 'a.PNG' belong to one example"),
    ([*SET, ("a.png", PNG)], "holds 'a.png' twice, at bytes 512 and"),
  ],
)
def test_errors(tmp_path, members, fact):
  with pytest.raises(UserError, match=fact):
    _source(_shard(tmp_path, members).parent)


def test_labels_may_be_left_out(tmp_path):
  source = _source(_shard(tmp_path, [*SET, ("c.png", PNG)]).parent, label_key="")
  assert len(source) == 3 and not source.has_labels and "label" not in source[0]


def _json(*values, key="label"):
  return [
    member
    for i, value in enumerate(values)
    for member in ((f"{i}.png", PNG), (f"{i}.json", json.dumps({key: value}).encode()))
  ]


def _classes(tmp_path, text="ant\nbee\n", name="classes.csv"):
  (tmp_path / name).write_text(text)
  return str(tmp_path / name)


def test_labels_in_json(tmp_path):
  root = str(_shard(tmp_path, _json("bee", 0)).parent)
  source = make(source="tar", root=root, class_file=_classes(tmp_path))
  assert source.class_names == ("ant", "bee") and [source[i]["label"] for i in range(2)] == [1, 0]
  with pytest.raises(UserError, match="0.png: the label holds 'bee'; .*a name only with data.class_file"):
    make(source="tar", root=root, num_classes=2)[0]
  with pytest.raises(UserError, match="the label holds 'bee'; .*or one of the 2 class names"):
    make(source="tar", root=root, class_file=_classes(tmp_path, "ant\ncat"))[0]
  assert not make(source="tar", root=root, label_key="class").has_labels


def test_several_labels_in_json(tmp_path):
  root = str(_shard(tmp_path, _json(["bee", 0], [], 1)).parent)
  source = make(source="tar", root=root, class_file=_classes(tmp_path))
  assert (
    source.multi_label and source[0]["label"].tolist() == [1, 1] and source[1]["label"].tolist() == [0, 0]
  )
  with pytest.raises(UserError, match="2.png: the label is 1; the first example has several"):
    source[2]


@pytest.mark.parametrize("value", [True, 1.5, None, {"a": 1}])
def test_values_that_are_no_labels(tmp_path, value):
  source = make(source="tar", root=str(_shard(tmp_path, _json(0, value)).parent), num_classes=2)
  with pytest.raises(UserError, match="1.png: the label holds"):
    source[1]


def test_labels_outside_the_classes(tmp_path):
  source = make(source="tar", root=str(_shard(tmp_path).parent), num_classes=1)
  with pytest.raises(
    UserError, match="train-0.tar/a.png: the label is 1, expected a whole number from 0 to 0"
  ):
    labels.check_label(source[0], source.num_classes, False, 0)


def test_the_digest_tells_labels_apart(tmp_path):
  """Processes with different data are refused by it."""
  digests = {
    _source(_shard(tmp_path / text, [("a.png", PNG), ("a.cls", text.encode())]).parent).digest()
    for text in "012"
  }
  assert len(digests) == 3


@pytest.mark.parametrize(
  "files, split, wanted",
  [
    (("train-0.tar", "train-1.tar", "val-0.tar"), "train", 2),
    (("train-0.tar", "train-1.tar", "val-0.tar"), "val", 1),
    (("train-0.tar", "val-0.tar"), "", 2),
    (("x-0.tar", "x-1.tar"), "train", 2),
    (("imagenet-train-0000.tar", "trains.tar"), "train", 1),
    (("train/a.tar", "train/b.tar", "val/c.tar"), "train", 2),
    (("data/train.tar", "data/.train.tar"), "train", 1),
    (("a.tar", "b.tar"), "train", "holds no .tar files of this split .found a.tar, b.tar"),
    (("train.tar.gz",), "train", "found train.tar.gz"),
    (("train-0.tar",), "test", "expected test-00000.tar, ... or test/.*.tar"),
    (
      ("train-00000-of-00003.tar", "train-00002-of-00003.tar"),
      "train",
      "train-00001-of-00003.tar: missing; 1 of 3",
    ),
  ],
)
def test_which_files_belong_to_a_split(tmp_path, files, split, wanted):
  for name in files:
    _shard(tmp_path, SET, name)
  if isinstance(wanted, str):
    with pytest.raises(UserError, match=wanted):
      _source(tmp_path / "data", split)
  else:
    assert len(_source(tmp_path / "data", split)) == 2 * wanted


def test_the_root_may_be_a_file(tmp_path):
  assert len(_source(_shard(tmp_path))) == 2
  with pytest.raises(UserError, match="no such file or folder"):
    _source(tmp_path / "nowhere")
