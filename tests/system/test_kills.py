"""Signals and kills at critical moments, on real processes; `python -m tests.kills` runs the full size."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from beit_jax.run import checkpoint
from beit_jax.runtime import preemption
from tests import kills

pytestmark = pytest.mark.slow
LIMIT = 30  # seconds from the signal to the exit of the process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  kills.finish(workdir, "uninterrupted", workers=2, mesh=1, slow=0.0)
  return workdir


def _wait(process, reached):
  deadline = time.monotonic() + 200
  while not reached():
    assert process.poll() is None, "the run ended before it could be stopped"
    assert time.monotonic() < deadline
    time.sleep(0.005)


def _sealed(workdir, step):
  return (workdir / "checkpoints" / str(step) / checkpoint.DIGEST).exists()


def _end(process, number, status):
  began = time.monotonic()
  process.send_signal(number)
  try:
    assert process.wait(LIMIT) == status
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  return time.monotonic() - began


def test_sigterm_at_the_first_compile_in_a_step_a_save_and_an_evaluation(uninterrupted, tmp_path):
  """Each process exits within 30 s with status 143 (130 after SIGINT); the result is that of an uninterrupted run."""
  workdir, log = tmp_path / "run", tmp_path / "run" / "log.txt"

  def start():
    return kills.start(workdir, "terms", workers=2, mesh=1, slow=0.3)

  def logged(text):
    return log.exists() and text in log.read_text()

  process = start()
  _wait(process, lambda: logged("parameter groups"))  # the compilation follows
  _end(process, signal.SIGTERM, 143)
  assert logged("nothing to save")

  process = start()
  _wait(process, lambda: kills.logged_steps(workdir) >= 4)
  _end(process, signal.SIGTERM, 143)
  assert logged("finishing the step and saving")
  stopped_at = max(checkpoint.steps(workdir / "checkpoints"))
  assert stopped_at >= 4 and checkpoint.fault(workdir / "checkpoints" / str(stopped_at)) is None

  process = start()
  before = kills.logged_steps(workdir)
  _wait(process, lambda: kills.logged_steps(workdir) > before and kills.saving(workdir))
  _end(process, signal.SIGTERM, 143)

  process = start()
  _wait(process, lambda: _sealed(workdir, 50))  # the evaluation follows
  _end(process, signal.SIGTERM, 143)

  process = start()
  _wait(process, lambda: kills.logged_steps(workdir) >= 60)
  _end(process, signal.SIGINT, 130)
  assert not kills.left_behind("terms")
  kills.finish(workdir, "terms", workers=0, mesh=1, slow=0.0)
  kills.compare(uninterrupted, workdir, exact=True)


def test_a_second_signal_ends_the_run_at_once(tmp_path):
  workdir = tmp_path / "run"
  process = kills.start(workdir, "twice", workers=0, mesh=1, slow=5.0)  # a save takes 15 seconds
  _wait(process, lambda: kills.saving(workdir))
  process.send_signal(signal.SIGTERM)
  _wait(process, lambda: "a second signal exits at once" in (workdir / "log.txt").read_text())
  time.sleep(preemption.SAME_NOTICE)
  assert _end(process, signal.SIGTERM, 143) < 3


def test_four_kills_do_not_change_the_result(tmp_path):
  counts = kills.harness(tmp_path, kills=4, seed=1, meshes=False)
  assert sum(counts.values()) == 4 and counts["save"] >= 1


def test_a_killed_run_continues_on_another_mesh(tmp_path):
  kills.harness(tmp_path, kills=2, seed=3, meshes=True)


def test_kills_of_one_or_both_of_two_processes_do_not_change_the_result(tmp_path):
  kills.harness(tmp_path, kills=2, seed=5, processes=2)


def test_a_run_ends_when_a_data_worker_is_killed(tmp_path):
  workdir = tmp_path / "run"
  process = kills.start(workdir, "worker", workers=2, mesh=1, slow=0.0)
  _wait(process, lambda: kills.logged_steps(workdir) >= 2)
  workers = [pid for pid in kills.living_processes("worker") if b"spawn_main" in _command(pid)]
  os.kill(workers[0], signal.SIGKILL)
  assert process.wait(60) in (0, 75)  # the workers may already have delivered all batches
  text = (tmp_path / "output.txt").read_text()
  assert process.returncode == 0 or "data workers was killed" in text and "Traceback" not in text
  assert not kills.left_behind("worker")


def _command(pid):
  return Path(f"/proc/{pid}/cmdline").read_bytes()
