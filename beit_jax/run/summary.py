"""The table at the end of a staged run: one line for each row of the config's `summary`."""

import fnmatch
from typing import Any

Results = dict[str, Any]  # stage -> content of its result.json


def lookup(results: Results, reference: str) -> dict[str, float]:
  """Finds the values that a reference such as "finetune_*.eval.acc1" names, one for each stage that matches.

  Args:
    results: stage -> content of its result.json.
    reference: a stage (or a pattern of stages), one of first, last, eval and seconds, and a metric.

  Returns:
    Stage -> value.
  """
  pattern, *path = reference.split(".")
  values = {}
  for name in fnmatch.filter(results, pattern):
    value = results[name]
    for key in path:
      value = value.get(key) if isinstance(value, dict) else None
    if value is not None:
      values[name] = value
  return values


def summary_table(rows: tuple[tuple[str, str, str], ...], results: Results) -> str:
  """Formats the table of a staged run. Where a reference has several values, it shows their mean and all of them.

  Args:
    rows: (label, reference, format).
    results: stage -> content of its result.json.
  """
  lines = []
  for label, reference, form in rows:
    values = list(lookup(results, reference).values())
    if values:
      text = format(sum(values) / len(values), form)
      if len(values) > 1:
        text += "   (" + ", ".join(format(v, form) for v in values) + ")"
      lines.append((label, text))
  width = max((len(label) for label, _ in lines), default=0)
  return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)
