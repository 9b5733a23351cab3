"""The processes of one run: how many there are, which one this is, how they connect and end together.

`initialize` runs before any device is touched. It learns from flags or from the environment (Cloud TPU, GKE, Slurm,
Open MPI) how many processes there are; a single process connects to nothing.

`jax.distributed.initialize` detects the same environments, but gives no public access to the result before it connects,
and ends the process with a stack dump when another one is missing. The processes therefore meet on the same port first
(rendezvous.py), so that messages name the processes that are missing or that die later. JAX's own heartbeat finds hosts
that vanish together with their network.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from beit_jax.errors import TransientError, UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log, only_file
from beit_jax.runtime.maintenance_events import read_metadata
from beit_jax.runtime.rendezvous import GRACE, Peers, ProcessInfo

TPU_PORT = 8482
# Seconds until every process sees a new file: NFS may cache the listing of a folder for 60 s (acdirmax).
VISIBILITY_TIMEOUT = 65.0
COMPARE_TIMEOUT = 1800.0
SHOWN = 4  # the most differences, and the most processes, that a message lists


@dataclasses.dataclass
class Flags:
  """Command-line flags about processes; `--num_processes=1` alone means a single process, without detection."""

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  initialization_timeout: float = 300.0
  heartbeat_timeout: int = 60


def take_flags(argv: list[str]) -> tuple[Flags, list[str]]:
  """Splits the flags of this module from a command line: (flags, remaining arguments)."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  for field in dataclasses.fields(Flags):
    kind = {"coordinator": str, "initialization_timeout": float}.get(field.name, int)
    parser.add_argument(f"--{field.name}", type=kind)
  try:
    flags, rest = parser.parse_known_args(argv, namespace=Flags())
  except argparse.ArgumentError as error:
    raise UserError(str(error).removeprefix("argument ")) from None
  for name in ("num_processes", "initialization_timeout", "heartbeat_timeout"):
    value = getattr(flags, name)
    if value is not None and not value > 0:
      raise UserError(f"--{name}={value}: must be more than 0")
  return flags, rest


def from_flags(flags: Flags) -> ProcessInfo | None:
  """The process that explicit flags describe; None when there are none."""
  values = {name: getattr(flags, name) for name in ("coordinator", "num_processes", "process_id")}
  missing = [f"--{name}" for name, value in values.items() if value is None]
  if len(missing) == 3:
    return None
  if flags.num_processes == 1 and len(missing) == 2:
    return ProcessInfo("flags", "", 1, 0)
  if flags.coordinator is None or flags.num_processes is None or flags.process_id is None:
    raise UserError(
      f"{', '.join(missing)} missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together "
      "(--num_processes=1 alone: a single process, whatever the environment says)"
    )
  if not re.fullmatch(r"\S+:\d{1,5}", flags.coordinator):
    raise UserError(f"--coordinator={flags.coordinator}: must be HOST:PORT of process 0")
  if not 0 <= flags.process_id < flags.num_processes:
    raise UserError(
      f"--process_id={flags.process_id}: with --num_processes={flags.num_processes} it must lie in 0 to "
      f"{flags.num_processes - 1}"
    )
  return ProcessInfo("flags", flags.coordinator, flags.num_processes, flags.process_id)


Metadata = Callable[[str], str | None]  # attribute of a Cloud TPU VM -> its value, or None


def detect(environ: Mapping[str, str], metadata: Metadata | None = None) -> ProcessInfo | None:
  """The process that the environment describes; None when nothing indicates more than one process.

  Args:
    environ: the environment variables.
    metadata: reads an attribute of this Cloud TPU VM; None on other machines.

  Raises:
    UserError: there are several processes, but the environment does not tell enough about them.
  """
  info = _open_mpi(environ) or _slurm(environ) or _gke_tpu(environ)
  if info is None and metadata is not None:
    info = _cloud_tpu(environ, metadata)
  if info is not None:
    return info if info.count > 1 else None
  index = environ.get("JOB_COMPLETION_INDEX", "0")
  if "KUBERNETES_SERVICE_HOST" in environ and index != "0":
    raise UserError(
      f"this is pod {index} of a Kubernetes job of unknown size: give --coordinator=HOST:PORT --num_processes=N "
      "--process_id=$(JOB_COMPLETION_INDEX) in the container's command"
    )
  return None


def _open_mpi(environ: Mapping[str, str]) -> ProcessInfo | None:
  count = int(environ.get("OMPI_COMM_WORLD_SIZE", 0))
  if count < 2:
    return None
  launcher = environ.get("OMPI_MCA_orte_hnp_uri", "")
  match = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", launcher)
  if match is None:
    raise UserError(
      f"Open MPI started {count} processes and does not tell the host of the first: give --coordinator=HOST:PORT "
      f"--num_processes={count} --process_id=$OMPI_COMM_WORLD_RANK"
    )
  host = match[1] or f"[{match[2]}]"
  port = 10000 + zlib.crc32(launcher.split(";")[0].encode()) % 20000
  share_host = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
  local = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]) if share_host else None
  return ProcessInfo("Open MPI", f"{host}:{port}", count, int(environ["OMPI_COMM_WORLD_RANK"]), local)


def _slurm(environ: Mapping[str, str]) -> ProcessInfo | None:
  """Only inside `srun`: the batch script and an interactive shell have the variables of the allocation too."""
  count = int(environ.get("SLURM_STEP_NUM_TASKS", 0))
  if count < 2 or "SLURM_PROCID" not in environ:
    return None
  step = environ.get("SLURM_STEP_ID", "0")
  port = 10000 + (int(environ["SLURM_JOB_ID"]) * 7 + (int(step) if step.isdigit() else 0)) % 20000
  # "4(x2)": four tasks on each of two nodes; "1": one task on one node.
  share_host = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] != "1"
  local = int(environ["SLURM_LOCALID"]) if share_host else None
  host = first_host(environ["SLURM_STEP_NODELIST"])
  return ProcessInfo("Slurm", f"{host}:{port}", count, int(environ["SLURM_PROCID"]), local)


def first_host(nodes: str) -> str:
  """The first host of a Slurm node list: `gpu[003-005,9],login1` -> `gpu003`."""
  match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
  return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0] if match else "")


def _gke_tpu(environ: Mapping[str, str]) -> ProcessInfo | None:
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if not hosts or "TPU_WORKER_ID" not in environ:
    return None
  return _tpu_slices("GKE", hosts.split(","), int(environ["TPU_WORKER_ID"]), environ)


def _cloud_tpu(environ: Mapping[str, str], metadata: Metadata) -> ProcessInfo | None:
  workers, index = metadata("worker-network-endpoints"), metadata("agent-worker-number")
  if not workers or index is None:
    return None
  pairs = re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", metadata("tpu-env") or "", re.MULTILINE)
  hosts = [worker.split(":")[-1] for worker in workers.split(",")]  # an address, or name:id:address
  return _tpu_slices("Cloud TPU", hosts, int(index), {**dict(pairs), **environ})


def _tpu_slices(origin: str, hosts: Sequence[str], index: int, variables: Mapping[str, str]) -> ProcessInfo:
  """Several TPU slices that are joined over the data-center network make one run."""
  num_slices = int(variables.get("MEGASCALE_NUM_SLICES") or 1)
  slice_index = int(variables.get("MEGASCALE_SLICE_ID") or 0)
  first = (variables.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
  return ProcessInfo(origin, f"{first}:{TPU_PORT}", len(hosts) * num_slices, slice_index * len(hosts) + index)


def tpu_metadata(environ: Mapping[str, str]) -> Metadata | None:
  """How to read the metadata server of a Cloud TPU VM; None on other machines, without a request to any server."""
  platforms = _platforms()
  # JAX sets TPU_SKIP_MDS_QUERY when it is imported on a machine without TPU chips.
  if platforms and "tpu" not in platforms.split(",") or "TPU_SKIP_MDS_QUERY" in environ:
    return None
  if importlib.util.find_spec("libtpu") is None:
    return None

  def read(key: str) -> str | None:
    for attempt in range(3):
      try:
        return read_metadata(server, f"attributes/{key}")
      except OSError:
        time.sleep(attempt)
    log.warning("TPU chips, but no metadata server at %s: this run uses a single host", server)
    return None

  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  return read


def _platforms() -> str | None:
  return jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX adds its options at run time


_peers: Peers | None = None


def initialize(flags: Flags) -> ProcessInfo | None:
  """Connects to the other processes of this run; None when there are none.

  Raises:
    TransientError: some processes did not connect in time; the message names them.
    UserError: the processes do not agree on their numbers.
  """
  global _peers
  info = from_flags(flags)
  if info is None:
    cpu_only = _platforms() == "cpu"
    environ = {k: v for k, v in os.environ.items() if not (cpu_only and k.startswith("TPU_"))}
    info = detect(environ, tpu_metadata(environ))
  if info is None or info.count == 1:
    return None
  level = logging.INFO if info.index == 0 else logging.DEBUG
  log.log(level, "%s: %s, waiting for the others at %s", info.origin, info, info.coordinator)
  peers = Peers(info, flags.initialization_timeout, flags.heartbeat_timeout)
  jax.distributed.initialize(
    info.coordinator,
    num_processes=info.count,
    process_id=info.index,
    local_device_ids=None if info.local_device is None else [info.local_device],
    cluster_detection_method="deactivate",
    initialization_timeout=max(int(flags.initialization_timeout), 1),
    heartbeat_timeout_seconds=flags.heartbeat_timeout,
  )
  log.log(level, "all processes are connected: %s", ", ".join(peers.hosts))
  _peers = peers
  barrier("start", flags.initialization_timeout)
  return info


def barrier(name: str, timeout: float = 300.0) -> None:
  """Waits until every process has called this with the same name.

  Raises:
    TransientError: some processes did not arrive within `timeout` seconds; the message names them.
  """
  if _peers is not None:
    _peers.barrier(name, timeout)


def check_shared(flag: str, folder: Path) -> None:
  """Checks that all processes see in `folder` what process 0 writes there. In a bucket they always do.

  Raises:
    UserError: this process does not.
  """
  if _peers is None or bucket.remote(folder):
    return
  is_writer = _peers.info.index == 0
  file = folder / f".shared-{_peers.start_id}"
  try:
    if is_writer:
      file.write_text("beit_jax\n")
    barrier("test file is written")
    visible = _appears(file)
    barrier("test file was looked for", VISIBILITY_TIMEOUT + 300)
  except OSError as error:
    raise UserError(f"{flag}={folder}: nothing can be written there ({error})") from None
  finally:
    if is_writer:
      with contextlib.suppress(OSError):
        file.unlink()
  if not visible:
    alternative = ", or gs://BUCKET/RUN" if flag == "--workdir" else ""
    raise UserError(
      f"{flag}={folder.absolute()}: {_peers.info} does not see there what process 0 ({_peers.hosts[0]}) writes; "
      f"it must be on a file system that all processes share{alternative}"
    )
  barrier("test file is visible to all")  # the run starts only after that


def post(key: str, value: Any) -> None:
  """Makes a JSON value known to all processes; `fetch` returns it there."""
  _store().key_value_set(f"beit_jax/{key}", json.dumps(value), allow_overwrite=True)


def fetch(key: str, seconds: float) -> Any:
  """Waits up to some seconds for the value that a process has posted under a key."""
  return json.loads(_store().blocking_key_value_get(f"beit_jax/{key}", int(seconds * 1000)))


def _store() -> Any:
  from jax._src import distributed as jax_distributed  # JAX has no public access to it; Orbax uses it too

  return jax_distributed.global_state.client


def differences(mine: Mapping[str, str], theirs: Mapping[str, str], owner: str = "here") -> str:
  """Lists what differs as `key theirs (here mine), ...`; "" for nothing. `owner`: who has `mine`."""
  names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
  text = ", ".join(f"{name} {theirs.get(name)!r} ({owner} {mine.get(name)!r})" for name in names[:SHOWN])
  return text + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_same(what: str, facts: Mapping[str, str]) -> None:
  """Checks that every process has the same facts as process 0, before any of them could wait for another.

  Args:
    what: name of the comparison, the same on all processes.
    facts: name -> value.

  Raises:
    UserError: some processes differ; the message names them on every process.
  """
  if _peers is None:
    return
  index, hosts = _peers.info.index, _peers.hosts
  if index == 0:
    post(f"{what}/facts", facts)
  barrier(f"{what} is known", COMPARE_TIMEOUT)  # a process may take minutes to list its files
  text = differences(fetch(f"{what}/facts", 60), facts, "process 0:")
  if text:
    post(f"{what}/differences/{index}", text)
  barrier(f"{what} is compared")
  found = dict(_store().key_value_dir_get(f"beit_jax/{what}/differences/"))
  if found:
    numbers = sorted((int(key.rpartition("/")[2]), json.loads(value)) for key, value in found.items())
    lines = [f"process {i} ({hosts[i]}) differs from process 0 ({hosts[0]}): {text}" for i, text in numbers]
    more = f"\n  and {len(lines) - SHOWN} more processes" if len(lines) > SHOWN else ""
    raise UserError(
      f"{what}: not the same on all processes\n  "
      + "\n  ".join(lines[:SHOWN])
      + f"{more}\nStart every process with the same config, and with a complete copy of the same data"
    )


def _appears(file: Path) -> bool:
  """Lists the folder each time: a network file system may cache a lookup by name that failed."""
  end = time.monotonic() + VISIBILITY_TIMEOUT
  while True:
    with contextlib.suppress(OSError):
      if file.name in os.listdir(file.parent):
        return True
    if time.monotonic() > end:
      return False
    time.sleep(0.5)


def notify_peers(text: str, status: int) -> None:
  """Notifies the other processes that this one is about to end with an error.

  They end too, with the same status when it is 2 (a mistake of the user's), else with 75. Nothing is sent when another
  process has ended by now: a collective or a save that fails is then the consequence.
  """
  if _peers is not None and not _peers.stopped.wait(GRACE if status < 128 else 0):
    _peers.fail(text, status)


def report_error(error: Exception) -> int:
  """Reports a mistake of the user's, or an outage: on the terminal, in log.txt, to the other processes.

  Returns:
    The exit status.
  """
  print(f"error: {error}", file=sys.stderr)
  only_file(f"error: {error}")
  status = getattr(error, "status", TransientError.status)
  notify_peers(str(error), status)
  return status


def shutdown() -> None:
  """Disconnects from the other processes, after everything is written."""
  global _peers
  if _peers is not None:
    _peers.leave(timeout=1800)
    _peers = None
    jax.distributed.shutdown()


def run(main: Callable[[list[str]], int], argv: list[str]) -> None:
  """Like `sys.exit(main(argv))`, but ends soon after an error.

  A process that fails must not wait for minutes in JAX's exit handler for others that wait for it in a collective, nor,
  as a single process, for the threads that a failed save of Orbax leaves behind.
  """
  try:
    status = main(argv)
    if _peers is not None and not _peers.leaving:
      shutdown()
  except Exception as error:
    if _peers is None:
      raise
    if isinstance(error, UserError):  # raised after `main` returned
      status = report_error(error)
    else:
      status = 1
      traceback.print_exc()
      notify_peers(f"{type(error).__name__}: {error}", status)
    if _peers.stopped.is_set():  # its thread names the process that ended first, and ends this one
      time.sleep(2 * GRACE)
  sys.stdout.flush()
  sys.stderr.flush()
  if _peers is not None:
    os._exit(status)
  if status:
    timer = threading.Timer(GRACE, os._exit, (status,))
    timer.daemon = True
    timer.start()
  sys.exit(status)
