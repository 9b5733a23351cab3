"""The lock of a run folder: one run writes there at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from beit_jax.errors import UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.runtime.rendezvous import LOST_STATUS

LOCK = "lock.json"
RENEW_INTERVAL = 10.0  # seconds between two renewals of a lease
LEASE = 45.0  # seconds after which a lease that is not renewed expires


def holder(workdir: Path) -> dict[str, Any]:
  """The process that wrote the lock file last: host, pid, started, command; empty when there is none."""
  try:
    return _parse((workdir / LOCK).read_text())
  except (OSError, ValueError):
    return {}


def _parse(text: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def held(workdir: Path) -> bool:
  """Whether a living process holds the lock: one of this machine, or in a bucket one of any machine."""
  if bucket.remote(workdir):
    return bucket.age(workdir / LOCK) < LEASE and _alive(holder(workdir)) is not False
  try:
    with (workdir / LOCK).open("r+") as file:
      return not acquire(file)
  except OSError:
    return False


def acquire(file: TextIO) -> bool:
  """Locks an open file, if no other process has; raises an OSError on file systems without locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


@contextlib.contextmanager
def exclusive_lock(workdir: Path) -> Iterator[None]:
  """Holds workdir/lock.json, on process 0. The kernel releases it when the process ends, however it ends.

  On file systems without locks (some network mounts) there is a warning instead. In a bucket the file itself is the
  lock, a lease that is renewed.

  Raises:
    UserError: another process holds the lock; the message names it.
  """
  if jax.process_index() != 0:
    yield
  elif bucket.remote(workdir):
    with _lease(workdir):
      yield
  else:
    with (workdir / LOCK).open("a+") as file:
      previous = holder(workdir)
      try:
        if not acquire(file):
          raise _refusal(workdir, previous)
      except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, str(error))
        log.warning("%s cannot be locked (%s): make sure that no other run writes there", workdir, reason)
      _log_takeover(previous)
      file.truncate(0)
      file.write(json.dumps(_this_process()) + "\n")
      file.flush()
      try:
        yield
      finally:
        with contextlib.suppress(OSError):
          file.truncate(0)  # marks a run that ended by itself: finished, failed or stopped by a signal


def _this_process() -> dict[str, Any]:
  started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return {"host": platform.node(), "pid": os.getpid(), "started": started, "command": " ".join(sys.argv)}


def _refusal(workdir: Path, other: dict[str, Any]) -> UserError:
  return UserError(
    f"{workdir}: another run writes here: process {other.get('pid')} on {other.get('host')}, since "
    f"{other.get('started')} ({other.get('command')}); wait for it, stop it, or use another --workdir"
  )


def _log_takeover(previous: dict[str, Any]) -> None:
  if previous:
    text = "process %s on %s ended without releasing its lock, which is now taken over"
    log.info(text, previous.get("pid"), previous.get("host"))


def _machine() -> str:
  """Identifies where process numbers are comparable: boot and process namespace; empty where this is unknown."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _alive(process: dict[str, Any]) -> bool | None:
  """Whether the process that holds a lock is alive; None when it runs on another machine."""
  if not _machine() or process.get("machine") != _machine():
    return None
  try:
    os.kill(int(process["pid"]), 0)
  except (ProcessLookupError, LookupError, ValueError):
    return False
  except PermissionError:
    pass
  return True


@contextlib.contextmanager
def _lease(workdir: Path) -> Iterator[None]:
  """Holds lock.json in a bucket: written on the condition that no other process has, and renewed.

  A lease that is not renewed for `LEASE` seconds is taken over; that of a dead process of this machine at once. A
  process that finds its own lease taken over, after a long pause, exits with status 75.
  """
  path, text = workdir / LOCK, json.dumps(_this_process() | {"machine": _machine()}) + "\n"
  generation = _write(path, text, _await_expiry(workdir))
  if not generation:
    raise _refusal(workdir, holder(workdir))
  stop = threading.Event()

  def renew() -> None:
    nonlocal generation
    while not stop.wait(RENEW_INTERVAL):
      try:
        generation = _write(path, text, generation)
      except Exception as error:  # an outage: the next renewal may succeed
        log.debug("%s: %s", path, error)
      if not generation:
        log.error("%s was taken over by process %s; this one ends", path, holder(workdir).get("pid"))
        logging.shutdown()
        os._exit(LOST_STATUS)

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    with contextlib.suppress(Exception):  # `bucket.close` tries again, and reports a failure
      bucket.push()  # while no other process writes
    stop.set()
    thread.join()
    with contextlib.suppress(Exception):  # the lease expires by itself
      bucket.delete(path, generation)


def _await_expiry(workdir: Path) -> int:
  """Waits until the lock is free or its lease has expired; the generation of lock.json to replace, 0 for none.

  A living holder on another machine has `LEASE` seconds to end: a cluster may start the replacement of a run that still
  saves.

  Raises:
    UserError: the holder runs on this machine, or goes on renewing its lease.
  """
  text, generation = bucket.read(workdir / LOCK)
  previous = _parse(text)
  alive = generation and _alive(previous)
  if alive:
    raise _refusal(workdir, previous)
  if generation and alive is None:
    text = "%s: locked by process %s on %s; waiting %g s for it to end or its lease to expire"
    log.info(text, workdir, previous.get("pid"), previous.get("host"), LEASE)
    began = renewed = time.monotonic()
    while time.monotonic() - renewed < LEASE:
      time.sleep(min(1.0, RENEW_INTERVAL))
      now = bucket.read(workdir / LOCK)[1]
      if not now:
        return 0
      if now != generation:
        generation, renewed = now, time.monotonic()
        if renewed - began > LEASE:
          raise _refusal(workdir, previous)
  if generation:
    _log_takeover(previous)
  return generation


def _write(path: Path, text: str, generation: int) -> int:
  """Replaces one generation of the lock: the new generation, 0 when another process was faster."""
  new = bucket.write(path, text, generation)
  if new:
    return new
  found, now = bucket.read(path)
  return now if found == text else 0  # a repeated request may have succeeded the first time
