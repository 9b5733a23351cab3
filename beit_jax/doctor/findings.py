"""What a check finds. Like versions.py this imports the standard library only, so that it works where JAX does not."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from beit_jax.errors import UserError

OK, WARN, FAIL = "ok", "warn", "fail"
Found = Iterator[tuple[str, str, str]]  # (status, what was found, what to do)


class Skip(Exception):
  """A check cannot be made: Skip(status, reason). OK if nothing is wrong, WARN if another line reports the cause."""


class Line(NamedTuple):
  """One line of the report; `process` names the process that found it, "" for this one."""

  check: str
  status: str
  found: str
  advice: str
  process: str = ""

  def __str__(self) -> str:
    where = f"{self.process}: " if self.process else ""
    return f"{self.status:<4}  {self.check:<12}{where}{self.found}" + (self.advice and f"  -> {self.advice}")


def guarded(found: Found) -> Found:
  """Yields what a check finds, each on one line; an exception that ends the check is a finding too."""
  try:
    for status, what, advice in found:
      yield status, _one_line(what), _one_line(advice)
  except Skip as skip:
    status, reason = skip.args
    yield status, _one_line(reason), "" if status == OK else "fix that first, then run the doctor again"
  except UserError as error:
    yield FAIL, _one_line(error), "do what the message says, then run the doctor again"
  except Exception as error:
    advice = "this check could not be made; a run may meet the same error"
    yield FAIL, f"{type(error).__name__}: {_one_line(error)}", advice


def _one_line(text: object) -> str:
  return " ".join(str(text).split())


def unless_worse(check: Callable[[Any], Found]) -> Callable[[Any], Found]:
  """Removes the OK findings of a check that follow a warning or a failure."""

  @functools.wraps(check)
  def filtered(machine: Any) -> Found:
    worse = False
    for found in check(machine):
      worse = worse or found[0] != OK
      if found[0] != OK or not worse:
        yield found

  return filtered
