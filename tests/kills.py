"""Kills a real run repeatedly with SIGKILL and compares its result with that of an uninterrupted run.

    python -m tests.kills --kills=30
    python -m tests.kills --kills=10 --meshes         # another mesh after each kill: losses equal to 1e-5
    python -m tests.kills --kills=10 --processes=2    # kills one or both of two; the other must exit by itself
    python -m tests.kills --kills=20 --processes=2 --signal   # SIGTERM to one of two, in a run of two stages

A third of the kills happen during a save (Orbax's temporary folder exists, or a step has no digest yet); the others
happen at a random moment between the start of the process and a few seconds after its first step. The number of data
workers changes after each kill. After SIGTERM, which is noticed within a second, all processes must stop within a step
or the evaluation in progress, with status 143. The exit status is 0 if the results are equal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import jax
import numpy as np

from beit_jax import trees
from beit_jax.run import checkpoint
from beit_jax.run.checkpointer import SLOW_SAVE
from beit_jax.runtime import rendezvous

ROOT = Path(__file__).resolve().parent.parent
MARK = "BEIT_JAX_KILLS"  # an environment variable of every process of a run, by which surviving processes are found
TIMINGS = ("images_per_second", "data_wait")
EXIT_TIMEOUT = 120  # seconds for processes that were asked to exit; the machine may be busy
# JAX's preemption service looks for SIGTERM once a second; steps that are shorter go on until then.
SECONDS_UNTIL_NOTICED = 1.2
# Two steps may be under way and one not yet logged when the signal is noticed; an evaluation adds one row.
MAX_ROWS_AFTER_NOTICE = 4
SURVIVOR_TIMEOUT = 30  # seconds for the other processes to exit after one was killed
MEETING_TIMEOUT = 60  # seconds after which they miss a process that was killed before all had met


def _without_torch(folder: Path) -> str:
  """Returns a folder for PYTHONPATH that hides PyTorch, whose import by tensorboardX takes seconds."""
  folder.mkdir(exist_ok=True)
  (folder / "torch.py").write_text("raise ImportError\n")
  return str(folder)


def start(
  workdir: Path,
  mark: str,
  *,
  workers: int,
  mesh: int,
  slow: float,
  stages: bool = False,
  flags: tuple[str, ...] = (),
) -> subprocess.Popen:
  """Starts one process of a run.

  Args:
    workdir: folder of the run; output and the compilation cache lie beside it.
    mark: value of the environment variable by which the processes of the run are found.
    workers: number of data workers.
    mesh: size of the mesh along "data".
    slow: seconds that each part of a save is delayed.
    stages: whether the run has two stages.
    flags: flags of one process of several, each of which has one device.
  """
  env = {
    **os.environ,
    MARK: mark,
    "PYTHONFAULTHANDLER": "1",
    "JAX_PLATFORMS": "cpu",
    SLOW_SAVE: str(slow),
  }
  paths = f"{ROOT}{os.pathsep}{_without_torch(workdir.parent / 'path')}"
  env |= {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"), "PYTHONPATH": paths}
  env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": ""}
  env["JAX_NUM_CPU_DEVICES"] = "8" if mesh > 1 and not flags else "1"
  command = [
    sys.executable,
    "-m",
    "beit_jax.main",
    f"--config={ROOT}/tests/kills_config.py{':stages' if stages else ''}",
    f"--workdir={workdir}",
  ]
  for prefix in ("one.", "two.") if stages else ("",):
    command += [f"--config.{prefix}data.workers={workers}", f"--config.{prefix}mesh.data={mesh}"]
  command += flags
  with (workdir.parent / "output.txt").open("a") as output:
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)


def free_port() -> int:
  with socket.create_server(("localhost", 0)) as free:
    return free.getsockname()[1]


def start_all(workdir: Path, mark: str, processes: int, **options) -> list[subprocess.Popen]:
  """Starts all processes of a run. Several processes have one device each and share a mesh."""
  if processes == 1:
    return [start(workdir, mark, **options)]
  together = (
    f"--coordinator=localhost:{free_port()}",
    f"--num_processes={processes}",
    "--heartbeat_timeout=10",
    f"--initialization_timeout={MEETING_TIMEOUT}",
  )
  options |= {"mesh": processes}
  return [start(workdir, mark, flags=(*together, f"--process_id={i}"), **options) for i in range(processes)]


def living_processes(mark: str) -> list[int]:
  """Returns the ids of the living processes with this mark in their environment."""
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
      if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes() and state != "Z":
        found.append(int(folder.name))
    except OSError:
      continue
  return found


def exit_statuses(started: list[subprocess.Popen], workdir: Path) -> list[int]:
  """Waits for processes that are about to exit; if one hangs, the error contains the stacks of all."""
  try:
    return [process.wait(EXIT_TIMEOUT) for process in started]
  except subprocess.TimeoutExpired:
    for process in started:
      process.send_signal(signal.SIGABRT)
      process.wait()
    text = (workdir.parent / "output.txt").read_text()
    raise AssertionError(f"still running after {EXIT_TIMEOUT} s:\n{text[-12000:]}") from None


def left_behind(mark: str) -> list[int]:
  """Returns the processes that are still alive after 30 s: a new worker first completes its imports."""
  deadline = time.monotonic() + 30
  while (found := living_processes(mark)) and time.monotonic() < deadline:
    time.sleep(0.1)
  return found


def saving(workdir: Path) -> bool:
  """Returns whether a save is in progress."""
  root = workdir / "checkpoints"
  try:
    folders = [path for path in root.iterdir() if path.is_dir()]
  except OSError:
    return False
  return any("tmp" in path.name or not (path / checkpoint.DIGEST).exists() for path in folders)


def logged_steps(workdir: Path) -> int:
  """Returns the number of rows in metrics.jsonl, of all stages."""
  paths = (*workdir.glob("metrics.jsonl"), *workdir.glob("*/metrics.jsonl"))
  return sum(path.read_text().count("\n") for path in paths)


def kill_once(
  workdir: Path, mark: str, rng: random.Random, in_save: bool, processes: int = 1, **options
) -> str:
  """Starts the run and kills it.

  Of several processes, a random selection is killed, and the others must soon exit by themselves.

  Returns:
    Where the kill happened ("save", "step" or "start"), or "finished" if the run ended first.
  """
  started = start_all(workdir, mark, processes, **options)
  began, lines = time.monotonic(), logged_steps(workdir)
  # Of the kills outside a save, one in four happens at a random time, the others after a logged step.
  moment = began + rng.uniform(0, 10) if not in_save and rng.random() < 0.25 else None

  def reached() -> bool:
    if moment is not None:
      return time.monotonic() > moment
    return logged_steps(workdir) > lines and (not in_save or saving(workdir))

  while all(process.poll() is None for process in started) and not reached():
    time.sleep(0.002)
  if not in_save:
    time.sleep(rng.uniform(0, 0.5) if logged_steps(workdir) > lines else 0)
  where = "start" if logged_steps(workdir) == lines else "save" if saving(workdir) else "step"
  if any(process.poll() is not None for process in started):
    _check_success(workdir, started)
    return "finished"
  victims = rng.sample(started, rng.randint(1, processes))
  for process in victims:
    process.kill()
    process.wait()
  timeout = SURVIVOR_TIMEOUT + (MEETING_TIMEOUT if where == "start" else 0)
  statuses = [process.wait(timeout) for process in started if process not in victims]
  # JAX's own heartbeat may detect the loss first; it aborts the process.
  assert all(status in (1, rendezvous.LOST_STATUS, -signal.SIGABRT) for status in statuses), statuses
  assert not left_behind(mark)
  return where


def stop_once(workdir: Path, mark: str, rng: random.Random, processes: int, **options) -> str:
  """Starts the run and sends SIGTERM to one process at a random moment after it has continued.

  Returns:
    "stopped", or "finished" if the run ended first.
  """
  started = start_all(workdir, mark, processes, **options)
  wanted = logged_steps(workdir) + rng.randint(1, 40)
  while all(process.poll() is None for process in started) and logged_steps(workdir) < wanted:
    time.sleep(0.002)
  time.sleep(rng.uniform(0, 0.2))
  if all(process.poll() is None for process in started):
    rng.choice(started).send_signal(signal.SIGTERM)
  time.sleep(SECONDS_UNTIL_NOTICED)
  noticed = logged_steps(workdir)
  statuses = exit_statuses(started, workdir)
  assert not left_behind(mark)
  if statuses == [0] * processes:
    return "finished"
  assert statuses == [143] * processes, statuses
  rows = logged_steps(workdir) - noticed
  assert rows <= MAX_ROWS_AFTER_NOTICE, f"{rows} rows were logged after the signal had been noticed"
  return "stopped"


def _check_success(workdir: Path, started: list[subprocess.Popen]) -> None:
  for process in started:
    assert process.wait() == 0, (workdir.parent / "output.txt").read_text()[-2000:]


def finish(workdir: Path, mark: str, processes: int = 1, **options) -> None:
  _check_success(workdir, start_all(workdir, mark, processes, **options))


def outcome(workdir: Path) -> tuple[dict, list[dict], dict]:
  """Returns (arrays of the final and the best state, rows of metrics.jsonl without timings, evaluation)."""
  arrays = {}
  for kind in ("checkpoints", "best"):
    if not (workdir / kind).is_dir():
      continue
    folder = checkpoint.find(workdir / kind)
    for item in ("params", "rest", "ema"):
      leaves = trees.flatten(checkpoint.load_params(folder, item)) if (folder / item).is_dir() else {}
      arrays |= {f"{kind}/{item}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
  return arrays, rows, json.loads((workdir / "result.json").read_text())["eval"]


def compare(reference: Path, killed: Path, exact: bool) -> None:
  """Asserts that two runs are equal, stage by stage: to the bit if `exact`, otherwise their losses to 1e-5."""
  for stage in ("one", "two"):
    if (reference / stage).is_dir():
      compare(reference / stage, killed / stage, exact)
  if (reference / "one").is_dir():
    return
  (wanted, rows, evaluation), (found, found_rows, found_evaluation) = outcome(reference), outcome(killed)
  assert wanted.keys() == found.keys()
  if exact:
    differ = [name for name in wanted if not np.array_equal(wanted[name], found[name])]
    assert not differ, f"{len(differ)} of {len(wanted)} arrays differ, first {differ[:3]}"
    different_rows = [pair for pair in zip(rows, found_rows, strict=False) if pair[0] != pair[1]]
    assert rows == found_rows, different_rows[:2]
    assert evaluation == found_evaluation
    return
  losses = [[row["loss"] for row in some if "loss" in row] for some in (rows, found_rows)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def harness(
  folder: Path, kills: int, seed: int, meshes: bool = False, processes: int = 1, stop: bool = False
) -> dict[str, int]:
  """Compares a run that is killed `kills` times with an uninterrupted one; returns where the kills happened.

  With `stop`, SIGTERM takes the place of SIGKILL, and the run has two stages.
  """
  rng, mark = random.Random(seed), uuid.uuid4().hex
  reference, killed = folder / "reference" / "run", folder / "killed" / "run"
  for path in (reference, killed):
    path.parent.mkdir(parents=True)
  shared = dict(processes=processes, stages=stop)
  finish(reference, mark, workers=2, mesh=1, slow=0.0, **shared)
  shutil.copytree(reference.parent / "cache", killed.parent / "cache")  # the compiled programs
  counts = {"stopped": 0} if stop else {"save": 0, "step": 0, "start": 0}
  while sum(counts.values()) < kills:
    done = sum(counts.values())
    options = dict(workers=rng.choice([0, 1, 2, 3]), mesh=rng.choice([2, 4, 8]) if meshes else 1)
    options |= shared
    in_save = done % 3 == 0
    options["slow"] = 0.1 if in_save else 0.0
    if stop:
      where = stop_once(killed, mark, rng, **options)
    else:
      where = kill_once(killed, mark, rng, in_save=in_save, **options)
    if where == "finished":  # compare and start over
      compare(reference, killed, exact=not meshes)
      shutil.rmtree(killed)
      continue
    counts[where] += 1
    print(f"kill {done + 1}: {where}, {logged_steps(killed)} rows logged", flush=True)
  finish(killed, mark, workers=1, mesh=1, slow=0.0, **shared)
  compare(reference, killed, exact=not meshes)
  assert not left_behind(mark)
  return counts


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--meshes", action="store_true")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--signal", action="store_true")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    given = (arguments.kills, arguments.seed, arguments.meshes, arguments.processes, arguments.signal)
    counts = harness(Path(folder), *given)
  seconds = time.monotonic() - began
  print(
    f"{arguments.kills} kills ({counts}), {seconds:.0f} s: the result equals that of an uninterrupted run"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
