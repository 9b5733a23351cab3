"""Prediction in batches: class names from classifiers, contact sheets from tokenizers and masked image models."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from beit_jax import masking
from beit_jax.data import drawing
from beit_jax.data.image_files import read_image
from beit_jax.errors import UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained

SHEET_COLUMNS = 16  # images on a contact sheet
MASK_RATIO = 0.383  # as in pre-training: 75 of 196 patches
Facts = dict[str, Any]  # what is known about one image, as JSON values
Rows = dict[str, np.ndarray]  # rows of a contact sheet: name -> float [B, H, W, 3] in [0, 1]


# (views, positions) -> (facts of each image, rows of a contact sheet). `views` holds the images float32 [B, H, W, 3] as
# each of the models prepares them; `positions` int32 [B] says where they are on the command line.
Run = Callable[[list[np.ndarray], np.ndarray], tuple[list[Facts], Rows]]


def classify(model: Pretrained, files: list[Path], args: argparse.Namespace) -> Iterator[Facts]:
  """Names the most likely classes of each image; of a regression model, the facts are its "values"."""
  labels = list(model.description.get("labels") or ())
  to_probabilities = jax.nn.sigmoid if model.description.get("multi_label") else jax.nn.softmax

  def named(index: int, kind: str = "class") -> Facts:
    return {kind: index, "label": str(labels[index]) if index < len(labels) else f"{kind} {index}"}

  def run(views: list[np.ndarray], positions: np.ndarray) -> tuple[list[Facts], Rows]:
    if model.description.get("regression"):
      outputs = np.asarray(model.forward(views[0])).tolist()
      values = [[{**named(i, "output"), "value": x} for i, x in enumerate(row)] for row in outputs]
      return [{"values": row} for row in values], {}
    probabilities = np.asarray(to_probabilities(model.forward(views[0])))
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, : args.top]
    facts = [
      {"predictions": [{**named(int(i)), "probability": float(row[i])} for i in indices]}
      for row, indices in zip(probabilities, best, strict=True)
    ]
    return facts, {}

  return _predict((model,), run, files, args)


def reconstruct(model: Pretrained, files: list[Path], args: argparse.Namespace) -> Iterator[Facts]:
  """Draws images above what a tokenizer decodes from their tokens."""
  decode = _decoder(model)

  def run(views: list[np.ndarray], positions: np.ndarray) -> tuple[list[Facts], Rows]:
    image, ids = _pixels(model, views[0]), _tokens(model, views[0])
    facts: list[Facts] = [{"distinct_tokens": len(np.unique(row))} for row in ids]
    drawn = decode({"reconstruction": ids})
    if not drawn:
      return facts, {}
    errors = np.abs(drawn["reconstruction"] - image).mean((1, 2, 3))
    facts = [{"mean_absolute_error": float(e), **row} for e, row in zip(errors, facts, strict=True)]
    return facts, {"image": image, **drawn}

  return _predict((model,), run, files, args, sheet="reconstructions")


def fill_in(model: Pretrained, files: list[Path], args: argparse.Namespace) -> Iterator[Facts]:
  """Masks patches and draws the tokens that a masked image model predicts for them."""
  tokenizer = _load_tokenizer(model, args.tokenizer)
  decode = _decoder(tokenizer)

  def run(views: list[np.ndarray], positions: np.ndarray) -> tuple[list[Facts], Rows]:
    image, mask = _pixels(model, views[0]), _masks(model, positions)
    masked, targets = mask.reshape(len(mask), -1), _tokens(tokenizer, views[1])
    predicted = np.where(masked, model.forward(views[0], mask).argmax(-1), targets)
    correct = ((predicted == targets) & masked).sum(1)
    rows = {
      "image": image,
      "masked": drawing.gray_out(image, mask),
      **decode({"predicted tokens": predicted, "true tokens": targets}),
    }
    facts = zip(masked.sum(1), correct, strict=True)
    return [{"masked_patches": int(count), "tokens_right": int(right)} for count, right in facts], rows

  return _predict((model, tokenizer), run, files, args, sheet="masked_image_modelling")


def fill_in_pixels(model: Pretrained, files: list[Path], args: argparse.Namespace) -> Iterator[Facts]:
  """Masks patches and draws the pixels that a model predicts for them."""
  if args.tokenizer is not None:
    raise UserError("--tokenizer: this model predicts pixels, so it needs none")
  module: Any = model.module

  def run(views: list[np.ndarray], positions: np.ndarray) -> tuple[list[Facts], Rows]:
    mask, prepared = _masks(model, positions), jnp.asarray(views[0])
    recovered = np.asarray(module.recovered(model.forward(prepared, mask), prepared))
    image, recovered = _pixels(model, views[0]), _pixels(model, recovered)
    rows = {
      "image": image,
      "masked": drawing.gray_out(image, mask),
      "recovered pixels": drawing.paste(image, recovered, mask),
    }
    errors = np.abs(rows["recovered pixels"] - image).sum((1, 2, 3)) / image[0].size
    facts = zip(mask.sum((1, 2)), errors * mask[0].size, strict=True)
    return [
      {"masked_patches": int(count), "mean_absolute_error": float(error / count)} for count, error in facts
    ], rows

  return _predict((model,), run, files, args, sheet="masked_image_modelling")


def _masks(model: Pretrained, positions: np.ndarray) -> np.ndarray:
  """Block-wise masks bool [B, h, w] that depend on the position of a file only."""
  height, width = _grid_size(model)
  num_masked = max(round(MASK_RATIO * height * width), 1)
  min_block_patches = min(max(height * width // 12, 4), 16)  # 16 for 14x14 patches, as in pre-training

  def sample(position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(0), position)
    return masking.block_mask(key, (height, width), num_masked, min_block_patches=min_block_patches)

  return np.asarray(jax.vmap(sample)(jnp.asarray(positions)))


def _grid_size(model: Pretrained) -> tuple[int, int]:
  fields = model.encoder_fields
  height, width = fields["image_size"]
  return height // fields["patch_size"], width // fields["patch_size"]


def _pixels(model: Pretrained, prepared: np.ndarray) -> np.ndarray:
  """Undoes the normalization of `Pretrained.preprocess`."""
  mean, std = (np.asarray(model.preprocessing[name], np.float32) for name in ("mean", "std"))
  return (prepared * std + mean).clip(0, 1)


def _tokens(tokenizer: Pretrained, prepared: np.ndarray) -> np.ndarray:
  """Computes the visual tokens int32 [B, N] of prepared images float32 [B, H, W, 3]."""
  return np.asarray(tokenizer.forward(prepared).argmax(-1), np.int32).reshape(len(prepared), -1)


def _decoder(tokenizer: Pretrained) -> Callable[[Rows], Rows]:
  """A function that draws tokens, int32 [B, N] per row; of a tokenizer that cannot, one that draws nothing."""
  if not tokenizer.can_decode:
    log.warning("tokens are not drawn: %s", tokenizer.spec.without_pixel_decoder)
    return lambda rows: {}
  return lambda rows: {name: np.asarray(tokenizer.decode(ids)) for name, ids in rows.items()}


def _load_tokenizer(model: Pretrained, path: str | None) -> Pretrained:
  """Loads the tokenizer of a masked image model; it crops images as the model does, at one token per patch."""
  recorded = model.description.get("tokenizer") or {}
  source = path or recorded.get("path")
  if not source:
    raise UserError("this checkpoint does not say where its tokenizer is; add --tokenizer=PATH")
  if path is None and not bucket.path(source).exists():
    raise UserError(f"{source}: the tokenizer of this checkpoint no longer exists; add --tokenizer=PATH")
  tokenizer = weights_io.load(source)
  if not tokenizer.can_tokenize:
    raise UserError(f"{source} is a {tokenizer.kind}, not a tokenizer; use another --tokenizer=PATH")
  found, expected = tokenizer.module.vocab_size, model.module.vocab_size
  if found != expected:
    raise UserError(f"{source}: the tokenizer has {found} words, but the model predicts {expected}")
  if recorded.get("sha256") not in (None, tokenizer.description.get("sha256")):
    log.warning("%s is not the tokenizer that the model was trained with: its weights differ", source)
  size = tuple(side * tokenizer.module.stride for side in _grid_size(model))
  if tokenizer.token_image_size not in (None, size):
    raise UserError(
      f"{source}: the tokenizer is for images of {tokenizer.token_image_size}, the model needs {size}"
    )
  framing = {"image_size": size, **{name: model.preprocessing[name] for name in ("crop_pct", "resize")}}
  return dataclasses.replace(tokenizer, preprocessing={**tokenizer.preprocessing, **framing})


def _predict(
  models: tuple[Pretrained, ...], run: Run, files: list[Path], args: argparse.Namespace, sheet: str = ""
) -> Iterator[Facts]:
  """Runs the files in batches, all padded to the same size: JAX then compiles one program.

  Args:
    models: the models to prepare images for; each has its own preprocessing.
    run: see `Run`.
    files: the images.
    args: the command line.
    sheet: first part of the contact sheets' file names.
  """
  size, sheets = min(args.batch_size, len(files)), _Sheets(args.out, sheet)
  for start in range(0, len(files), size):
    results, readable, positions, prepared = [], [], [], []
    for position, file in enumerate(files[start : start + size], start):
      results.append({"file": str(file)})
      with skipping(results[-1]):
        image = read_image(file, models[0].pixel_rule)
        prepared.append([np.asarray(model.normalize([image]))[0] for model in models])
        readable.append(results[-1])
        positions.append(position)
    if readable:
      padding = size - len(readable)
      views = [np.stack([*view, *view[-1:] * padding]) for view in zip(*prepared, strict=True)]
      found, rows = run(views, np.array(positions + positions[-1:] * padding, np.int32))
      for i, facts in enumerate(readable):
        facts |= found[i]
        if rows:
          facts["sheet"] = sheets.add({name: images[i] for name, images in rows.items()})
    yield from results
  sheets.write()


class _Sheets:
  """Writes contact sheets <stem>_001.png, <stem>_002.png ... and overwrites those of earlier commands."""

  def __init__(self, folder: Path, stem: str):
    self._folder, self._stem, self._number = folder, stem, 1
    self._columns: list[Rows] = []

  @property
  def _path(self) -> Path:
    return self._folder / f"{self._stem}_{self._number:03d}.png"

  def add(self, column: Rows) -> str:
    """Adds one image's column, float [H, W, 3] per row; returns the path of its sheet."""
    path = self._path
    self._columns.append(column)
    if len(self._columns) == SHEET_COLUMNS:
      self.write()
    return str(path)

  def write(self) -> None:
    """Writes the columns that are not on a sheet yet, if any."""
    if self._columns:
      rows = {name: np.stack([column[name] for column in self._columns]) for name in self._columns[0]}
      save(Image.fromarray(drawing.labeled_rows(rows, columns=SHEET_COLUMNS)), self._path)
      self._columns, self._number = [], self._number + 1


@contextlib.contextmanager
def skipping(facts: Facts) -> Iterator[None]:
  """Catches the ValueError of an unreadable file, logs it and records it in the file's facts."""
  try:
    yield
  except ValueError as error:
    facts["error"] = str(error)
    log.warning("skipped %s: %s", facts["file"], error)


def save(image: Image.Image, path: Path) -> None:
  """Writes an image and creates its folder.

  Raises:
    UserError: the image cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
  except OSError as error:
    raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from None
