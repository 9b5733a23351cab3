"""Writes the same labeled images, or pairs of images and label maps, in the format of every source."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.test_tfds import _prepare

CLASSES = ("ant", "bee", "cat")


def encoded(array, kind="PNG"):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, kind)
  return buffer.getvalue()


def labeled(count=20):
  """(file name, bytes, class) in the order of a folder; names whose order depends on the rule: "-" < "." < "/"."""
  rng, rows = np.random.default_rng(0), []
  for i in range(count):
    kind = ("jpg", "JPEG") if i % 3 else ("png", "PNG")
    pixels = rng.integers(0, 256, (20 + i, 31, 3), np.uint8)
    name = f"{CLASSES[i % 3]}/{('x', 'x-1', 'x/y', '10', '9')[i % 5]}{i // 5 or ''}.{kind[0]}"
    rows.append((name, encoded(pixels, kind[1]), i % 3))
  return sorted(rows, key=lambda row: row[0].split("/"))


def pairs(count=6):
  """(file name, bytes of an image, bytes of its label map)."""
  rng = np.random.default_rng(1)
  images = [rng.integers(0, 256, (20, 24 + i, 3), np.uint8) for i in range(count)]
  maps = [rng.integers(0, 3, image.shape[:2], np.uint8) for image in images]
  return [
    (f"{i}.png", encoded(image), encoded(labels))
    for i, (image, labels) in enumerate(zip(images, maps, strict=True))
  ]


def write_tar(path, members):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def class_file(root):
  (root / "classes.csv").write_text("\n".join(CLASSES) + "\n")
  return str(root / "classes.csv")


def folder(root, rows):
  for name, data, _ in rows:
    path = root / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return dict(source="folder", root=str(root))


def tar(root, rows):
  """Two shards, in an order of their own."""
  for shard in range(2):
    members = []
    for name, data, label in rows[::-1][shard::2]:
      stem, _, ending = name.rpartition(".")
      members += [(f"./{stem}.{ending}", data), (f"./{stem}.cls", str(label).encode())]
    write_tar(root / f"train-{shard:06d}.tar", members)
  return dict(source="tar", root=str(root), class_file=class_file(root))


def tar_with_json(root, rows):
  members = []
  for name, data, label in rows:
    stem, _, ending = name.rpartition(".")
    members += [(f"{stem}.{ending}", data), (f"{stem}.json", json.dumps({"label": CLASSES[label]}).encode())]
  write_tar(root / "train.tar", members)
  return dict(source="tar", root=str(root), class_file=class_file(root))


HF = {
  "image": {"_type": "Image"},
  "label": {"names": list(CLASSES), "_type": "ClassLabel"},
}


def table(rows, features=HF, label=None):
  """As `datasets` writes it."""
  image = pa.array(
    [{"bytes": data, "path": name} for name, data, _ in rows],
    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
  )
  label = pa.array([row[2] for row in rows], pa.int64()) if label is None else label
  metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
  found = pa.table({"image": image, "label": label})
  return found.replace_schema_metadata(metadata)


def parquet(root, rows):
  (root / "data").mkdir(parents=True)
  for shard, part in enumerate((rows[:7], rows[7:])):
    pq.write_table(table(part), root / "data" / f"train-{shard:05d}-of-00002.parquet", row_group_size=3)
  return dict(source="parquet", root=str(root))


def write_arrow(path, found, batch=3):
  path.parent.mkdir(parents=True, exist_ok=True)
  with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, found.schema) as writer:
    writer.write_table(found, max_chunksize=batch)
  return path


def arrow(root, rows):
  for shard, part in enumerate((rows[:8], rows[8:])):
    write_arrow(root / "train" / f"data-{shard:05d}-of-00002.arrow", table(part))
  return dict(source="arrow", root=str(root))


def tfds_set(root, rows):
  spec = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list(CLASSES))}
  _prepare(root / "toy" / "1.0.0", spec, [{"image": data, "label": [label]} for _, data, label in rows])
  return dict(source="tfds", name="toy", data_dir=str(root))


LABELED = dict(
  folder=folder, tar=tar, tar_with_json=tar_with_json, parquet=parquet, arrow=arrow, tfds=tfds_set
)


def pairs_folder(root, rows):
  for part, column in (("images", 1), ("annotations", 2)):
    (root / part / "train").mkdir(parents=True)
    for row in rows:
      (root / part / "train" / row[0]).write_bytes(row[column])
  return dict(source="pairs", root=str(root))


def tar_of_pairs(root, rows):
  members = []
  for name, image, labels in rows:
    members += [(name, image), (name.replace(".png", ".mask.png"), labels)]
  write_tar(root / "train.tar", members)
  return dict(source="tar", root=str(root), label_key="mask")


def table_of_pairs(rows):
  labels = pa.array([{"bytes": row[2], "path": None} for row in rows])
  return table([(*row[:2], 0) for row in rows], {"image": {"_type": "Image"}}, labels).rename_columns(
    ["image", "mask"]
  )


def parquet_of_pairs(root, rows):
  root.mkdir(parents=True, exist_ok=True)
  pq.write_table(table_of_pairs(rows), root / "train.parquet", row_group_size=4)
  return dict(source="parquet", root=str(root), label_key="mask")


def arrow_of_pairs(root, rows):
  write_arrow(root / "train.arrow", table_of_pairs(rows))
  return dict(source="arrow", root=str(root), label_key="mask")


def tfds_of_pairs(root, rows):
  spec = {"image": tfds.features.Image(), "mask": tfds.features.Image(shape=(None, None, 1))}
  _prepare(root / "toy" / "1.0.0", spec, [{"image": row[1], "mask": row[2]} for row in rows])
  return dict(source="tfds", name="toy", data_dir=str(root), label_key="mask")


PAIRS = dict(
  pairs=pairs_folder, tar=tar_of_pairs, parquet=parquet_of_pairs, arrow=arrow_of_pairs, tfds=tfds_of_pairs
)
