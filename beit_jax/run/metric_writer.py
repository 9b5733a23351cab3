"""The metrics of a run: metrics.jsonl, TensorBoard, the progress line."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from beit_jax.run import files
from beit_jax.runtime import bucket


class MetricWriter:
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
  rows = [row for row in files.read_json_lines(path) if row.get("step", math.inf) <= step]
  if redo_evaluation:
    rows = [row for row in rows if row["step"] < step or not any(key.startswith("eval_") for key in row)]
  files.write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


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
