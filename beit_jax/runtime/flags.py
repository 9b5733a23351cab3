"""Command lines: argparse, with a `UserError` for every mistake."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from beit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """An `ArgumentParser` that raises `UserError` instead of ending the process."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message.removeprefix('argument ')}; {' '.join(self.format_usage().split())}")


def print_help(argv: Sequence[str], text: str | None) -> bool:
  """Prints `text`, a command's docstring, if its command line asks for help; returns whether it does."""
  asked = not {"-h", "--help"}.isdisjoint(argv)
  if asked:
    print(text)
  return asked


def number(kind: type, least: float, most: float = 1e12) -> Callable[[str], Any]:
  """Returns a converter for argparse that accepts numbers from `least` to `most`."""

  def convert(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = None
    if value is None or not least <= value <= most:
      what = "an integer" if kind is int else "a number"
      raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {least:g} to {most:g}")
    return value

  return convert
