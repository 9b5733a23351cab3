"""From encoded JPEGs to two uint8 views on one core: ours against Pillow. Images a second, ratios, PSNR.

    TFDS_DATA_DIR=DIR python benchmarks/input.py --name=imagenet2012 --split=train

Three contestants cut the same box from the same picture, resize it to 224 (bicubic) and 112 (lanczos) and flip the
same ones: ours (`images.train_views`); Pillow alone, as torchvision's loader and its
`resized_crop` do it; Pillow with unilm's colour jitter (0.4) of the whole picture first, which here runs on the device.
A fourth is ours with data.scaled_decode. They take turns, a block of pictures each; the median over all rounds counts.
Reading the records is left out. `--mosaic=4` makes pictures of 4x4 pictures: as large as those of a camera.
"""

import argparse
import io
import os
import time

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance

from beit_jax.data import images, sources

VIEWS = {"image": ((224, 224), "bicubic"), "token_image": ((112, 112), "lanczos")}
LAW = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
JITTER = 0.4


def _rng(index):
  return np.random.default_rng((0, 0, index, 2))


def ours(encoded, index, scaled=False):
  return images.train_views(
    images.LazyImage(encoded), _rng(index), VIEWS, crop="random_resized", flip=True, scaled=scaled, **LAW
  )


def scaled(encoded, index):
  return ours(encoded, index, scaled=True)


def _upright(encoded):
  """What torchvision's loader does, and the turn that ours takes from EXIF."""
  image = Image.open(io.BytesIO(encoded)).convert("RGB")
  turn = image.getexif().get(0x0112, 1)
  return images.ImageOps.exif_transpose(image) if turn != 1 else image


def _pillow_views(image, rng):
  box = images.random_resized_box(rng, *image.size, **LAW)
  flip = rng.random() < 0.5
  result = {}
  for name, (size, how) in VIEWS.items():
    view = image.crop(box).resize(size[::-1], images.RESAMPLE[how])
    result[name] = np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)
  return result


def pillow(encoded, index):
  return _pillow_views(_upright(encoded), _rng(index))


def jittered(encoded, index):
  """torchvision's ColorJitter(0.4, 0.4, 0.4): brightness, contrast and saturation, in random order."""
  image, rng = _upright(encoded), np.random.default_rng((0, 0, index, 9))
  kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for kind in rng.permutation(3):
    image = kinds[kind](image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
  return _pillow_views(image, _rng(index))


def psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-10))


def mosaics(encoded, side):
  """Pictures of side x side pictures, each the first's size; quality 90."""
  made = []
  for start in range(0, len(encoded) - side**2 + 1, side**2):
    parts = [images.decode(data) for data in encoded[start : start + side**2]]
    width, height = parts[0].size
    whole = Image.new("RGB", (side * width, side * height))
    for i, part in enumerate(parts):
      whole.paste(part.resize((width, height)), (i % side * width, i // side * height))
    made.append(simplejpeg.encode_jpeg(np.asarray(whole), 90, "RGB", "420"))
  return made


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--name", default="imagenet_sample", help="of the TFDS data set")
  parser.add_argument("--split", default="train")
  parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR", ""))
  parser.add_argument("--count", type=int, default=500, help="pictures")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--block", type=int, default=25, help="pictures before the next one's turn")
  parser.add_argument("--mosaic", type=int, default=0)
  flags = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  source = sources.TfdsSource(flags.name, flags.split, flags.data_dir, "image", "")
  encoded = [source[i]["image"] for i in range(min(flags.count, len(source)))]
  encoded = mosaics(encoded, flags.mosaic) if flags.mosaic else encoded
  sizes = np.array([images.open_image(data).size for data in encoded])
  mean = sizes.mean(0).round().astype(int)
  print(
    f"{len(encoded)} pictures, {mean[0]}x{mean[1]} and {np.mean([*map(len, encoded)]) / 1e3:.0f} kB on average"
  )

  contestants = {"ours": ours, "scaled decode": scaled, "Pillow": pillow, "Pillow, jitter": jittered}
  for contestant in contestants.values():
    contestant(encoded[0], 0)
  seconds = {name: np.zeros(flags.rounds) for name in contestants}
  for turn in range(flags.rounds):
    for start in range(0, len(encoded), flags.block):
      for name, contestant in contestants.items():
        began = time.process_time()
        for index in range(start, min(start + flags.block, len(encoded))):
          contestant(encoded[index], index)
        seconds[name][turn] += time.process_time() - began
  rates = {name: len(encoded) / np.median(some) for name, some in seconds.items()}
  for name, rate in rates.items():
    spread = len(encoded) / seconds[name]
    print(f"{name:15} {rate:6.0f} images/s a core ({spread.min():.0f} to {spread.max():.0f})")
  for name in ("ours", "scaled decode"):
    # Of each round, since all contestants have had the same share of the machine in it.
    for peer in ("Pillow", "Pillow, jitter"):
      print(f"{name} / {peer}: {np.median(seconds[peer] / seconds[name]):.2f}")

  found = {name: {view: [] for view in VIEWS} for name in ("ours", "scaled decode")}
  shrunk = []
  for index, data in enumerate(encoded):
    want, exact, fewer = pillow(data, index), ours(data, index), scaled(data, index)
    shrunk.append(any((exact[view] != fewer[view]).any() for view in VIEWS))
    for view in VIEWS:
      found["ours"][view].append(psnr(exact[view], want[view]))
      if shrunk[-1]:
        found["scaled decode"][view].append(psnr(fewer[view], want[view]))
  print(f"decoded to fewer pixels with scaled_decode: {np.mean(shrunk):.1%}")
  for name, views in found.items():
    for view, values in views.items():
      if values:
        size, how = VIEWS[view]
        print(
          f"PSNR of {name} against Pillow, {how} {size[0]}: median {np.median(values):.1f} dB, 5th percentile "
          f"{np.percentile(values, 5):.1f} dB, over {len(values)} pictures"
        )


if __name__ == "__main__":
  main()
