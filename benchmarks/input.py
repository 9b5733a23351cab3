"""Compares our decoding, cropping and resizing of JPEGs with Pillow's, on one core: speed and PSNR.

    TFDS_DATA_DIR=DIR python benchmarks/input.py --name=imagenet2012 --split=train

Four methods crop the same box of each image, resize it to 224 (bicubic) and 112 (lanczos), and flip the same images:
- ours: `images.train_views`;
- scaled decode: the same with data.scaled_decode;
- Pillow: the steps of torchvision's loader and `resized_crop`;
- Pillow, jitter: the same after unilm's color jitter (0.4) of the full image, which in this library runs on the device.
The methods alternate in blocks of images; the result is the median over all rounds. Reading the records is excluded.
`--mosaic=4` tiles 4x4 images into one, of the size of a camera's images.
"""

import argparse
import io
import os
import time

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance, ImageOps

from beit_jax.data import images, resize, sources

VIEWS = {"image": ((224, 224), "bicubic"), "token_image": ((112, 112), "lanczos")}
BOXES = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
JITTER = 0.4


def _rng(index):
  return np.random.default_rng((0, 0, index, 2))


def ours(encoded, index, scaled=False):
  return images.train_views(
    images.LazyImage(encoded), _rng(index), VIEWS, crop="random_resized", flip=True, scaled=scaled, **BOXES
  )


def ours_scaled(encoded, index):
  return ours(encoded, index, scaled=True)


def _upright(encoded):
  """Decodes as torchvision's loader does, and rotates by the EXIF orientation as ours does."""
  return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _pillow_views(image, rng):
  box = images.random_resized_box(rng, *image.size, **BOXES)
  flip = rng.random() < 0.5
  result = {}
  for name, (size, interpolation) in VIEWS.items():
    view = image.crop(box).resize(size[::-1], resize.RESAMPLE[interpolation])
    result[name] = np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)
  return result


def pillow(encoded, index):
  return _pillow_views(_upright(encoded), _rng(index))


def pillow_jitter(encoded, index):
  """torchvision's ColorJitter(0.4, 0.4, 0.4): brightness, contrast and saturation, in random order."""
  image, rng = _upright(encoded), np.random.default_rng((0, 0, index, 9))
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i in rng.permutation(3):
    image = enhancers[i](image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
  return _pillow_views(image, _rng(index))


METHODS = {
  "ours": ours,
  "scaled decode": ours_scaled,
  "Pillow": pillow,
  "Pillow, jitter": pillow_jitter,
}


def psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-10))


def mosaics(encoded, side):
  """Tiles side x side images into one, each resized to the size of the first; JPEG quality 90."""
  result = []
  for start in range(0, len(encoded) - side**2 + 1, side**2):
    parts = [Image.fromarray(images.decode(data)) for data in encoded[start : start + side**2]]
    width, height = parts[0].size
    canvas = Image.new("RGB", (side * width, side * height))
    for i, part in enumerate(parts):
      canvas.paste(part.resize((width, height)), (i % side * width, i // side * height))
    result.append(simplejpeg.encode_jpeg(np.asarray(canvas), 90, "RGB", "420"))
  return result


def measure_speed(encoded, rounds, block):
  """Prints images per second, and the ratios of ours to Pillow."""
  for method in METHODS.values():
    method(encoded[0], 0)
  seconds = {name: np.zeros(rounds) for name in METHODS}
  for round_index in range(rounds):
    for start in range(0, len(encoded), block):
      for name, method in METHODS.items():
        began = time.process_time()
        for index in range(start, min(start + block, len(encoded))):
          method(encoded[index], index)
        seconds[name][round_index] += time.process_time() - began
  for name, times in seconds.items():
    rates = len(encoded) / times
    print(f"{name:15} {np.median(rates):6.0f} images/s per core ({rates.min():.0f} to {rates.max():.0f})")
  for name in ("ours", "scaled decode"):
    # Ratios are taken within a round, in which other load on the machine affects all methods equally.
    for peer in ("Pillow", "Pillow, jitter"):
      print(f"{name} / {peer}: {np.median(seconds[peer] / seconds[name]):.2f}")


def measure_psnr(encoded):
  """Prints the PSNR of our views against those of Pillow."""
  found = {name: {view: [] for view in VIEWS} for name in ("ours", "scaled decode")}
  shrunk = []
  for index, data in enumerate(encoded):
    wanted, exact, fewer = pillow(data, index), ours(data, index), ours_scaled(data, index)
    shrunk.append(any((exact[view] != fewer[view]).any() for view in VIEWS))
    for view in VIEWS:
      found["ours"][view].append(psnr(exact[view], wanted[view]))
      if shrunk[-1]:
        found["scaled decode"][view].append(psnr(fewer[view], wanted[view]))
  print(f"decoded at a lower resolution with scaled_decode: {np.mean(shrunk):.1%}")
  for name, views in found.items():
    for view, values in views.items():
      if values:
        size, interpolation = VIEWS[view]
        print(
          f"PSNR of {name} against Pillow, {interpolation} {size[0]}: median {np.median(values):.1f} dB, 5th "
          f"percentile {np.percentile(values, 5):.1f} dB, over {len(values)} images"
        )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--name", default="imagenet_sample", help="the TFDS data set")
  parser.add_argument("--split", default="train")
  parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR", ""))
  parser.add_argument("--count", type=int, default=500, help="number of images")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--block", type=int, default=25, help="images per block")
  parser.add_argument("--mosaic", type=int, default=0, help="images per side of a mosaic; 0 = no mosaics")
  flags = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):  # Linux only
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  source = sources.TfdsSource(flags.name, flags.split, flags.data_dir, "image", "")
  encoded = [source[i]["image"] for i in range(min(flags.count, len(source)))]
  encoded = mosaics(encoded, flags.mosaic) if flags.mosaic else encoded
  width, height = np.mean([images.open_image(data).size for data in encoded], 0)
  kilobytes = np.mean([len(data) for data in encoded]) / 1e3
  print(f"{len(encoded)} images, {width:.0f}x{height:.0f} and {kilobytes:.0f} kB on average")
  measure_speed(encoded, flags.rounds, flags.block)
  measure_psnr(encoded)


if __name__ == "__main__":
  main()
