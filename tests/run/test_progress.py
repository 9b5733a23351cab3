"""Lines of progress, the bar on a terminal, TensorBoard's figures and hyper-parameters, Weights & Biases."""

import io
import logging
import re
import struct
import sys
import types

import numpy as np
import pytest

from beit_jax import train
from beit_jax.errors import UserError
from beit_jax.run import progress as progress_lib
from beit_jax.run.metric_writer import MetricWriter
from beit_jax.run.progress import Progress
from beit_jax.runtime import logs
from tests import tiny

ROW = dict(loss=1.5, learning_rate=1e-3, images_per_second=310.0, data_wait=0.02)


@pytest.fixture
def clock(monkeypatch):
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(progress_lib.time, "monotonic", lambda: clock.now)
  return clock


@pytest.fixture
def lines(monkeypatch):
  """(time, message) of the lines in the log, which is not a terminal."""
  found = []
  handler = logging.Handler()
  handler.emit = lambda record: found.append(record.getMessage())
  monkeypatch.setattr(logs.log, "handlers", [handler])
  monkeypatch.setattr(logs.log, "level", logging.INFO)
  return found


def _run(progress, clock, steps, seconds, *, start=0, every=1, compilation=0.0):
  """Runs steps of `seconds`, the first one with compilation; returns the times of the rows by step."""
  progress.compiling()
  clock.now += compilation
  for step in range(start + 1, start + steps + 1):
    clock.now += seconds
    progress.completed(step)
    if step == 1 or step % every == 0:
      progress.show(step, ROW)


def _steps(lines):
  return [int(line.split("step ")[1].split("/")[0]) for line in lines if "loss" in line]


def test_fast_runs_have_a_line_at_each_milestone_only(clock, lines):
  _run(Progress("pretrain", 1000), clock, 1000, seconds=0.01, every=5)
  assert lines[0] == "pretrain: compiling the training step ..."
  assert _steps(lines) == [1, 10, *range(100, 1001, 100)]
  assert (
    lines[2] == "pretrain step 10/1000 (1%)  loss 1.5  lr 1.00e-03  310.0 images/s  data wait 2%  eta 0:00:10"
  )
  assert lines[-1].endswith("data wait 2%")


def test_slow_runs_have_at_most_one_line_a_minute_between_milestones(clock, lines):
  _run(Progress("pretrain", 100_000), clock, 999, seconds=7.0, every=2)
  steps = _steps(lines)
  assert steps[0] == 1 and all(
    late - early >= 60 / 7 for early, late in zip(steps[:-1], steps[1:], strict=True)
  )
  assert len(steps) > 90


def test_a_resumed_run_does_not_repeat_milestones(clock, lines):
  _run(Progress("pretrain", 1000, 500), clock, 20, seconds=0.01, start=500)
  assert _steps(lines) == [501]  # the first one of this call


def test_the_remaining_time_leaves_compilation_out_and_knows_days(clock, lines):
  progress = Progress("pretrain", 100_001)
  _run(progress, clock, 101, seconds=2.0, every=101, compilation=3600.0)
  assert "the first step took 3602 s" in lines[1]
  assert "eta 2 days, 7:30:00" in progress.facts(101, ROW)  # 99,900 steps of 2 s


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_terminal_has_a_bar_and_the_file_has_the_lines(monkeypatch, tmp_path, clock):
  terminal = _Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  logs.setup(tmp_path)
  progress = Progress("pretrain", 100)
  _run(progress, clock, 50, seconds=0.5)
  logs.log.info("a message")
  _run(progress, clock, 50, seconds=0.5, start=50)
  progress.close()
  logs.log.info("after the run")
  shown = terminal.getvalue()
  assert "50/100, loss 1.5  lr 1.00e-03  310.0 images/s  data wait 2%  eta 0:00:25" in shown
  assert "pretrain 100%|" in shown and "100/100, loss 1.5" in shown
  # The bar is cleared before a message, which has a line of its own.
  assert re.search(r"\r\d\d:\d\d:\d\d I a message\n", shown)
  assert shown.endswith("I after the run\n") and "step 10/100" not in shown
  text = (tmp_path / "log.txt").read_text()
  assert "a message" in text and "pretrain step 50/100 (50%)  loss 1.5" in text and "|" not in text
  logs.setup()


# Programs that display runs.

FIGURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def _events(folder):
  from tensorboardX.proto.event_pb2 import Event

  (path,) = folder.iterdir()
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events


def test_tensorboard_has_figures_and_hyper_parameters(tmp_path):
  from PIL import Image
  from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

  writer = MetricWriter(tmp_path)
  writer.write_hyper_parameters(
    {"optimizer.learning_rate": 0.5, "data.flip": True, "betas": [0.9, 1], "x": None}
  )
  writer.write_figures(7, {"masks": FIGURE})
  writer.close()
  values = [
    (event.step, value) for event in _events(tmp_path / "tensorboard") for value in event.summary.value
  ]
  (step, image), found = values[-1], {value.tag: value for _, value in values}
  assert step == 7 and image.tag == "figures/masks"
  np.testing.assert_array_equal(Image.open(io.BytesIO(image.image.encoded_image_string)), FIGURE)
  data = found["_hparams_/session_start_info"].metadata.plugin_data.content
  config = HParamsPluginData.FromString(data).session_start_info.hparams
  assert config["optimizer.learning_rate"].number_value == 0.5 and config["data.flip"].bool_value
  assert config["betas"].string_value == "[0.9, 1]" and config["x"].string_value == "None"


class _WandbRun:
  def __init__(self, **options):
    self.options, self.rows, self.finished = options, [], False
    self.config = types.SimpleNamespace(update=lambda config, allow_val_change: self.rows.append(config))

  def log(self, values, step):
    self.rows.append((step, values))

  def finish(self):
    self.finished = True


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in with the part of the interface that is used; `runs` are those that were started."""
  module = types.ModuleType("wandb")
  module.runs = []
  module.Error = type("Error", (Exception,), {})
  module.Settings, module.Image = dict, lambda x: ("image", x.shape)

  def init(**options):
    module.runs.append(_WandbRun(**options))
    return module.runs[-1]

  module.init = init
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def test_a_run_reads_like_a_story_and_writes_to_weights_and_biases(wandb, tmp_path, capsys):
  logs.setup(tmp_path)
  try:
    train.run(tiny.config("classify", wandb=True, figures=True), tmp_path)
  finally:
    logs.setup()
  story = ("objective classify", "compiling the training step", "step 1/6 (17%)", "the first step took")
  story += (
    "images/s  data wait",
    "eta 0:00:0",
    "step 3/6 (50%)",
    "step 6/6 (100%)",
    "eval  acc1",
    "figure:",
    "done in",
  )
  for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
    places = [text.index(part) for part in story]
    assert places == sorted(places)
  (run,) = wandb.runs
  assert run.finished and run.options["project"] == "beit_jax" and run.options["name"] == tmp_path.name
  assert run.rows[0]["optimizer.learning_rate"] == 1e-3
  assert [step for step, values in run.rows[1:] if "loss" in values] == [1, 2, 3, 4, 5, 6]
  assert {key for _, values in run.rows[1:] for key in values} >= {"eval_acc1", "figures/predictions"}

  # A resumed run goes on with its curves.
  MetricWriter(tmp_path, wandb=True).close()
  assert wandb.runs[1].options["id"] == run.options["id"] and run.options["resume"] == "allow"


def test_without_weights_and_biases_the_error_names_the_extra(wandb, monkeypatch, tmp_path):
  def fail(**_):
    raise wandb.Error("no API key")

  wandb.init = fail
  with pytest.raises(UserError, match=r"config key 'wandb': .*\(no API key\); WANDB_MODE=offline"):
    MetricWriter(tmp_path, wandb=True)
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"config key 'wandb': .* pip install 'beit_jax\[wandb\]'"):
    MetricWriter(tmp_path, wandb=True)
