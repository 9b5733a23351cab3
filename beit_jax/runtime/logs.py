"""The log of the package: on the terminal and in log.txt."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax.errors import UserError
from beit_jax.runtime import bucket

log = logging.getLogger("beit_jax")
FOREIGN_LOGGERS = ("py.warnings", "absl", "jax", "orbax")  # their warnings go to log.txt too


def setup(workdir: Path | None = None) -> None:
  """Sends the package's log to standard error and, with a workdir, to workdir/log.txt. May be called again.

  Text that cannot be encoded, such as the name of a file, is escaped, also on standard output.

  With a workdir, process 0 logs everything; the other processes log warnings only, with their number before each line,
  and write workdir/log_<number>.txt.

  Raises:
    UserError: the workdir cannot be written to.
  """
  index = jax.process_index() if workdir is not None else 0
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
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


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """Suppresses the log of work that will be repeated, and logged then."""
  log.disabled = True
  try:
    yield
  finally:
    log.disabled = False


def only_file(message: str) -> None:
  """Writes a line to log.txt but not to the terminal."""
  record = logging.LogRecord(log.name, logging.INFO, __file__, 0, message, None, None)
  for handler in log.handlers:
    if isinstance(handler, logging.FileHandler):
      handler.handle(record)


class _File(logging.FileHandler):
  """Reports the first write error (a full disk) in one line, not a stack trace for every message."""

  failed = False

  def __init__(self, path: Path):
    super().__init__(
      path, encoding="utf-8", errors="backslashreplace"
    )  # names of files need not be valid text

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
