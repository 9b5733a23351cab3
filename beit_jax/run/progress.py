"""How far a run is: a bar on a terminal, lines in the log everywhere else."""

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from beit_jax.runtime.logs import log, only_file

MILESTONES = (0.01, *(i / 10 for i in range(1, 11)))  # the parts of a run that always get a line
SECONDS_BETWEEN_LINES = 60.0


class Progress:
  """Shows step, loss, learning rate, speed, data wait and remaining time of a run, on process 0.

  The remaining time is that of the steps since the first one of this call, which includes compilation. Evaluations and
  saves between them count.
  """

  def __init__(self, name: str, total_steps: int, start_step: int = 0):
    """`name`: the run in lines; `start_step`: where this call starts."""
    self._name, self._total = name, total_steps
    self._began, self._first = (
      time.monotonic(),
      (start_step, math.inf),
    )  # first step of this call and when it ended
    self._last_line = -math.inf
    self._passed = 0
    self._bar: tqdm | None = None
    self._stack = contextlib.ExitStack()

  def compiling(self) -> None:
    """Says that the first step starts, which may take minutes."""
    self._began = time.monotonic()
    log.info("%s: compiling the training step ...", self._name)

  def completed(self, step: int) -> None:
    """Notes that a step has ended on the devices."""
    if math.isinf(self._first[1]):
      self._first = step, time.monotonic()
      if jax.process_index() == 0 and sys.stderr.isatty():
        self._bar = self._open_bar(step)
    elif self._bar is not None:
      self._bar.update(step - self._bar.n)

  def show(self, step: int, row: Mapping[str, float]) -> None:
    """Shows a row of metrics: at once in the bar, in the log at the next milestone or after a minute."""
    facts, now = self.facts(step, row), time.monotonic()
    passed = self._milestones(step)
    is_due = passed > self._passed or now - self._last_line >= SECONDS_BETWEEN_LINES
    if is_due:
      self._last_line, self._passed = now, passed
      line = f"{self._name} step {step}/{self._total} ({step / self._total:.0%})  {facts}"
      if self._bar is None:
        log.info("%s", line)
      else:
        only_file(line)
    if self._bar is not None:
      self._bar.set_postfix_str(facts)

  def facts(self, step: int, row: Mapping[str, float]) -> str:
    """Formats a row: `loss 4.512  lr 1.5e-03  310.0 images/s  data wait 2%  eta 1 day, 2:03:04`."""
    first, ended = self._first
    text = f"loss {row['loss']:.4g}  lr {row['learning_rate']:.2e}"
    if step <= first:
      return f"{text}  the first step took {ended - self._began:.0f} s"
    seconds = (time.monotonic() - ended) / (step - first) * (self._total - step)
    text += f"  {row['images_per_second']:.1f} images/s  data wait {row['data_wait']:.0%}"
    return f"{text}  eta {datetime.timedelta(seconds=round(seconds))}" if step < self._total else text

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    self._stack.close()

  def _milestones(self, step: int) -> int:
    return sum(step >= part * self._total for part in MILESTONES)

  def _open_bar(self, step: int) -> tqdm:
    self._stack.enter_context(logging_redirect_tqdm(loggers=[log]))  # other lines appear above the bar
    layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
    return tqdm(
      desc=self._name, total=self._total, initial=step, bar_format=layout, dynamic_ncols=True, file=sys.stderr
    )
