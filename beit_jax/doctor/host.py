"""Checks of the machine itself: accelerators and who uses them, the disk, the clock."""

import contextlib
import glob
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax.doctor.findings import FAIL, OK, WARN, Found, unless_worse
from beit_jax.doctor.machine import Machine
from beit_jax.runtime import bucket, distributed

TPU_LOCK = Path("/tmp/libtpu_lockfile")
NETWORK = re.compile(r"(nfs|cifs|smb|lustre|ceph|gluster|beegfs|9p|afs|gpfs|fuse\.)")
LOCAL_LOCKS = re.compile(
  r"\b(nolock|local_lock=(all|flock)|localflock)\b"
)  # mount options: nobody else sees them
MAX_SKEW = 5.0  # seconds


def nvidia_smi(*args: str) -> list[str]:
  """The lines it prints; none where it is not there, or does not work."""
  try:
    done = subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=60)
  except (OSError, subprocess.SubprocessError):
    return []
  return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def nvidia_gpus() -> list[str]:
  return nvidia_smi("-L") or sorted(glob.glob("/dev/nvidia[0-9]*"))


def tpu_chips() -> list[str]:
  return sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def _users(paths: list[str]) -> list[int]:
  """The other processes that have one of these files open, as far as they can be seen from here."""
  found = set()
  for link in glob.glob("/proc/[0-9]*/fd/*"):
    with contextlib.suppress(OSError):
      if os.readlink(link) in paths:
        found.add(int(link.split("/")[2]))
  return sorted(found - {os.getpid()})


def _flocked(path: Path) -> bool | None:
  """Whether somebody holds a lock on a file; None where that cannot be asked."""
  try:
    import fcntl

    with path.open("rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except (ImportError, OSError):
    return None
  return False


def tpu_lock(machine: Machine) -> Found:
  """Asked before a device is touched: from then on this process holds it."""
  del machine
  if not TPU_LOCK.exists():
    yield OK, "no lock file of a TPU", ""
    return
  living = _users([str(TPU_LOCK), *tpu_chips()])
  if living or _flocked(TPU_LOCK):
    who = f"process {', '.join(map(str, living))}" if living else "a process that cannot be seen from here"
    advice = (
      f"wait for it or stop it, one process at a time gets the TPU (sudo fuser -v {TPU_LOCK} shows who)"
    )
    yield FAIL, f"{TPU_LOCK}: {who} uses the TPU", advice
    return
  yield (
    WARN,
    f"{TPU_LOCK}: left behind by a dead process",
    f"rm {TPU_LOCK} (with sudo, if it is another user's)",
  )


@unless_worse
def gpu_memory(machine: Machine) -> Found:
  """Asked before a device is touched: from then on this process has taken its share."""
  del machine
  if not nvidia_gpus():
    yield OK, "no NVIDIA GPU", ""
    return
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  name = "XLA_CLIENT_MEM_FRACTION" if "XLA_CLIENT_MEM_FRACTION" in os.environ else name
  text, whole = os.environ.get(name, ""), os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "")
  try:
    share = float(text) if text else 0.75
  except ValueError:
    share = -1.0
  advice = f"export {name}=0.92"
  if not 0 < share <= 1:
    yield FAIL, f"{name}={text}: must be a number in (0, 1]", advice
  elif share > 0.95:
    yield WARN, f"{name}={text}: leaves little for CUDA itself and for compiling", advice
  elif text and share < 0.5:
    yield WARN, f"{name}={text}: most of the memory stays unused", advice
  if whole.lower() in ("false", "0"):
    what = (
      "XLA_PYTHON_CLIENT_PREALLOCATE=false: memory is taken bit by bit, and may be too fragmented after hours"
    )
    yield WARN, what, "unset XLA_PYTHON_CLIENT_PREALLOCATE, unless several programs share the GPU on purpose"
  others = nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
  if others:
    yield (
      WARN,
      f"in use by process {'; '.join(others)}",
      "stop it, or set CUDA_VISIBLE_DEVICES to the free ones",
    )
  for line in nvidia_smi("--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"):
    index, used, total = (int(number) if number.strip().isdigit() else 0 for number in line.split(","))
    if not others and total and used > 0.1 * total:
      what = f"GPU {index}: {used:,} of {total:,} MiB are taken, by something that cannot be seen from here"
      yield WARN, what, "look for it on the host (nvidia-smi), or set CUDA_VISIBLE_DEVICES to the free ones"
  yield OK, f"{len(nvidia_gpus())} GPUs, {share:.0%} of the memory is taken at the start ({name})", ""


def devices(machine: Machine) -> Found:
  if machine.place is not None:
    distributed.barrier("the doctor touches the devices")  # now every process has seen who uses them
  found, mine = machine.devices(), jax.local_devices()
  kinds = sorted({f"{device.platform} {device.device_kind}" for device in mine})
  text = f"{len(mine)} x {', '.join(kinds)}" + (f" of {len(found)} in all" if len(found) > len(mine) else "")
  limits = set()
  for device in mine:
    with contextlib.suppress(Exception):  # not every backend knows
      limits.add(round(device.memory_stats()["bytes_limit"] / 2**30, 1))
  if limits:
    text += ", " + " or ".join(f"{limit:g}" for limit in sorted(limits)) + " GiB each for JAX"
  forced = jax.config.jax_platforms
  if all(device.platform == "cpu" for device in found):
    for there, what, extra in ((nvidia_gpus(), "an NVIDIA GPU", "cuda"), (tpu_chips(), "a TPU", "tpu")):
      if there:
        how = f"unset JAX_PLATFORMS ({forced}); if that is not enough, " if forced else ""
        yield WARN, f"{text}, although there is {what} ({there[0]})", f"{how}pip install -e '.[{extra}]'"
        return
  yield OK, text, ""


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Path]:
  """A new file with a few bytes in it."""
  if bucket.remote(folder):
    path = folder / f".doctor-{platform.node()}-{os.getpid()}"
    path.write_text("beit_jax\n")
    try:
      yield path
    finally:
      path.unlink()
    return
  handle, name = tempfile.mkstemp(prefix=f".doctor-{platform.node()}-", dir=folder)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(b"beit_jax\n")
      os.fsync(file.fileno())
    yield Path(name)
  finally:
    os.unlink(name)


def mounted(path: Path) -> tuple[str, str]:
  """(file system, mount options) of a path; ("", "") where nobody says."""
  best = ("", "", "")
  with contextlib.suppress(OSError):
    for line in Path("/proc/mounts").read_text().splitlines():
      _, point, kind, options, *_ = line.split(" ")
      point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point)
      if path.resolve().is_relative_to(point) and len(point) >= len(best[0]):
        best = (point, kind, options)
  return best[1:]


def workdir(machine: Machine) -> Found:
  ground = machine.ground()
  if bucket.remote(ground):
    bucket.check_writable(ground)
    yield OK, f"{machine.workdir}: can be written, with a lock that all machines see", ""
    return
  if not ground.is_dir():
    yield FAIL, f"{machine.workdir}: {ground} is a file, not a folder", "take another --workdir"
    return
  try:
    with trial(ground) as path:
      locks = _flocked(path) is False
  except OSError as error:
    advice = "take another --workdir, or change its owner or its mount"
    yield FAIL, f"{machine.workdir}: no file can be written in {ground} ({error.strerror or error})", advice
    return
  kind, options = mounted(ground)
  text = f"{machine.workdir}: can be written" + (f", {kind}" if kind else "")
  text += "" if machine.workdir.exists() else ", will be made"
  network = NETWORK.match(kind)
  if not locks or (network and (LOCAL_LOCKS.search(options) or "fuse." in kind)):
    what = "without locks" if not locks else "whose locks other machines may not see"
    yield WARN, f"{text} {what}", "make sure yourself that never two runs write to the same workdir"
    return
  yield OK, text, ""


def clock(machine: Machine) -> Found:
  now = time.time()
  if time.gmtime(now).tm_year < 2024:
    day = time.strftime("%Y-%m-%d", time.gmtime(now))
    yield (
      FAIL,
      f"the clock says {day}",
      "set it (timedatectl set-ntp true): certificates and file times need it",
    )
    return
  if bucket.remote(machine.ground()):
    yield OK, "set; that of the bucket is not asked", ""
    return
  with trial(machine.ground()) as path:
    skew = path.stat().st_mtime - time.time()
  if abs(skew) > MAX_SKEW:
    what = (
      f"a file written now in {machine.ground()} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
    )
    yield WARN, what, "set the clocks of this machine and of the file server by NTP"
    return
  yield OK, f"as that of the disk, to {max(abs(skew), 0.1):.1f} s", ""
