"""`python -m beit_jax.predict CHECKPOINT IMAGE...`: runs a model on images.

A classifier names what images show and a regression model gives its values, a segmenter assigns a class to every pixel,
a tokenizer and a masked image model draw contact sheets. Results go to standard output, everything else to standard
error. Exit status: 0; 1 if some images were skipped; 2 after a mistake in the command or if no image could be read.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from beit_jax.data.image_files import find_images
from beit_jax.errors import UserError
from beit_jax.predict import batches, class_maps
from beit_jax.predict.batches import Facts
from beit_jax.runtime import bucket, logs
from beit_jax.runtime.flags import Parser, number
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained

# Kind of model (a key of `weights.kinds.KINDS`) -> function that yields the facts of each file in order: "file",
# then those of the kind or "error".
PREDICTORS: dict[str, Callable[[Pretrained, list[Path], argparse.Namespace], Iterator[Facts]]] = {
  "classifier": batches.classify,
  "segmenter": class_maps.segment,
  "tokenizer": batches.reconstruct,
  "vqkd": batches.reconstruct,
  "mim": batches.fill_in,
  "mim_pixels": batches.fill_in_pixels,
}


def _parser() -> argparse.ArgumentParser:
  summary = (__doc__ or "").partition("\n\n")[2]
  parser = Parser("python -m beit_jax.predict", description=summary)
  add = parser.add_argument
  add("checkpoint", help="anything that beit_jax.load reads")
  add("images", nargs="+", metavar="IMAGE", help="file, folder, or quoted pattern")
  add("--top", type=number(int, 1), default=5, help="number of classes that a classifier names (default 5)")
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--json", action="store_true", help="print one JSON list instead of text")
  form.add_argument(
    "--csv", action="store_true", help="print CSV with a header, one row for each class of an image"
  )
  add("--out", default="predictions", help="folder for images that are drawn (default predictions)")
  add("--tokenizer", help="tokenizer of a masked image model, instead of the one its checkpoint names")
  add("--ema", action="store_true", help="use the averaged weights")
  add(
    "--batch_size", type=number(int, 1), default=16, help="images per batch (default 16; a segmenter uses 1)"
  )
  return parser


def as_text(facts: Facts) -> str:
  """Formats the facts of one image: the file, a line for each class, and a line for the rest."""
  classes = facts.get("predictions") or facts.get("classes") or []
  lines = [f"  {entry.get('probability', entry.get('share')):7.2%}  {entry['label']}" for entry in classes]
  lines += [f"  {entry['value']:10.4f}  {entry['label']}" for entry in facts.get("values", ())]
  rest = {
    name.replace("_", " "): value for name, value in facts.items() if isinstance(value, str | int | float)
  }
  del rest["file"]
  words = [
    f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in rest.items()
  ]
  if words:
    lines.append(f"  {', '.join(words)}")
  return "\n".join([facts["file"], *lines])


def as_rows(facts: Facts) -> list[Facts]:
  """The rows of one image in a table: its simple facts with those of each class or value."""
  simple = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
  entries: list[Facts] = next(
    (facts[name] for name in ("predictions", "classes", "values") if facts.get(name)), [{}]
  )
  return [{**simple, **entry} for entry in entries]


def print_csv(results: list[Facts]) -> None:
  """Prints the table of all images; a column that an image does not have is empty."""
  rows = [row for facts in results for row in as_rows(facts)]
  columns = list(dict.fromkeys(name for row in rows for name in row))
  writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)


def _predict(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  files = find_images(args.images)
  if bucket.remote(args.out):
    raise UserError(f"--out={args.out}: images can only be written to a local folder")
  args.out = Path(os.path.expanduser(args.out))
  model = weights_io.load(args.checkpoint, ema=args.ema)
  if model.kind not in PREDICTORS:
    raise UserError(
      f"a {model.kind} has no output to show; fine-tune it (configs/finetune_imagenet.py), or compute features in "
      "Python with beit_jax.load(...).features"
    )
  if args.tokenizer is not None and not model.takes_mask:
    raise UserError(f"--tokenizer: only a masked image model needs one, this is a {model.kind}")
  results = []
  for facts in PREDICTORS[model.kind](model, files, args):
    results.append(facts)
    if not (args.json or args.csv) and "error" not in facts:
      print(as_text(facts), flush=True)
  if args.json:
    print(json.dumps(results, indent=1), flush=True)
  if args.csv:
    print_csv(results)
  skipped = sum("error" in facts for facts in results)
  if skipped == len(results):
    raise UserError(f"none of the {skipped} images could be read")
  return 1 if skipped else 0


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  logs.setup()
  try:
    return _predict(argv)
  except bucket.errors(UserError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 130
  except BrokenPipeError:  # standard output was closed, as by `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
