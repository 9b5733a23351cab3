"""Random folders, damaged images, configs and command lines give a result or a `UserError`, within seconds and 1 GiB.

The full size takes about thirteen minutes, weight files (tests/weights/test_hostile_files.py) included:

    BEIT_FUZZ=5000 BEIT_FUZZ_IMAGES=20000 BEIT_FUZZ_CONFIGS=2000 BEIT_FUZZ_COMMANDS=40 BEIT_FUZZ_FOLDERS=5000 \
      python -m pytest -n 0 -s tests/system/test_fuzz.py tests/weights/test_hostile_files.py

Each case is a function of its number: `BEIT_FUZZ_FIRST=1234 BEIT_FUZZ_IMAGES=1 pytest -k damaged_images` repeats case
1234. The names of the image samples are sorted before one is drawn, so renaming a sample can change the cases.
"""

import contextlib
import copy
import functools
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import main as main_lib
from beit_jax import objectives, train
from beit_jax import step as step_lib
from beit_jax.config import parse as config_lib
from beit_jax.config import ranges
from beit_jax.data import examples, images, listing, source_folder, sources
from beit_jax.data.image_files import find_images
from beit_jax.data.resize import RESAMPLE
from beit_jax.errors import BadImage, UserError
from beit_jax.models.beit import Beit
from beit_jax.objectives.probe import Knn
from beit_jax.predict import class_maps
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import variable_shapes
from beit_jax.weights.pretrained import Pretrained
from tests import tiny
from tests.conftest import ROOT
from tests.limits import Limits

IMAGES, CONFIGS, COMMANDS, FOLDERS, FIRST = (
  int(os.environ.get(f"BEIT_FUZZ_{name}", default))
  for name, default in (("IMAGES", 300), ("CONFIGS", 60), ("COMMANDS", 3), ("FOLDERS", 100), ("FIRST", 0))
)


# Images.


def _image(format, mode="RGB", size=(40, 30), **options):
  rng = np.random.default_rng(len(format) + size[0])
  small = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
  image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
  if mode == "I;16":
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
  elif mode == "F":
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 3)
  else:
    image = image.convert(mode)
  other_frames = [image.rotate(90 * i) for i in range(1, options.pop("frames", 1))]
  buffer = io.BytesIO()
  image.save(
    buffer, format, **options, **(dict(save_all=True, append_images=other_frames) if other_frames else {})
  )
  return buffer.getvalue()


def _exif(orientation):
  exif = Image.Exif()
  exif[0x0112], exif[0x010F], exif[0x8769] = orientation, "maker" * 5, {0x9003: "2021:06:15 00:00:00"}
  return exif.tobytes()


def _chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(body):
  return b"\x89PNG\r\n\x1a\n" + body


def _chunks(png):
  """Returns (kind, data) of every chunk of an intact PNG."""
  found, at = [], 8
  while at + 8 <= len(png):
    (length,) = struct.unpack(">I", png[at : at + 4])
    found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
    at += 12 + length
  return found


def _interlaced():
  """Returns a 16x16 gray PNG with Adam7 interlacing, which Pillow reads but does not write."""
  pixels = (np.arange(256) % 251).astype(np.uint8).reshape(16, 16)
  starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
  rows = [row for y, x, dy, dx in starts for row in pixels[y::dy, x::dx]]
  data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1)
  return _png(_chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b""))


def _intact_images():
  return {
    "jpeg": _image("JPEG"),
    "jpeg progressive": _image("JPEG", progressive=True),
    "jpeg gray": _image("JPEG", "L"),
    "jpeg cmyk": _image("JPEG", "CMYK"),
    "jpeg 4:4:4": _image("JPEG", subsampling=0, optimize=True),
    "jpeg restarts": _image("JPEG", restart_marker_rows=1),
    **{f"jpeg rotated {i}": _image("JPEG", exif=_exif(i)) for i in (3, 6, 7)},
    "png": _image("PNG"),
    "png rgba": _image("PNG", "RGBA"),
    "png palette": _image("PNG", "P"),
    "png palette transparent": _image("PNG", "P", transparency=b"\0\x80\xff"),
    "png 16-bit": _image("PNG", "I;16"),
    "png 1-bit": _image("PNG", "1"),
    "png gray alpha": _image("PNG", "LA"),
    "png interlaced": _interlaced(),
    "png rotated": _image("PNG", exif=_exif(5)),
    "png multiframe": _image("PNG", frames=3),
    "png line": _image("PNG", size=(5000, 1)),
    "png column": _image("PNG", "L", size=(1, 3000)),
    "jpeg line": _image("JPEG", size=(1, 4000)),
    "webp": _image("WEBP"),
    "webp lossless": _image("WEBP", "RGBA", lossless=True),
    "webp multiframe": _image("WEBP", frames=3, exif=_exif(8)),
    "gif": _image("GIF", "P", frames=2),
    "tiff": _image("TIFF", exif=_exif(6)),
    "tiff lzw": _image("TIFF", compression="tiff_lzw"),
    "tiff float": _image("TIFF", "F"),
    "tiff 16-bit": _image("TIFF", "I;16", compression="tiff_deflate"),
    "bmp": _image("BMP"),
    "ppm": _image("PPM"),
  }


SIZES = (0, 1, 2, 7, 255, 4096, 8192, 8193, 16383, 30_000, 65_535, 2**24, 2**31 - 1, 2**32 - 1)


def _other_sizes(rng, data):
  """Changes the width or height in the header and updates the checksum."""
  damaged = bytearray(data)
  sizes = [rng.choice(SIZES) if rng.random() < 0.7 else rng.randrange(1, 9000) for _ in range(2)]
  if data.startswith(b"\x89PNG"):
    both = struct.pack(">II", *sizes)
    damaged[16:24] = both if rng.random() < 0.5 else both[:4] + data[20:24]
    damaged[29:33] = struct.pack(">I", zlib.crc32(bytes(damaged[12:29])))
  elif data.startswith(b"\xff\xd8"):
    frame = re.search(rb"\xff[\xc0-\xc2]\0.", data, re.S)
    if frame:
      damaged[frame.start() + 5 : frame.start() + 9] = struct.pack(">HH", *(side % 65_536 for side in sizes))
  elif data.startswith(b"GIF"):
    damaged[6:10] = struct.pack("<HH", *(side % 65_536 for side in sizes))
  elif data.startswith(b"BM"):
    damaged[18:26] = struct.pack("<II", *sizes)
  elif data.startswith(b"P6"):
    damaged = bytearray(b"P6\n%d %d\n255\n" % tuple(sizes)) + damaged[-50:]
  elif data.startswith(b"RIFF"):
    at = 20 + rng.choice((1, 4, 6, 7, 9))
    damaged[at : at + 3] = struct.pack("<I", sizes[0])[:3]
  elif data.startswith(b"II"):
    for tag in (256, 257):
      at = data.find(struct.pack("<H", tag))
      if at > 0:
        damaged[at + 8 : at + 12] = struct.pack("<I", sizes[tag - 256])
  return bytes(damaged)


def _other_chunks(rng, data):
  """Repeats, deletes, moves or changes chunks of a PNG, with valid checksums; repeats segments of a JPEG."""
  if not data.startswith(b"\x89PNG"):
    markers = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", data)] or [0]
    start, stop = sorted((rng.choice(markers), rng.choice(markers)))
    at = rng.choice(markers)
    return (
      data[:at] + data[start:stop] + data[at if rng.random() < 0.5 else min(at + stop - start, len(data)) :]
    )
  chunks = _chunks(data)
  if not chunks:
    return data
  at = rng.randrange(len(chunks))
  kind, content = chunks[at]
  what = rng.randrange(5)
  if what == 0:
    chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
  elif what == 1:
    del chunks[at]
  elif what == 2:
    rng.shuffle(chunks)
  elif what == 3 and content:
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
      changed[rng.randrange(len(changed))] = rng.randrange(256)
    chunks[at] = (kind, bytes(changed))
  else:
    other = rng.choice(
      (b"tEXt", b"iTXt", b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT")
    )
    junk = rng.choice((rng.randbytes(rng.randrange(60)), b"k\0\0" + zlib.compress(b"\0" * 10**6), content))
    chunks.insert(rng.randrange(len(chunks) + 1), (other, junk))
  return _png(b"".join(_chunk(kind, content) for kind, content in chunks))


def _flips(rng, data):
  damaged = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
    edge = rng.random() < 0.5  # half of the changes are in the header
    at = rng.randrange(min(len(data), 64) if edge else len(data))
    damaged[at] = damaged[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.randrange(256)
  return bytes(damaged)


def _cut(rng, data):
  start = rng.randrange(len(data))
  return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randrange(1, 40) :]


def _filled(rng, data):
  start, count = rng.randrange(len(data)), rng.randrange(1, 200)
  filling = rng.choice((b"\0" * count, b"\xff" * count, rng.randbytes(count)))
  return data[:start] + filling + data[start + count :]


def _doubled(rng, data):
  start, count, at = rng.randrange(len(data)), rng.randrange(1, 200), rng.randrange(len(data))
  return data[:at] + data[start : start + count] + data[at:]


DAMAGES = (_flips, _flips, _cut, _filled, _doubled, _other_sizes, _other_sizes, _other_chunks)


def _damaged(rng, samples):
  name = rng.choice(sorted(samples))
  data = samples[name]
  if rng.random() < 0.05:
    other = rng.choice(sorted(samples))
    return f"{name} and {other}", data[: rng.randrange(len(data))] + samples[other]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    data = rng.choice(DAMAGES)(rng, data) or b"\0"
  return name, data


def _read(rng, data, case):
  """Passes `data` to every reader of images, each within `case(what)`; returns whether it can be decoded."""
  found = None
  with case("decode"):
    try:
      found = examples.decode({"image": data, "file": "x.jpg"}, 0)
      pixels = found.pixels()
    except BadImage as error:
      found = None
      assert "x.jpg cannot be decoded: " in str(error)
  with case("label map"):
    try:
      labels = examples.decode_labels(data, "x.png")
      assert labels.ndim == 2 and labels.dtype.kind in "ui"
    except UserError as error:
      assert str(error).startswith("x.png: the label map ")
  if found is None:
    return False
  assert pixels.dtype == np.uint8 and pixels.shape == (*found.size[::-1], 3) and min(found.size) > 0
  del pixels
  views, crop = {"view": ((16, 16), rng.choice(sorted(RESAMPLE)))}, rng.choice(images.CROPS)
  options = dict(scale=(0.08, 1.0), ratio=rng.choice(((3 / 4, 4 / 3), (0.1, 0.2), (10.0, 20.0))), flip=True)
  with case(f"{crop} of {found.size}"):
    made = images.train_views(found, np.random.default_rng(0), views, crop=crop, **options)
  assert made["view"].shape == (16, 16, 3) and made["view"].dtype == np.uint8
  with case(f"evaluation of {found.size}"):
    made = images.eval_views(found, views, crop_pct=0.875, resize=rng.choice(images.RESIZES))
  assert made["view"].shape == (16, 16, 3) and made["view"].dtype == np.uint8
  return True


def _case(limits, sample, what):
  return limits.case(f"{sample}, {what}")


def test_damaged_images_are_decoded_or_rejected():
  """Warnings are errors in half of the cases, as in all tests, and ignored in the others, as in a run."""
  samples = _intact_images()
  for name, data in samples.items():
    assert _read(random.Random(0), data, contextlib.nullcontext), name
  limits, good = Limits("images"), 0
  for i in range(FIRST, FIRST + IMAGES):
    rng = random.Random(f"images {i}")
    name, data = _damaged(rng, samples)
    case = functools.partial(_case, limits, f"{i}: {name}, {len(data)} bytes")
    with warnings.catch_warnings():
      warnings.simplefilter(rng.choice(("error", "ignore")))
      good += _read(rng, data, case)
  limits.report(images=IMAGES, readable=good)
  # The damage is neither harmless nor always fatal.
  assert IMAGES < 100 or 0.05 < good / IMAGES < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "I;16", "F", "P"])
def test_the_largest_allowed_image_is_decoded_in_less_than_a_gib(mode):
  """A file of a few KB holds 67 million pixels."""
  side = 8192
  format, options = {
    "CMYK": ("JPEG", dict(progressive=True)),
    "F": ("TIFF", dict(compression="tiff_lzw")),
  }.get(mode, ("PNG", dict(compress_level=1)))
  buffer = io.BytesIO()
  Image.new(mode, (side, side)).save(buffer, format, **options)
  data = buffer.getvalue()
  del buffer
  _read(random.Random(0), _image("PNG"), contextlib.nullcontext)
  limits = Limits(f"a large image, {mode}")
  assert _read(random.Random(0), data, limits.case)
  limits.report()


# Folders.

STEMS = [
  "a",
  "b b",
  " c",
  "-d",
  "é",
  "e\u0301",
  "10",
  "9",
  "x\ny",
  "train",
  "val",
  os.fsdecode(b"K\xe4se"),
  "[0:1]",
]
HIDDEN = [".a", "._b", ".ipynb_checkpoints", "__MACOSX", "lost+found"]
ENDINGS = [
  ".png",
  ".PNG",
  ".jpg",
  ".jfif",
  ".jpe",
  ".tif",
  ".avif",
  "",
  "",
  ".",
  ".txt",
  ".csv",
  ".tar.gz",
  ".png.bak",
]


def _random_tree(rng, root):
  """Fills a folder with files, folders, links (also to themselves, to folders above and to nothing) and pipes."""
  contents = [*(_image(kind) for kind in ("PNG", "JPEG", "TIFF")), b"", b"text", b"P1 text", b"\xff\xd8\xff"]
  folders, paths = [root], [root]
  for _ in range(rng.randint(0, 25)):
    folder = rng.choice(folders)
    name = rng.choice(HIDDEN if rng.random() < 0.15 else STEMS)
    kind = rng.choices(["folder", "file", "link", "pipe"], [6, 12, 5, 1])[0]
    path = folder / (name if kind == "folder" else name + rng.choice(ENDINGS))
    if os.path.lexists(path) or len(path.parts) - len(root.parts) > 4:
      continue
    if kind == "folder":
      path.mkdir()
      folders.append(path)
    elif kind == "file":
      path.write_bytes(rng.choice(contents))
    elif kind == "pipe":
      os.mkfifo(path)
    else:
      target = rng.choice([*paths, path, root.parent, root / "nowhere", "relative"])
      path.symlink_to(os.path.relpath(target, folder) if rng.random() < 0.5 else target)
    paths.append(path)


def _count_leaves(folder, above=()):
  """Counts what a folder holds, through links: each file, link to nowhere or to a folder above, pipe."""
  identity, count = os.path.realpath(folder), 0
  above = above or tuple(map(str, folder.resolve().parents))
  if identity in above:
    return 1
  for name in os.listdir(folder):
    path = os.path.join(folder, name)
    hidden = listing.is_metadata(name)
    if os.path.isdir(path) and not (hidden and os.path.islink(path)):
      count += sum(len(f) for *_, f in os.walk(path)) if hidden else _count_leaves(path, (*above, identity))
    else:
      count += 1
  return count


def _left_out(text):
  """Adds up the lines of the log, or of an error, about files that are left out."""
  reasons = [
    listing.HIDDEN,
    listing.OTHER,
    listing.BROKEN,
    listing.LOOP,
    listing.SPECIAL,
    source_folder.UNNAMED,
  ]
  return sum(map(int, re.findall(rf"(\d+) (?:{'|'.join(map(re.escape, reasons))}) left out", text)))


def _random_label_file(rng, root, names):
  rows = []
  for name in rng.sample(names, rng.randint(0, len(names))):
    name = rng.choice([name, f"./{name}", f"{root}/{name}", name.replace("/", "\\"), f'"{name}"'])
    rows.append(",".join([name, *rng.choices(["x", "y", " ", "é", ""], k=rng.randint(0, 3))]))
  data = "\n".join(rows).encode(errors="surrogateescape")
  if rng.random() < 0.3:
    data += rng.choice([b"\0", b'"', b"\xff\xfe,a", b"gone.png,x", b";", b"\n,\n", b"../../x.png,y"])
  (root / "labels.csv").write_bytes(data)


def _result(make):
  """(what `make` returns, the text of the error)."""
  try:
    return make(), ""
  except UserError as error:
    return None, str(error)


def _check_folder(rng, root, caplog):
  """Reads a random tree in every way; returns the number of images."""
  _random_tree(rng, root)
  caplog.clear()
  source, error = _result(lambda: sources.FolderSource(str(root), ""))
  used = [source[i]["file"] for i in range(len(source))] if source else []
  assert len(used) + _left_out(caplog.text + error) == _count_leaves(root), (caplog.text, error)
  files = _result(lambda: find_images([str(root)]))[0] or []
  assert used == [str(path) for path in files]
  if source is None:
    return 0
  assert len(set(class_maps.output_names(files, root / "out"))) == len(files)
  json.dumps([source.description, source.class_names, list(source.listing())])
  for i in range(len(source)):
    with contextlib.suppress(BadImage):
      examples.decode(examples.read(source, i), i).pixels()
  parts = [_result(lambda: sources.FolderSource(str(root), part))[0] for part in ("[30%:]", "[:30%]")]  # noqa: B023
  assert sorted(used) == sorted(part[i]["file"] for part in parts if part for i in range(len(part)))
  for split in ("train", "val", "a", "10[1:]", "\0", "x" * 300, "[5:1]"):
    _result(lambda: sources.FolderSource(str(root), split))  # noqa: B023
    _result(lambda: sources.PairsSource(str(root), split))  # noqa: B023
  _random_label_file(rng, root, [os.path.relpath(path, root) for path in used])
  caplog.clear()
  labeled, error = _result(lambda: sources.FolderSource(str(root), "", "labels.csv"))
  assert labeled is None or len(labeled) + _left_out(caplog.text) == _count_leaves(root) - 1
  assert labeled or "data.label_file" in error
  return len(used)


def test_random_folders_are_read_or_rejected(tmp_path, caplog):
  """No traceback, and the log accounts for every file."""
  caplog.set_level("INFO", "beit_jax")
  limits, found = Limits("folders"), 0
  for i in range(FIRST, FIRST + FOLDERS):
    root = tmp_path / str(i) / "data"
    root.mkdir(parents=True)
    with limits.case(f"{i}"):
      found += _check_folder(random.Random(f"folders {i}"), root, caplog)
    shutil.rmtree(root.parent)
  limits.report(images=found)
  assert FOLDERS < 100 or found > FOLDERS


# Configs.

INTEGERS = (0, 1, 2, 3, 7, 16, -1, 255, 10**9, 10**18, -(10**18), 10**400, 2**31, 2**32)
FLOATS = (0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e30, 1e300, float("nan"), float("inf"), -float("inf"))
STRINGS = (
  "", "x", "\0", "é" * 5000, "(", "[a", "stage:", "stage:tokenizer", "/proc/self/mem", "~nobody/x", "..", ".",
)  # fmt: skip
SEQUENCES = (
  (), (1,), (0.5, 0.5), (1.0, 0.1), (0.0, 0.0), (0, 0, 0), (1, 2, 3, 4), ("a", "b"), (None, None), [1, 2], [[]],
  ({},), ((1, 2), (3, 4)), (float("nan"),) * 2, (float("inf"),) * 3, (0.5, 0.5, 0.5), (16, 32), (1e300, 1e300),
)  # fmt: skip
OTHER_VALUES = ({}, {"a": 1}, {"a": {"b": ()}}, {"a.b": 1}, {1: 2}, b"bytes", range(3), object(), {1, 2}, 1j)
PLAIN = (None, True, False, *INTEGERS, *FLOATS, *STRINGS, *SEQUENCES, *OTHER_VALUES)
WORDS = (
  "cosine poly block random block_at_most paper plus tiny base large bicubic nearest lanczos float16 bfloat16 float64 "
  "int8 float32 per_block shared none cls mean setr_pup upernet whole slide l1 l2 rand-m9-mstd0.5-inc1 pad center "
  "random_resized squash short_side folder pairs tfds shapes train test camvid acc1 loss dvae beit knn segment classify"
).split()


def _sections(run, prefix=()):
  """Yields the path of every key in nested dicts, sections included."""
  for key, value in run.items():
    yield (*prefix, key)
    if isinstance(value, dict):
      yield from _sections(value, (*prefix, key))


def _near(rng, value):
  """Returns a value like the given one, usually of the same type."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return rng.choice(
      (value * 2, value + 1, value - 1, -value, value // 2, value * 0.5, value * 10, value * 1000)
    )
  if isinstance(value, str):
    return rng.choice(WORDS)
  if isinstance(value, tuple) and value:
    return rng.choice((value[::-1], value[:-1], value * 2, tuple(_near(rng, v) for v in value), list(value)))
  return rng.choice(PLAIN)


def _mutated(rng, bases):
  name = rng.choice([name for name in bases if "default" not in name or rng.random() < 0.3])
  run, done = copy.deepcopy(bases[name]), []
  paths = [path for path in _sections(run) if rng.random() < 0.8 or len(path) > 1]
  for _ in range(rng.choice((1, 1, 2, 3))):
    *parents, last = rng.choice(paths)
    node = run
    for parent in parents:
      node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict):
      continue
    if rng.random() < 0.05:
      last = rng.choice(("nothing", "mode1", "", "a.b", 5, None, "__class__", "items", *WORDS))
    value = _near(rng, node.get(last)) if rng.random() < 0.7 else rng.choice((*PLAIN, *WORDS))
    node[last] = value
    done.append(f"{'.'.join(map(str, (*parents, last)))}={ranges.show(value, 60)}")
  return f"{name} with {', '.join(done)}", run


class Reached(Exception):
  """Raised where a run would create its first array."""


TEACHERS = {"teacher 8x8": 8, "teacher 2x2": 2}  # path -> patches in each direction


def _teacher(side):
  module = Beit(image_size=(4 * side, 4 * side), patch_size=4, width=8, depth=1, num_heads=2)
  params = jax.tree.map(lambda x: np.zeros(x.shape), variable_shapes(module, module.image_size)["params"])
  preprocessing = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=module.image_size)
  return Pretrained("backbone", params, module, preprocessing)


@pytest.fixture
def no_arrays(monkeypatch, tokenizer_run):
  """Stops runs before they create their first array, and reads the tokenizer only once."""

  def stop(*_, **__):
    raise Reached

  loaded, original = weights_io.load(tokenizer_run), weights_io.load

  def load(path, **options):
    if path in TEACHERS:
      return _teacher(TEACHERS[path])
    return loaded if path == str(tokenizer_run) else original(path, **options)

  monkeypatch.setattr(train_state, "create", stop)
  monkeypatch.setattr(Knn, "frozen_params", stop)
  monkeypatch.setattr(weights_io, "load", load)


def _bases(tokenizer):
  """Returns small configs, and configs of the size of the paper."""
  found = {name: tiny.raw(name).to_dict() for name in tiny.RUNS}
  for name in tiny.RUNS:
    full = config_lib.complete({"objective": found[name]["objective"]}, objectives.schemas()).to_dict()
    full["data"] |= dict(source="shapes", num_classes=None, token_image_size=28)
    full["total_epochs"] = 3.0
    full["eval"]["split"] = "test"
    found[f"default {name}"] = full
    if name == "segment":
      full["model"]["num_classes"] = 9
    if name in ("dvae", "vqkd"):
      full["data"]["token_image_size"] = 32
  for name, run in found.items():
    if run["objective"] == "vqkd":
      run["teacher"] = {"init_from": "teacher 2x2" if "default" in name else "teacher 8x8"}
    if run["objective"] == "beit":
      run["tokenizer"] = {"init_from": tokenizer}
  return found


def _run_until_arrays(run, workdir):
  """Runs `run` up to its first array and returns the completed config."""
  config = config_lib.complete(run, objectives.schemas())
  with contextlib.suppress(Reached):
    train.run(config, workdir)
  return config


def _trace(config):
  """Reads the first example and traces the steps of training and evaluation."""
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  with jax.set_mesh(mesh):
    _trace_steps(config, train.prepare(config, mesh), mesh)


def _trace_steps(config, plan, mesh):
  objective, source = plan.objective, plan.source
  image = examples.decode(source[0], 0)
  plan.reader.eval(image, source[0])
  example = plan.reader.train(image, source[0], (config.seed, 0, 0))
  example |= {"example_key": np.zeros(2, np.uint32), "valid": np.array(True)}
  batch = {
    name: jax.ShapeDtypeStruct((config.batch_size, *np.shape(value)), np.asarray(value).dtype)
    for name, value in example.items()
  }

  def init():
    return objective.init(jax.random.key(0))

  decay = config.optimizer.ema_decay
  _, shapes, shardings = train_state.abstract(init, plan.tx, mesh, ema=decay > 0)
  frozen = jax.eval_shape(lambda: objective.frozen_params(mesh))
  step = step_lib.make_train_step(
    objective, plan.tx, config.microbatches, jax.random.key(1), shardings, decay
  )
  jax.eval_shape(step, shapes, frozen, batch)
  jax.eval_shape(objective.eval_step, {"params": shapes.params, **shapes.collections}, frozen, batch)


def test_mutated_configs_are_accepted_or_rejected(no_arrays, tokenizer_run, tmp_path):
  bases = _bases(str(tokenizer_run))
  for run in bases.values():
    _run_until_arrays(copy.deepcopy(run), tmp_path / "base")
  limits, traces, accepted = Limits("configs"), Limits("configs, steps traced", seconds=60), 0
  for i in range(FIRST, FIRST + CONFIGS):
    rng = random.Random(f"configs {i}")
    what, run = _mutated(rng, bases)
    trace = rng.random() < 0.3 and "default" not in what
    try:
      with limits.case(f"{i}: {what}"):
        config = _run_until_arrays(run, tmp_path / f"{i}")
      accepted += 1
      if trace and objectives.objective_of(config).trains:
        with traces.case(f"{i}: {what}"):
          _trace(config)
    except UserError as error:
      assert 10 < len(str(error)) < 10_000 and "Traceback" not in str(error)
    if i % 100 == 99:
      jax.clear_caches()
  limits.report(accepted=accepted)
  traces.report()


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"batch_size": 0}, "'batch_size': 0 must be a whole number from 1"),
    ({"optimizer.betas": (0.999, 0.9)}, r"'optimizer.betas': \(0.999, 0.9\) must be two numbers"),
    ({"optimizer.learning_rate": float("nan")}, "'optimizer.learning_rate': nan must be a finite number"),
    ({"optimizer.no_decay": ("(",)}, "'optimizer.no_decay'.*regular expressions"),
    ({"data.crop_scale": (1.0, 0.5)}, r"'data.crop_scale'.*\(0, 1\], the smaller one first"),
    ({"data.std": (0.5, 0.5, 0.0)}, "'data.std'.*numbers from 1e-6 to 1e6, one for each channel"),
    ({"data.mean": (0.5, 2.0)}, "'data.mean'.*numbers in .0, 1., one for each channel"),
    ({"data.threads": 0}, "'data.threads': 0"),
    ({"data.root": "a\0b"}, "'data.root'.*null"),
    ({"checkpoint.keep": 0}, "'checkpoint.keep': 0"),
    ({"seed": 2**32}, "'seed': 4294967296"),
    ({"log_every_steps": 0}, "'log_every_steps'"),
    ({"model.dtype": "float64"}, "'model.dtype': 'float64' must be one of float32"),
    ({"model.depth": 1000}, "'model.depth': 1000"),
    ({"model.drop_path_rate": 1.0}, r"'model.drop_path_rate': 1.0 must lie in \[0, 1\)"),
    ({"data.image_size": 2**20}, "'data.image_size': 1048576"),
    ({"total_steps": 10**400}, "'total_steps': 1000.*\\.\\.\\. must be"),
  ],
)
def test_out_of_range_values_are_rejected(changes, fact):
  with pytest.raises(UserError, match=fact):
    tiny.config("classify", **changes)


@pytest.mark.parametrize(
  "text, fact",
  [
    ("def get_config(): return 5", "get_config gave 5"),
    ("def get_config(): return {}['x']", "line 2: KeyError: 'x'"),
    ("1 / 0", "line 2: ZeroDivisionError"),
    ("get_config = 3", "no get_config"),
    ("def get_config(): return dict(stages=5)", "names of one or more stages"),
    ("def get_config(): return {'stages': ('../x',), '../x': {}}", "'../x' cannot name a stage"),
    ("def get_config(): return {'stages': ('a', 'a'), 'a': {}}", "'a' cannot name a stage"),
    ("def get_config(): return {'stages': ('a',), 'a': 7}", "stage a: found 7"),
    ("def get_config(): return {'stages': ('a',), 'a': {}, 'summary': (('x', 'a.eval'),)}", "'summary'"),
    (
      "def get_config(): return {'stages': ('a',), 'a': {'eval': {'num_examples': 0}}}",
      "'a.eval.num_examples': 0",
    ),
  ],
)
def test_invalid_config_files_are_rejected(text, fact, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(f"# a config\n{text}\n")
  with pytest.raises(UserError) as error:
    config_lib.load(str(path), [], objectives.schemas())
  assert fact in str(error.value)


def test_every_range_matches_an_existing_key():
  keys = set()
  for name in objectives.OBJECTIVES:
    run = config_lib.complete({"objective": name}, objectives.schemas()).to_dict()
    keys |= {".".join(path) for path in _sections(run)}
  for pattern, _ in (*ranges.COMMON, *ranges.MODEL):
    assert any(re.fullmatch(pattern, key) for key in keys), pattern


# Command lines.


def _config_file(folder):
  """Writes a config whose data set is missing, so that a valid command line soon ends with status 2."""
  run = tiny.raw("classify", **{"data.source": "tfds", "data.name": "none", "data.data_dir": str(folder)})
  path = folder / "config.py"
  path.write_text(
    textwrap.dedent(f"""
      from ml_collections import ConfigDict

      def get_config(variant="a"):
        return ConfigDict({run.to_dict()!r})
    """)
  )
  return str(path)


TEXTS = (
  "", "1", "-1", "0", "nan", "1e999", "none", "True", "x", "é\n\t", "%s%n", "--", "-", "=", "0x" + "f" * 6000,
  "(1,2", "{[]: 1}", "[" * 500, "-" * 500 + "1", "1is", "'\\d'", "()", "{}", "(0.5,)*3", "lambda: 0", "a" * 50_000,
)  # fmt: skip


def _command(rng, config, folder):
  key = rng.choice(
    ("seed", "batch_size", "data", "data.mean", "optimizer.betas", "model.width", "model.nothing", "eval..")
  )
  value = rng.choice(TEXTS)
  flags = [f"--config={config}", f"--workdir={folder / 'run'}"]
  program = rng.choice(("main", "main", "main", "main", "main", "doctor", "convert", "predict"))
  if program in ("main", "doctor"):
    more = rng.choice(
      (
        [f"--config.{key}={value}"],
        [f"--config.{key}", value],
        [f"--config.{value[:100]}={value}"],
        [
          f"--config={rng.choice((value, __file__, str(ROOT / 'README.md'), sys.executable, str(folder), '/dev/null'))}"
        ],
        [f"--config={config}:{value}"],
        [f"--workdir={rng.choice((value, '/dev/null/x', '/proc/x', config))}"],
        [f"--{value}"],
        [value],
        [f"--num_processes={value}"],
        [f"--process_id={value}", "--num_processes=1"],
        ["--config"],
      )
    )
    return program, [*flags, *more] if rng.random() < 0.8 else more
  noise = rng.sample(
    [value, config, str(folder), "--format=hf", "--format=x", "--ema", "--top=0", "--image_size=x"], 4
  )
  return program, noise


def test_random_command_lines_end_without_a_traceback(tmp_path):
  config, statuses = _config_file(tmp_path), []
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  for i in range(FIRST, FIRST + COMMANDS):
    program, arguments = _command(random.Random(f"commands {i}"), config, tmp_path)
    done = subprocess.run(
      [sys.executable, "-m", f"beit_jax.{program}", *arguments],
      cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    what = json.dumps([program, *(ranges.show(text) for text in arguments)])
    assert "Traceback" not in done.stderr + done.stdout, (i, what, done.stderr[-2000:])
    wanted = (0, 1, 2) if program in ("doctor", "predict") else (2,)
    assert done.returncode in wanted, (i, what, done.returncode, done.stderr[-2000:])
    if program == "main":
      errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
      assert len(errors) == 1, (i, what, done.stderr[-2000:])
    statuses.append(done.returncode)
  print(
    f"\ncommands: {len(statuses)}, with status {', '.join(f'{s}: {statuses.count(s)}' for s in (0, 1, 2))}"
  )


@pytest.mark.parametrize("workdir", ["/dev/null/x", "/proc/x", __file__, "x" * 300])
def test_a_workdir_that_cannot_be_created_is_rejected(workdir, capsys):
  assert main_lib.main([f"--config={ROOT}/configs/segment_shapes.py", f"--workdir={workdir}"]) == 2
  assert "nothing can be written there" in capsys.readouterr().err
