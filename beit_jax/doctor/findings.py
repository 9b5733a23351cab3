"""What a check finds. Like versions.py this needs the standard library only: it must work where JAX does not."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from beit_jax.errors import UserError

OK, WARN, FAIL = "ok", "warn", "fail"
Found = Iterator[tuple[str, str, str]]  # (status, what was found, what to do)


class Skip(Exception):
  """A check cannot look: Skip(status, why). OK where that is as it should be, WARN where another line says why."""


class Line(NamedTuple):
  """One line of the report; `process`: which one found it, "" for this one."""

  check: str
  status: str
  found: str
  advice: str
  process: str = ""

  def __str__(self):
    where = f"{self.process}: " if self.process else ""
    return f"{self.status:<4}  {self.check:<12}{where}{self.found}" + (self.advice and f"  -> {self.advice}")


def guarded(found: Found) -> Found:
  """What a check finds, each on one line. An exception that ends it is a finding too."""
  line = lambda text: " ".join(str(text).split())
  try:
    for status, what, advice in found:
      yield status, line(what), line(advice)
  except Skip as skip:
    status, why = skip.args
    yield status, line(why), "" if status == OK else "mend that first, then ask again"
  except UserError as error:
    yield FAIL, line(error), "do as it says, then ask again"
  except Exception as error:
    advice = "this check could not be made; a run may well meet the same error"
    yield FAIL, f"{type(error).__name__}: {line(error)}", advice


def unless_worse(check: Callable[..., Found]) -> Callable[..., Found]:
  """Leaves out what is OK after something that is not."""

  @functools.wraps(check)
  def over(machine):
    worse = False
    for found in check(machine):
      worse = worse or found[0] != OK
      if found[0] != OK or not worse:
        yield found

  return over
