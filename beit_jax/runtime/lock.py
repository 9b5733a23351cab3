"""One writer a run folder."""

import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax.errors import UserError
from beit_jax.runtime import bucket, rendezvous
from beit_jax.runtime.logs import log

LOCK = "lock.json"
BEAT = 10.0  # seconds between two signs of life of who holds the lock in a bucket
LEASE = 45.0  # seconds without one after which it is free


def holder(workdir: Path) -> dict:
  """What the lock file says of the process that last wrote here: host, pid, started, command; {} for nothing."""
  try:
    return _parse((workdir / LOCK).read_text())
  except (OSError, ValueError):
    return {}


def _parse(text: str) -> dict:
  try:
    value = json.loads(text)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def held(workdir: Path) -> bool:
  """Whether a living process of this machine, or of any machine in a bucket, holds the lock."""
  if bucket.remote(workdir):
    return bucket.age(workdir / LOCK) < LEASE and _alive(holder(workdir)) is not False
  try:
    import fcntl

    with (workdir / LOCK).open("rb+") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except (ImportError, OSError):
    return False
  return False


@contextlib.contextmanager
def exclusive_lock(workdir: Path) -> Iterator[None]:
  """Holds workdir/lock.json; the kernel lets go of it when the process ends, however it ends.

  On file systems without locks (some network mounts) nothing is held, with a warning. In a bucket the file itself is
  the lock: see `_lease`.

  Raises:
    UserError: another process holds it; names that.
  """
  if jax.process_index() != 0:
    yield
    return
  if bucket.remote(workdir):
    with _lease(workdir):
      yield
    return
  with contextlib.ExitStack() as stack:
    file = stack.enter_context((workdir / LOCK).open("a+"))
    before = holder(workdir)
    try:
      import fcntl

      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _refusal(workdir, before) from None
    except (ImportError, OSError) as error:
      reason = errno.errorcode.get(getattr(error, "errno", None) or 0, str(error))
      log.warning("%s cannot be locked (%s): make sure that no other run writes there", workdir, reason)
    _say_left_behind(before)
    file.truncate(0)
    file.write(json.dumps(_me()) + "\n")
    file.flush()
    yield
    file.truncate(0)  # left in good order


def _me() -> dict:
  started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return dict(host=platform.node(), pid=os.getpid(), started=started, command=" ".join(sys.argv))


def _refusal(workdir: Path, before: dict) -> UserError:
  return UserError(
    f"{workdir}: another run writes here: process {before.get('pid')} on {before.get('host')}, since "
    f"{before.get('started')} ({before.get('command')}); wait for it, stop it, or take another --workdir"
  )


def _say_left_behind(before: dict) -> None:
  if before:
    log.info(
      "the lock of process %s on %s was left behind; taken over", before.get("pid"), before.get("host")
    )


def _machine() -> str:
  """Where process numbers mean the same: the boot of a kernel, and a namespace in it; "" where nobody says."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _alive(before: dict) -> bool | None:
  """Whether the process that a lock names lives; None where that cannot be seen from here."""
  if not _machine() or before.get("machine") != _machine():
    return None
  try:
    os.kill(int(before["pid"]), 0)
  except (ProcessLookupError, KeyError, ValueError):
    return False
  except PermissionError:
    pass
  return True


@contextlib.contextmanager
def _lease(workdir: Path) -> Iterator[None]:
  """Holds lock.json in a bucket: written on the condition that nobody else has, and again every `BEAT` seconds.

  A lock without such a sign of life for `LEASE` seconds, watched from here, is taken over; that of a dead process of
  this machine at once. A living one on another machine has as long to end: a cluster may start the replacement while
  it still saves. Who finds that his own was taken over, after a long pause, ends with status 75.
  """
  path = workdir / LOCK
  text, generation = bucket.read(path)
  before = _parse(text)
  if generation and _alive(before) is not False:
    generation = _watch(workdir, before, generation)
  _say_left_behind(before if generation else {})
  mine = json.dumps(_me() | {"machine": _machine()}) + "\n"
  generation = _claim(path, mine, generation)
  if not generation:
    raise _refusal(workdir, holder(workdir))
  held, stop = [generation], threading.Event()

  def beat():
    while not stop.wait(BEAT):
      try:
        held[0] = _claim(path, mine, held[0])
      except Exception as error:  # an outage; tried again
        log.debug("%s: %s", path, error)
      if not held[0]:
        log.error("%s was taken over by process %s; this one ends", path, holder(workdir).get("pid"))
        logging.shutdown()
        os._exit(rendezvous.LOST)

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    with contextlib.suppress(
      Exception
    ):  # while nobody else writes; tried again, and said, at the end of the process
      bucket.push()
    stop.set()
    thread.join()
    with contextlib.suppress(Exception):  # it will be seen to be dead
      bucket.delete(path, held[0])


def _watch(workdir: Path, before: dict, generation: int) -> int:
  """Waits for the holder to end. The generation to replace, or 0 where it has let go by itself.

  Raises:
    UserError: the holder is of this machine, or gives signs of life for longer than `LEASE`.
  """
  if _alive(before):
    raise _refusal(workdir, before)
  log.info(
    "%s: process %s on %s has the lock; looking for %g s whether it lives, or ends",
    workdir,
    before.get("pid"),
    before.get("host"),
    LEASE,
  )
  began = last = time.monotonic()
  while time.monotonic() - last < LEASE:
    time.sleep(min(1.0, BEAT))
    now = bucket.read(workdir / LOCK)[1]
    if not now:
      return 0
    if now != generation:
      generation, last = now, time.monotonic()
      if last - began > LEASE:
        raise _refusal(workdir, before)
  return generation


def _claim(path: Path, mine: str, generation: int) -> int:
  """The new generation; 0 where another writer has it. A repeated request may have been answered already."""
  text, now = (mine, 0) if (new := bucket.write(path, mine, generation)) else bucket.read(path)
  return new or (now if text == mine else 0)
