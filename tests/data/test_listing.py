"""What identifies data besides their length: relative paths and classes."""

import hashlib
import shutil
import tracemalloc

from PIL import Image

from beit_jax.data import sources


def _folder(root, names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(root / name)
  return root


def test_a_copy_of_a_folder_has_the_same_digest(tmp_path):
  root = _folder(tmp_path / "a", ["cat/1.png", "dog/2.png"])
  source = sources.FolderSource(str(root), "")
  assert list(source.listing()) == ["cat/1.png\tcat", "dog/2.png\tdog"]
  copy = sources.FolderSource(str(shutil.copytree(root, tmp_path / "b")), "")
  assert copy.digest() == source.digest() == sources.Subset(copy, 0.5).digest()
  swapped = sources.FolderSource(str(_folder(tmp_path / "c", ["dog/1.png", "cat/2.png"])), "")
  assert len(swapped) == len(source) and swapped.class_names == source.class_names
  assert swapped.digest() != source.digest()


def test_the_classes_of_a_label_file_count(tmp_path):
  root = _folder(tmp_path / "a", ["1.png", "2.png"])
  digests = []
  for text in ("1.png,cat\n2.png,dog\n", "1.png,dog\n2.png,cat\n"):
    (root / "labels.csv").write_text(text)
    digests.append(sources.FolderSource(str(root), "", "labels.csv").digest())
  assert digests[0] != digests[1]
  (root / "labels.csv").unlink()
  assert sources.FolderSource(str(root), "").digest() not in digests


def test_pairs_and_procedural_data(tmp_path):
  _folder(tmp_path, ["images/train/x/1.png", "annotations/train/x/1.png"])
  assert list(sources.PairsSource(str(tmp_path), "train").listing()) == ["images/train/x/1.png"]
  assert sources.ShapesSource("train", 4, 16).digest() == ""


class _Large(sources.Source):
  description = {}

  def listing(self):
    return (f"{i}.png" for i in range(100_000))


def test_the_digest_of_many_files_takes_little_memory():
  expected = hashlib.sha256("\n".join(_Large().listing()).encode()).hexdigest()
  tracemalloc.start()
  digest, (_, peak) = _Large().digest(), tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert digest == expected and peak < 2**21
