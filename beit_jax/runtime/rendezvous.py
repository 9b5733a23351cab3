"""The processes of a run find each other, and notice when one is gone, over TCP connections of their own.

Process 0 listens on the coordinator's port until all have come, then leaves the port to JAX; the connections stay open.
A process that dies closes its own, whatever killed it, and process 0 tells all the others at once who it was. Messages
are JSON, one a line; they carry names and numbers only.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
import uuid

from beit_jax.errors import TransientError, UserError

LOST = TransientError.status  # exit status when another process is gone: the same command may well succeed
GRACE = 3.0  # seconds a process has to end by itself when another has failed
RETRY = 0.5


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
  """Where this process stands among all."""

  origin: str  # who says so
  coordinator: str  # HOST:PORT of process 0
  count: int
  index: int
  local_device: int | None = None  # the one GPU of this process, where several processes share a host

  def __str__(self):
    return f"process {self.index} of {self.count} ({socket.gethostname()})"


def join(place: ProcessInfo, timeout: float, heartbeat: int) -> "Coordinator | Worker":
  """Returns when every process has come.

  Raises:
    TransientError: some have not after `timeout` seconds, which it names, or the port is in use.
    UserError: two have the same number, or another count than process 0.
  """
  crew = (Coordinator if place.index == 0 else Worker)(place, timeout, heartbeat)
  crew.call_roll()
  threading.Thread(target=crew.watch, name="watch", daemon=True).start()
  return crew


def _of_the_others(status: int) -> int:
  """With what the others end when one fails with `status`: a mistake is a mistake whichever of them a launcher asks."""
  return UserError.status if status == UserError.status else LOST


class Channel:
  """A connection that carries messages."""

  def __init__(self, sock: socket.socket, heartbeat: int):
    """Dead connections are found about as fast as by JAX's heartbeat; idle ones stay alive in firewalls."""
    self.socket, self._rest = sock, b""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", heartbeat // 10 + 1)):
      if hasattr(socket, name):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def fileno(self) -> int:
    return self.socket.fileno()

  def send(self, **message) -> None:
    try:
      self.socket.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
      pass  # whoever reads from it notices

  def receive(self) -> list[dict]:
    """Waits for the next messages; ConnectionError when the other is gone or speaks something else."""
    data = self.socket.recv(65536)
    *lines, self._rest = (self._rest + data).split(b"\n")
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
      messages = [None]
    if not (data and len(self._rest) < 2**20 and all(isinstance(message, dict) for message in messages)):
      raise ConnectionError("connection closed by something that is no roll call of this program")
    return messages


class Peers:
  """What process 0 and the others have in common."""

  def __init__(self, place: ProcessInfo, timeout: float, heartbeat: int):
    self.place, self.timeout, self.heartbeat = place, timeout, heartbeat
    self.hosts = [""] * place.count
    self.token = ""  # of this start of the run, the same for all; process 0 makes it up
    self.stopped = threading.Event()  # another process is gone
    self.leaving = False  # or about to: nobody's end is news any more
    self._changed = threading.Condition()
    self._passed: set[str] = set()
    self._calls: dict[str, int] = {}

  def barrier(self, name: str, timeout: float) -> None:
    self._calls[name] = self._calls.get(name, 0) + 1
    key = f"{name} {self._calls[name]}"
    self._arrive(key)
    with self._changed:
      if self._changed.wait_for(lambda: key in self._passed, timeout):
        self._passed.discard(key)
        return
    missing = self._names(self._missing(key))
    raise TransientError(f"{self.place}: after {timeout:g} s at {name!r} there is no sign of {missing}")

  def _names(self, indices) -> str:
    return ", ".join(
      f"process {i}" + (f" ({self.hosts[i]})" if self.hosts[i] else "") for i in sorted(indices)
    )

  def _stop(self, text: str, died: bool, status: int) -> None:
    """Ends this process, which cannot go on alone; where another failed, its own words come first."""
    if self.leaving or self.stopped.is_set():
      return
    self.stopped.set()

    def end():
      message = f"error: {text}; {self.place} ends too"
      if status == LOST:
        message += ". The same command goes on from the last checkpoint."
      if not died:
        time.sleep(GRACE)
      print(message, file=sys.stderr, flush=True)
      if died:
        time.sleep(GRACE)
      os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()


class Coordinator(Peers):
  """Process 0: it counts the others."""

  def __init__(self, *args):
    super().__init__(*args)
    self.hosts[0], self.token = socket.gethostname(), uuid.uuid4().hex
    self._selector = selectors.DefaultSelector()
    self._members: dict[int, Channel] = {}
    self._arrived: dict[str, set[int]] = {}
    self._gone: set[int] = set()  # in good order
    self._alone = threading.Event()

  def call_roll(self) -> None:
    server = self._listen()
    self._selector.register(server, selectors.EVENT_READ)
    end, refused = time.monotonic() + self.timeout, None
    while len(self._members) < self.place.count - 1 and not refused:
      for key, _ in self._selector.select(RETRY):
        if key.fileobj is server:
          sock = server.accept()[0]
          sock.settimeout(10)
          self._selector.register(Channel(sock, self.heartbeat), selectors.EVENT_READ)
        else:
          refused = refused or self._hear(key.fileobj)
      if time.monotonic() > end and not refused:
        here, count = len(self._members) + 1, self.place.count
        refused = TransientError(
          f"{self._names(set(range(1, count)) - self._members.keys())} did not come to {self.place.coordinator} within "
          f"{self.timeout:g} s; {here} of {count} are there. Look at the missing one's own log; is this address that "
          "of process 0 as seen from there, and the port open?"
        )
    self._selector.unregister(server)
    server.close()
    for key in list(self._selector.get_map().values()):
      if refused:
        key.fileobj.send(refused=str(refused), status=refused.status)
      else:
        key.fileobj.send(hosts=self.hosts, token=self.token)
      if refused or key.fileobj not in self._members.values():
        self._close(key.fileobj)
    if refused:
      raise refused

  def _listen(self) -> socket.socket:
    """JAX will listen on the same port, while the connections made here go on."""
    port, both = int(self.place.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    end = time.monotonic() + min(self.timeout, 30)  # an earlier run may be about to end
    while True:
      try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)
      except OSError as error:
        if time.monotonic() > end:
          raise TransientError(
            f"port {port} of {self.hosts[0]}: {error}; is an earlier run alive there?"
          ) from None
        time.sleep(RETRY)

  def _hear(self, channel: Channel) -> UserError | None:
    """Takes a process into the roll; strangers are sent away. Returns why there can be no run, if so."""
    try:
      message = (channel.receive() or [None])[0]
      if message is None:
        return None
      index, count, host = int(message["hello"]), int(message["count"]), str(message["host"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
      for index in [i for i, member in self._members.items() if member is channel]:
        del self._members[index]  # it may come again
      self._close(channel)
      return None
    if count != self.place.count or not 0 < index < count:
      return UserError(
        f"process {index} on {host} counts {count} processes, {self.place} counts {self.place.count}"
      )
    if index in self._members:
      return UserError(f"two processes say they are number {index}: on {self.hosts[index]} and on {host}")
    self._members[index], self.hosts[index] = channel, host
    return None

  def _close(self, channel: Channel) -> None:
    self._selector.unregister(channel)
    channel.socket.close()

  def watch(self) -> None:
    index_of = {channel: index for index, channel in self._members.items()}
    while index_of:
      for key, _ in self._selector.select():
        channel = key.fileobj
        index = index_of[channel]
        try:
          for message in channel.receive():
            self._take(index, channel, message)
        except OSError:
          del index_of[channel]
          self._close(channel)
          if index not in self._gone:
            self._lose(f"process {index} of {self.place.count} ({self.hosts[index]}) died", True, LOST)
    self._alone.set()

  def _take(self, index: int, channel: Channel, message: dict) -> None:
    if "at" in message:
      self._arrive(message["at"], index)
    elif "who" in message:
      channel.send(key=message["who"], missing=sorted(self._missing(message["who"])))
    else:
      self._gone.add(index)
      if "failed" in message:
        name = f"process {index} of {self.place.count} ({self.hosts[index]})"
        self._lose(f"{name} failed: {message['failed']}", False, _of_the_others(message.get("status")))

  def _lose(self, text: str, died: bool, status: int) -> None:
    if not self.leaving and not self.stopped.is_set():
      self._send_all(lost=text, died=died, status=status)
      self._stop(text, died, status)

  def _send_all(self, **message) -> None:
    for channel in list(self._members.values()):
      channel.send(**message)

  def _arrive(self, key: str, index: int = 0) -> None:
    with self._changed:
      here = self._arrived.setdefault(key, set())
      here.add(index)
      if len(here) == self.place.count:
        del self._arrived[key]
        self._passed.add(key)
        self._changed.notify_all()
        self._send_all(passed=key)

  def _missing(self, key: str) -> set[int]:
    return set(range(self.place.count)) - self._arrived.get(key, set())

  def fail(self, text: str, status: int) -> None:
    """The others go first: JAX aborts them with a stack dump when process 0, its coordinator, is gone."""
    self.leaving = True
    self._send_all(lost=f"{self.place} failed: {text}", died=False, status=_of_the_others(status))
    self._alone.wait(GRACE + 2)

  def leave(self) -> None:
    self.leaving = True
    self._send_all(bye=True)


class Worker(Peers):
  """Every process but number 0."""

  def call_roll(self) -> None:
    host, port = self.place.coordinator.rsplit(":", 1)
    end, why, self._inbox = time.monotonic() + self.timeout, "", []
    while time.monotonic() < end:
      try:
        with contextlib.ExitStack() as stack:
          sock = stack.enter_context(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
          self._channel = Channel(sock, self.heartbeat)
          self._channel.send(hello=self.place.index, count=self.place.count, host=socket.gethostname())
          sock.settimeout(self.timeout + 30)  # the clock of process 0 may have started later
          while not self._inbox:
            self._inbox = self._channel.receive()
          answer = self._inbox.pop(0)
          if "refused" in answer:
            raise (TransientError if answer["status"] == LOST else UserError)(answer["refused"])
          self.hosts, self.token = answer["hosts"], answer["token"]
          sock.settimeout(None)
          stack.pop_all()
        return
      except (OSError, KeyError) as error:
        why = str(error)
        time.sleep(RETRY)
    raise TransientError(
      f"process 0 did not answer {self.place} at {self.place.coordinator} within {self.timeout:g} s: {why}. Is it "
      "running, is the address its own as seen from here, is the port open?"
    )

  def watch(self) -> None:
    try:
      while True:
        for message in self._inbox:
          self._take(message)
        self._inbox = self._channel.receive()
    except OSError:
      self._channel.socket.close()
      self._stop(f"process 0 of {self.place.count} ({self.hosts[0]}) died", True, LOST)

  def _take(self, message: dict) -> None:
    if "passed" in message:
      with self._changed:
        self._passed.add(message["passed"])
        self._changed.notify_all()
    elif "missing" in message:
      with self._changed:
        self._answer = message
        self._changed.notify_all()
    elif "lost" in message:
      self._stop(message["lost"], message["died"], message["status"])
    elif "bye" in message:
      self.leaving = True

  def _arrive(self, key: str) -> None:
    self._channel.send(at=key)

  def _missing(self, key: str) -> set[int]:
    self._answer = {}
    self._channel.send(who=key)
    with self._changed:
      self._changed.wait_for(lambda: self._answer.get("key") == key, 10)
    return set(self._answer.get("missing", [0]))

  def fail(self, text: str, status: int) -> None:
    self.leaving = True
    self._channel.send(failed=text, status=status)

  def leave(self) -> None:
    self.leaving = True
    self._channel.send(bye=True)
    with contextlib.suppress(OSError):
      self._channel.socket.shutdown(socket.SHUT_WR)
