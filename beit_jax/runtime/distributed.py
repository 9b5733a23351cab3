"""Several processes, one run: which process this is, how all find each other, how they notice that one is gone.

`initialize` runs before any device is touched. It learns from flags or from the environment (Cloud TPU, GKE, Slurm,
Open MPI) how many processes there are; with one process it does nothing and waits for nobody.

`jax.distributed.initialize` ends the process with a stack dump when a process is missing, and does not say which.
Therefore the processes first meet on the same port (rendezvous.py), which names those that are missing and those that
die later. JAX's own heartbeat finds hosts that vanish together with their network.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from beit_jax.errors import TransientError, UserError
from beit_jax.runtime import bucket, rendezvous
from beit_jax.runtime.logs import log, only_file
from beit_jax.runtime.rendezvous import ProcessInfo

TPU_PORT = 8482
# Seconds for a new file to be seen by all: NFS may show a folder as it was up to 60 s ago (acdirmax).
PATIENCE = 65.0


@dataclasses.dataclass
class Flags:
  """Command-line flags of the start; `--num_processes=1` alone means: look for nobody."""

  coordinator: str = ""
  num_processes: int = 0
  process_id: int = -1
  initialization_timeout: float = 300.0
  heartbeat_timeout: int = 60


def take_flags(argv: list[str]) -> tuple[Flags, list[str]]:
  """Splits the flags of this module off a command line: (flags, what is left)."""
  flags, rest, items = Flags(), [], iter(argv)
  for item in items:
    name, equals, value = item.partition("=")
    field = name.removeprefix("--")
    if not name.startswith("--") or field not in Flags.__dataclass_fields__:
      rest.append(item)
      if name.startswith("--") and not equals:  # its value must not be taken for a flag
        rest.extend(value for value in [next(items, None)] if value is not None)
      continue
    value = value if equals else next(items, "")
    kind = type(getattr(flags, field))
    try:
      setattr(flags, field, kind(value))
    except ValueError:
      raise UserError(f"{name}={value}: not {'a number' if kind is float else 'an integer'}") from None
    if field not in ("coordinator", "process_id") and not getattr(flags, field) > 0:
      raise UserError(f"{name}={value}: must be more than 0")
  return flags, rest


def from_flags(flags: Flags) -> ProcessInfo | None:
  """The place that explicit flags give; None when there are none."""
  given = dict(
    coordinator=bool(flags.coordinator),
    num_processes=flags.num_processes > 0,
    process_id=flags.process_id != -1,
  )
  if not any(given.values()):
    return None
  if given == dict(coordinator=False, num_processes=True, process_id=False) and flags.num_processes == 1:
    return ProcessInfo("flags", "", 1, 0)
  if not all(given.values()):
    missing = ", ".join(f"--{name}" for name, there in given.items() if not there)
    raise UserError(
      f"{missing} missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together "
      "(--num_processes=1 alone: one process, whatever the environment says)"
    )
  if not re.fullmatch(r"\S+:\d{1,5}", flags.coordinator):
    raise UserError(f"--coordinator={flags.coordinator}: must be HOST:PORT of process 0")
  if not 0 <= flags.process_id < flags.num_processes:
    raise UserError(
      f"--process_id={flags.process_id}: with --num_processes={flags.num_processes} it must lie in 0 to "
      f"{flags.num_processes - 1}"
    )
  return ProcessInfo("flags", flags.coordinator, flags.num_processes, flags.process_id)


def detect(
  environ: Mapping[str, str], metadata: Callable[[str], str | None] | None = None
) -> ProcessInfo | None:
  """The place that the environment gives; None when nothing speaks of more than one process.

  Args:
    environ: the environment variables.
    metadata: attribute of a Cloud TPU VM -> its value or None; None when this is no such machine.
  """
  for find in (_mpi, _slurm, _gke_tpu):
    place = find(environ)
    if place is not None:
      return place if place.count > 1 else None
  if metadata is not None:
    place = _gce_tpu(environ, metadata)
    if place is not None:
      return place if place.count > 1 else None
  index = environ.get("JOB_COMPLETION_INDEX", "0")
  if "KUBERNETES_SERVICE_HOST" in environ and index != "0":
    raise UserError(
      f"this is pod {index} of a Kubernetes job, and nothing says how many there are: give "
      "--coordinator=HOST:PORT --num_processes=N --process_id=$(JOB_COMPLETION_INDEX) in the container's command"
    )
  return None


def _mpi(environ) -> ProcessInfo | None:
  count = int(environ.get("OMPI_COMM_WORLD_SIZE", 0))
  if count < 2:
    return None
  launcher = environ.get("OMPI_MCA_orte_hnp_uri", "")
  host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", launcher)
  if host is None:
    raise UserError(
      f"Open MPI started {count} processes and does not say where: give --coordinator=HOST:PORT "
      f"--num_processes={count} --process_id=$OMPI_COMM_WORLD_RANK"
    )
  port = 10000 + zlib.crc32(launcher.split(";")[0].encode()) % 20000
  several = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
  local = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]) if several else None
  host = host[1] or f"[{host[2]}]"
  return ProcessInfo("Open MPI", f"{host}:{port}", count, int(environ["OMPI_COMM_WORLD_RANK"]), local)


def _slurm(environ) -> ProcessInfo | None:
  """Only inside `srun`: the allocation (SLURM_NTASKS) also speaks in the batch script and in an interactive shell."""
  count = int(environ.get("SLURM_STEP_NUM_TASKS", 0))
  if count < 2 or "SLURM_PROCID" not in environ:
    return None
  step = environ.get("SLURM_STEP_ID", "0")
  port = 10000 + (int(environ["SLURM_JOB_ID"]) * 7 + (int(step) if step.isdigit() else 0)) % 20000
  # "4(x2)" tasks on each of two nodes, "1" on one
  several = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] != "1"
  local = int(environ["SLURM_LOCALID"]) if several else None
  host = first_host(environ["SLURM_STEP_NODELIST"])
  return ProcessInfo("Slurm", f"{host}:{port}", count, int(environ["SLURM_PROCID"]), local)


def first_host(nodes: str) -> str:
  """`gpu[003-005,9],login1` -> `gpu003`."""
  return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0])


def _gke_tpu(environ) -> ProcessInfo | None:
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if not hosts or "TPU_WORKER_ID" not in environ:
    return None
  return _slices("GKE", hosts.split(","), int(environ["TPU_WORKER_ID"]), environ.get)


def _gce_tpu(environ, metadata) -> ProcessInfo | None:
  workers, index = metadata("worker-network-endpoints"), metadata("agent-worker-number")
  if not workers or index is None:
    return None
  text = metadata("tpu-env") or ""
  pairs = dict(re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", text, re.MULTILINE))
  hosts = [worker.split(":")[-1] for worker in workers.split(",")]  # an address, or name:id:address
  return _slices("Cloud TPU", hosts, int(index), lambda key: environ.get(key) or pairs.get(key))


def _slices(origin, hosts, index, get) -> ProcessInfo:
  """Several TPU slices joined over the data-centre network make one run."""
  slices, this = int(get("MEGASCALE_NUM_SLICES") or 1), int(get("MEGASCALE_SLICE_ID") or 0)
  root = (get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
  return ProcessInfo(origin, f"{root}:{TPU_PORT}", len(hosts) * slices, this * len(hosts) + index)


def tpu_metadata(environ: Mapping[str, str]) -> Callable[[str], str | None] | None:
  """How to ask the metadata server of a Cloud TPU VM; None on any other machine, without asking anyone."""
  platforms = jax.config.jax_platforms
  # JAX sets TPU_SKIP_MDS_QUERY when imported on a machine without TPU chips.
  if platforms and "tpu" not in platforms.split(",") or "TPU_SKIP_MDS_QUERY" in environ:
    return None
  if importlib.util.find_spec("libtpu") is None:
    return None
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

  def ask(key):
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for attempt in range(3):
      try:
        with opener.open(request, timeout=5) as answer:
          return answer.read().decode()
      except urllib.error.HTTPError as error:
        if error.code == 404:
          return None
      except OSError:
        pass
      time.sleep(attempt)
    log.warning("TPU chips, but no metadata server at %s: taken for a single host", server)
    return None

  return ask


_crew: rendezvous.Peers | None = None


def active() -> bool:
  """Whether this process is one of several."""
  return _crew is not None


def initialize(flags: Flags) -> ProcessInfo | None:
  """Joins the other processes of this run, if there are any; None if this is the only one.

  Raises:
    TransientError: some processes did not come in time; it names them.
    UserError: the processes do not agree on who they are.
  """
  global _crew
  place = from_flags(flags)
  if place is None:
    cpu_only = jax.config.jax_platforms == "cpu"
    environ = {k: v for k, v in os.environ.items() if not (cpu_only and k.startswith("TPU_"))}
    place = detect(environ, tpu_metadata(environ))
  if place is None or place.count == 1:
    return None
  say = log.info if place.index == 0 else log.debug
  say("%s: %s, waiting for the others at %s", place.origin, place, place.coordinator)
  crew = rendezvous.join(place, flags.initialization_timeout, flags.heartbeat_timeout)
  jax.distributed.initialize(
    place.coordinator,
    num_processes=place.count,
    process_id=place.index,
    local_device_ids=None if place.local_device is None else [place.local_device],
    cluster_detection_method="deactivate",
    initialization_timeout=max(int(flags.initialization_timeout), 1),
    heartbeat_timeout_seconds=flags.heartbeat_timeout,
  )
  say("all are here: %s", ", ".join(crew.hosts))
  _crew = crew
  barrier("started", flags.initialization_timeout)
  return place


def barrier(name: str, timeout: float = 300.0) -> None:
  """Waits until every process is here; an TransientError names those that are not, after `timeout` seconds."""
  if _crew is not None:
    _crew.barrier(name, timeout)


def check_shared(flag: str, folder: Path) -> None:
  """Makes sure that all processes see in `folder` what process 0 writes there. In a bucket all do.

  Raises:
    UserError: this one does not.
  """
  if _crew is None or bucket.remote(folder):
    return
  mine, seen = _crew.place.index == 0, True
  file = folder / f".shared-{_crew.token}"
  try:
    if mine:
      file.write_text("beit_jax\n")
    barrier("a file for all to see is there")
    seen = mine or _appears(file)
    barrier("all have looked for it", PATIENCE + 300)
  except OSError as error:
    raise UserError(f"{flag}={folder}: nothing can be written there ({error})") from None
  finally:
    if mine:
      with contextlib.suppress(OSError):
        file.unlink()
  if not seen:
    alternative = ", or gs://BUCKET/RUN" if flag == "--workdir" else ""
    raise UserError(
      f"{flag}={folder.absolute()}: {_crew.place} does not see there what process 0 ({_crew.hosts[0]}) writes; "
      f"it must be on a file system that all processes share{alternative}"
    )
  barrier("all see it")  # nothing is begun before


def _appears(file: Path) -> bool:
  """Lists the folder anew each time: a look-up by name that failed may be remembered."""
  end = time.monotonic() + PATIENCE
  while True:
    with contextlib.suppress(OSError):
      if file.name in os.listdir(file.parent):
        return True
    if time.monotonic() > end:
      return False
    time.sleep(0.5)


def tell(text: str, status: int) -> None:
  """Says to all the others why this process is about to end, and with which status: 2 is then theirs too, else 75.

  Nothing is said where another has ended by now: a collective or a save that breaks is the consequence.
  """
  if _crew is not None and not _crew.stopped.wait(rendezvous.GRACE if status < 128 else 0):
    _crew.fail(text, status)


def end_with(error: Exception) -> int:
  """A mistake of the user's or an outage, said here, in log.txt and to the others; returns the exit status."""
  print(f"error: {error}", file=sys.stderr)
  only_file(f"error: {error}")
  status = getattr(error, "status", TransientError.status)
  tell(str(error), status)
  return status


def shutdown() -> None:
  """Leaves the run in good order, after everything is written."""
  global _crew
  if _crew is not None:
    barrier("finished", 1800)
    _crew.leave()
    _crew = None
    jax.distributed.shutdown()


def run(main: Callable[[list[str]], int], argv: list[str]) -> None:
  """`sys.exit(main(argv))` that ends soon where something went wrong.

  A process that fails must not wait in JAX's exit handler, for minutes, for others that wait for it in a collective,
  nor, alone, for the threads that a failed save of Orbax leaves behind.
  """
  try:
    status = main(argv)
    if active() and not _crew.leaving:
      shutdown()
  except Exception as error:
    if not active():
      raise
    if isinstance(error, UserError):  # at the very end, where `main` has returned
      print(f"error: {error}", file=sys.stderr)
    else:
      traceback.print_exc()
    status = getattr(error, "status", 1)
    tell(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", status)
    if _crew.stopped.is_set():  # a thread says who was first, and ends this process with the status of that
      time.sleep(2 * rendezvous.GRACE)
  if not active():
    if status:
      end = threading.Timer(rendezvous.GRACE, os._exit, (status,))
      end.daemon = True
      end.start()
      sys.stdout.flush()
    sys.exit(status)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
