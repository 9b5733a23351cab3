"""Which files of a folder are used, in which order, and what the log says of the others."""

import io
import os
import random

import pytest
from PIL import Image, features

from beit_jax import metrics
from beit_jax.data import listing, sources
from beit_jax.data.image_files import find_images
from beit_jax.errors import UserError
from beit_jax.runtime import logs


def _encoded(kind="PNG", color=(200, 30, 40)):
  buffer = io.BytesIO()
  Image.new("RGB", (12, 10), color).save(buffer, kind)
  return buffer.getvalue()


PNG, JPEG = _encoded(), _encoded("JPEG")


def _tree(root, *names, data=PNG):
  """Writes files; "name -> target" is a symbolic link."""
  for name in names:
    name, _, target = name.partition(" -> ")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if target:
      path.symlink_to(target)
    else:
      path.write_bytes(data)
  return root


def _used(source):
  return [os.path.relpath(source[i]["file"], source.description["root"]) for i in range(len(source))]


def _folder(root, split="", **options):
  return sources.FolderSource(str(root), split, **options)


HIDDEN = (
  "a/._1.png",
  "a/.hidden.png",
  "a/.ipynb_checkpoints/1-checkpoint.png",
  ".ipynb_checkpoints/2-checkpoint.png",
  "__MACOSX/a/._1.png",
  "__MACOSX/a/1.png",
  "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
)


def test_hidden_names_are_no_classes_and_no_images(tmp_path, caplog):
  source = _folder(_tree(tmp_path, "a/1.png", "b/1.png", "b/2.png", *HIDDEN))
  assert source.class_names == ("a", "b") and _used(source) == ["a/1.png", "b/1.png", "b/2.png"]
  assert [source[i]["label"] for i in range(3)] == [0, 1, 1]
  assert f"{len(HIDDEN)} hidden files and files of operating systems left out" in caplog.text
  assert ".ipynb_checkpoints (2)" in caplog.text and "__MACOSX (2)" in caplog.text


def test_a_large_hidden_folder_is_not_counted_to_its_end(tmp_path, monkeypatch):
  """A snapshot of a file system may hold millions of files."""
  monkeypatch.setattr(listing, "MAX_COUNTED", 3)
  (tmp_path / ".snapshot").mkdir()
  for i in range(5):
    (tmp_path / ".snapshot" / f"{i}.png").touch()
  assert "3 hidden files" in listing.list_images(tmp_path, "data.root").report()[0]


def test_hidden_names_are_left_out_of_pairs(tmp_path, caplog):
  _tree(tmp_path, "images/train/1.png", "annotations/train/1.png")
  _tree(tmp_path / "images" / "train", *HIDDEN)
  assert len(sources.PairsSource(str(tmp_path), "train")) == 1
  assert f"{len(HIDDEN)} hidden files" in caplog.text


def test_hidden_names_are_left_out_of_predictions(tmp_path, caplog, monkeypatch):
  monkeypatch.chdir(_tree(tmp_path, "a/1.png", *HIDDEN))
  assert [str(path) for path in find_images(["."])] == ["a/1.png"]
  assert f"{len(HIDDEN)} hidden files" in caplog.text
  assert [str(path) for path in find_images(["**/1.png"])] == ["a/1.png", "b/@eaDir/1.png"][:1]
  assert [str(path) for path in find_images(["__MACOSX/*/1.png"])] == ["__MACOSX/a/1.png"]  # named


def test_a_folder_with_a_hidden_name_may_be_given(tmp_path):
  assert _used(_folder(_tree(tmp_path / ".cache" / "photos", "1.png"))) == ["1.png"]


def test_links_are_followed(tmp_path):
  _tree(tmp_path / "store", "cats/1.png", "cats/2.png", "dogs/deep/1.png", "single.png")
  _tree(
    tmp_path / "data",
    "cat -> ../store/cats",
    "dog -> ../store/dogs",
    "emu/1.png",
    "emu/2.png -> ../../store/single.png",
  )
  source = _folder(tmp_path / "data")
  assert source.class_names == ("cat", "dog", "emu")
  assert _used(source) == ["cat/1.png", "cat/2.png", "dog/deep/1.png", "emu/1.png", "emu/2.png"]
  assert len(find_images([str(tmp_path / "data")])) == 5


def test_loops_and_broken_links_are_named(tmp_path, caplog):
  _tree(
    tmp_path / "data",
    "a/1.png",
    "a/up -> ..",
    "a/out -> ../..",
    "b/other -> ../a",
    "b/2.png",
    "self -> self",
    "gone.png -> nowhere.png",
    "c/empty.txt",
  )
  os.mkfifo(tmp_path / "data" / "pipe.png")
  source = _folder(tmp_path / "data")
  assert _used(source) == ["a/1.png", "b/2.png", "b/other/1.png"]
  for line in (
    "4 links to a folder that contains them left out: a/up (1), a/out (1), b/other/up (1), b/other/out (1)",
    "2 links that lead to no file left out: ",
    "1 pipes, sockets and devices left out: pipe.png (1)",
    "1 folders without an image left out: c (1)",
  ):
    words = line.partition(" left out")[0]
    assert words in caplog.text, caplog.text


def test_patterns_follow_links_and_end_at_loops(tmp_path, monkeypatch):
  monkeypatch.chdir(
    _tree(tmp_path, "a/1.png", "a/up -> ..", "a/too -> ../b", "b/2.png", "b/up -> ..", "b/n.txt")
  )
  for pattern, wanted in (
    ("**/*.png", ["a/1.png", "a/too/2.png", "b/2.png"]),
    ("a/**", ["a/1.png", "a/too/2.png"]),
    ("?/**/2.*", ["a/too/2.png", "b/2.png"]),
    (f"{tmp_path}/**/b/*", [f"{tmp_path}/b/2.png"]),
    ("b/*.png", ["b/2.png"]),
  ):
    assert [str(path) for path in find_images([pattern])] == wanted


def test_every_ending_that_can_be_read_is_used(tmp_path, caplog):
  names = ["1.jfif", "2.jpe", "3.JPG", "4.apng", "5.pnm", "without_ending"]
  if features.check("avif"):
    names.append("6.avif")
  _tree(tmp_path, *names, data=JPEG)
  _tree(tmp_path, "labels.csv", "notes.txt", "more.TXT", "LICENSE", "Python", data=b"Python 3 is a language")
  assert sorted(_used(_folder(tmp_path))) == sorted(names)
  assert "5 files with other endings left out: .txt (2), no ending (2), .csv (1)" in caplog.text


def test_a_folder_with_no_image_says_what_it_has(tmp_path):
  _tree(tmp_path, "1.heic", "2.heic", ".3.png")
  with pytest.raises(UserError) as error:
    _folder(tmp_path)
  for fact in (
    "no images in this folder",
    ".avif, ",
    "2 files with other endings left out: .heic (2)",
    "1 hidden",
  ):
    assert fact in str(error.value)
  with pytest.raises(UserError, match=".heic"):
    find_images([str(tmp_path)])


def test_the_order_of_old_runs_is_kept(tmp_path):
  """That of `sorted(Path.rglob)`, which compares paths part by part."""
  rng = random.Random(0)
  pieces = ["a", "a-b", "a b", "A", "a.b", "ä", "10", "9", "a!"]
  names = {
    "/".join(rng.choices(pieces, k=rng.randint(0, 3)) + [f"{rng.choice(pieces)}x.png"]) for _ in range(200)
  }
  _tree(tmp_path, *names)
  wanted = sorted(path for path in tmp_path.rglob("*.png"))
  assert [tmp_path / name for name in _used(_folder(tmp_path))] == wanted


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  _tree(tmp_path, "a/1.png", "b/1.png")
  scandir = os.scandir

  def refuse(path):
    if str(path).rstrip("/").endswith("b"):
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(UserError, match="b/ cannot be listed .Permission denied"):
    _folder(tmp_path)


def test_tables_and_logs_take_any_name(tmp_path, capsys):
  name = os.fsdecode(b"K\xe4se")
  assert "K\\udce4se,1" in metrics.write_csv(tmp_path / "table.csv", [(name, 1)]).read_text()
  logs.setup(tmp_path)
  logs.log.info("the class %s", name)
  assert "the class K\\udce4se" in (tmp_path / "log.txt").read_text()
  assert "surrogates not allowed" not in capsys.readouterr().err
  logs.setup()  # closes log.txt


# Label files.


@pytest.mark.parametrize("name", ["{}", "./{}", "{root}/{}", "{link}/{}", "sub/../{}", " {} ", "\\"])
def test_label_files_name_files_in_any_way(tmp_path, name):
  root = _tree(tmp_path / "data", "deep/1.png", "deep/2.png", "sub/3.png")
  (tmp_path / "link").symlink_to("data")
  text = name.format("deep/1.png", root=root, link=tmp_path / "link") if name != "\\" else ".\\deep\\1.png"
  (root / "labels.csv").write_text(f"{text},cat,dog\n")
  for given in (root, tmp_path / "link"):
    if "{root}" in name and given != root or "{link}" in name:
      given = tmp_path / "link"
    source = _folder(given, label_file="labels.csv")
    assert len(source) == 1 and source[0]["label"].tolist() == [1, 1]


def test_files_that_a_label_file_does_not_name_are_counted(tmp_path, caplog):
  _tree(tmp_path, "1.png", "2.png", "3.png")
  (tmp_path / "labels.csv").write_text("1.png,cat\n")
  assert len(_folder(tmp_path, label_file="labels.csv")) == 1
  assert "2 images that the label file does not name left out: " in caplog.text
  assert "other endings" not in caplog.text  # the label file itself


@pytest.mark.parametrize(
  "row, fact",
  [
    ("gone.png", "'gone.png'"),
    ("x.heic", "'x.heic' exists, but is hidden, outside, or no image by its ending"),
    ("/elsewhere/1.png", "with files relative to"),
    ("file", "without a header"),
  ],
)
def test_label_files_that_name_no_image_are_refused_with_the_reason(tmp_path, row, fact):
  _tree(tmp_path, "1.png", "x.heic")
  (tmp_path / "labels.csv").write_text(f"{row},cat\n1.png,dog\n")
  with pytest.raises(UserError) as error:
    _folder(tmp_path, label_file="labels.csv")
  assert "names 1 files" in str(error.value) and fact in str(error.value)


def test_label_files_in_another_encoding(tmp_path):
  """The bytes of names are compared."""
  name = os.fsdecode(b"K\xe4se.png")
  _tree(tmp_path, name)
  (tmp_path / "labels.csv").write_bytes(b"K\xe4se.png,K\xe4se\n")
  source = _folder(tmp_path, label_file="labels.csv")
  assert _used(source) == [name] and source.class_names == (os.fsdecode(b"K\xe4se"),)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_label_files_of_spreadsheets(tmp_path, encoding):
  _tree(tmp_path, "ä.png")
  (tmp_path / "labels.csv").write_text("ä.png,Käse\r\n,\r\n", encoding=encoding)  # with an empty row
  assert _folder(tmp_path, label_file="labels.csv").class_names == ("Käse",)


def test_images_beside_class_folders_are_named(tmp_path, caplog):
  assert not _folder(_tree(tmp_path, "a/1.png", "b/2.png", "logo.png")).has_labels
  assert "1 of 3 images lie outside of subfolders, so the subfolders are no classes" in caplog.text


# Parts of a folder.


def _classes(root, count=40):
  return _tree(root, *(f"{name}/{i:03d}.png" for name in "abc" for i in range(count)))


def test_two_parts_make_up_the_folder(tmp_path):
  whole = _used(_folder(_classes(tmp_path)))
  train, held_out = _folder(tmp_path, "train[10%:]"), _folder(tmp_path, "train[:10%]")
  assert sorted(_used(train) + _used(held_out)) == whole and len(held_out) == 12
  assert _used(held_out) == sorted(_used(held_out)) and _used(_folder(tmp_path, "[:10%]")) == _used(held_out)
  assert train.class_names == held_out.class_names == ("a", "b", "c")
  assert {held_out[i]["label"] for i in range(12)} == {0, 1, 2}  # some of every class
  assert "part" not in _folder(tmp_path, "train").description
  assert train.description["part"] == "[10%:]" and train.description["num_examples"] == 108
  assert len(_folder(tmp_path, "train[:7]")) == 7 and len(_folder(tmp_path, "train[7:]")) == 113


def test_the_parts_of_a_folder_never_change(tmp_path):
  """A resumed run must hold the same images out."""
  _tree(tmp_path, *(f"{i:02d}.png" for i in range(20)))
  assert _used(_folder(tmp_path, "[:15%]")) == ["06.png", "08.png", "19.png"]


def test_most_held_out_images_stay_so_when_the_folder_grows(tmp_path):
  before = set(_used(_folder(_classes(tmp_path), "train[:10%]")))
  _tree(tmp_path, *(f"c/new{i}.png" for i in range(6)))
  assert len(before & set(_used(_folder(tmp_path, "train[:10%]")))) >= 10


def test_a_class_with_one_image_keeps_its_number(tmp_path):
  """Whichever part holds the image, both parts know the class."""
  _tree(_classes(tmp_path, 3), "bb/1.png")
  for split in ("[50%:]", "[:50%]"):
    assert _folder(tmp_path, split).class_names == ("a", "b", "bb", "c")


@pytest.mark.parametrize("count", [2, 9, 11])
def test_the_smaller_part_of_a_small_folder_is_not_empty(tmp_path, count):
  _tree(tmp_path, *(f"{i}.png" for i in range(count)))
  assert len(_folder(tmp_path, "train[:10%]")) == -(-count // 10)


def test_parts_of_splits_label_files_and_pairs(tmp_path):
  _classes(tmp_path / "val", 4)
  _classes(tmp_path / "images" / "val", 4), _classes(tmp_path / "annotations" / "val", 4)
  _classes(tmp_path / "odd[1:2]", 4)
  assert len(_folder(tmp_path, "val[50%:]")) == 6 and len(_folder(tmp_path, "odd[1:2]")) == 12
  assert len(sources.PairsSource(str(tmp_path), "val[50%:]")) == 6
  (tmp_path / "val" / "labels.csv").write_text("a/000.png,x\nb/000.png,y\n")
  parts = [_folder(tmp_path, part, label_file="labels.csv") for part in ("val[:50%]", "val[50%:]")]
  assert [len(part) for part in parts] == [1, 1] and {part.class_names for part in parts} == {("x", "y")}


def test_a_missing_split_names_the_way_to_hold_images_out(tmp_path):
  with pytest.raises(UserError, match=r"no such subfolder.*eval.split='train\[:10%\]'"):
    _folder(_classes(tmp_path, 1), "val")
  with pytest.raises(UserError, match="this part of 3 images is empty"):
    _folder(tmp_path, "train[50%:50%]")
