"""`python -m beit_jax.predict CHECKPOINT IMAGE...`: what a model makes of pictures.

A classifier names what pictures show; a segmenter gives every pixel a class; a tokenizer and a masked image model draw
contact sheets. Results go to standard output, everything else to standard error. Exit status: 0, 1 when pictures were
skipped, 2 for a mistake of yours or when no picture could be read.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from beit_jax import masking
from beit_jax.data import drawing
from beit_jax.data.image_files import find_images, read_image
from beit_jax.errors import UserError
from beit_jax.predict import class_maps
from beit_jax.runtime import bucket, logs
from beit_jax.runtime.logs import log
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained

SHEET = 16  # pictures on a contact sheet
Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
  """What is done with pictures, for one kind of model.

  Attributes:
    models: each prepares the pictures in its own way.
    run: (one prepared float32 [B, H, W, 3] per model, the pictures' positions int32 [B]) -> (facts per picture, rows
      of a contact sheet, float [B, H, W, 3] in [0, 1], by name).
    text: a picture's facts as lines of text.
    sheet: how the sheets' names begin.
  """

  models: tuple[Pretrained, ...]
  run: Callable[[list[np.ndarray], np.ndarray], tuple[list[Facts], dict[str, np.ndarray]]]
  text: Callable[[Facts], str]
  sheet: str = ""


def make_task(model: Pretrained, *, top: int, tokenizer: str | None) -> Task:
  """The task of a model of this kind; a segmenter has its own way (`class_maps`).

  Args:
    top: how many classes a classifier names.
    tokenizer: path of a masked image model's tokenizer, instead of the one that its checkpoint names.

  Raises:
    UserError: the model predicts nothing, or its tokenizer is missing or another one.
  """
  if model.kind == "classifier":
    return _classify(model, top)
  if model.kind == "tokenizer":
    return _reconstruct(model)
  if model.kind == "mim":
    return _fill_in(model, _load_tokenizer(model, tokenizer))
  raise UserError(
    f"a {model.kind} predicts nothing; fine-tune it (configs/finetune_imagenet.py), or take its features in Python "
    "with beit_jax.load"
  )


def _classify(model: Pretrained, top: int) -> Task:
  labels = list(model.description.get("labels") or ())
  squash = jax.nn.sigmoid if model.description.get("multi_label") else jax.nn.softmax

  def describe(probabilities):
    best = np.argsort(-probabilities, kind="stable")[:top].tolist()
    names = [str(labels[i]) if i < len(labels) else f"class {i}" for i in best]
    shares = [float(probabilities[i]) for i in best]
    found = zip(best, names, shares, strict=True)
    return {"predictions": [{"class": i, "label": name, "probability": p} for i, name, p in found]}

  def run(views, positions):
    probabilities = np.asarray(squash(model.forward(views[0])))
    return [describe(row) for row in probabilities], {}

  def text(facts):
    return "\n".join(f"  {p['probability']:7.2%}  {p['label']}" for p in facts["predictions"])

  return Task((model,), run, text)


def _reconstruct(model: Pretrained) -> Task:
  _need_decoder(model)

  def run(views, positions):
    image, ids = _pixels(model, views[0]), _tokens(model, views[0])
    decoded = np.asarray(model.decode(ids))
    errors = np.abs(decoded - image).mean((1, 2, 3))
    facts = [
      {"mean_absolute_error": float(error), "distinct_tokens": len(np.unique(row))}
      for error, row in zip(errors, ids, strict=True)
    ]
    return facts, {"image": image, "reconstruction": decoded}

  def text(facts):
    numbers = (
      f"mean absolute error {facts['mean_absolute_error']:.4f}, {facts['distinct_tokens']} distinct tokens"
    )
    return f"  {numbers}, {facts['sheet']}"

  return Task((model,), run, text, "reconstructions")


def _fill_in(model: Pretrained, tokenizer: Pretrained) -> Task:
  height, width = _patch_grid(model)
  count = height * width
  num_masked = max(round(0.383 * count), 1)
  smallest = min(max(count // 12, 4), 16)  # 16 for the released 14x14
  sample = jax.vmap(
    lambda i: masking.block_mask(
      jax.random.fold_in(jax.random.key(0), i), (height, width), num_masked, min_block_patches=smallest
    )
  )

  def run(views, positions):
    image, mask = _pixels(model, views[0]), np.asarray(sample(positions))
    hidden, true = mask.reshape(len(mask), count), _tokens(tokenizer, views[1])
    guess = np.where(hidden, model.forward(views[0], mask).argmax(-1), true)
    right = ((guess == true) & hidden).sum(1)
    facts = [{"masked_patches": num_masked, "tokens_right": int(n)} for n in right]
    rows = {
      "image": image,
      "masked": drawing.hide(image, mask),
      "predicted tokens": np.asarray(tokenizer.decode(guess)),
      "true tokens": np.asarray(tokenizer.decode(true)),
    }
    return facts, rows

  def text(facts):
    return f"  {facts['tokens_right']} of {facts['masked_patches']} masked tokens predicted, {facts['sheet']}"

  return Task((model, tokenizer), run, text, "masked_image_modelling")


def _patch_grid(model: Pretrained) -> tuple[int, int]:
  fields = model.encoder_fields
  height, width = fields["image_size"]
  return height // fields["patch_size"], width // fields["patch_size"]


def _pixels(model: Pretrained, prepared: np.ndarray) -> np.ndarray:
  """The inverse of the normalisation in `Pretrained.preprocess`."""
  mean, std = (np.asarray(model.preprocessing[name], np.float32) for name in ("mean", "std"))
  return (prepared * std + mean).clip(0, 1)


def _tokens(tokenizer: Pretrained, prepared: np.ndarray) -> np.ndarray:
  """Prepared float32 [B, H, W, 3] -> visual tokens int32 [B, N]."""
  return np.asarray(tokenizer.forward(prepared).argmax(-1), np.int32).reshape(len(prepared), -1)


def _load_tokenizer(model: Pretrained, path: str | None) -> Pretrained:
  """The tokenizer that a masked image model predicts the tokens of, with the model's framing of a picture."""
  recorded = model.description.get("tokenizer") or {}
  where = path or recorded.get("path")
  if not where:
    raise UserError("this checkpoint does not say where its tokenizer is; give --tokenizer=PATH")
  if path is None and not bucket.path(where).exists():
    raise UserError(
      f"{where}: the tokenizer that this checkpoint names is not there any more; give --tokenizer=PATH"
    )
  tokenizer = weights_io.load(where)
  if tokenizer.kind != "tokenizer":
    raise UserError(f"{where} holds a {tokenizer.kind}, not a tokenizer; give another --tokenizer=PATH")
  _need_decoder(tokenizer)
  found, wanted = tokenizer.module.vocab_size, model.module.vocab_size
  if found != wanted:
    raise UserError(f"{where}: a tokenizer of {found} words, the model predicts {wanted}")
  size = tuple(side * tokenizer.module.stride for side in _patch_grid(model))
  have = tuple(tokenizer.preprocessing["image_size"])
  if have != size:
    log.info("%s: made for pictures of %s, used on %s, a token for every patch", where, have, size)
  if recorded.get("sha256") not in (None, tokenizer.description.get("sha256")):
    log.warning("%s is not the tokenizer that the model was trained with: other weights", where)
  framing = {"image_size": size, **{name: model.preprocessing[name] for name in ("crop_pct", "resize")}}
  return dataclasses.replace(tokenizer, preprocessing={**tokenizer.preprocessing, **framing})


def _need_decoder(tokenizer: Pretrained) -> None:
  if "decoder" not in tokenizer.params:
    path = tokenizer.description.get("path", "this checkpoint")
    raise UserError(
      f"{path}: a tokenizer without its decoder, so tokens cannot be turned into pictures; give a folder with both"
    )


class _Sheets:
  """Contact sheets of up to `SHEET` pictures in a folder: <stem>_001.png and so on, overwriting earlier ones."""

  def __init__(self, folder: Path, stem: str):
    self._folder, self._stem, self._number = folder, stem, 1
    self._columns: list[dict[str, np.ndarray]] = []

  def add(self, column: dict[str, np.ndarray]) -> str:
    """Adds one picture's column, float [H, W, 3] per row; returns the file it will be in."""
    path = self._path()
    self._columns.append(column)
    if len(self._columns) == SHEET:
      self.write()
    return str(path)

  def write(self) -> None:
    """Writes the sheet that has been begun, if any."""
    if not self._columns:
      return
    rows = {name: np.stack([column[name] for column in self._columns]) for name in self._columns[0]}
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(drawing.table(rows, columns=SHEET)).save(self._path())
    except OSError as error:
      raise UserError(f"--out: {self._path()} cannot be written ({error.strerror or error})") from None
    self._columns, self._number = [], self._number + 1

  def _path(self) -> Path:
    return self._folder / f"{self._stem}_{self._number:03d}.png"


def predict(task: Task, files: list[Path], folder: Path, batch_size: int) -> Iterator[Facts]:
  """Yields each file's facts, in order: "file" and the task's, or "file" and "error"; sheets go to `folder`.

  The last batch is padded, so that one program is compiled.
  """
  sheets, size = _Sheets(folder, task.sheet), min(batch_size, len(files))
  results: list[Facts] = []
  batch: list[tuple[int, Facts, list[np.ndarray]]] = []
  for position, file in enumerate(files):
    facts: Facts = {"file": str(file)}
    results.append(facts)
    try:
      image = read_image(file)
      batch.append((position, facts, [np.asarray(model.preprocess([image]))[0] for model in task.models]))
    except ValueError as error:
      facts["error"] = str(error)
      log.warning("skipped %s: %s", file, error)
    if len(batch) == size or position == len(files) - 1:
      _run(task, batch, size, sheets)
      if position == len(files) - 1:
        sheets.write()
      yield from results
      results, batch = [], []


def _run(task: Task, batch: list[tuple[int, Facts, list[np.ndarray]]], size: int, sheets: _Sheets) -> None:
  """Adds the task's facts to those of each picture in the batch."""
  if not batch:
    return
  padded = batch + batch[-1:] * (size - len(batch))
  views = [np.stack(view) for view in zip(*(prepared for _, _, prepared in padded), strict=True)]
  found, rows = task.run(views, np.array([position for position, _, _ in padded], np.int32))
  for i, (_, facts, _) in enumerate(batch):
    facts.update(found[i])
    if rows:
      facts["sheet"] = sheets.add({name: row[i] for name, row in rows.items()})


def _parser() -> argparse.ArgumentParser:
  summary = (__doc__ or "").partition("\n\n")[2]
  parser = argparse.ArgumentParser(prog="python -m beit_jax.predict", description=summary)
  parser.add_argument("checkpoint", help="whatever beit_jax.load reads")
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, or pattern in quotes")
  parser.add_argument("--top", type=int, default=5, help="classes that a classifier names (default 5)")
  parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
  parser.add_argument("--out", default="predictions", help="folder for pictures (default predictions)")
  parser.add_argument("--tokenizer", help="of a masked image model, instead of the one its checkpoint names")
  parser.add_argument("--ema", action="store_true", help="the averaged weights")
  parser.add_argument(
    "--batch_size", type=int, default=16, help="pictures at a time (default 16; a segmenter: 1)"
  )
  return parser


def _predict_all(args: argparse.Namespace) -> int:
  for name in ("top", "batch_size"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
  files = find_images(args.images)
  if bucket.remote(args.out):
    raise UserError(f"--out={args.out}: pictures are written on disk only")
  folder, model = Path(os.path.expanduser(args.out)), weights_io.load(args.checkpoint, ema=args.ema)
  if args.tokenizer is not None and model.kind != "mim":
    raise UserError(f"--tokenizer: only a masked image model needs one, this is a {model.kind}")
  if model.kind == "segmenter":
    found, text = class_maps.segment(model, files, folder), class_maps.text
  else:
    task = make_task(model, top=args.top, tokenizer=args.tokenizer)
    found, text = predict(task, files, folder, args.batch_size), task.text
  results = []
  for facts in found:
    results.append(facts)
    if not args.json and "error" not in facts:
      print(f"{facts['file']}\n{text(facts)}", flush=True)
  if args.json:
    print(json.dumps(results, indent=1), flush=True)
  skipped = sum("error" in facts for facts in results)
  if skipped == len(results):
    raise UserError(f"none of the {skipped} pictures could be read")
  return 1 if skipped else 0


def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  logs.setup()
  sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
  try:
    return _predict_all(args)
  except (UserError, *bucket.errors()) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 130
  except BrokenPipeError:  # `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
