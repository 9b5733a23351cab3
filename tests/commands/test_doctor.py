"""The doctor finds planted faults and says what to do; on a healthy machine it finds none."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax import trees
from beit_jax.doctor import __main__ as doctor
from beit_jax.doctor import host, versions
from beit_jax.doctor.machine import Machine, prepare
from beit_jax.run import checkpoint, record
from beit_jax.runtime import lock
from tests import tiny
from tests.conftest import ROOT

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch, tmp_path):
  """A machine without an accelerator and without its lock file, whatever the tests run on."""
  monkeypatch.setattr(host, "TPU_LOCK", tmp_path / "no" / "libtpu_lockfile")
  for name in ("nvidia_gpus", "tpu_chips"):
    monkeypatch.setattr(host, name, list)


@pytest.fixture
def flags(tmp_path):
  """`flags("classify", "--config.batch_size=8")` gives the command line of a small run."""

  def make(objective, *more):
    run = tiny.raw(objective).to_dict()
    text = f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({run!r})\n"
    (tmp_path / "config.py").write_text(text)
    return [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", *more]

  return make


@pytest.fixture
def ask(capsys):
  """Runs the doctor; returns its exit status and its lines."""

  def run(argv):
    status = doctor.main([*argv, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["advice"] for line in lines if line["status"] != "ok"), lines
    assert status == int(any(line["status"] == "fail" for line in lines))
    return status, lines

  return run


def _only(lines, check, status, *facts):
  """Asserts that one line is not OK, apart from those about an installation without metadata."""
  bad = [line for line in lines if line["status"] != "ok" and line["check"] != "versions"]
  assert [(line["check"], line["status"]) for line in bad] == [(check, status)], bad
  for fact in facts:
    assert fact in bad[0]["found"] + bad[0]["advice"], bad


def _found(check, machine=None):
  return list(check(machine or Machine(ROOT)))


def test_a_healthy_machine(flags, ask, tmp_path):
  status, lines = ask(flags("classify"))
  assert status == 0
  assert {line["status"] for line in lines if line["check"] != "versions"} == {"ok"}, lines
  assert [line for line in lines if line["check"] == "data"][0]["found"].startswith(
    "train (train): 96 examples"
  )
  assert list(dict.fromkeys(line["check"] for line in lines)) == [
    name for name in doctor.checks() if name != "shared"
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py"]


def test_quickstart_in_a_subprocess(tmp_path):
  command = [sys.executable, "-m", "beit_jax.doctor", f"--config={ROOT}/configs/quickstart.py"]
  run = subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}"],
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stdout + run.stderr
  assert "Traceback" not in run.stderr
  found = run.stdout.splitlines()
  assert all(line.split()[0] in ("ok", "warn") for line in found)
  assert any("the result of stage 'tokenizer' is not yet there" in line for line in found)
  assert any("tensors of the result of stage 'pretrain', not yet there" in line for line in found)
  assert not list(tmp_path.iterdir())


def test_wrong_version(monkeypatch):
  needs = {
    "beit_jax": ["flax>=0.12,<0.14", 'torch>=2; extra == "torch"', "no-such>=1"],
    "jax": ["jaxlib<=0.1"],
  }
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs[name])
  monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
  version = lambda name: {"flax": "0.11.2", "jax": "0.1", "jaxlib": "0.2"}[name]

  def lookup(name):
    try:
      return version(name)
    except KeyError:
      raise importlib.metadata.PackageNotFoundError(name) from None

  monkeypatch.setattr(importlib.metadata, "version", lookup)
  bad = {what: advice for status, what, advice in _found(versions.versions) if status == "fail"}
  assert bad["flax 0.11.2, beit_jax needs >=0.12,<0.14"] == "pip install 'flax>=0.12,<0.14'"
  assert "no-such missing, beit_jax needs >=1" in bad and "jaxlib 0.2, jax needs <=0.1" in bad
  assert any("beit_jax needs >=3.99" in what for what in bad) and len(bad) == 4


@pytest.mark.parametrize(
  "version, bounds, good",
  [("0.10.2", ">=0.10,<0.12", True), ("0.12.0", ">=0.10,<0.12", False), ("0.9.9", ">=0.10", False), ("1", "", True),
   ("6", ">=6.0", True), ("2.4.6rc1", "~=2.4", True), ("3.0", "~=2.4", False), ("1.0", "!=1", False)],
)  # fmt: skip
def test_bounds(version, bounds, good):
  assert versions.within(version, bounds) == good


def test_missing_data_set(flags, ask, tmp_path):
  more = ("--config.data.source=tfds", "--config.data.name=no_such_set", f"--config.data.data_dir={tmp_path}")
  status, lines = ask(flags("classify", *more))
  assert status == 1
  (line,) = [line for line in lines if line["check"] == "data"]
  assert line["status"] == "fail" and "no_such_set" in line["found"] and "tfds build" in line["found"]
  assert {line["status"] for line in lines if line["check"] in ("sizes", "checkpoints")} <= {"warn", "ok"}


def _images(folder, count=6):
  for i in range(count):
    path = folder / f"class{i % 2}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(path)
  return folder


def test_damaged_image(flags, ask, tmp_path):
  folder = _images(tmp_path / "images")
  broken = folder / "class0" / "0.png"
  broken.write_bytes(broken.read_bytes()[:40])
  more = ("--config.data.source=folder", f"--config.data.root={folder}", "--config.eval.split=")
  run = flags("classify", *more, "--config.batch_size=2")
  status, lines = ask(run)
  assert status == 0
  _only(lines, "data", "warn", "cannot be read", str(broken), "data.max_bad=0.05")
  assert ask([*run, "--config.data.max_bad=0"])[0] == 1


def test_missing_labels(flags, ask, tmp_path):
  folder = _images(tmp_path / "images") / "class0"
  more = ("--config.data.source=folder", f"--config.data.root={folder}", "--config.eval.split=")
  status, lines = ask(flags("classify", *more, "--config.batch_size=2"))
  assert status == 1
  assert any(line["check"] == "data" and "has no label" in line["found"] for line in lines)


def test_workdir_below_a_file(flags, ask, tmp_path):
  (tmp_path / "file").write_text("")
  status, lines = ask([f"--workdir={tmp_path / 'file' / 'run'}"])
  assert status == 1
  assert [line["check"] for line in lines if line["status"] == "fail"][0] == "workdir"


def test_read_only_workdir(monkeypatch, tmp_path):
  def refuse(**options):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(host.tempfile, "NamedTemporaryFile", refuse)
  ((status, what, advice),) = _found(host.workdir, Machine(tmp_path))
  assert status == "fail" and "Permission denied" in what and "--workdir" in advice


def test_network_mount_whose_locks_are_local(monkeypatch, tmp_path):
  monkeypatch.setattr(host, "mounted", lambda path: ("nfs4", "rw,vers=4.2,local_lock=all"))
  ((status, what, _),) = _found(host.workdir, Machine(tmp_path))
  assert status == "warn" and "nfs4" in what
  monkeypatch.setattr(host, "mounted", lambda path: ("nfs4", "rw,vers=4.2,local_lock=none"))
  assert _found(host.workdir, Machine(tmp_path))[0][0] == "ok"


def test_the_state_of_each_optimizer_is_counted(flags):
  machine = prepare(flags("classify"))
  (run,) = machine.runs
  params = trees.num_bytes(jax.eval_shape(machine.objective(run).init, jax.random.key(0))["params"])
  for name, copies in (("adamw", 3), ("lamb", 3), ("lion", 2), ("sgd", 2), ("muon", 2)):
    run.config.optimizer.name = name
    ratio = doctor.runs.state_bytes(machine, run) / params
    assert copies <= ratio < copies + (0.9 if name == "muon" else 0.01), name  # muon: Adam's for vectors


def test_too_little_space(flags, monkeypatch):
  machine = prepare(flags("classify"))
  (run,) = machine.runs
  params = jax.eval_shape(machine.objective(run).init, jax.random.key(0))["params"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  needed = 3 * 3 * 4 * count  # keep=2 and the one being written; float32; two moments
  usage = types.SimpleNamespace(free=0)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  for share, wanted in ((0.99, "fail"), (1.99, "warn"), (2.01, "ok")):
    usage.free = int(share * needed)
    ((status, what, _),) = _found(doctor.runs.space, machine)
    assert status == wanted and "3 x " in what


@contextlib.contextmanager
def _holder(path):
  """Another process that holds a lock on a file."""
  command = [sys.executable, "-c", HOLD, str(path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout.readline() == "held\n"
      yield process
    finally:
      process.kill()


def test_held_lock(flags, tmp_path):
  machine = prepare(flags("classify"))
  (tmp_path / "run").mkdir()
  path = tmp_path / "run" / lock.LOCK
  before = dict(host=host.platform.node(), pid=4711, started="2026-01-01", command="python -m beit_jax.main")
  path.write_text(json.dumps(before))
  with _holder(path):
    ((status, what, _),) = _found(doctor.runs.locks, machine)
    assert status == "fail" and "4711" in what and "beit_jax.main" in what
  ((status, what, _),) = _found(doctor.runs.locks, machine)
  assert status == "ok" and "will be taken over" in what
  path.write_text(json.dumps({**before, "host": "elsewhere"}))
  assert _found(doctor.runs.locks, machine)[0][0] == "warn"


def _save(machine, step):
  """Writes a small checkpoint that claims to be of this run."""
  (run,) = machine.runs
  description = record.describe(run.config, machine.objective(run), machine.main_source(run))
  folder = run.folder / "checkpoints" / str(step)
  folder.mkdir(parents=True)
  checkpoint.write_model(folder, {"w": np.zeros(3, np.float32)}, {**description, "step": step})
  return folder


def test_damaged_checkpoint(flags):
  command = flags("classify")
  machine = prepare(command)
  folders = [_save(machine, step) for step in (2, 4)]
  assert _found(doctor.runs.checkpoints, machine) == [("ok", "continues from step 4", "")]
  (folders[1] / "description.json").write_text("{}")
  (status, what, advice), (_, then, _) = _found(doctor.runs.checkpoints, machine)
  assert (status, then) == ("warn", "continues from step 2")
  assert f"{folders[1]} is damaged" in what and "step 2" in advice
  other = prepare([*command, "--config.seed=7"])
  assert any(found[0] == "fail" and "seed" in found[1] for found in _found(doctor.runs.checkpoints, other))
  (folders[0] / "description.json").write_text("{}")
  ((status, what, advice),) = _found(doctor.runs.checkpoints, machine)
  assert status == "fail" and str(folders[0]) in what and "start over" in advice


def test_resume_at_another_place_of_the_data(flags, tmp_path):
  command = flags("classify")
  folder = _save(prepare(command), 4)
  (folder / "rest").mkdir()
  new = [*command, f"--workdir={tmp_path / 'new'}", f"--config.resume={folder.parent.parent}"]
  assert "starts with the full state of" in _found(doctor.runs.checkpoints, prepare(new))[0][1]
  ((status, what, _),) = _found(doctor.runs.checkpoints, prepare([*new, "--config.batch_size=32"]))
  assert status == "fail" and "batch_size: 16 in the checkpoint, 32 in the config" in what


def test_run_that_has_passed_its_last_step(flags):
  command = flags("classify")
  _save(prepare(command), 4)
  found = _found(doctor.runs.checkpoints, prepare([*command, "--config.total_steps=3"]))
  assert [status for status, *_ in found] == ["fail"] and "starts at step 4 already" in found[0][1]
  assert (
    "only evaluates" in _found(doctor.runs.checkpoints, prepare([*command, "--config.total_steps=4"]))[0][1]
  )


def test_lost_checkpoints(flags):
  machine = prepare(flags("classify"))
  folder = machine.runs[0].folder
  folder.mkdir()
  (folder / "metrics.jsonl").write_text('{"step": 5000, "eval_loss": 1.0}\n')
  ((status, what, advice),) = _found(doctor.runs.checkpoints, machine)
  assert status == "fail" and "has 5000 steps" in what + advice


def test_finished_run(flags):
  machine = prepare(flags("classify"))
  (run,) = machine.runs
  run.folder.mkdir()
  record.write_config(run.config, run.folder)
  record.write_result(run.folder, {"step": 6})
  assert "finished earlier, at step 6" in _found(doctor.runs.checkpoints, machine)[0][1]


def _clock(monkeypatch, now):
  names = types.SimpleNamespace(time=now, gmtime=time.gmtime, strftime=time.strftime)
  monkeypatch.setattr(host, "time", names)


def test_clock(monkeypatch, tmp_path):
  _clock(monkeypatch, lambda: time.time() - 60)
  ((status, what, _),) = _found(host.clock, Machine(tmp_path))
  assert status == "warn" and "60 s ahead" in what
  _clock(monkeypatch, lambda: 3600.0)
  ((status, what, _),) = _found(host.clock, Machine(tmp_path))
  assert status == "fail" and "1970-01-01" in what


def test_tpu_lock_file(monkeypatch, tmp_path):
  path = tmp_path / "libtpu_lockfile"
  monkeypatch.setattr(host, "TPU_LOCK", path)
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert _found(host.tpu_lock)[0][0] == "ok"
  with _holder(path) as process:
    ((status, what, _),) = _found(host.tpu_lock)
    assert status == "fail" and f"process {process.pid}" in what
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert _found(host.tpu_lock)[0][0] == "ok"
    monkeypatch.delenv("JAX_PLATFORMS")
  ((status, _, advice),) = _found(host.tpu_lock)
  assert status == "warn" and f"rm {path}" in advice


def test_batch_that_does_not_divide(flags, ask):
  status, lines = ask(flags("classify", "--config.microbatches=4", "--config.batch_size=10"))
  assert status == 1
  _only(lines, "sizes", "fail", "'batch_size': 10", "microbatches=4", "set batch_size to 8 or 12")


def test_patch_that_does_not_divide(flags, ask):
  status, lines = ask(flags("classify", "--config.data.image_size=17"))
  assert status == 1
  assert any(line["check"] == "sizes" and "(17, 17) is not divisible" in line["found"] for line in lines)


def test_accelerator_that_jax_does_not_use(monkeypatch):
  monkeypatch.setattr(host, "nvidia_gpus", lambda: ["GPU 0: a fast one"])
  ((status, what, advice),) = _found(host.devices)
  assert status == "warn" and "GPU 0: a fast one" in what and "JAX_PLATFORMS" in advice and "[cuda]" in advice
  monkeypatch.setattr(host, "nvidia_gpus", list)
  monkeypatch.setattr(host, "tpu_chips", lambda: ["/dev/accel0"])
  ((status, what, advice),) = _found(host.devices)
  assert status == "warn" and "/dev/accel0" in what and "[tpu]" in advice


def test_gpu_in_use(monkeypatch):
  apps, cards = ["4711, python, 900 MiB"], ["0, 30000, 80000"]
  monkeypatch.setattr(host, "nvidia_gpus", lambda: ["GPU 0"])
  monkeypatch.setattr(host, "nvidia_smi", lambda query, *_: apps if "apps" in query else cards)
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
    monkeypatch.delenv(name, raising=False)
  ((status, what, _),) = _found(host.gpu_memory)
  assert status == "warn" and "4711" in what
  apps.clear()
  ((status, what, _),) = _found(host.gpu_memory)
  assert status == "warn" and "30,000 of 80,000 MiB" in what
  cards.clear()
  assert [found[0] for found in _found(host.gpu_memory)] == ["ok"]
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "92")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  assert [found[0] for found in _found(host.gpu_memory)] == ["fail", "warn"]


def test_exception_is_a_finding(flags, ask, monkeypatch):
  def broken(machine):
    yield "ok", "the first half", ""
    raise RuntimeError("bad\nluck")

  monkeypatch.setattr(host, "clock", broken)
  status, lines = ask([])
  assert status == 1
  _only(lines, "clock", "fail", "RuntimeError: bad luck")
  assert lines[-1]["check"] == "space"


def test_broken_installation(monkeypatch, capsys):
  monkeypatch.setattr(doctor, "BROKEN", ImportError("no module of that name"))
  assert doctor.main([]) == 1
  assert "fail  import      beit_jax cannot be imported: ImportError: no module" in capsys.readouterr().out


def test_mistakes_in_the_command(flags, capsys, tmp_path):
  (tmp_path / "bad.py").write_text("def get_config():\n  return 1 / 0\n")
  cases = {
    "did you mean 'batch_size'": flags("classify", "--config.batch_siz=3"),
    "no such file": ["--config=no_such_file.py"],
    "no --config=FILE": ["--config.batch_size=3"],
    "usage: python -m beit_jax.doctor": ["--confg=x"],
    "go together": ["--num_processes=2"],
    "ZeroDivisionError": [f"--config={tmp_path / 'bad.py'}"],
  }
  for text, argv in cases.items():
    assert doctor.main(argv) == 2
    out, error = capsys.readouterr()
    assert not out and text in error and error.count("error: ") == 1 and "Traceback" not in error, error


def test_missing_processes(flags, ask):
  more = ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--initialization_timeout=0.5")
  status, lines = ask(flags("classify", *more))
  assert status == 1
  bad = {line["check"]: line for line in lines if line["status"] != "ok"}
  assert bad["processes"]["status"] == "fail" and "process 0 did not answer" in bad["processes"]["found"]
  assert bad["devices"]["status"] == bad["sizes"]["status"] == "warn"


@pytest.mark.slow
def test_two_processes_with_different_configs(flags):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "beit_jax.doctor", *flags("classify", "--config.mesh.data=2")]
  command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
  with contextlib.ExitStack() as stack:
    both = []
    for index in range(2):
      mine = [*command, f"--process_id={index}", f"--config.seed={index}"]
      options = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      both.append(stack.enter_context(subprocess.Popen(mine, **options)))
    (out, error), (quiet, _) = (process.communicate(timeout=400) for process in both)
  assert [process.returncode for process in both] == [1, 0], out + error
  bad = [line for line in out.splitlines() if line.startswith("fail")]
  assert len(bad) == 1 and "process 1" in bad[0] and "seed '1' (here '0')" in bad[0], out
  assert "all see" in out and not quiet
