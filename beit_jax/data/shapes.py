"""The embedded data set: procedural RGB scenes, so that every objective has data on a bare machine.

A scene is a textured background with one large shape and a few small ones. Kind, color, position, angle and size of
each shape are random; shapes are slightly shaded from top to bottom. The class of the image is the kind of the large
shape; the label map has the kind of each pixel.
An example is a function of (split, index, size). This module needs NumPy only.
"""

from collections.abc import Callable

import numpy as np

SPLITS = {"train": 0, "test": 1}


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  angle = np.abs((np.arctan2(y, x) / (2 * np.pi) * 5) % 1 - 0.5) * 2  # 1 at a tip, 0 between two tips
  return x * x + y * y < (0.4 + 0.6 * angle**1.5) ** 2


# Name -> function that says which points lie inside the shape. Coordinates are relative to its center; its radius is 1.
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "disc": lambda x, y: x * x + y * y < 0.8,
  "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
  "triangle": lambda x, y: (y > -0.55) & (y + 1.732 * abs(x) < 0.95),
  "plus": lambda x, y: np.minimum(abs(x), abs(y)) < 0.3 * (np.maximum(abs(x), abs(y)) < 0.95),
  "ring": lambda x, y: (x * x + y * y < 0.9) & (x * x + y * y > 0.35),
  "star": _star,
  "bar": lambda x, y: (abs(x) < 1.0) & (abs(y) < 0.35),
  "crescent": lambda x, y: (x * x + y * y < 0.95) & ((x - 0.45) ** 2 + y * y > 0.5),
}
KINDS = tuple(INSIDE)


def _texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Background: stripes, checks or waves between two muted colors, [S, S, 3] in [0, 1]."""
  first, second = rng.uniform(0.1, 0.55, (2, 3))
  angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(4, 14), rng.uniform(0, 2 * np.pi)
  u = np.cos(angle) * x + np.sin(angle) * y
  v = np.cos(angle) * y - np.sin(angle) * x
  wave = np.sin(frequency * u + phase)
  style = rng.integers(4)
  if style == 1:
    wave = wave * np.sin(frequency * v)
  elif style == 2:
    wave = np.sign(wave)
  elif style == 3:
    wave = u * 1.2
  mix = (wave[..., None] + 1) / 2
  return np.clip(first + (second - first) * 0.7 * mix, 0, 1)


def render(split: str, index: int, size: int) -> dict[str, np.ndarray | int]:
  """Renders one scene.

  Args:
    split: a key of `SPLITS`.
    index: any number; scenes are unlimited.
    size: S, side of the image in pixels.

  Returns:
    {"image": uint8 [S, S, 3], "label": int in [0, 8), "label_map": uint8 [S, S], 0 = background, 1 + kind}.
  """
  rng = np.random.default_rng((SPLITS[split], index, 20210615))
  scale = 2  # supersampling
  grid = (np.arange(size * scale) + 0.5) / (size * scale) * 2 - 1
  y, x = np.meshgrid(grid, grid, indexing="ij")
  image = _texture(rng, x, y)
  labels = np.zeros(image.shape[:2], np.uint8)
  label = int(rng.integers(len(KINDS)))
  small = [(int(rng.integers(len(KINDS))), rng.uniform(0.12, 0.2)) for _ in range(rng.integers(0, 3))]
  for kind, radius in [*small, (label, rng.uniform(0.5, 0.75))]:
    angle = rng.uniform(0, 2 * np.pi)
    center = rng.uniform(-1 + radius * 0.8, 1 - radius * 0.8, 2)
    dx, dy = (x - center[0]) / radius, (y - center[1]) / radius
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    inside = INSIDE[KINDS[kind]](u, v)
    shade = 1 + 0.15 * dy[inside][:, None]
    image[inside] = np.clip(rng.uniform(0.5, 1.0, 3) * shade, 0, 1)
    labels[inside] = kind + 1
  image = image.reshape(size, scale, size, scale, 3).mean((1, 3))
  image = image + rng.normal(0, 0.02, image.shape)
  return {
    "image": (np.clip(image, 0, 1) * 255).round().astype(np.uint8),
    "label": label,
    "label_map": labels[::scale, ::scale].copy(),
  }
