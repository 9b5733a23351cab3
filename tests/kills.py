"""Kills a real run with SIGKILL again and again, and compares what comes out with a run that was left alone.

    python -m tests.kills --kills=30
    python -m tests.kills --kills=10 --meshes         # another mesh after each kill: losses to 1e-5 instead of bits
    python -m tests.kills --kills=10 --processes=2    # one or both of two are killed; the other must end by itself

A third of the kills wait for a save to be under way (Orbax's temporary folder, or a step without its digest); the
others come at a random moment from the start of the process to some seconds after its first step. The number of data
workers changes after each. The exit status says whether all is as it should be.
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
from beit_jax.runtime import rendezvous

ROOT = Path(__file__).resolve().parent.parent
MARK = "BEIT_JAX_KILLS"  # in the environment of every process of a run, so that orphans are found
TIMINGS = ("images_per_second", "data_wait")
PATIENCE = 120  # seconds for processes that were asked to end; a machine may be busy
LIMIT = 30  # seconds for the processes that are left when one is killed


def _without_torch(folder: Path) -> str:
  """A folder for the search path where PyTorch cannot be imported: tensorboardX does so where it can, for seconds."""
  folder.mkdir(exist_ok=True)
  (folder / "torch.py").write_text("raise ImportError\n")
  return str(folder)


def start(
  workdir: Path, mark: str, *, workers: int, mesh: int, slow: float, place: tuple[str, ...] = ()
) -> subprocess.Popen:
  """`place`: flags of one process of several, which have a device each."""
  env = {
    **os.environ,
    MARK: mark,
    "PYTHONFAULTHANDLER": "1",
    "JAX_PLATFORMS": "cpu",
    checkpoint.SLOW_SAVE: str(slow),
  }
  paths = f"{ROOT}{os.pathsep}{_without_torch(workdir.parent / 'path')}"
  env |= {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"), "PYTHONPATH": paths}
  env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": ""}
  env["JAX_NUM_CPU_DEVICES"] = "8" if mesh > 1 and not place else "1"
  command = [
    sys.executable,
    "-m",
    "beit_jax.main",
    f"--config={ROOT}/tests/kills_config.py",
    f"--workdir={workdir}",
  ]
  command += [f"--config.data.workers={workers}", f"--config.mesh.data={mesh}", *place]
  with (workdir.parent / "output.txt").open("a") as output:
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)


def free_port() -> int:
  with socket.create_server(("localhost", 0)) as free:
    return free.getsockname()[1]


def start_all(workdir: Path, mark: str, processes: int, **options) -> list[subprocess.Popen]:
  """All processes of a run; several have a device each, and a mesh of these."""
  if processes == 1:
    return [start(workdir, mark, **options)]
  together = (
    f"--coordinator=localhost:{free_port()}",
    f"--num_processes={processes}",
    "--heartbeat_timeout=10",
  )
  options |= {"mesh": processes}
  return [start(workdir, mark, place=(*together, f"--process_id={i}"), **options) for i in range(processes)]


def orphans(mark: str) -> list[int]:
  """Living processes with the mark in their environment."""
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
      if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes() and state != "Z":
        found.append(int(folder.name))
    except OSError:
      continue
  return found


def ended(started: list[subprocess.Popen], workdir: Path) -> list[int]:
  """Exit statuses of processes that are about to end; the stacks of those that hang instead."""
  try:
    return [process.wait(PATIENCE) for process in started]
  except subprocess.TimeoutExpired:
    for process in started:
      process.send_signal(signal.SIGABRT)
      process.wait()
    text = (workdir.parent / "output.txt").read_text()
    raise AssertionError(f"still there after {PATIENCE} s:\n{text[-12000:]}") from None


def left_behind(mark: str) -> list[int]:
  """Those that live on for 30 s: a worker that has just been started first imports what it needs."""
  deadline = time.monotonic() + 30
  while (found := orphans(mark)) and time.monotonic() < deadline:
    time.sleep(0.1)
  return found


def saving(workdir: Path) -> bool:
  """Whether a save is under way."""
  root = workdir / "checkpoints"
  try:
    folders = [path for path in root.iterdir() if path.is_dir()]
  except OSError:
    return False
  return any("tmp" in path.name or not (path / checkpoint.DIGEST).exists() for path in folders)


def logged_steps(workdir: Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def kill_once(
  workdir: Path, mark: str, rng: random.Random, in_save: bool, processes: int = 1, **options
) -> str:
  """Starts the run, kills it: "save", "step", "start", or "finished" where it was too fast.

  Of several processes some are killed, and the others must end by themselves, soon.
  """
  started = start_all(workdir, mark, processes, **options)
  began, lines = time.monotonic(), logged_steps(workdir)
  if in_save:
    reached = lambda: logged_steps(workdir) > lines and saving(workdir)
  elif rng.random() < 0.25:
    moment = began + rng.uniform(0, 10)
    reached = lambda: time.monotonic() > moment
  else:
    reached = lambda: logged_steps(workdir) > lines
  while all(process.poll() is None for process in started) and not reached():
    time.sleep(0.002)
  if not in_save:
    time.sleep(rng.uniform(0, 0.5) if logged_steps(workdir) > lines else 0)
  where = "start" if logged_steps(workdir) == lines else "save" if saving(workdir) else "step"
  if any(process.poll() is not None for process in started):
    _all_well(workdir, started)
    return "finished"
  victims = rng.sample(started, rng.randint(1, processes))
  for process in victims:
    process.kill()
    process.wait()
  statuses = [process.wait(LIMIT) for process in started if process not in victims]
  # JAX's own heartbeat may be the first to notice, and aborts.
  assert all(status in (1, rendezvous.LOST_STATUS, -signal.SIGABRT) for status in statuses), statuses
  assert not left_behind(mark)
  return where


def _all_well(workdir: Path, started: list[subprocess.Popen]) -> None:
  for process in started:
    assert process.wait() == 0, (workdir.parent / "output.txt").read_text()[-2000:]


def finish(workdir: Path, mark: str, processes: int = 1, **options) -> None:
  _all_well(workdir, start_all(workdir, mark, processes, **options))


def outcome(workdir: Path) -> tuple[dict, list[dict], dict]:
  """(every array of the final and the best state, the rows of metrics.jsonl without timings, the evaluation)."""
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


def compare(whole: Path, killed: Path, exact: bool) -> None:
  (wanted, rows, evaluation), (found, found_rows, found_evaluation) = outcome(whole), outcome(killed)
  assert wanted.keys() == found.keys()
  if exact:
    differ = [name for name in wanted if not np.array_equal(wanted[name], found[name])]
    assert not differ, f"{len(differ)} of {len(wanted)} arrays differ, first {differ[:3]}"
    assert rows == found_rows, [pair for pair in zip(rows, found_rows, strict=False) if pair[0] != pair[1]][
      :2
    ]
    assert evaluation == found_evaluation
    return
  losses = [[row["loss"] for row in some if "loss" in row] for some in (rows, found_rows)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def harness(folder: Path, kills: int, seed: int, meshes: bool = False, processes: int = 1) -> dict[str, int]:
  """Everything; how many kills came where."""
  rng, mark = random.Random(seed), uuid.uuid4().hex
  whole, killed = folder / "whole" / "run", folder / "killed" / "run"
  for path in (whole, killed):
    path.parent.mkdir(parents=True)
  shared = dict(processes=processes)
  finish(whole, mark, workers=2, mesh=1, slow=0.0, **shared)
  shutil.copytree(whole.parent / "cache", killed.parent / "cache")  # of compiled programs
  counts = {"save": 0, "step": 0, "start": 0}
  while sum(counts.values()) < kills:
    done = sum(counts.values())
    options = dict(workers=rng.choice([0, 1, 2, 3]), mesh=rng.choice([2, 4, 8]) if meshes else 1)
    options |= shared
    in_save = done % 3 == 0
    where = kill_once(killed, mark, rng, in_save=in_save, slow=0.1 if in_save else 0.0, **options)
    if where == "finished":  # compare, and begin anew
      compare(whole, killed, exact=not meshes)
      shutil.rmtree(killed)
      continue
    counts[where] += 1
    print(f"kill {done + 1}: {where}, {logged_steps(killed)} rows logged", flush=True)
  finish(killed, mark, workers=1, mesh=1, slow=0.0, **shared)
  compare(whole, killed, exact=not meshes)
  assert not left_behind(mark)
  return counts


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--meshes", action="store_true")
  parser.add_argument("--processes", type=int, default=1)
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    counts = harness(Path(folder), arguments.kills, arguments.seed, arguments.meshes, arguments.processes)
  print(
    f"{arguments.kills} kills ({counts}), {time.monotonic() - began:.0f} s: the run came out as if left alone"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
