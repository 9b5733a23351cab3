"""Checks of the machine: accelerators and their users, the disk, the clock."""

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
from beit_jax.runtime import bucket, distributed, lock

TPU_LOCK = Path("/tmp/libtpu_lockfile")
NETWORK = re.compile(r"(nfs|cifs|smb|lustre|ceph|gluster|beegfs|9p|afs|gpfs|fuse\.)")
LOCAL_LOCKS = re.compile(r"\b(nolock|local_lock=(all|flock)|localflock)\b")  # mount options
MAX_SKEW = 5.0  # seconds


def nvidia_smi(*args: str) -> list[str]:
  """Returns the lines that the command prints; none if it does not exist or does not work."""
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
  """The other processes that have one of these files open, as far as this user may see."""
  found: set[int] = set()
  for link in glob.glob("/proc/[0-9]*/fd/*"):
    with contextlib.suppress(OSError):
      if os.readlink(link) in paths:
        found.add(int(link.split("/")[2]))
  return sorted(found - {os.getpid()})


def _locked(path: Path) -> bool | None:
  """Whether another process holds a lock on a file; None if the file system has no locks."""
  try:
    with path.open() as file:
      return not lock.acquire(file)
  except OSError:
    return None


def tpu_lock(machine: Machine) -> Found:
  del machine
  if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu").split(","):
    yield OK, "TPUs are not used (JAX_PLATFORMS)", ""
    return
  if not TPU_LOCK.exists():
    yield OK, "no lock file of a TPU", ""
    return
  users = _users([str(TPU_LOCK), *tpu_chips()])
  if users or _locked(TPU_LOCK):
    who = f"process {', '.join(map(str, users))}" if users else "a process of another user or container"
    advice = f"wait for it or stop it, one process at a time gets the TPU (sudo fuser -v {TPU_LOCK} shows it)"
    yield FAIL, f"{TPU_LOCK}: {who} uses the TPU", advice
  else:
    advice = f"rm {TPU_LOCK} (with sudo, if it is another user's)"
    yield WARN, f"{TPU_LOCK}: left behind by a dead process", advice


@unless_worse
def gpu_memory(machine: Machine) -> Found:
  del machine
  if not nvidia_gpus():
    yield OK, "no NVIDIA GPU", ""
    return
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  name = "XLA_CLIENT_MEM_FRACTION" if "XLA_CLIENT_MEM_FRACTION" in os.environ else name
  text = os.environ.get(name) or "0.75"
  if not re.fullmatch(r"(0?\.\d+|1(\.0*)?)", text) or not float(text):
    yield FAIL, f"{name}={text}: must be a number in (0, 1]", f"export {name}=0.92"
  switch = "XLA_PYTHON_CLIENT_PREALLOCATE"
  if os.environ.get(switch, "").lower() in ("false", "0"):
    what = f"{switch}=false: memory is allocated piece by piece and may fragment after hours"
    yield WARN, what, f"unset {switch}, unless several programs share the GPU on purpose"
  others = nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
  free = "set CUDA_VISIBLE_DEVICES to the free ones"
  if others:
    yield WARN, f"in use by process {'; '.join(others)}", f"stop it, or {free}"
  for line in nvidia_smi("--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"):
    index, used, total = (int(number) if number.strip().isdigit() else 0 for number in line.split(","))
    if not others and used > 0.1 * total:
      what = f"GPU {index}: {used:,} of {total:,} MiB are in use by a process that is not visible here"
      yield WARN, what, f"look for it on the host (nvidia-smi), or {free}"
  yield OK, f"{len(nvidia_gpus())} GPUs; JAX allocates {text} of the memory at the start ({name})", ""


def devices(machine: Machine) -> Found:
  if machine.process is not None:
    distributed.barrier("the doctor uses the devices")  # after every process has checked who else uses them
  found, mine = machine.devices(), jax.local_devices()
  kinds = sorted({f"{device.platform} {device.device_kind}" for device in mine})
  text = f"{len(mine)} x {', '.join(kinds)}" + (f" of {len(found)} in all" if len(found) > len(mine) else "")
  stats = [device.memory_stats() or {} for device in mine]
  limits = sorted({round(each["bytes_limit"] / 2**30, 1) for each in stats if "bytes_limit" in each})
  if limits:
    text += f", {' or '.join(f'{limit:g}' for limit in limits)} GiB each for JAX"
  forced = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX defines it when it is imported
  unused = [(nvidia_gpus(), "an NVIDIA GPU", "cuda"), (tpu_chips(), "a TPU", "tpu")]
  for present, what, extra in unused if all(device.platform == "cpu" for device in found) else ():
    if present:
      how = f"unset JAX_PLATFORMS ({forced}); if that is not enough, " if forced else ""
      yield WARN, f"{text}, although there is {what} ({present[0]})", f"{how}pip install -e '.[{extra}]'"
      return
  yield OK, text, ""


@contextlib.contextmanager
def trial_file(folder: Path) -> Iterator[Path]:
  """Writes a new file with a few bytes, which is deleted at the end."""
  with tempfile.NamedTemporaryFile(mode="w", prefix=f".doctor-{platform.node()}-", dir=folder) as file:
    file.write("beit_jax\n")
    file.flush()
    os.fsync(file.fileno())
    yield Path(file.name)


def mounted(path: Path) -> tuple[str, str]:
  """Returns the type and the mount options of a path's file system; ("", "") if they are unknown."""
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
    yield FAIL, f"{machine.workdir}: {ground} is a file, not a folder", "use another --workdir"
    return
  try:
    with trial_file(ground) as path:
      has_locks = _locked(path) is False
  except OSError as error:
    advice = "use another --workdir, or change its owner or its mount"
    yield FAIL, f"{machine.workdir}: no file can be written in {ground} ({error.strerror or error})", advice
    return
  kind, options = mounted(ground)
  text = f"{machine.workdir}: can be written" + (f", {kind}" if kind else "")
  text += "" if machine.workdir.exists() else ", will be created"
  is_local = NETWORK.match(kind) and (LOCAL_LOCKS.search(options) or "fuse." in kind)
  if has_locks and not is_local:
    yield OK, text, ""
    return
  what = "whose locks other machines may not see" if has_locks else "without locks"
  yield WARN, f"{text} {what}", "make sure that two runs never write to the same workdir"


def clock(machine: Machine) -> Found:
  now = time.time()
  if time.gmtime(now).tm_year < 2024:
    advice = "set it (timedatectl set-ntp true): certificates and file times need it"
    yield FAIL, f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}", advice
    return
  if bucket.remote(machine.ground()):
    yield OK, "plausible; the clock of the bucket is not checked", ""
    return
  with trial_file(machine.ground()) as path:
    skew = path.stat().st_mtime - time.time()
  if abs(skew) > MAX_SKEW:
    direction = "ahead" if skew > 0 else "behind"
    what = f"the time of a file written now in {machine.ground()} is {abs(skew):.0f} s {direction}"
    yield WARN, what, "synchronize the clocks of this machine and of the file server with NTP"
    return
  yield OK, f"within {max(abs(skew), 0.1):.1f} s of the disk's", ""
