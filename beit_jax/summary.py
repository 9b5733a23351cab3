"""The table at the end of a staged run: which numbers, is the config's to say."""

import fnmatch
from typing import Any


def lookup(results: dict[str, Any], reference: str) -> list[float]:
  """ "finetune*.eval.acc1"-like references -> the values of all stages that match.

  The parts are: a stage (a pattern), one of first, last, eval, seconds, and a metric.
  """
  pattern, *path = reference.split(".")
  values = []
  for name in fnmatch.filter(results, pattern):
    value = results[name]
    for key in path:
      value = value.get(key) if isinstance(value, dict) else None
    if value is not None:
      values.append(value)
  return values


def table(rows: tuple[tuple[str, str, str], ...], results: dict[str, Any]) -> str:
  """Rows are (label, reference, format); several values give their mean and the list."""
  lines = []
  for label, reference, form in rows:
    values = lookup(results, reference)
    if values:
      text = format(sum(values) / len(values), form)
      if len(values) > 1:
        text += "   (" + ", ".join(format(v, form) for v in values) + ")"
      lines.append((label, text))
  width = max((len(label) for label, _ in lines), default=0)
  return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)
