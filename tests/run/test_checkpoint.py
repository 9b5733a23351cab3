"""Saving while training continues: only the main thread launches programs, on one process and on two."""

import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.run import checkpoint, files
from beit_jax.run.checkpointer import Checkpointer
from beit_jax.run.state import TrainState
from tests import kills
from tests.conftest import ROOT
from tests.run import launches


def _state(value: float) -> TrainState:
  return TrainState(jnp.int32(value), {"w": jnp.full((8, 4), value)}, {}, (jnp.zeros(3),))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_the_main_thread_launches_programs(asynchronous, tmp_path, monkeypatch):
  """Processes deadlock if they launch programs in different orders, as threads would make them."""
  jax.clear_caches()  # programs that were launched before are on the fast path, which is not recorded
  calls = launches.record(monkeypatch)
  saver = Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
  for step in range(1, 6):
    saver.save(step, _state(step), {})
  assert saver.wait() and checkpoint.steps(saver.root) == [5]
  saver.delete_from(5)
  saver.close()
  assert checkpoint.steps(saver.root) == []
  functions = {name.split()[0] for name, _ in calls}
  assert {"__call__", "sync_global_processes"} <= functions  # the recorder sees programs and barriers
  assert [call for call in calls if call[1] != threading.main_thread().name] == []


CONFIG = """
from tests import tiny

def get_config():
  changes = {"mesh.data": 2, "total_steps": 30, "eval.every_steps": 10, "optimizer.ema_decay": 0.9}
  changes |= {"checkpoint.every_steps": 1, "checkpoint.keep": 1, "checkpoint.best": "loss"}
  return tiny.raw("classify", **changes)
"""


def _train(folder, count):
  """Trains in `count` processes on two devices; returns what each has launched."""
  records = [folder / f"launches_{index}.json" for index in range(count)]
  command = [sys.executable, "-m", "tests.run.launches"]
  flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}", f"--num_processes={count}"]
  flags += [f"--coordinator=localhost:{kills.free_port()}"]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // count), "XLA_FLAGS": ""}
  env |= {"PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "float32"}
  options = dict(cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  started = [
    subprocess.Popen([*command, str(records[i]), *flags, f"--process_id={i}"], **options)
    for i in range(count)
  ]
  try:
    errors = [process.communicate(timeout=300)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0] * count, errors
  return [json.loads(path.read_text()) for path in records]


@pytest.mark.slow
def test_two_processes_launch_the_same_programs_in_the_same_order(tmp_path):
  """With a deletion after each of thirty saves; losses, parameters and the best state are those of one process."""
  for count in (1, 2):
    (tmp_path / str(count)).mkdir()
    (tmp_path / str(count) / "config.py").write_text(CONFIG)
  calls = [call for count in (1, 2) for call in _train(tmp_path / str(count), count)]
  for some in calls:
    assert sum("train_step" in name for name, _ in some) == 30  # the recorder sees every step
    assert {thread for _, thread in some} == {threading.main_thread().name}
  first, second = calls[1:]
  assert first == second
  one, two = (kills.outcome(tmp_path / str(count) / "run") for count in (1, 2))
  assert two[1] == one[1]
  assert one[0].keys() == two[0].keys()
  for name, leaf in one[0].items():
    np.testing.assert_array_equal(two[0][name], leaf, err_msg=name)
  for count in (1, 2):
    assert checkpoint.steps(tmp_path / str(count) / "run" / "checkpoints") == [30]


def test_only_what_is_read_is_hashed(tmp_path, monkeypatch):
  """Of other items, such as the optimizer's moments, the sizes are compared."""
  for name, content in (("params/a", b"123"), ("rest/b", b"456"), ("description.json", b"{}")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  checkpoint.write_digest(tmp_path)
  hashed, hash_file = [], files.hash_file
  monkeypatch.setattr(
    files, "hash_file", lambda path, kind: hashed.append(path.name) or hash_file(path, kind)
  )
  assert checkpoint.find(tmp_path, items=["params"]) == tmp_path
  assert sorted(hashed) == ["a", "description.json"]
  (tmp_path / "rest" / "b").write_bytes(b"654")
  assert checkpoint.fault(tmp_path, ["params"]) is None
  assert checkpoint.fault(tmp_path, ["rest"]) == checkpoint.fault(tmp_path) == "damaged: rest/b is changed"
  (tmp_path / "rest" / "b").write_bytes(b"6")
  assert checkpoint.fault(tmp_path, ["params"]) == "damaged: rest/b is changed"
