"""Compares the speed of reading the same encoded images from each source with that of a folder of files.

    TFDS_DATA_DIR=DIR python benchmarks/sources.py --name=imagenet2012 --split=train --images=3000 --out=/tmp/sources

The images of a TFDS data set, repeated up to `--images`, are written as a folder, a tar file, Parquet with row groups
of 100 and of 10 images, and Arrow. Then every source is read in a random order and in its own order: bytes only,
nothing is decoded. The sources take turns; the result is the median over all rounds. The files are in the cache of the
operating system, so this measures the cost of a source and not of a disk.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beit_jax.data import sources


def _write(rows, out):
  """Writes (bytes, label) in each format; returns the arguments of `make_source`'s classes."""
  names = [f"{label:04d}/{i:06d}" for i, (_, label) in enumerate(rows)]
  folder = out / "folder" / "train"
  (out / "tar").mkdir(parents=True, exist_ok=True)
  with tarfile.open(out / "tar" / "train-000000.tar", "w") as tar:
    for name, (data, label) in zip(names, rows, strict=True):
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / f"{name}.jpg").write_bytes(data)
      for ending, content in ((".jpg", data), (".cls", str(label).encode())):
        info = tarfile.TarInfo(name + ending)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  image = pa.array([{"bytes": data, "path": None} for data, _ in rows])
  table = pa.table({"image": image, "label": [label for _, label in rows]})
  for size in (100, 10):
    (out / f"parquet{size}").mkdir(exist_ok=True)
    pq.write_table(table, out / f"parquet{size}" / "train.parquet", row_group_size=size)
  (out / "arrow").mkdir(exist_ok=True)
  with (
    pa.OSFile(str(out / "arrow" / "train.arrow"), "wb") as file,
    pa.ipc.new_stream(file, table.schema) as stream,
  ):
    stream.write_table(table, max_chunksize=100)


def _seconds(source, order):
  began = time.perf_counter()
  for index in order:
    source[int(index)]
  return time.perf_counter() - began


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--name", default="imagenet_sample")
  parser.add_argument("--split", default="train")
  parser.add_argument("--images", type=int, default=3000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out", type=Path, default=Path("/tmp/beit_jax_sources"))
  args = parser.parse_args()
  data_dir = os.environ.get("TFDS_DATA_DIR", "")
  tfds = sources.TfdsSource(args.name, args.split, data_dir, "image", "label")
  count = args.images
  examples = [tfds[i] for i in range(min(count, len(tfds)))]
  rows = [(example["image"], example["label"]) for example in examples]
  _write([rows[i % len(rows)] for i in range(count)], args.out)
  root = {name: str(args.out / name) for name in ("folder", "tar", "parquet100", "parquet10", "arrow")}
  makers = {
    "folder": lambda: sources.FolderSource(root["folder"], "train"),
    "tar": lambda: sources.TarSource(root["tar"], "train", "label"),
    "parquet, groups of 100": lambda: sources.ParquetSource(root["parquet100"], "train", "image", "label"),
    "parquet, groups of 10": lambda: sources.ParquetSource(root["parquet10"], "train", "image", "label"),
    "arrow": lambda: sources.ArrowSource(root["arrow"], "train", "image", "label"),
    "tfds": lambda: tfds,
  }
  found, starts = {}, {}
  for name, make in makers.items():
    began = time.perf_counter()
    found[name] = make()
    starts[name] = time.perf_counter() - began
  orders = {"random": np.random.default_rng(0).permutation(count), "in order": np.arange(count)}
  seconds = {(name, order): [] for name in found for order in orders}
  for _ in range(args.rounds):
    for name, order in seconds:
      seconds[name, order].append(_seconds(found[name], orders[order] % len(found[name])))
  medians = {key: statistics.median(values) for key, values in seconds.items()}
  for name in found:
    row = {order: round(count / medians[name, order]) for order in orders}
    ratio = medians["folder", "random"] / medians[name, "random"]
    print(
      json.dumps(
        {"source": name, "images/s": row, "random, to folder": round(ratio, 2), "start": starts[name]}
      )
    )


if __name__ == "__main__":
  main()
