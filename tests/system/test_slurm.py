"""`launch/slurm.sh` on a real Slurm: whatever interrupts a run of two nodes, it ends as an uninterrupted run does.

    BEIT_JAX_TEST_SLURM=env python -m pytest -n 0 -s -m "" tests/system/test_slurm.py --basetemp=/shared/folder

The value is put before each command: `env` where Slurm's commands are in PATH. The nodes must share the folder.
BEIT_JAX_TEST_SLURM_PARTITIONS=LOW,NOGRACE,HIGH names three partitions, of which HIGH preempts the others
(PreemptMode=REQUEUE), LOW after a GraceTime of at least 20 seconds. The test of a node that fails sets one of two nodes
down, which only an administrator may do.
"""

import os
import re
import shlex
import subprocess
import sys
import time

import pytest

from beit_jax.run.checkpointer import SLOW_SAVE
from tests import kills
from tests.conftest import ROOT

PREFIX = shlex.split(os.environ.get("BEIT_JAX_TEST_SLURM", ""))
PARTITIONS = os.environ.get("BEIT_JAX_TEST_SLURM_PARTITIONS", ",,").split(",")
PATIENCE = 400  # seconds for anything that is waited for
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "PREEMPTED", "REQUEUED", "NODE_FAIL")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not PREFIX, reason="set BEIT_JAX_TEST_SLURM to run on a real Slurm"),
]


def _wait_for(condition, what):
  deadline = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < deadline, what
    time.sleep(0.3)


class Job:
  """A submitted run."""

  def __init__(self, workdir, *flags, overrides=()):
    self.workdir, self.output = workdir, workdir.parent
    self.output.mkdir(exist_ok=True)
    command = [ROOT / "launch" / "slurm.sh", "--nodes=2", "--gpus=0", "--cpus=1", "--mem=2G", "--time=20"]
    command += [f"--python={sys.executable}", *flags, "--", f"--config={ROOT}/tests/kills_config.py"]
    command += [f"--workdir={workdir}", "--config.mesh.data=2", "--config.data.workers=0", *overrides]
    self.id = re.search(r"\d+", self.slurm(*command))[0]

  def slurm(self, *command):
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.output / "cache"))
    env = {**os.environ, **env, "JAX_COMPILATION_CACHE_DIR": cache}
    words = [*PREFIX, *map(str, command)]
    run = subprocess.run(words, cwd=self.output, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, (words, run.stdout, run.stderr)
    return run.stdout

  def field(self, name):
    return re.search(rf"\b{name}=(\S*)", self.slurm("scontrol", "show", "job", self.id))[1]

  def log(self):
    return (self.output / f"beit_jax-{self.id}.log").read_text()

  def signal(self, *words):
    self.slurm("scancel", *words, self.id)

  def wait_for_steps(self, count):
    _wait_for(lambda: kills.logged_steps(self.workdir) >= count, "no steps")

  def wait_for_restart(self):
    _wait_for(lambda: self.field("Restarts") != "0", "the job is not queued again")

  def end(self):
    """Waits for the end, without Slurm's two minutes before each restart; returns (state, restarts)."""
    deadline = time.monotonic() + PATIENCE
    while (state := self.field("JobState")) in ACTIVE:
      assert time.monotonic() < deadline, (state, self.log()[-3000:])
      if state == "PENDING":
        subprocess.run(
          [*PREFIX, "scontrol", "update", f"jobid={self.id}", "starttime=now"], capture_output=True
        )
      time.sleep(0.5)
    return state, int(self.field("Restarts"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  job = Job(tmp_path_factory.mktemp("slurm") / "uninterrupted" / "run")
  assert job.end() == ("COMPLETED", 0), job.log()[-3000:]
  return job.workdir


def _check_equal(job, uninterrupted, restarts=1):
  found = job.end()
  assert found[0] == "COMPLETED" and (restarts is None or found[1] == restarts), (found, job.log()[-3000:])
  kills.compare(uninterrupted, job.workdir, exact=True)


def test_a_process_that_is_killed(uninterrupted, tmp_path):
  job = Job(tmp_path / "killed" / "run")
  job.wait_for_steps(25)
  pattern = f"[w]orkdir={job.workdir}"  # does not match itself
  job.slurm(
    "srun",
    f"--jobid={job.id}",
    "--overlap",
    "--nodes=1",
    "--ntasks=1",
    "pkill",
    "-KILL",
    "-f",
    f"beit_jax.main.*{pattern}",
  )
  job.wait_for_restart()
  _check_equal(job, uninterrupted)


def test_the_warning_before_the_time_limit(uninterrupted, tmp_path):
  job = Job(tmp_path / "warned" / "run")
  job.wait_for_steps(25)
  job.signal("--signal=USR1", "--batch")
  job.wait_for_restart()
  _check_equal(job, uninterrupted)


def test_a_save_that_outlasts_the_warning(uninterrupted, tmp_path):
  """Three delays of 40 s are longer than the 15 s that remain after a warning of 20 s."""
  setup = f'[ "${{SLURM_RESTART_COUNT:-0}}" != 0 ] || export {SLOW_SAVE}=40'
  job = Job(tmp_path / "outlasted" / "run", "--warning=20", f"--setup={setup}")
  job.wait_for_steps(5)
  job.signal("--signal=USR1", "--batch")
  job.wait_for_restart()
  _check_equal(job, uninterrupted)
  assert "raise --warning" in job.log()


def test_requeue_by_hand(uninterrupted, tmp_path):
  job = Job(tmp_path / "requeued" / "run")
  job.wait_for_steps(25)
  job.slurm("scontrol", "requeue", job.id)
  _check_equal(job, uninterrupted)


def test_scancel_ends_the_job_and_another_one_continues(uninterrupted, tmp_path):
  job = Job(tmp_path / "canceled" / "run")
  job.wait_for_steps(25)
  job.signal()
  assert job.end() == ("CANCELLED", 0)
  _check_equal(Job(job.workdir), uninterrupted, restarts=0)


def test_scancel_with_a_signal_saves_and_restarts(uninterrupted, tmp_path):
  job = Job(tmp_path / "signaled" / "run")
  job.wait_for_steps(25)
  job.signal("--signal=TERM")
  job.wait_for_restart()
  _check_equal(job, uninterrupted)


@pytest.mark.skipif(not PARTITIONS[2], reason="set BEIT_JAX_TEST_SLURM_PARTITIONS")
@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=["with grace", "without grace"])
def test_preemption(partition, uninterrupted, tmp_path):
  job = Job(tmp_path / "preempted" / "run", f"--partition={partition}")
  job.wait_for_steps(25)
  job.slurm("sbatch", f"--partition={PARTITIONS[2]}", "--nodes=2", "--exclusive", "--wrap=sleep 3")
  job.wait_for_restart()
  _check_equal(job, uninterrupted)


def test_a_node_that_fails(uninterrupted, tmp_path):
  job = Job(tmp_path / "node" / "run")
  job.wait_for_steps(25)
  node = job.slurm("scontrol", "show", "hostnames", job.field("NodeList")).split()[-1]
  job.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
  job.wait_for_restart()
  # Fails where the node has returned by itself (ReturnToService=2).
  subprocess.run([*PREFIX, "scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
  _check_equal(job, uninterrupted, restarts=None)


def test_a_mistake_is_not_queued_again(tmp_path):
  job = Job(tmp_path / "mistake" / "run", overrides=["--config.batch_size=15"])
  assert job.end() == ("FAILED", 0) and job.field("ExitCode") == "2:0" and "batch_size" in job.log()
