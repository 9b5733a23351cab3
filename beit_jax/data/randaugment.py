"""RandAugment as in BEiT's fine-tuning (paper, Table 13): timm's `rand-m9-mstd0.5-inc1`, with Pillow, on the host.

Two operations are drawn with replacement from fifteen. Each is applied with probability 0.5, at a magnitude drawn from
N(9, 0.5) and clipped to [0, 10]. "inc1" means that every operation gets stronger with its magnitude.
One deliberate difference: at magnitude 10 posterizing keeps one bit; timm keeps none, an error in newer Pillow.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from beit_jax.errors import UserError

MAX = 10.0  # magnitudes lie in [0, MAX]
MAX_OPS = 100
BICUBIC = Image.Resampling.BICUBIC
Fill = tuple[int, int, int]


def _affine(*matrix: float) -> Callable:
  """Pillow's inverse affine map (a, b, c, d, e, f): the output at (x, y) is the input at (ax + by + c, dx + ey + f)."""
  return lambda image, fill: image.transform(
    image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=fill
  )


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
  """Adds to every value below 128, up to 255."""
  return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _enhance(enhancer: type) -> Callable:
  return lambda image, factor, fill: enhancer(image).enhance(factor)


def _enhance_level(m: float, sign: float) -> float:
  return max(0.1, 1.0 + sign * 0.9 * m / MAX)


class Op(NamedTuple):
  """An operation.

  Attributes:
    level: (magnitude, sign) -> argument; None if the operation has no argument.
    apply: (image, [argument,] fill) -> image.
  """

  level: Callable[[float, float], float] | None
  apply: Callable[..., Image.Image]


OPS: dict[str, Op] = {
  "AutoContrast": Op(None, lambda image, fill: ImageOps.autocontrast(image)),
  "Equalize": Op(None, lambda image, fill: ImageOps.equalize(image)),
  "Invert": Op(None, lambda image, fill: ImageOps.invert(image)),
  "Rotate": Op(
    lambda m, sign: sign * 30.0 * m / MAX,
    lambda image, degrees, fill: image.rotate(degrees, BICUBIC, fillcolor=fill),
  ),
  "PosterizeIncreasing": Op(
    lambda m, sign: max(1, 4 - int(4 * m / MAX)), lambda image, bits, fill: ImageOps.posterize(image, bits)
  ),
  "SolarizeIncreasing": Op(
    lambda m, sign: 256 - min(256, int(256 * m / MAX)),
    lambda image, threshold, fill: ImageOps.solarize(image, threshold),
  ),
  "SolarizeAdd": Op(
    lambda m, sign: min(128, int(110 * m / MAX)), lambda image, add, fill: _solarize_add(image, add)
  ),
  "ColorIncreasing": Op(_enhance_level, _enhance(ImageEnhance.Color)),
  "ContrastIncreasing": Op(_enhance_level, _enhance(ImageEnhance.Contrast)),
  "BrightnessIncreasing": Op(_enhance_level, _enhance(ImageEnhance.Brightness)),
  "SharpnessIncreasing": Op(_enhance_level, _enhance(ImageEnhance.Sharpness)),
  "ShearX": Op(
    lambda m, sign: sign * 0.3 * m / MAX, lambda image, f, fill: _affine(1, f, 0, 0, 1, 0)(image, fill)
  ),
  "ShearY": Op(
    lambda m, sign: sign * 0.3 * m / MAX, lambda image, f, fill: _affine(1, 0, 0, f, 1, 0)(image, fill)
  ),
  "TranslateXRel": Op(
    lambda m, sign: sign * 0.45 * m / MAX,
    lambda image, part, fill: _affine(1, 0, part * image.width, 0, 1, 0)(image, fill),
  ),
  "TranslateYRel": Op(
    lambda m, sign: sign * 0.45 * m / MAX,
    lambda image, part, fill: _affine(1, 0, 0, 0, 1, part * image.height)(image, fill),
  ),
}


def apply_op(image: Image.Image, name: str, magnitude: float, sign: float, fill: Fill) -> Image.Image:
  """Applies one operation.

  Args:
    image: RGB.
    name: a key of `OPS`.
    magnitude: in [0, 10].
    sign: 1 or -1; the direction of a rotation, shear or translation.
    fill: the color of uncovered pixels.
  """
  op = OPS[name]
  return op.apply(image, fill) if op.level is None else op.apply(image, op.level(magnitude, sign), fill)


class Policy(NamedTuple):
  num_ops: int
  magnitude: float
  magnitude_std: float
  prob: float


@functools.lru_cache
def parse(spec: str) -> Policy:
  """Parses a specification in timm's notation, such as "rand-m9-mstd0.5-inc1".

  Its parts are m: magnitude; mstd: standard deviation of the magnitude; n: number of operations (default 2);
  p: probability of each (default 0.5); inc1: use the increasing operations, the only ones implemented, so required.

  Raises:
    UserError: the specification is invalid.
  """
  head, *parts = spec.split("-")
  found: dict[str, float] = {}
  for part in parts:
    match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part)
    if match is None or match[1] in found:
      found = {}
      break
    found[match[1]] = float(match[2])
  num_ops, prob = found.get("n", 2), found.get("p", 0.5)
  magnitude, magnitude_std = found.get("m", MAX), found.get("mstd", 0.0)
  in_range = num_ops in range(1, MAX_OPS + 1) and magnitude <= MAX and magnitude_std < 100 and prob <= 1
  if head != "rand" or found.get("inc") != 1 or not in_range:
    raise UserError(
      f"config key 'data.rand_augment': {spec!r} is invalid; expected e.g. 'rand-m9-mstd0.5-inc1' (magnitude up to "
      f"{MAX:g}; inc1, the increasing operations, is required), or '' for none"
    )
  return Policy(int(num_ops), magnitude, magnitude_std, prob)


def draw(rng: np.random.Generator, policy: Policy) -> list[tuple[str, float, float]]:
  """Draws the operations to apply to one image: (name, magnitude, sign) each."""
  names = list(OPS)
  drawn = []
  for choice in rng.integers(len(names), size=policy.num_ops):
    happens, sign = rng.random() < policy.prob, 1.0 if rng.random() < 0.5 else -1.0
    magnitude = min(max(rng.normal(policy.magnitude, policy.magnitude_std), 0.0), MAX)
    if happens:
      drawn.append((names[choice], magnitude, sign))
  return drawn


def fill_color(mean: tuple[float, ...]) -> Fill:
  """The color of pixels that a transform uncovers: the mean color of the data, in 0 to 255."""
  red, green, blue = (min(255, math.floor(255 * m + 0.5)) for m in mean)
  return red, green, blue


def rand_augment(image: Image.Image, rng: np.random.Generator, spec: str, fill: Fill) -> Image.Image:
  """Applies random operations to an RGB image; see `parse` for `spec`. The size does not change."""
  for name, magnitude, sign in draw(rng, parse(spec)):
    image = apply_op(image, name, magnitude, sign, fill)
  return image
