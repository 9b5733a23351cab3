"""The log of the package, and the metrics of a run: metrics.jsonl, TensorBoard, the progress line."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from beit_jax.errors import UserError
from beit_jax.runtime import bucket

log = logging.getLogger("beit_jax")
FOREIGN_LOGGERS = ("py.warnings", "absl", "jax", "orbax")  # their warnings go to log.txt too


def setup(workdir: Path | None = None) -> None:
  """Sends the package's log to standard error and, with a workdir, to workdir/log.txt. May be called again.

  With a workdir, process 0 logs everything; the other processes log warnings only, with their number before each line,
  and write workdir/log_<number>.txt.

  Raises:
    UserError: the workdir cannot be written to.
  """
  index = jax.process_index() if workdir is not None else 0
  log.setLevel(logging.WARNING if index else logging.INFO)
  log.propagate = False
  for handler in list(log.handlers):
    log.removeHandler(handler)
    handler.close()
  prefix = f"[{index}] " if index else ""
  _add_handler(logging.StreamHandler(sys.stderr), prefix, "%H:%M:%S")
  for name in FOREIGN_LOGGERS:
    logger = logging.getLogger(name)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Forward)]:
      logger.removeHandler(handler)
  if workdir is not None:
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *bucket.errors())
    try:
      bucket.check_writable(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
      file = _File(bucket.local(workdir / (f"log_{index}.txt" if index else "log.txt")))
    except failures as error:
      raise UserError(f"--workdir={workdir}: nothing can be written there ({error})") from None
    _add_handler(file, prefix, "%Y-%m-%d %H:%M:%S")
    for name in FOREIGN_LOGGERS:
      logging.getLogger(name).addHandler(_Forward(file))


def _add_handler(handler: logging.Handler, prefix: str, time_format: str) -> None:
  handler.setFormatter(logging.Formatter(f"{prefix}%(asctime)s %(levelname).1s %(message)s", time_format))
  log.addHandler(handler)


def only_file(message: str) -> None:
  """Writes a line to log.txt but not to the terminal."""
  record = logging.LogRecord(log.name, logging.INFO, __file__, 0, message, None, None)
  for handler in log.handlers:
    if isinstance(handler, logging.FileHandler):
      handler.handle(record)


class _File(logging.FileHandler):
  """Reports the first write error (a full disk) in one line, not a stack trace for every message."""

  failed = False

  def handleError(self, record: logging.LogRecord) -> None:
    if not self.failed:
      self.failed = True
      print(f"{self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


class _Forward(logging.Handler):
  """Sends the warnings of another package to a handler of ours, each message once."""

  def __init__(self, target: logging.Handler):
    super().__init__(logging.WARNING)
    self._target = target
    self._known: set[tuple[str, str]] = set()

  def emit(self, record: logging.LogRecord) -> None:
    key = (record.name, record.getMessage())
    if key not in self._known and len(self._known) < 1000:
      self._known.add(key)
      self._target.handle(record)


class Logger:
  """Writes one JSON object per logged step, TensorBoard's copy of it, and a progress line; on process 0 only."""

  def __init__(
    self,
    workdir: Path,
    total_steps: int,
    name: str = "",
    start_step: int = 0,
    *,
    redo_evaluation: bool = False,
  ):
    """
    Args:
      workdir: folder of metrics.jsonl and tensorboard/.
      total_steps: last step of the run.
      name: label of the progress line.
      start_step: the step that was restored; later rows of an interrupted run are deleted.
      redo_evaluation: whether the evaluation at `start_step` is repeated; its rows are then deleted too.
    """
    self._active = jax.process_index() == 0
    self._total, self._name, self._start = total_steps, name, start_step
    self._began = time.monotonic()
    if self._active:
      path = bucket.local(workdir / "metrics.jsonl")
      _truncate(path, start_step, redo_evaluation)
      self._file = path.open("a")
      self._tensorboard = _TensorBoard(bucket.local(workdir / "tensorboard"), start_step + 1)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a step; NaN and infinity become null and are not plotted."""
    if not self._active:
      return
    clean = {k: (float(v) if math.isfinite(float(v)) else None) for k, v in metrics.items()}
    self._file.write(json.dumps({"step": int(step), **clean}) + "\n")
    self._file.flush()
    for key, value in clean.items():
      if value is not None:
        self._tensorboard.add(step, key, value)
    self._tensorboard.flush()

  def progress(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows `pretrain 120/600  loss 4.5120  310 img/s  eta 1:32` in one line of a terminal."""
    if not (self._active and sys.stderr.isatty()):
      return
    done = max(step - self._start, 1)
    eta = (time.monotonic() - self._began) / done * (self._total - step)
    parts = [f"{self._name} {step}/{self._total}", f"loss {metrics['loss']:.4f}"]
    parts += [f"{metrics['images_per_second']:.0f} img/s", f"eta {int(eta) // 60}:{int(eta) % 60:02d}"]
    sys.stderr.write("\r\033[K" + "  ".join(parts) + ("\n" if step == self._total else ""))
    sys.stderr.flush()

  def close(self) -> None:
    if self._active:
      self._file.close()
      self._tensorboard.close()


def _truncate(path: Path, step: int, redo_evaluation: bool) -> None:
  """Deletes the rows after a step and, with `redo_evaluation`, the evaluation at that step."""
  if not path.exists():
    return
  rows = [line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
  if redo_evaluation:
    rows = [row for row in rows if not (_step_of(row) == step and '"eval_' in row)]
  temporary = path.with_suffix(".tmp")  # a kill in between leaves the old file or the new one
  with temporary.open("w") as file:
    file.write("".join(f"{row}\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def _step_of(line: str) -> int:
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):  # a line that a kill has cut off
    return sys.maxsize


class _TensorBoard:
  """Writes scalars in TensorBoard's file format.

  The thread of tensorboardX's SummaryWriter ends at the first error (a full disk), after which its callers block.
  """

  def __init__(self, folder: Path, first_step: int):
    from tensorboardX import event_file_writer, summary  # here: keeps `import beit_jax` light
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    self._event, self._scalar = Event, summary.scalar
    self._writer = event_file_writer.EventsWriter(str(folder / "events"))
    start = SessionLog(status=SessionLog.START)  # TensorBoard drops this step and later ones of earlier files
    self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

  def add(self, step: int, key: str, value: float) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(key, value)))

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Reads the objects of a JSON Lines file; [] if there is no file. Lines that a kill cut off are skipped."""
  try:
    lines = path.read_text(errors="replace").splitlines()
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(ValueError):
      rows.append(json.loads(line))
  return [row for row in rows if isinstance(row, dict)]
