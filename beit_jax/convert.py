"""`python -m beit_jax.convert SRC DST --format={orbax,unilm,timm,hf,openmmlab}`: converts weights between formats."""

import argparse
import logging
import sys

from beit_jax.errors import UserError
from beit_jax.models.beit import POOLS
from beit_jax.models.layers import ACTIVATIONS
from beit_jax.runtime import logs
from beit_jax.weights import io as weights_io


def _size(text: str) -> tuple[int, int]:
  height, _, width = text.partition("x")
  return int(height), int(width or height)


def _blocks(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(","))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m beit_jax.convert", description=__doc__)
  parser.add_argument(
    "src", help="a run, a .pth, .safetensors or .pkl file, or a folder of Hugging Face or timm"
  )
  parser.add_argument("dst", help="a folder (orbax, hf) or a file (unilm, timm, openmmlab); must not exist")
  parser.add_argument("--format", required=True, choices=tuple(weights_io.WRITERS))
  parser.add_argument("--num_heads", type=int, help="if the source does not determine it")
  parser.add_argument(
    "--image_size", type=_size, metavar="N or HxW", help="pixels, if the source does not determine them"
  )
  parser.add_argument(
    "--out_indices",
    type=_blocks,
    metavar="A,B,C,D",
    help="blocks that a segmentation decoder taps, counted from 0, instead of those that the source states",
  )
  parser.add_argument("--pool", choices=tuple(POOLS), help="of a ViT, if the source does not state it")
  parser.add_argument(
    "--activation", choices=tuple(ACTIVATIONS), help="of a ViT, if the source does not state it"
  )
  parser.add_argument("--step", type=int, help="the checkpoint of a run; the default is the newest")
  parser.add_argument("--ema", action="store_true", help="convert the averaged weights")
  parser.add_argument("-v", "--verbose", action="store_true", help="print a table of every tensor")
  return parser


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  logs.setup()
  if args.verbose:
    logs.log.setLevel(logging.DEBUG)
  try:
    model = weights_io.load(
      args.src,
      num_heads=args.num_heads,
      image_size=args.image_size,
      step=args.step,
      ema=args.ema,
      out_indices=args.out_indices,
      pool=args.pool,
      activation=args.activation,
    )
    weights_io.save(model, args.dst, format=args.format)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
