"""Google's clouds say in the metadata of a machine, and in no signal, that they are about to take it away.

Slurm, Kubernetes, containers and shutdowns send SIGTERM. A spot VM or a TPU host about to be maintained is told by its
metadata server (`instance/preempted`, `instance/maintenance-event`), seconds to an hour before; here that becomes the
same SIGTERM.
"""

import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from beit_jax.runtime.logs import log

SIGNS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
EVERY, FAILURES = (
  5.0,
  3,
)  # seconds between two looks; looks in a row without an answer before nobody is asked any more
PRODUCT = Path("/sys/class/dmi/id/product_name")


def server(environ: Mapping[str, str]) -> str | None:
  """Address of this machine's metadata server; None, without asking anyone, on machines that are not Google's."""
  if "GCE_METADATA_IP" in environ:
    return environ["GCE_METADATA_IP"]
  try:
    return "metadata.google.internal" if PRODUCT.read_text().startswith("Google") else None
  except (OSError, ValueError):
    return None


class Notices:
  """A context in which a notice that comes is a SIGTERM to this process. One that was there at the start is none:
  a run that is started again on a machine with an announced end shall use the time that is left."""

  def __init__(self, every: float = EVERY):
    self._every, self._end = every, threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Notices":
    address = server(os.environ)
    if address is not None:
      self._thread = threading.Thread(target=self._watch, args=(address,), name="notices", daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._end.set()
    if self._thread is not None:
      self._thread.join()

  def _watch(self, address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    known, failures = None, 0
    while True:
      try:
        now = {key for key in SIGNS if self._ask(opener, address, key) == SIGNS[key]}
      except OSError as error:
        failures += 1
        if failures == FAILURES:
          log.warning("no metadata server at %s (%s): nobody will say that this machine ends", address, error)
          return
      else:
        failures = 0
        new = now - (now if known is None else known)
        if new:
          log.warning(
            "notice of the metadata server: %s", ", ".join(f"{key}={SIGNS[key]}" for key in sorted(new))
          )
          os.kill(os.getpid(), signal.SIGTERM)
          return
        known = now
      if self._end.wait(self._every):
        return

  def _ask(self, opener: urllib.request.OpenerDirector, address: str, key: str) -> str:
    url = f"http://{address}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
      with opener.open(request, timeout=3) as answer:
        return answer.read(1000).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
      error.close()
      if error.code == 404:  # a key that this kind of machine does not have
        return ""
      raise
