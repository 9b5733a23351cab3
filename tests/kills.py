"""Kills a real run with SIGKILL again and again, and compares what comes out with a run that was left alone.

    python -m tests.kills --kills=30            # about 15 minutes on two cores
    python -m tests.kills --kills=6 --meshes    # on another mesh after each kill: losses to 1e-5 instead of bits

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
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from beit_jax import checkpoint, trees

ROOT = Path(__file__).resolve().parent.parent
MARK = "BEIT_JAX_KILLS"  # in the environment of every process of a run, so that orphans are found
TIMINGS = ("images_per_second", "data_wait")


def start(workdir: Path, mark: str, *, workers: int, mesh: int, slow: float) -> subprocess.Popen:
  env = {**os.environ, MARK: mark, "JAX_PLATFORMS": "cpu", checkpoint.SLOW_SAVE: str(slow)}
  env |= {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"), "PYTHONPATH": str(ROOT)}
  env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
  if mesh > 1:
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  command = [
    sys.executable,
    "-m",
    "beit_jax.main",
    f"--config={ROOT}/tests/kills_config.py",
    f"--workdir={workdir}",
  ]
  command += [f"--config.data.workers={workers}", f"--config.mesh.data={mesh}"]
  with (workdir.parent / "output.txt").open("a") as output:
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)


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


def kill_once(workdir: Path, mark: str, rng: random.Random, in_save: bool, **options) -> str:
  """Starts the run, kills it: "save", "step", "start", or "finished" where it was too fast."""
  process = start(workdir, mark, **options)
  began, lines = time.monotonic(), logged_steps(workdir)
  if in_save:
    reached = lambda: logged_steps(workdir) > lines and saving(workdir)
  elif rng.random() < 0.25:
    moment = began + rng.uniform(0, 10)
    reached = lambda: time.monotonic() > moment
  else:
    reached = lambda: logged_steps(workdir) > lines
  while process.poll() is None and not reached():
    time.sleep(0.002)
  if not in_save:
    time.sleep(rng.uniform(0, 0.5) if logged_steps(workdir) > lines else 0)
  where = "start" if logged_steps(workdir) == lines else "save" if saving(workdir) else "step"
  if process.poll() is not None:
    assert process.returncode == 0, (workdir.parent / "output.txt").read_text()[-2000:]
    return "finished"
  process.send_signal(signal.SIGKILL)
  process.wait()
  deadline = time.monotonic() + 30  # a worker that has just been started first imports what it needs
  while orphans(mark) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not orphans(mark), f"left behind: {orphans(mark)}"
  return where


def finish(workdir: Path, mark: str, **options) -> None:
  process = start(workdir, mark, **options)
  assert process.wait() == 0, (workdir.parent / "output.txt").read_text()[-2000:]


def outcome(workdir: Path) -> tuple[dict, list[dict], dict]:
  """(every array of the final state, the rows of metrics.jsonl without timings, the evaluation)."""
  folder = checkpoint.find(workdir)
  arrays = {}
  for item in ("params", "rest", "ema"):
    leaves = trees.flatten(checkpoint.load_params(folder, item))
    arrays |= {f"{item}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
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


def harness(folder: Path, kills: int, seed: int, meshes: bool) -> dict[str, int]:
  """Everything; how many kills came where."""
  rng, mark = random.Random(seed), uuid.uuid4().hex
  whole, killed = folder / "whole" / "run", folder / "killed" / "run"
  for path in (whole, killed):
    path.parent.mkdir(parents=True)
  finish(whole, mark, workers=2, mesh=1, slow=0.0)
  counts = {"save": 0, "step": 0, "start": 0}
  while sum(counts.values()) < kills:
    done = sum(counts.values())
    options = dict(workers=rng.choice([0, 1, 2, 3]), mesh=rng.choice([2, 4, 8]) if meshes else 1)
    in_save = done % 3 == 0
    where = kill_once(killed, mark, rng, in_save=in_save, slow=0.1 if in_save else 0.0, **options)
    if where == "finished":  # compare, and begin anew
      compare(whole, killed, exact=not meshes)
      shutil.rmtree(killed)
      continue
    counts[where] += 1
    print(f"kill {done + 1}: {where}, {logged_steps(killed)} rows logged", flush=True)
  finish(killed, mark, workers=1, mesh=1, slow=0.0)
  compare(whole, killed, exact=not meshes)
  assert not orphans(mark)
  return counts


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--meshes", action="store_true")
  arguments = parser.parse_args()
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    counts = harness(Path(folder), arguments.kills, arguments.seed, arguments.meshes)
  print(
    f"{arguments.kills} kills ({counts}), {time.monotonic() - began:.0f} s: the run came out as if left alone"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
