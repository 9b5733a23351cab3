"""Runs that are stopped: by signals, by maintenance events, in one or several processes."""

import contextlib
import functools
import http.server
import signal
import socket
import threading
import time

import jax.numpy as jnp
import pytest

from beit_jax.run import checkpoint
from beit_jax.run.checkpointer import Checkpointer
from beit_jax.run.state import TrainState
from beit_jax.runtime import maintenance_events, preemption
from tests import kills

SLOW = pytest.mark.slow


@pytest.fixture
def metadata(monkeypatch):
  """A metadata server on the loopback address that serves these values as `instance/<key>`."""
  values = {"preempted": "FALSE", "maintenance-event": "NONE"}

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.rpartition("/")[2]
      good = self.headers["Metadata-Flavor"] == "Google" and key in values
      self.send_response(200 if good else 404)
      self.end_headers()
      self.wfile.write(values.get(key, "").encode() if good else b"")
      values["asked"] = values.get("asked", 0) + 1

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
  events = functools.partial(maintenance_events.MaintenanceEvents, interval=0.05)
  monkeypatch.setattr(preemption, "MaintenanceEvents", events)
  yield values
  server.shutdown()
  thread.join()
  server.server_close()


def _until(reached, seconds=20):
  end = time.monotonic() + seconds
  while not reached() and time.monotonic() < end:
    time.sleep(0.01)
  return reached()


def _asked(values, times=4):
  before = values.get("asked", 0)
  return _until(lambda: values.get("asked", 0) >= before + times)


@pytest.mark.parametrize(
  "key, value", [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_maintenance_event_sends_sigterm(key, value, metadata, caplog):
  with preemption.Watch() as watch:
    watch.nothing_to_save = False
    assert _asked(metadata) and watch.requested() == 0
    metadata[key] = value
    assert _until(watch.requested) and watch.requested() == signal.SIGTERM
    with pytest.raises(preemption.Stopped) as stopped:
      watch.saved()
  assert stopped.value.status == 143 and f"{key}={value}" in caplog.text


def test_earlier_events_and_live_migrations_are_ignored(metadata):
  metadata |= {"preempted": "TRUE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
  with preemption.Watch() as watch:
    watch.nothing_to_save = False
    assert _asked(metadata, 8) and watch.requested() == 0


def test_metadata_server_without_these_keys_and_no_server(metadata, monkeypatch, caplog):
  metadata.clear()
  with preemption.Watch():
    assert _asked(metadata)
  assert "metadata server" not in caplog.text
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{port}")
  with preemption.Watch():
    assert _until(lambda: "no metadata server" in caplog.text)


def test_other_machines_send_no_request(monkeypatch, tmp_path):
  monkeypatch.setattr(maintenance_events, "PRODUCT", tmp_path / "product_name")
  assert maintenance_events.metadata_server({}) is None
  (tmp_path / "product_name").write_text("Standard PC\n")
  assert maintenance_events.metadata_server({}) is None
  (tmp_path / "product_name").write_text("Google Compute Engine\n")
  assert maintenance_events.metadata_server({}) == "metadata.google.internal"


@pytest.fixture
def two(monkeypatch):
  """Pretends to be one of two processes: (steps that JAX's service was asked about, SIGTERMs that it got)."""
  asked, handed = [], []
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)

  def reached_sync_point(step):
    if not handed:
      return False
    asked.append(step)
    return True

  monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached_sync_point)
  old = signal.signal(signal.SIGTERM, lambda *_: handed.append(1))
  yield asked, handed
  signal.signal(signal.SIGTERM, old)


def test_the_first_ctrl_c_waits_for_a_compilation_in_one_of_several_processes(two, monkeypatch):
  _, handed = two
  left = []
  monkeypatch.setattr(preemption.Watch, "_exit", lambda self, number, reason: left.append(number))
  with preemption.Watch() as watch:
    assert watch.nothing_to_save
    signal.raise_signal(signal.SIGINT)
    assert _until(lambda: handed or left) and not left
    assert watch.requested() == signal.SIGINT
    signal.raise_signal(signal.SIGINT)
    assert _until(lambda: left) and left == [signal.SIGINT]


def test_two_sigterms_of_one_notice_count_once(monkeypatch):
  """Slurm sends two within milliseconds when it preempts a job; later ones, and Ctrl-C, exit at once."""
  left = []
  monkeypatch.setattr(preemption.Watch, "_exit", lambda self, number, reason: left.append(number))
  monkeypatch.setattr(preemption, "SAME_NOTICE", 1.0)
  with preemption.Watch() as watch:
    watch.nothing_to_save = False
    for _ in range(2):
      signal.raise_signal(signal.SIGTERM)
      time.sleep(0.2)
    assert watch.requested() == signal.SIGTERM and not left
    signal.raise_signal(signal.SIGINT)
    assert _until(lambda: left) and left == [signal.SIGINT]
    time.sleep(1)
    signal.raise_signal(signal.SIGTERM)
    assert _until(lambda: len(left) > 1) and left[1] == signal.SIGTERM


def test_steps_are_numbered_across_stages(two):
  """JAX chooses the step after the last one it was asked about, so a later stage must continue the numbers."""
  asked, handed = two
  handed.append(1)
  for _ in range(2):
    with preemption.Watch() as watch:
      for _ in range(3):
        watch.requested()
  assert asked == list(range(asked[0], asked[0] + 6))


def test_a_save_does_not_ask_the_preemption_service(two, tmp_path):
  """The service compares the last numbers that processes asked about: a second numbering would hide a signal."""
  asked, handed = two
  handed.append(1)
  zeros = {"kernel": jnp.zeros((2, 2))}
  state = TrainState(jnp.int32(0), zeros, {}, zeros, None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preemption.jax, "process_count", lambda: 1)  # no barriers with the second process
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpointer:
      checkpointer.save(51, state, {})
      assert checkpointer.wait()
  assert checkpoint.steps(tmp_path / "checkpoints") == [51] and asked == []


@SLOW
def test_a_signal_during_a_save_of_a_resumed_run_stops_the_next_step(tmp_path):
  """A run that did not begin at step 0 does not wait for a step that is as far ahead as the step it resumed from."""
  workdir = tmp_path / "run"
  options = dict(processes=2, workers=0, mesh=2)
  save = workdir / "checkpoints" / "50"
  with contextlib.ExitStack() as stack:
    for slow, reached in ((0.0, lambda: kills.logged_steps(workdir) > 12), (1.0, save.is_dir)):
      started = kills.start_all(workdir, "resumed", slow=slow, **options)
      for process in started:
        stack.callback(process.wait)
        stack.callback(process.kill)  # runs before `wait`
      assert _until(reached, 240)
      started[1].send_signal(signal.SIGTERM)
      assert kills.exit_statuses(started, workdir) == [143, 143]
  assert max(checkpoint.steps(workdir / "checkpoints")) in (50, 51)


@SLOW
def test_a_signal_during_the_first_compilation(tmp_path):
  """The run saves the step that follows. The compilation cache is empty."""
  workdir, log = tmp_path / "run", tmp_path / "run" / "log.txt"
  with contextlib.ExitStack() as stack:
    started = kills.start_all(workdir, "compiling", processes=2, workers=0, mesh=2, slow=0.0)
    for process in started:
      stack.callback(process.wait)
      stack.callback(process.kill)  # runs before `wait`
    assert _until(lambda: log.exists() and "parameter groups" in log.read_text(), 240)
    started[1].send_signal(signal.SIGINT)
    assert kills.exit_statuses(started, workdir) == [143, 130]
  assert checkpoint.steps(workdir / "checkpoints") == [kills.logged_steps(workdir)]


@SLOW
@pytest.mark.parametrize(
  "index, number, statuses",
  [(1, signal.SIGTERM, [143, 143]), (0, signal.SIGTERM, [143, 143]), (1, signal.SIGINT, [143, 130])],
)
def test_a_signal_to_one_of_two_processes_makes_both_save_the_same_step(index, number, statuses, tmp_path):
  """The resumed run is identical to one that was not interrupted."""
  (tmp_path / "uninterrupted").mkdir()
  uninterrupted, workdir = tmp_path / "uninterrupted" / "run", tmp_path / "run"
  options = dict(processes=2, workers=0, mesh=2, slow=0.0)
  with contextlib.ExitStack() as stack:
    started = kills.start_all(workdir, "asked", **options)
    for process in started:
      stack.callback(process.wait)
      stack.callback(process.kill)  # runs before `wait`
    assert _until(lambda: kills.logged_steps(workdir) > 12, 240)
    started[index].send_signal(number)
    assert kills.exit_statuses(started, workdir) == statuses
  newest = max(checkpoint.steps(workdir / "checkpoints"))
  assert newest == kills.logged_steps(workdir)
  assert checkpoint.fault(workdir / "checkpoints" / str(newest)) is None
  if number == signal.SIGINT:
    kills.finish(workdir, "asked", **options)
    kills.finish(uninterrupted, "asked", **options)
    kills.compare(uninterrupted, workdir, exact=True)
  assert not kills.left_behind("asked")
