"""Maintenance events and preemptions that Google Cloud announces in the metadata of a machine.

Slurm, Kubernetes, containers and shutdowns send SIGTERM. For a spot VM, or a TPU host before its maintenance, there is
only an announcement at its metadata server, seconds to an hour before; this module turns it into the same SIGTERM.
"""

import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from beit_jax.runtime.logs import log

EVENTS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
POLL_INTERVAL = 5.0  # seconds
MAX_FAILURES = 3  # failed polls in a row before polling stops
PRODUCT = Path("/sys/class/dmi/id/product_name")


def metadata_server(environ: Mapping[str, str]) -> str | None:
  """The address of this machine's metadata server; None on machines that are not Google's, without a request."""
  if "GCE_METADATA_IP" in environ:
    return environ["GCE_METADATA_IP"]
  try:
    return "metadata.google.internal" if PRODUCT.read_text().startswith("Google") else None
  except (OSError, ValueError):
    return None


def read_metadata(server: str, key: str) -> str | None:
  """The value of `instance/<key>`, None where this kind of machine has no such key; raises an OSError on failure."""
  url = f"http://{server}/computeMetadata/v1/instance/{key}"
  request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with opener.open(request, timeout=5) as response:
      return response.read().decode(errors="replace").strip()
  except urllib.error.HTTPError as error:
    error.close()
    if error.code == 404:
      return None
    raise


class MaintenanceEvents:
  """A context in which a new announcement sends SIGTERM to this process.

  An announcement that is there at the start does not count: a run that is started on such a machine uses the time
  that is left.
  """

  def __init__(self, interval: float = POLL_INTERVAL):
    self._interval, self._end = interval, threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "MaintenanceEvents":
    server = metadata_server(os.environ)
    if server is not None:
      self._thread = threading.Thread(target=self._poll, args=(server,), name="events", daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._end.set()
    if self._thread is not None:
      self._thread.join()

  def _poll(self, server: str) -> None:
    known, failures = None, 0
    while failures < MAX_FAILURES:
      try:
        current = {f"{key}={value}" for key, value in EVENTS.items() if read_metadata(server, key) == value}
      except OSError as error:
        failures += 1
        if failures == MAX_FAILURES:
          log.warning("no metadata server at %s (%s): maintenance events will not be seen", server, error)
      else:
        failures = 0
        known = current if known is None else known & current
        if current - known:
          log.warning("the metadata server announces %s", ", ".join(sorted(current - known)))
          os.kill(os.getpid(), signal.SIGTERM)
          return
      if self._end.wait(self._interval):
        return
