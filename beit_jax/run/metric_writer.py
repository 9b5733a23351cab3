"""The metrics of a run: metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np

from beit_jax.errors import UserError
from beit_jax.run import files
from beit_jax.runtime import bucket

Figures = Mapping[str, np.ndarray]  # name -> uint8 [H, W, 3]


class Viewer(Protocol):
  """A program that displays runs and gets a copy of what they write."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

  def figures(self, step: int, figures: Figures) -> None: ...

  def hyper_parameters(self, config: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


class MetricWriter:
  """Writes one JSON object per logged step and copies of it for the programs that display runs; on process 0 only."""

  def __init__(
    self,
    workdir: Path,
    start_step: int = 0,
    *,
    redo_evaluation: bool = False,
    wandb: bool = False,
    name: str = "",
  ):
    """
    Args:
      workdir: folder of metrics.jsonl, tensorboard/ and wandb/.
      start_step: the step that was restored; later rows of an interrupted run are deleted.
      redo_evaluation: whether the evaluation at `start_step` is repeated; its rows are then deleted too.
      wandb: whether Weights & Biases gets a copy.
      name: the run's name there.

    Raises:
      UserError: Weights & Biases is not installed or cannot be reached.
    """
    self._active = jax.process_index() == 0
    self._viewers: list[Viewer] = []
    if self._active:
      if wandb:
        self._viewers.append(_WandB(bucket.local(workdir), name or workdir.name))
      path = bucket.local(workdir / "metrics.jsonl")
      _truncate(path, start_step, redo_evaluation)
      self._file = path.open("a")
      self._viewers.append(_TensorBoard(bucket.local(workdir / "tensorboard"), start_step + 1))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a step; NaN and infinity become null and are not plotted."""
    if not self._active:
      return
    clean = {k: (float(v) if math.isfinite(float(v)) else None) for k, v in metrics.items()}
    self._file.write(json.dumps({"step": int(step), **clean}) + "\n")
    self._file.flush()
    for viewer in self._viewers:
      viewer.scalars(int(step), {key: value for key, value in clean.items() if value is not None})

  def write_figures(self, step: int, figures: Figures) -> None:
    """Shows figures, uint8 [H, W, 3], in the viewers; the files of the run are written elsewhere."""
    for viewer in self._viewers:
      viewer.figures(int(step), figures)

  def write_hyper_parameters(self, config: Mapping[str, Any]) -> None:
    """Shows the flat config in the viewers; they take UTF-8 only, which names of files need not be."""
    values = {
      key: value
      if isinstance(value, bool | int | float)
      else str(value).encode(errors="backslashreplace").decode()
      for key, value in config.items()
    }
    for viewer in self._viewers:
      viewer.hyper_parameters(values)

  def close(self) -> None:
    if self._active:
      self._file.close()
    for viewer in self._viewers:
      viewer.close()


def _truncate(path: Path, step: int, redo_evaluation: bool) -> None:
  """Deletes the rows after a step and, with `redo_evaluation`, the evaluation at that step."""
  if not path.exists():
    return
  rows = [row for row in files.read_json_lines(path) if row.get("step", math.inf) <= step]
  if redo_evaluation:
    rows = [row for row in rows if row["step"] < step or not any(key.startswith("eval_") for key in row)]
  files.write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


class _TensorBoard:
  """Writes TensorBoard's file format.

  The thread of tensorboardX's SummaryWriter ends at the first error (a full disk), after which its callers block.
  """

  def __init__(self, folder: Path, first_step: int):
    from tensorboardX import event_file_writer, summary  # here: keeps `import beit_jax` light
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    self._event, self._summary = Event, summary
    self._writer = event_file_writer.EventsWriter(str(folder / "events"))
    start = SessionLog(status=SessionLog.START)  # TensorBoard drops this step and later ones of earlier files
    self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._write(step, *(self._summary.scalar(key, value) for key, value in values.items()))

  def figures(self, step: int, figures: Figures) -> None:
    named = figures.items()
    self._write(step, *(self._summary.image(f"figures/{key}", x, dataformats="HWC") for key, x in named))

  def hyper_parameters(self, config: Mapping[str, Any]) -> None:
    experiment, start, _ = self._summary.hparams(dict(config), {"loss": 0.0})
    self._write(0, experiment, start)

  def _write(self, step: int, *summaries: Any) -> None:
    for summary in summaries:
      self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WandB:
  """Writes to Weights & Biases. Its environment variables apply: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""

  def __init__(self, folder: Path, name: str):
    self._wandb = _import_wandb()
    id_file = folder / "wandb_id.txt"  # a resumed run continues its curves
    if not id_file.exists():
      files.write_atomic(id_file, uuid.uuid4().hex + "\n")
    try:
      self._run = self._wandb.init(
        project=os.environ.get("WANDB_PROJECT", "beit_jax"),
        name=name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(folder),
        settings=self._wandb.Settings(console="off"),
      )
    except self._wandb.Error as error:
      raise UserError(
        f"config key 'wandb': Weights & Biases cannot start ({error}); WANDB_MODE=offline writes to {folder} only"
      ) from None

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def figures(self, step: int, figures: Figures) -> None:
    self._run.log({f"figures/{name}": self._wandb.Image(x) for name, x in figures.items()}, step=step)

  def hyper_parameters(self, config: Mapping[str, Any]) -> None:
    self._run.config.update(dict(config), allow_val_change=True)

  def close(self) -> None:
    self._run.finish()


def _import_wandb() -> ModuleType:
  try:
    import wandb
  except ImportError:
    raise UserError(
      "config key 'wandb': the package is not installed; pip install 'beit_jax[wandb]'"
    ) from None
  return wandb
