"""A comparison of methods over seeds: the table of a staged config's `comparison`, as text, Markdown, LaTeX and a plot.

Every row is one method, every column one metric. A reference such as "beit_*.eval.acc1" names one stage for each seed,
and `*` stands for the seed. The first row is the baseline: the other rows are compared with it seed by seed, since
seeds share their data and their initial values.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import special

from beit_jax.config import ranges
from beit_jax.errors import UserError
from beit_jax.run import files
from beit_jax.run.summary import Results, lookup
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

KEYS = ("title", "columns", "paper", "rows")
CONFIDENCE = 0.95  # of the intervals


class Cell(NamedTuple):
  """The values of one metric of one method.

  Attributes:
    values: seed -> value in [0, 1].
    differences: value - value of the baseline, for the seeds that both have; empty for the baseline.
  """

  values: dict[str, float]
  differences: list[float]


def check(comparison: Any) -> None:
  """Checks the `comparison` of a staged config before the first stage trains.

  Raises:
    UserError: a key is missing or unknown, or a row has another number of entries than there are columns.
  """
  if not comparison:
    return
  if sorted(comparison) != sorted(KEYS):
    raise UserError(f"config key 'comparison': found the keys {sorted(comparison)}, expected {sorted(KEYS)}")
  count = len(comparison["columns"])
  for row in comparison["rows"]:
    valid = len(row) == 3 and isinstance(row[0], str) and len(row[1]) == len(row[2]) == count
    if not valid or not all(ref == "" or ref.partition(".")[0].count("*") == 1 for ref in row[1]):
      raise UserError(
        f"config key 'comparison.rows': found {ranges.show(row)}; expected (label, references, numbers of the paper), "
        f"{count} of each as in 'columns', with one * for the seed in each reference, such as 'beit_*.eval.acc1'"
      )


def cells(comparison: dict[str, Any], results: Results) -> list[list[Cell]]:
  """The values of every row and column; those of stages that have no result are missing."""
  table: list[list[Cell]] = []
  for _, references, _ in comparison["rows"]:
    row = []
    for column, reference in enumerate(references):
      prefix, _, suffix = reference.partition(".")[0].partition("*")
      named = lookup(results, reference) if reference else {}
      values = {name[len(prefix) : len(name) - len(suffix)]: value for name, value in named.items()}
      base = table[0][column].values if table else {}
      row.append(Cell(values, [value - base[seed] for seed, value in values.items() if seed in base]))
    table.append(row)
  return table


def half_interval(values: Sequence[float]) -> float:
  """Half the width of Student's confidence interval of the mean; NaN for fewer than two values."""
  if len(values) < 2:
    return math.nan
  quantile = float(special.stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2))
  return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _mean_text(cell: Cell) -> str:
  values = list(cell.values.values())
  if not values:
    return "no result"
  spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
  return f"{100 * statistics.mean(values):.1f}{spread} ({len(values)})"


def _difference_text(cell: Cell) -> str:
  if not cell.differences:
    return ""
  mean, half = statistics.mean(cell.differences), half_interval(cell.differences)
  interval = "" if math.isnan(half) else f" [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"
  return f"{100 * mean:+.1f}{interval}"


def text_rows(comparison: dict[str, Any], table: list[list[Cell]]) -> list[list[str]]:
  """The table as texts, its header first. The paper's numbers have columns of their own."""
  header = [""]
  for name in comparison["columns"]:
    header += [f"{name}, %", "difference", f"{name} ({comparison['paper']})"]
  lines = [header]
  for (label, _, published), row in zip(comparison["rows"], table, strict=True):
    line = [label]
    for cell, number in zip(row, published, strict=True):
      line += [_mean_text(cell), _difference_text(cell), str(number)]
    lines.append(line)
  return lines


def _caption(comparison: dict[str, Any]) -> str:
  return (
    f"{comparison['title']}. Mean ± standard deviation (number of seeds); difference to the first row, paired by seed, "
    f"with its {CONFIDENCE:.0%} interval."
  )


def as_text(comparison: dict[str, Any], table: list[list[Cell]]) -> str:
  lines = text_rows(comparison, table)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  rows = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
  return "\n".join([_caption(comparison), *(row.rstrip() for row in rows)])


def as_markdown(comparison: dict[str, Any], table: list[list[Cell]]) -> str:
  header, *body = (f"| {' | '.join(line)} |" for line in text_rows(comparison, table))
  rule = "|" + "---|" * (1 + 3 * len(comparison["columns"]))
  return "\n".join([_caption(comparison), "", header, rule, *body])


def as_latex(comparison: dict[str, Any], table: list[list[Cell]]) -> str:
  def escaped(text: str) -> str:
    return text.replace("%", r"\%").replace("±", r"$\pm$").replace("_", r"\_").replace("&", r"\&")

  lines = [" & ".join(map(escaped, line)) + r" \\" for line in text_rows(comparison, table)]
  columns = "l" + "lrr" * len(comparison["columns"])
  body = [rf"\begin{{tabular}}{{{columns}}}", lines[0], r"\hline", *lines[1:], r"\end{tabular}"]
  return "\n".join([f"% {_caption(comparison)}", *body])


def draw(comparison: dict[str, Any], table: list[list[Cell]], path: Path) -> None:
  """Draws one panel for each column: the value of every seed, their mean and the interval of the mean, in percent.

  Args:
    comparison: the config's section.
    table: see `cells`.
    path: of the file, whose ending decides the format.
  """
  from matplotlib.figure import Figure  # here: optional, and slow to import

  labels, columns = [row[0] for row in comparison["rows"]], comparison["columns"]
  figure = Figure(figsize=(3 + 3.5 * len(columns), 1.2 + 0.4 * len(labels)), layout="constrained")
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
  for column, (axes, name) in enumerate(zip(panels, columns, strict=True)):
    for y, row in enumerate(table):
      values = [100 * value for value in row[column].values.values()]
      if not values:
        continue
      half = half_interval(values)
      axes.plot(values, [y] * len(values), ".", color="0.6")
      error = None if math.isnan(half) else half
      axes.errorbar(statistics.mean(values), y, xerr=error, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel(f"{name}, %")
    axes.grid(axis="x", alpha=0.3)
    axes.set_ylim(len(labels) - 0.5, -0.5)
  figure.suptitle(f"{comparison['title']}: seeds, mean and its {CONFIDENCE:.0%} interval", fontsize="medium")
  figure.savefig(path)


def write(comparison: dict[str, Any], results: Results, folder: Path) -> str:
  """Writes comparison.md, comparison.tex and comparison.svg into a folder.

  Returns:
    The table as text.
  """
  table = cells(comparison, results)
  forms: dict[str, Callable[..., str]] = {"md": as_markdown, "tex": as_latex}
  for ending, form in forms.items():
    files.write_atomic(folder / f"comparison.{ending}", form(comparison, table) + "\n")
  try:
    draw(comparison, table, bucket.local(folder / "comparison.svg"))
  except ImportError:
    log.warning("no plot of the comparison: pip install 'beit_jax[report]' installs matplotlib")
  return as_text(comparison, table)
