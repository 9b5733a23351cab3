"""Several processes: detection, missing and dead processes, and the same losses with two processes as with one."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from beit_jax import main, tokenize
from beit_jax.config import parse as config_lib
from beit_jax.errors import TransientError, UserError
from beit_jax.run.checkpointer import SLOW_SAVE
from beit_jax.runtime import distributed, rendezvous
from beit_jax.runtime.rendezvous import ProcessInfo
from tests.conftest import ROOT

FLAGS = ("--coordinator=a:1", "--num_processes=4", "--process_id=3")


def test_take_flags():
  argv = ["--config", "x", *FLAGS, "--heartbeat_timeout", "9", "--config.a=--process_id=7", "--workdir=w"]
  flags, rest = distributed.take_flags(argv)
  assert rest == ["--config", "x", "--config.a=--process_id=7", "--workdir=w"]
  assert config_lib.parse_args(rest)[:2] == ("x", "w")
  assert distributed.from_flags(flags) == ProcessInfo("flags", "a:1", 4, 3)
  assert (flags.heartbeat_timeout, flags.initialization_timeout) == (9, 300.0)


def test_no_flags():
  assert distributed.from_flags(distributed.take_flags(["--config=x"])[0]) is None


def test_num_processes_1_alone_means_one_process():
  info = distributed.from_flags(distributed.take_flags(["--num_processes=1"])[0])
  assert (info.count, info.index) == (1, 0)


@pytest.mark.parametrize(
  "argv, fact",
  [
    (FLAGS[:1], "--num_processes, --process_id missing"),
    (FLAGS[1:2], "--coordinator, --process_id missing"),
    (FLAGS[1:], "--coordinator missing"),
    ((*FLAGS[:2], "--process_id=4"), "must lie in 0 to 3"),
    ((*FLAGS[:2], "--process_id=-2"), "must lie in 0 to 3"),
    ((*FLAGS[:2], "--process_id=two"), "--process_id: invalid int value: 'two'"),
    ((*FLAGS[1:], "--coordinator=host"), "must be HOST:PORT"),
    (("--num_processes=0",), "must be more than 0"),
    (("--heartbeat_timeout=0",), "must be more than 0"),
    (("--initialization_timeout=long",), "invalid float value"),
  ],
)
def test_invalid_flags(argv, fact):
  with pytest.raises(UserError, match=fact.replace("(", "\\(")):
    distributed.from_flags(distributed.take_flags([*argv])[0])


SLURM = dict(
  SLURM_JOB_ID="123", SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2",
  SLURM_LOCALID="0", SLURM_STEP_NODELIST="gpu[07-09],big1", SLURM_STEP_TASKS_PER_NODE="1(x4)",
)  # fmt: skip
BATCH = dict(
  SLURM_JOB_ID="123", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="n[1-4]"
)
MPI = dict(
  OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2",
  OMPI_MCA_orte_hnp_uri="15315.0;tcp://10.96.0.1,10.148.0.1:34911",
)  # fmt: skip
GKE = dict(TPU_WORKER_HOSTNAMES="w-0.s,w-1.s", TPU_WORKER_ID="1", KUBERNETES_SERVICE_HOST="10.0.0.1")
MEGASCALE = dict(
  MEGASCALE_NUM_SLICES="3", MEGASCALE_SLICE_ID="2", MEGASCALE_COORDINATOR_ADDRESS="s0-w0.jobs:8080"
)


@pytest.mark.parametrize(
  "environ, info",
  [
    ({}, None),
    (SLURM, ProcessInfo("Slurm", "gpu07:10861", 4, 2)),
    (
      {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
      ProcessInfo("Slurm", "gpu07:10861", 4, 2, 1),
    ),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # `salloc -n 4` and its interactive step, `srun -n 1`
    (BATCH, None),  # the batch script itself
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, None),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    (MPI, ProcessInfo("Open MPI", "10.96.0.1:17420", 2, 1, 1)),
    ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ProcessInfo("Open MPI", "10.96.0.1:17420", 2, 1)),
    (GKE, ProcessInfo("GKE", "w-0.s:8482", 2, 1)),
    ({**GKE, **MEGASCALE}, ProcessInfo("GKE", "s0-w0.jobs:8482", 6, 5)),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),  # one host of TPUs
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, None),
  ],
)
def test_environments(environ, info):
  found = distributed.detect(environ)
  if found and found.origin == "Open MPI":  # the port is a checksum
    assert 10000 <= int(found.coordinator.split(":")[1]) < 30000
    info = ProcessInfo(info.origin, found.coordinator, info.count, info.index, info.local_device)
  assert found == info


@pytest.mark.parametrize(
  "environ, fact",
  [
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, "pod 2 of a Kubernetes job"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK"),
  ],
)
def test_environments_that_require_flags(environ, fact):
  with pytest.raises(UserError, match="--coordinator=HOST:PORT") as error:
    distributed.detect(environ)
  assert fact in str(error.value)


@pytest.mark.parametrize(
  "nodes, first",
  [
    ("a1", "a1"),
    ("a1,b2", "a1"),
    ("n[03-7,9],b", "n03"),
    ("r[1-2]n[5-6]x,b", "r1n5x"),
    ("a-b.c[2]", "a-b.c2"),
  ],
)
def test_first_host_of_a_slurm_list(nodes, first):
  assert distributed.first_host(nodes) == first


@pytest.mark.parametrize(
  "attributes, info",
  [
    ({}, None),
    ({"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.2"}, None),
    (
      {"agent-worker-number": "1", "worker-network-endpoints": "u:0:10.0.0.2,u:1:10.0.0.3"},
      ProcessInfo("Cloud TPU", "10.0.0.2:8482", 2, 1),
    ),
    (
      {"agent-worker-number": "1", "worker-network-endpoints": "10.0.0.2,10.0.0.3",
       "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                  "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"},
      ProcessInfo("Cloud TPU", "10.9.0.1:8482", 4, 3),
    ),
  ],
)  # fmt: skip
def test_cloud_tpu_metadata_server(attributes, info, monkeypatch):
  """Uses a server that answers like the one of a TPU VM."""

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
      found = key in attributes and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if found else 404)
      self.end_headers()
      self.wfile.write(attributes[key].encode() if found else b"")

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: True)
    with jax_platforms(""):
      found = distributed.detect(environ, distributed.tpu_metadata(environ))
    server.shutdown()
  assert found == info


class jax_platforms:
  def __init__(self, value):
    self.value = value

  def __enter__(self):
    self.before = jax.config.jax_platforms
    jax.config.update("jax_platforms", self.value)

  def __exit__(self, *_):
    jax.config.update("jax_platforms", self.before)


def test_other_machines_do_not_ask_a_metadata_server(monkeypatch):
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: True)
  with jax_platforms(""):
    assert distributed.tpu_metadata({"TPU_SKIP_MDS_QUERY": "1"}) is None  # no TPU chips
    assert distributed.tpu_metadata({}) is not None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: None)
    assert distributed.tpu_metadata({}) is None  # no libtpu
  with jax_platforms("cpu"):
    assert distributed.tpu_metadata({}) is None


@pytest.mark.parametrize("environ, count", [({}, 0), (BATCH, 0), (GKE, 0), (SLURM, 1)])
def test_initialize_calls_jax_only_for_several_processes(environ, count, monkeypatch):
  """GKE's variables on a worker that uses only its CPU mean one process."""
  calls = []

  class Peers:
    hosts = ["a"] * 4
    barrier = staticmethod(lambda *_: None)

  for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_"))]:
    monkeypatch.delenv(name)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(distributed, "Peers", lambda *args: Peers())
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
  monkeypatch.setattr(distributed, "_peers", None)
  info = distributed.initialize(distributed.Flags())
  assert len(calls) == count and (info is not None) == bool(count) == (distributed._peers is not None)
  if calls:
    ((coordinator,), settings) = calls[0]
    assert coordinator == "gpu07:10861" and settings["cluster_detection_method"] == "deactivate"
    assert (settings["num_processes"], settings["process_id"], settings["local_device_ids"]) == (4, 2, None)
    assert settings["heartbeat_timeout_seconds"] == 60


def test_cpu_collectives_between_processes():
  assert jax.config.jax_cpu_collectives_implementation == "gloo"


# The check that all processes share a folder.


def _one_of_two(monkeypatch, index, barrier=lambda *_: None):
  peers = SimpleNamespace(
    info=ProcessInfo("flags", "a:1", 2, index), hosts=["h0", "h1"], start_id="t", barrier=barrier
  )
  monkeypatch.setattr(distributed, "_peers", peers)


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
  monkeypatch.setattr(distributed, "VISIBILITY_TIMEOUT", 0.1)
  _one_of_two(monkeypatch, 1)
  for flag, more in (("--workdir", "share, or gs://BUCKET/RUN"), ("--out", "share")):
    with pytest.raises(UserError) as error:
      distributed.check_shared(flag, tmp_path / "gone")
    for fact in (
      f"{flag}={tmp_path / 'gone'}: process 1 of 2 ({socket.gethostname()})",
      "process 0 (h0)",
      more,
    ):
      assert fact in str(error.value)
    assert str(error.value).endswith(more)
  distributed.check_shared("--workdir", epath.Path("gs://bucket/run"))


def test_a_folder_that_shows_new_files_late(tmp_path, monkeypatch):
  _one_of_two(monkeypatch, 1)
  late = threading.Timer(0.3, (tmp_path / ".shared-t").touch)
  late.start()
  distributed.check_shared("--workdir", tmp_path)
  late.join()


def test_the_check_leaves_no_file_behind(tmp_path, monkeypatch):
  there = []
  _one_of_two(monkeypatch, 0, lambda *_: there.append([path.name for path in tmp_path.iterdir()]))
  distributed.check_shared("--workdir", tmp_path)
  assert there == [[".shared-t"], [".shared-t"], []]
  with pytest.raises(UserError, match="nothing can be written there"):
    distributed.check_shared("--workdir", tmp_path / "gone")


def test_commands_check_that_their_folder_is_shared(tmp_path, monkeypatch, capsys):
  asked = []

  def check(*what):
    asked.append(what)
    raise UserError("not shared")

  monkeypatch.setattr(distributed, "check_shared", check)
  config = f"--config={ROOT}/configs/quickstart.py"
  assert main.main([config, f"--workdir={tmp_path / 'run'}"]) == 2
  assert tokenize.main([config, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'tokens'}"]) == 2
  assert asked == [("--workdir", tmp_path / "run"), ("--out", tmp_path / "tokens")]


# Real processes.

SCRIPT = """
import os, sys, time
from pathlib import Path
from beit_jax.runtime import distributed, logs
from beit_jax.errors import UserError

def main(argv):
  logs.setup()
  try:
    flags, (what,) = distributed.take_flags(argv)
    distributed.initialize(flags)
    me = flags.process_id
    if what == "late":
      time.sleep(8 * (me == 1))
      distributed.barrier("saved", 1)
    if what == "twice":
      for i in range(20):
        distributed.barrier("again", 10)
    if what == "kill" and me == 1:
      os.kill(os.getpid(), 9)
    if what == "raise" and me == 1:
      raise ValueError("boom")
    if what.startswith("mistake") and me == int(what[-1]):
      raise UserError("no such key")
    if what == "stopped":
      return 143
    if what in ("shared", "apart"):
      distributed.VISIBILITY_TIMEOUT = 2
      mine = Path(sys.argv[0]).parent / ("there" if what == "apart" and me == 2 else "here")
      mine.mkdir(exist_ok=True)
      distributed.check_shared("--workdir", mine)
    time.sleep(0 if what in ("fine", "twice", "shared") else 30)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    distributed.notify_peers(str(error), error.status)
    return error.status
  return 0

if __name__ == "__main__":
  distributed.run(main, sys.argv[1:])
"""


def _port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def _start(command, ids, count, timeout=60, env=None, port=None):
  """One process per id: (status, standard error) of each. `command` and `env`: for all, or a list with one each."""
  port = port or _port()
  common = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  commands = command if isinstance(command[0], list) else [command] * len(ids)
  own = env if isinstance(env, list) else [env or {}] * len(ids)
  flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
  options = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  started = [
    subprocess.Popen(
      [sys.executable, *command, *flags, f"--process_id={i}"], env={**os.environ, **common, **env}, **options
    )
    for i, command, env in zip(ids, commands, own, strict=True)
  ]
  try:
    errors = [process.communicate(timeout=timeout)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "what, statuses, fact",
  [
    ("kill", (75, -9, 75), "process 1 ({host}) died"),
    pytest.param("fine", (0, 0, 0), "", marks=SLOW),
    pytest.param("twice", (0, 0, 0), "", marks=SLOW),
    pytest.param("stopped", (143, 143, 143), "", marks=SLOW),
    pytest.param("raise", (75, 1, 75), "process 1 ({host}) failed: ValueError: boom", marks=SLOW),
    pytest.param("mistake0", (2, 2, 2), "process 0 ({host}) failed: no such key", marks=SLOW),
    pytest.param("mistake1", (2, 2, 2), "process 1 ({host}) failed: no such key", marks=SLOW),
    pytest.param("late", (75, 75, 75), "no sign of process 1 ({host})", marks=SLOW),
    pytest.param("shared", (0, 0, 0), "", marks=SLOW),
    pytest.param(
      "apart", (2, 2, 2), "process 2 of 3 ({host}) does not see there what process 0 ({host})", marks=SLOW
    ),
  ],
  ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_three_processes(what, statuses, fact, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  began = time.monotonic()
  results = _start([script, what, "--initialization_timeout=40"], range(3), 3)
  assert time.monotonic() - began < 45
  for i, ((status, error), wanted) in enumerate(zip(results, statuses, strict=True)):
    assert status == wanted, (i, status, error)
    if what != f"mistake{i}" and status in (2, 75):
      assert fact.format(host=socket.gethostname()) in error, (i, error)
      assert "Check failure stack trace" not in error
    assert ("resumes from the last checkpoint" in error) == (status == 75 and "ends too" in error), (i, error)
  assert not [path for folder in ("here", "there") for path in (tmp_path / folder).glob("*")]


@pytest.mark.parametrize(
  "ids, missing",
  [
    ((0, 2), "process 1, process 3 did not connect"),
    pytest.param((3,), "process 0 did not answer process 3 of 4", marks=SLOW),
  ],
)
def test_missing_processes_are_named(ids, missing, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  began = time.monotonic()
  for status, error in _start([script, "fine", "--initialization_timeout=4"], ids, 4):
    assert status == 75 and missing in error and "stack trace" not in error, error
  assert time.monotonic() - began < 30


def _join(info, timeout, results):
  try:
    results[info.index] = rendezvous.Peers(info, timeout, 60)
  except UserError as error:
    results[info.index] = error


def _join_all(infos, timeout=20.0):
  results = {}
  threads = [threading.Thread(target=_join, args=(info, timeout, results)) for info in infos]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def _leave(results):
  threads = [threading.Thread(target=peers.leave, args=(10,)) for peers in results.values()]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  end = time.monotonic() + 10
  while any(p._channel.socket.fileno() != -1 for p in results.values()) and time.monotonic() < end:
    time.sleep(0.01)


def _connect(port):
  """A plain connection to a hub that is about to listen."""
  end = time.monotonic() + 10
  while True:
    try:
      return socket.create_connection(("localhost", port), timeout=5)
    except OSError:
      assert time.monotonic() < end
      time.sleep(0.1)


@pytest.mark.parametrize(
  "hostile", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": "x"}\n', b"", b"x" * 4096]
)
def test_foreign_connections_do_not_disturb_the_rendezvous(hostile):
  port, results = _port(), {}
  infos = [ProcessInfo("flags", f"localhost:{port}", 2, i) for i in range(2)]
  coordinator = threading.Thread(target=_join, args=(infos[0], 20, results))
  coordinator.start()
  foreign = _connect(port)
  foreign.sendall(hostile)
  _join(infos[1], 20, results)
  coordinator.join()
  foreign.close()
  assert results[1].hosts == results[0].hosts == [socket.gethostname()] * 2
  _leave(results)


def test_same_number_twice_and_different_counts():
  address = f"localhost:{_port()}"
  results = _join_all(
    [ProcessInfo("flags", address, 3, i) for i in range(2)] + [ProcessInfo("flags", address, 4, 2)]
  )
  assert "process 2 on" in str(results[0]) and "counts 4 processes" in str(results[0])
  assert str(results[2]) == str(results[1]) == str(results[0])
  assert {type(result) for result in results.values()} == {UserError}
  address = f"localhost:{_port()}"
  both = {}
  threads = [
    threading.Thread(target=_join, args=(ProcessInfo("flags", address, 3, i), 8, results))
    for results, i in ((both, 0), ({}, 1), (both, 1))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert "two processes have the number 1" in str(both[0]) and type(both[0]) is UserError


def test_a_late_process_is_a_transient_error():
  """Launchers try again, whichever host they look at."""
  address = f"localhost:{_port()}"
  results = _join_all([ProcessInfo("flags", address, 3, i) for i in range(2)], timeout=2.0)
  assert "process 2 did not connect" in str(results[0]) and str(results[1]) == str(results[0])
  assert {type(result) for result in results.values()} == {TransientError}
  results = _join_all([ProcessInfo("flags", address, 3, 2)], timeout=0.1)
  assert "process 0 did not answer" in str(results[2]) and type(results[2]) is TransientError
  results = _join_all([ProcessInfo("flags", address, 2, i) for i in range(2)])
  with pytest.raises(TransientError, match="no sign of process 1"):
    results[0].barrier("saved", 0.1)
  _leave(results)


def test_a_process_may_restart_during_the_rendezvous():
  """It connects, dies, and connects again before the last process does."""
  port, results = _port(), {}
  infos = [ProcessInfo("flags", f"localhost:{port}", 3, i) for i in range(3)]
  first = [threading.Thread(target=_join, args=(infos[0], 20, results))]
  first[0].start()
  early = _connect(port)
  early.sendall(json.dumps(dict(hello=1, count=3, host="h")).encode() + b"\n")
  time.sleep(0.5)
  early.close()
  time.sleep(0.5)
  for info in infos[1:]:
    first.append(threading.Thread(target=_join, args=(info, 20, results)))
    first[-1].start()
  for thread in first:
    thread.join()
  assert results[2].hosts == [socket.gethostname()] * 3
  _leave(results)


def test_a_process_that_dies_before_the_start_is_missing():
  port, results = _port(), {}
  info = ProcessInfo("flags", f"localhost:{port}", 3, 0)
  coordinator = threading.Thread(target=_join, args=(info, 3, results))
  coordinator.start()
  with _connect(port) as early:
    early.sendall(json.dumps(dict(hello=1, count=3, host="h")).encode() + b"\n")
    time.sleep(0.5)
  coordinator.join()
  assert "process 1 (h), process 2 did not connect" in str(results[0])
  assert "1 of 3 are connected" in str(results[0]) and type(results[0]) is TransientError


def test_port_in_use():
  with socket.create_server(("", 0)) as taken:
    results = _join_all([ProcessInfo("flags", f"localhost:{taken.getsockname()[1]}", 2, 0)], timeout=1.0)
  assert "check that no earlier run is alive there" in str(results[0]) and type(results[0]) is TransientError


def test_differences_between_processes():
  mine = {"jax": "0.10.2", "data.root": "/a", **{f"k{i}": "1" for i in range(5)}}
  assert distributed.differences(mine, mine) == ""
  assert distributed.differences(mine, {**mine, "jax": "0.10.1"}) == "jax '0.10.1' (here '0.10.2')"
  assert distributed.differences(mine, {}).endswith(" and 3 more")


CONFIG = """
from tests import tiny

def get_config():
  changes = {"mesh.data": 8, "total_steps": 13, "checkpoint.every_steps": 5, "eval.every_steps": 5}
  changes["figures"] = True
  return tiny.raw("classify", **changes)
"""


def _train(config, workdir, count, *flags):
  """`python -m beit_jax.main` in `count` processes of 8 / count devices: (their standard errors, rows of metrics)."""
  command = ["-m", "beit_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
  env = {"JAX_NUM_CPU_DEVICES": str(8 // count), "JAX_DEFAULT_MATMUL_PRECISION": "float32"}
  results = _start(command, range(count), count, timeout=600, env=env)
  assert [status for status, _ in results] == [0] * count, results
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [error for _, error in results], [json.loads(line) for line in lines]


@SLOW
def test_two_processes_train_as_one_does(tmp_path):
  """2 x 4 devices against 1 x 8, through `python -m beit_jax.main`: losses, checkpoints, logs.

  One and four processes resume from the checkpoint of two.
  """
  config = tmp_path / "config.py"
  config.write_text(textwrap.dedent(CONFIG))
  rows = {}
  for count in (1, 2):
    errors, rows[count] = _train(config, tmp_path / str(count), count)
    assert (tmp_path / str(count) / "checkpoints" / "13" / "digest.json").exists()
    assert [path.suffix for path in (tmp_path / str(count) / "figures").iterdir()] == [".png"]
  assert " I " in errors[0] and " I " not in errors[1]
  assert len(rows[1]) == len(rows[2]) == 16  # 13 steps, 3 evaluations
  _same_losses(rows[1], rows[2])
  for count in (1, 4):
    workdir = tmp_path / f"2_then_{count}"
    shutil.copytree(tmp_path / "2", workdir)
    shutil.rmtree(workdir / "checkpoints" / "13")
    (workdir / "result.json").unlink()
    errors, rows[count] = _train(config, workdir, count)
    assert f"resuming from {workdir / 'checkpoints' / '10'}" in errors[0]
    _same_losses(rows[count], rows[2])


def _same_losses(some, others):
  for one, two in zip(some, others, strict=True):
    key = "loss" if "loss" in one else "eval_loss"
    assert one["step"] == two["step"] and one[key] == pytest.approx(two[key], rel=1e-6)


DIFFERENT = """
import os
from tests import tiny

def get_config():
  changes = {"mesh.data": 2, "batch_size": 4, "figures": False, "data.source": "folder"}
  changes |= {"data.root": os.environ["DATA"], "data.split": "train", "eval.split": "val"}
  return tiny.raw("classify", **changes)
"""


def _two_folders(tmp_path):
  """Equal data in two places, as on the disks of two hosts: the second is to be changed."""
  for i in range(8):
    for split in ("train", "val"):
      file = tmp_path / "0" / split / "ab"[i % 2] / f"{i}.png"
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((16, 16, 3), 8 * i, np.uint8)).save(file)
  shutil.copytree(tmp_path / "0", tmp_path / "1")
  return tmp_path / "1"


@SLOW
@pytest.mark.parametrize(
  "change, facts",
  [
    ("same", ()),
    ("fewer", ("training examples '7' (process 0: '8')",)),
    ("renamed class", ("training class 1 'c' (process 0: 'b')", "evaluation")),
    ("swapped classes", ("training files and their classes (sha256)",)),
    ("renamed file", ("evaluation files and their classes (sha256)",)),
    ("config", ("config: not the same", "seed '1' (process 0: '0')")),
    ("stages", ("config: not the same",)),
    ("no folder", ("no such folder; set it to the folder",)),
  ],
)
def test_two_processes_with_different_data_are_refused(change, facts, tmp_path):
  """Within 60 seconds on both; equal data in another place are the same."""
  other, more = _two_folders(tmp_path), [[], []]
  if change == "fewer":
    (other / "train/a/0.png").unlink()
  elif change == "renamed class":
    for split in ("train", "val"):
      (other / split / "b").rename(other / split / "c")
  elif change == "swapped classes":
    for source, target in (("a", "x"), ("b", "a"), ("x", "b")):
      (other / "train" / source).rename(other / "train" / target)
  elif change == "renamed file":
    (other / "val/a/0.png").rename(other / "val/a/00.png")
  elif change == "config":
    more[1] = ["--config.seed=1"]
  elif change == "no folder":
    shutil.rmtree(other)
  configs = [tmp_path / f"config{i}.py" for i in range(2)]
  for config in configs:
    config.write_text(DIFFERENT)
  if change == "stages":
    text = DIFFERENT.replace("return tiny", "run = tiny") + '  return dict(stages=("run",), run=run)\n'
    configs[1].write_text(text)
  commands = [
    ["-m", "beit_jax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags]
    for config, flags in zip(configs, more, strict=True)
  ]
  environments = [{"DATA": str(tmp_path / str(i)), "XLA_FLAGS": ""} for i in range(2)]
  began = time.monotonic()
  results = _start(commands, range(2), 2, timeout=300, env=environments)
  if change == "same":
    assert [status for status, _ in results] == [0, 0], results
    return
  assert time.monotonic() - began < 60
  for status, error in results:
    assert status == 2 and "Traceback" not in error, error
    for fact in facts:
      assert fact in error, error
  assert all("process 1" in error for _, error in results[: 1 if change == "no folder" else 2]), results
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


STAGES = """
from tests import tiny

def get_config():
  changes = {"mesh.data": 2, "total_steps": 2, "eval.split": "", "batch_size": 16}
  changes |= {"data.source": "folder", "data.root": "ROOT", "data.num_examples": 32, "data.max_bad": 0.5}
  two = tiny.raw("beit", **changes, **{"tokenizer.init_from": "stage:one", "optimizer.warmup_steps": 0})
  return dict(stages=("one", "two"), one=tiny.raw("dvae", **changes), two=two)
"""


@SLOW
def test_a_stage_begins_when_process_0_has_finished_the_previous_one(tmp_path):
  """Without evaluation and figures, nothing else waits for the seal. Bad images of both processes are counted."""
  for i in range(32):
    folder = tmp_path / "data" / "train" / "ab"[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.full((16, 16, 3), 8 * i, np.uint8))
    folder.joinpath(f"{i}.png").write_text("broken") if i % 8 == 0 else image.save(folder / f"{i}.png")
  config = tmp_path / "config.py"
  config.write_text(STAGES.replace("ROOT", str(tmp_path / "data")))
  command = ["-m", "beit_jax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  results = _start(command, range(2), 2, timeout=300, env={SLOW_SAVE: "2", "XLA_FLAGS": ""})
  assert [status for status, _ in results] == [0, 0], results
  for stage in ("one", "two"):
    result = json.loads((tmp_path / "run" / stage / "result.json").read_text())
    assert (result["step"], result["bad_images"]) == (2, 4)


@SLOW
def test_a_run_ends_when_one_of_its_processes_is_killed(tmp_path):
  """During training, the other process soon names the one that died."""
  config = tmp_path / "config.py"
  config.write_text(CONFIG)
  flags = ["--config.total_steps=100000", "--config.mesh.data=2", "--config.eval.split="]
  flags += [f"--coordinator=localhost:{_port()}", "--num_processes=2", f"--workdir={tmp_path / 'run'}"]
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  command = [sys.executable, "-m", "beit_jax.main", f"--config={config}", *flags]
  options = dict(cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  both = [subprocess.Popen([*command, f"--process_id={i}"], **options) for i in range(2)]
  try:
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
      assert time.monotonic() < end and both[0].poll() is None
      time.sleep(0.2)
    both[1].kill()
    began = time.monotonic()
    error = both[0].communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
  finally:
    for process in both:
      process.kill()
      process.communicate()
  assert both[0].returncode == rendezvous.LOST_STATUS
  assert f"error: process 1 ({socket.gethostname()}) died" in error


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
@pytest.mark.parametrize("heartbeat", [12, 60, 300])
def test_a_dead_host_is_found_before_jax_finds_it(heartbeat):
  """JAX may find it after half of its timeout; this process then needs the time to end by itself."""
  with (
    socket.create_server(("localhost", 0)) as server,
    socket.create_connection(server.getsockname()) as sock,
  ):
    rendezvous._Channel(sock, heartbeat)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    idle, every, count, timeout = (
      sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
    )
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
  assert 0 < idle + count * every <= heartbeat / 3  # an idle connection
  assert 0 < timeout / 1000 <= heartbeat / 3  # one that sends
