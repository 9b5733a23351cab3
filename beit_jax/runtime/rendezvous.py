"""Rendezvous of the processes of one run, over TCP connections that stay open while the run lasts.

Process 0 runs a hub on the coordinator's port. When every process, process 0 included, has connected to it, the port is
left to JAX. The operating system closes the connection of a process that dies, whatever killed it, and the hub then
notifies all others. A message is one line of JSON that holds names and numbers only.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from beit_jax.errors import TransientError, UserError

LOST_STATUS = (
  TransientError.status
)  # exit status when another process is gone: the same command may succeed later
GRACE = 3.0  # seconds that a process has to end by itself when another has failed
REFUSAL_SECONDS = 5  # after a refusal, for the others to connect and hear of it
RETRY = 0.1  # seconds between two attempts to connect
MAX_MESSAGE = 2**20  # bytes
END = "end of the run"  # the barrier after which no process is missed


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
  """The identity of this process within the run.

  Attributes:
    origin: where the information comes from, for the log.
    coordinator: HOST:PORT of process 0.
    count: number of processes.
    index: number of this process.
    local_device: the only GPU of this process, where several processes share a host.
  """

  origin: str
  coordinator: str
  count: int
  index: int
  local_device: int | None = None

  def __str__(self) -> str:
    return f"process {self.index} of {self.count} ({socket.gethostname()})"


def _names(indices: Iterable[int], hosts: Sequence[str]) -> str:
  return ", ".join(f"process {i} ({hosts[i]})" if hosts[i] else f"process {i}" for i in sorted(indices))


class _Channel:
  """A TCP connection that carries JSON objects."""

  def __init__(self, sock: socket.socket, heartbeat: int):
    self.socket, self._file, self._lock = sock, sock.makefile("rb"), threading.Lock()
    # A host that vanishes with its network is found in a third of JAX's timeout. JAX sends a heartbeat every half of
    # it, so that it can find the host after the other half, and then aborts this process with a stack dump.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(heartbeat // 12, 1)  # seconds between probes
    options = {
      "TCP_KEEPIDLE": every,
      "TCP_KEEPINTVL": every,
      "TCP_KEEPCNT": 3,
      "TCP_USER_TIMEOUT": 4000 * every,
    }
    for name, value in options.items():
      if hasattr(socket, name):  # depends on the operating system
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, **message: Any) -> None:
    """Sends a message; `receive` is where a broken connection is reported."""
    with self._lock, contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> dict[str, Any]:
    """Waits for the next message; raises an OSError when the connection is closed or carries anything else."""
    line = self._file.readline(MAX_MESSAGE)
    try:
      message = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
      message = None
    if not isinstance(message, dict):
      raise ConnectionError("the connection was closed, or the other end is not a process of this program")
    return message

  def close(self) -> None:
    self._file.close()
    self.socket.close()


class _Hub:
  """What process 0 runs for all processes: registration, barriers, and notifications. One thread a connection."""

  def __init__(self, info: ProcessInfo, timeout: float, heartbeat: int):
    self._info, self._timeout, self._heartbeat = info, timeout, heartbeat
    self._hosts = [""] * info.count
    self._channels: dict[int, _Channel] = {}
    self._changed = threading.Condition()
    self._started = False  # every process has connected, and the run has started
    self._refusal: UserError | None = None
    self._num_refused, self._refused_at = 0, math.inf
    self._arrived: dict[str, set[int]] = collections.defaultdict(set)
    self._ending = False  # by a failure or as planned; the end of a process is no longer reported
    server = self._listen()
    threading.Thread(target=self._accept, args=(server,), name="accept", daemon=True).start()

  def _listen(self) -> socket.socket:
    """Listens on the port that JAX will use after the rendezvous; connections made before stay open."""
    port, both = int(self._info.coordinator.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end = time.monotonic() + min(self._timeout, 30)  # an earlier run may be about to end
    while True:
      try:
        return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)
      except OSError as error:
        if time.monotonic() > end:
          text = f"port {port} of {socket.gethostname()}: {error}; check that no earlier run is alive there"
          raise TransientError(text) from None
      time.sleep(RETRY)

  def _accept(self, server: socket.socket) -> None:
    end = time.monotonic() + self._timeout
    with server:
      server.settimeout(RETRY)
      while self._waiting() and time.monotonic() < min(end, self._refused_at + REFUSAL_SECONDS):
        with contextlib.suppress(OSError):
          channel = _Channel(server.accept()[0], self._heartbeat)
          threading.Thread(target=self._serve, args=(channel,), name="serve", daemon=True).start()
    with self._changed:
      missing, count = self._missing_from(self._channels), self._info.count
      if missing and not self._refusal:
        self._refusal = TransientError(
          f"{_names(missing, self._hosts)} did not connect to {self._info.coordinator} within {self._timeout:g} s; "
          f"{count - len(missing)} of {count} are connected. See the log of the missing process; check that this "
          "address is the one of process 0 as seen from there, and that the port is open"
        )
      if self._refusal:
        self._broadcast(refused=str(self._refusal), status=self._refusal.status)
      else:
        self._started = True
        self._broadcast(hosts=self._hosts, start_id=uuid.uuid4().hex)

  def _waiting(self) -> bool:
    """Whether processes have not connected yet; all of them shall hear of a refusal, process 0 last."""
    return 0 not in self._channels or len(self._channels) + self._num_refused < self._info.count

  def _serve(self, channel: _Channel) -> None:
    """Registers the process at the other end and handles its messages until the connection ends."""
    channel.socket.settimeout(10)
    index = None
    try:
      index = self._register(channel, channel.receive())
      channel.socket.settimeout(None)
      while True:
        self._handle(index, channel.receive())
    except (OSError, LookupError, TypeError, ValueError):
      channel.close()
    if index is not None:
      with self._changed:
        del self._channels[index]  # until all have connected, the process may connect once more
        self._changed.notify_all()
        if self._started:
          self._report(f"{_names([index], self._hosts)} died", True, LOST_STATUS)

  def _register(self, channel: _Channel, message: dict[str, Any]) -> int:
    index, count, host = int(message["hello"]), int(message["count"]), str(message["host"])
    with self._changed:
      if count != self._info.count or not 0 <= index < count:
        text = f"process {index} on {host} counts {count} processes, {self._info} counts {self._info.count}"
        self._refusal = UserError(text)
      elif index in self._channels:
        text = f"two processes have the number {index}: one on {self._hosts[index]} and one on {host}"
        self._refusal = UserError(text)
      if self._refusal:
        self._num_refused += 1
        self._refused_at = min(self._refused_at, time.monotonic())
        channel.send(refused=str(self._refusal), status=self._refusal.status)
        raise ConnectionError("refused")
      self._channels[index], self._hosts[index] = channel, host
    return index

  def _handle(self, index: int, message: dict[str, Any]) -> None:
    with self._changed:
      match message:
        case {"arrived": key}:
          self._arrived[key].add(index)
          if not self._missing_from(self._arrived[key]):
            del self._arrived[key]
            self._ending = self._ending or key == END
            self._broadcast(released=key)
        case {"query": key}:
          missing = self._missing_from(self._arrived[key])
          self._channels[index].send(barrier=key, missing=sorted(missing))
        case {"failed": text, "status": status}:
          # A launcher must see a mistake of the user's whichever process it asks.
          others = UserError.status if status == UserError.status else LOST_STATUS
          self._report(f"{_names([index], self._hosts)} failed: {text}", False, others)

  def _missing_from(self, indices: Iterable[int]) -> set[int]:
    return set(range(self._info.count)) - set(indices)

  def _report(self, reason: str, died: bool, status: int) -> None:
    if not self._ending:
      self._ending = True
      self._broadcast(lost=reason, died=died, status=status)

  def _broadcast(self, **message: Any) -> None:
    for index in sorted(self._channels, reverse=True):  # process 0 last: it may end the hub
      self._channels[index].send(**message)

  def wait_for_others(self) -> None:
    """Lets the others end first: JAX aborts them with a stack dump when process 0, its coordinator, is gone."""
    with self._changed:
      self._changed.wait_for(lambda: self._channels.keys() <= {0}, GRACE + 2)


class Peers:
  """The connection of this process to the others.

  Attributes:
    info: the identity of this process.
    hosts: name of the host of each process.
    start_id: random identifier of this start of the run, the same on all processes.
    stopped: set when another process is gone; this one then ends soon.
    leaving: whether this process is about to end, so that the end of others is no longer reported.
  """

  def __init__(self, info: ProcessInfo, timeout: float, heartbeat: int):
    """Connects to all other processes; returns when all have connected.

    Args:
      info: the identity of this process.
      timeout: seconds to wait for the others.
      heartbeat: seconds after which a silent connection counts as broken.

    Raises:
      TransientError: some processes did not connect in time, or the port is in use.
      UserError: two processes have the same number, or the processes disagree on their count.
    """
    self.info, self.stopped, self.leaving = info, threading.Event(), False
    self._hub = _Hub(info, timeout, heartbeat) if info.index == 0 else None
    self._changed = threading.Condition()
    self._released: set[str] = set()  # barriers that all processes have reached
    self._missing: dict[str, list[int]] = {}  # barriers that the hub was asked about -> missing processes
    self._channel, welcome = self._connect(timeout, heartbeat)
    self.hosts, self.start_id = welcome["hosts"], welcome["start_id"]
    threading.Thread(target=self._listen, name="listen", daemon=True).start()

  def _connect(self, timeout: float, heartbeat: int) -> tuple[_Channel, dict[str, Any]]:
    host, _, port = self.info.coordinator.rpartition(":")
    address = ("localhost" if self._hub else host.strip("[]"), int(port))
    end, reason = time.monotonic() + timeout, ""
    while time.monotonic() < end:
      try:
        with contextlib.ExitStack() as stack:
          sock = socket.create_connection(address, timeout=5)
          channel = stack.enter_context(contextlib.closing(_Channel(sock, heartbeat)))
          channel.send(hello=self.info.index, count=self.info.count, host=socket.gethostname())
          sock.settimeout(timeout + 30)  # process 0 may have started to wait later than this one
          answer = channel.receive()
          if "refused" in answer:
            error = TransientError if answer["status"] == LOST_STATUS else UserError
            raise error(answer["refused"])
          sock.settimeout(None)
          stack.pop_all()  # keeps the connection open
          return channel, answer
      except OSError as error:
        reason = str(error)
        time.sleep(RETRY)
    raise TransientError(
      f"process 0 did not answer {self.info} at {self.info.coordinator} within {timeout:g} s: {reason}. Check that "
      "it is running, that this is its address as seen from here, and that the port is open"
    )

  def _listen(self) -> None:
    try:
      while True:
        self._handle(self._channel.receive())
    except OSError:
      self._channel.close()
      self._stop(f"{_names([0], self.hosts)} died", True, LOST_STATUS)

  def _handle(self, message: dict[str, Any]) -> None:
    with self._changed:
      match message:
        case {"released": key}:
          self._released.add(key)
          self.leaving = self.leaving or key == END
        case {"barrier": key, "missing": missing}:
          self._missing[key] = missing
        case {"lost": reason, "died": died, "status": status}:
          self._stop(reason, died, status)
      self._changed.notify_all()

  def _stop(self, reason: str, died: bool, status: int) -> None:
    """Ends this process, which cannot continue alone."""
    if self.leaving or self.stopped.is_set():
      return
    self.stopped.set()
    message = f"error: {reason}; {self.info} ends too"
    if status == LOST_STATUS:
      message += ". The same command resumes from the last checkpoint."

    def end() -> None:
      if not died:
        time.sleep(GRACE)  # the message of the failed process comes first, or this process ends by itself
      print(message, file=sys.stderr, flush=True)
      if died:
        time.sleep(GRACE)
      os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()

  def barrier(self, name: str, timeout: float) -> None:
    """Waits until all processes have called this; raises a TransientError that names the missing ones."""
    self._channel.send(arrived=name)
    with self._changed:
      if self._changed.wait_for(lambda: name in self._released, timeout):
        self._released.discard(name)  # the same name may be used again
        return
      self._channel.send(query=name)
      self._changed.wait_for(lambda: name in self._missing, 10)
    missing = _names(self._missing.get(name, [0]), self.hosts)
    raise TransientError(f"{self.info}: after {timeout:g} s at {name!r} there is no sign of {missing}")

  def fail(self, text: str, status: int) -> None:
    """Notifies the others that this process ends with an error."""
    self.leaving = True
    self._channel.send(failed=text, status=status)
    if self._hub:
      self._hub.wait_for_others()

  def leave(self, timeout: float) -> None:
    """Waits until all processes call this, and disconnects."""
    self.barrier(END, timeout)
    with contextlib.suppress(OSError):
      self._channel.socket.shutdown(socket.SHUT_WR)
