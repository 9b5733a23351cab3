"""`python -m beit_jax.convert SRC DST --format={orbax,unilm,timm,hf}`: weights from any format into another."""

import argparse
import logging
import sys

from beit_jax.errors import UserError
from beit_jax.runtime import logs
from beit_jax.weights import io as weights_io


def _size(text: str) -> tuple[int, int]:
  height, _, width = text.partition("x")
  return int(height), int(width or height)


def _blocks(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(","))


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="python -m beit_jax.convert", description=__doc__)
  parser.add_argument(
    "src", help="run folder, .pth, .safetensors, .pkl, or a folder of Hugging Face's or timm's"
  )
  parser.add_argument("dst", help="folder (orbax, hf) or file (unilm, timm); must not exist")
  parser.add_argument("--format", required=True, choices=("orbax", "unilm", "timm", "hf"))
  parser.add_argument("--num_heads", type=int, help="where the source does not say")
  parser.add_argument(
    "--image_size", type=_size, metavar="N or HxW", help="pixels, where the source does not say"
  )
  parser.add_argument(
    "--out_indices",
    type=_blocks,
    metavar="A,B,C,D",
    help="blocks that a segmentation decoder taps, from 0, instead of what the source says",
  )
  parser.add_argument("--step", type=int, help="of a run, instead of its newest checkpoint")
  parser.add_argument("--ema", action="store_true", help="the averaged weights")
  parser.add_argument("-v", "--verbose", action="store_true", help="a table of every tensor")
  args = parser.parse_args(argv)
  logs.setup()
  if args.verbose:
    logs.log.setLevel(logging.DEBUG)
  try:
    options = {
      name: getattr(args, name) for name in ("num_heads", "image_size", "out_indices", "step", "ema")
    }
    weights_io.save(weights_io.load(args.src, **options), args.dst, format=args.format)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
