"""metrics.jsonl, TensorBoard, the progress line; only process 0 writes."""

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


def setup(workdir: Path | None = None) -> None:
  """Sends the package's log to standard error and, with a workdir, to workdir/log.txt. Idempotent.

  Of several processes, which a call with a workdir asks for, number 0 says everything; the others warn, with their
  number before each line; they write workdir/log_<number>.txt.

  Raises:
    UserError: the workdir cannot be written to.
  """
  index = jax.process_index() if workdir is not None else 0
  log.setLevel(logging.WARNING if index else logging.INFO)
  log.propagate = False
  for handler in list(log.handlers):
    log.removeHandler(handler)
    handler.close()
  handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
  if workdir is not None:
    try:
      bucket.check_writable(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
      handlers.append(_File(bucket.local(workdir / (f"log_{index}.txt" if index else "log.txt"))))
    except (OSError, ValueError, *bucket.errors()) as error:
      raise UserError(f"--workdir={workdir}: nothing can be written there ({error})") from None
  prefix = f"[{index}] " if index else ""
  for handler, clock in zip(handlers, ("%H:%M:%S", "%Y-%m-%d %H:%M:%S"), strict=False):
    handler.setFormatter(logging.Formatter(f"{prefix}%(asctime)s %(levelname).1s %(message)s", clock))
    log.addHandler(handler)
  for other in ("py.warnings", "absl", "jax", "orbax"):  # their warnings belong into the file too
    logger = logging.getLogger(other)
    for handler in [h for h in logger.handlers if getattr(h, "of_beit_jax", False)]:
      logger.removeHandler(handler)
    if len(handlers) > 1:
      forward = _Forward(handlers[1])
      logger.addHandler(forward)


def only_file(message: str) -> None:
  """One line for log.txt that nobody wants on the terminal."""
  record = logging.LogRecord(log.name, logging.INFO, __file__, 0, message, None, None)
  for handler in log.handlers:
    if isinstance(handler, logging.FileHandler):
      handler.handle(record)


class _File(logging.FileHandler):
  """On a full disk one line, not a stack trace for every message; what must not be lost raises by itself."""

  failed = False

  def handleError(self, record: logging.LogRecord) -> None:
    if not self.failed:
      self.failed = True
      print(f"{self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


class _Forward(logging.Handler):
  """Sends the warnings of another logger to one of our handlers, each message once."""

  of_beit_jax = True

  def __init__(self, target: logging.Handler):
    super().__init__(logging.WARNING)
    self._target, self._seen = target, set()

  def emit(self, record: logging.LogRecord) -> None:
    key = (record.name, record.getMessage())
    if key not in self._seen and len(self._seen) < 1000:
      self._seen.add(key)
      self._target.handle(record)


class Logger:
  """Writes one JSON object per logged step, mirrors it to TensorBoard, keeps a progress line on a terminal."""

  def __init__(
    self, workdir: Path, total_steps: int, name: str = "", start_step: int = 0, *, again: bool = False
  ):
    self._active = jax.process_index() == 0
    self._total, self._name, self._start = total_steps, name, start_step
    self._began = time.monotonic()
    if not self._active:
      return
    self._path = bucket.local(workdir / "metrics.jsonl")
    self._truncate(start_step, again)
    self._file = self._path.open("a")
    self._tensorboard = _TensorBoard(bucket.local(workdir / "tensorboard"), start_step + 1)

  def _truncate(self, step: int, again: bool) -> None:
    """Forgets what an interrupted run logged after the step that was restored, and, `again`, that step's evaluation."""
    if self._path.exists():
      rows = [line for line in self._path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
      rows = [row for row in rows if not (again and _step_of(row) == step and '"eval_' in row)]
      temporary = self._path.with_suffix(".tmp")  # a kill in between leaves the old file or the new one
      with temporary.open("w") as file:
        file.write("".join(f"{row}\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(self._path)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Values must be finite floats to be plotted; NaN and infinity go to the file as null."""
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
    """`pretrain 120/600 loss 4.512 310 img/s eta 1:32`, on one line of a terminal."""
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


class _TensorBoard:
  """Scalars in a file of TensorBoard's own form.

  Not tensorboardX's SummaryWriter: that one's thread ends at the first error (a full disk), and whoever hands it more
  waits for ever.
  """

  def __init__(self, folder: Path, first_step: int):
    from tensorboardX import event_file_writer, summary  # here: keeps `import beit_jax` light
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    self._event, self._scalar = Event, summary.scalar
    self._writer = event_file_writer.EventsWriter(str(folder / "events"))
    start = SessionLog(
      status=SessionLog.START
    )  # what earlier files say of this step and later ones is forgotten
    self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

  def add(self, step: int, key: str, value: float) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(key, value)))

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _step_of(line: str) -> int:
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):  # a line cut off by a kill
    return sys.maxsize


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
