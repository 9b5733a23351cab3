"""One writer a run folder."""

import contextlib
import datetime
import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax.errors import UserError
from beit_jax.logs import log

LOCK = "lock.json"


def holder(workdir: Path) -> dict:
  """What the lock file says of the process that last wrote here: host, pid, started, command; {} for nothing."""
  try:
    value = json.loads((workdir / LOCK).read_text())
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def held(workdir: Path) -> bool:
  """Whether a living process of this machine holds the lock."""
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
def only_writer(workdir: Path) -> Iterator[None]:
  """Holds workdir/lock.json; the kernel lets go of it when the process ends, however it ends.

  On file systems without locks (some network mounts, buckets) nothing is held, with a warning.

  Raises:
    UserError: another process holds it; names that.
  """
  if jax.process_index() != 0:
    yield
    return
  with contextlib.ExitStack() as stack:
    file = stack.enter_context((workdir / LOCK).open("a+"))
    before = holder(workdir)
    try:
      import fcntl

      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"{workdir}: another run writes here: process {before.get('pid')} on {before.get('host')}, since "
        f"{before.get('started')} ({before.get('command')}); wait for it, stop it, or take another --workdir"
      ) from None
    except (ImportError, OSError) as error:
      reason = errno.errorcode.get(getattr(error, "errno", None) or 0, str(error))
      log.warning("%s cannot be locked (%s): make sure that no other run writes there", workdir, reason)
    if before:
      log.info(
        "the lock of process %s on %s was left behind; taken over", before.get("pid"), before.get("host")
      )
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = dict(host=platform.node(), pid=os.getpid(), started=started, command=" ".join(sys.argv))
    file.truncate(0)
    file.write(json.dumps(mine) + "\n")
    file.flush()
    yield
    file.truncate(0)  # left in good order
