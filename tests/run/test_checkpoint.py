"""Saving while training goes on: only the main thread launches programs, and only old checkpoints are deleted."""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import pxla  # no public function sees every launch of a program
from jax.experimental import multihost_utils
from orbax.checkpoint._src.multihost import multihost as orbax_multihost

from beit_jax.run import checkpoint
from beit_jax.run.state import TrainState

# What launches a program on the devices, and the barriers and broadcasts of Orbax and JAX that do so.
LAUNCHES = (
  (pxla.ExecuteReplicated, "__call__"),
  (multihost_utils, "sync_global_devices"),
  (multihost_utils, "broadcast_one_to_all"),
  (multihost_utils, "process_allgather"),
  (orbax_multihost, "sync_global_processes"),
  (orbax_multihost, "broadcast_one_to_all"),
)


def record_launches(patch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
  """A list that grows with (function, its first text argument, thread) at each call that launches a program."""
  calls: list[tuple[str, str, str]] = []

  def recorder(name, original):
    def call(*args, **options):
      text = next((arg for arg in args if isinstance(arg, str)), getattr(args[0], "name", ""))
      calls.append((name, text, threading.current_thread().name))
      return original(*args, **options)

    return call

  for owner, name in LAUNCHES:
    patch.setattr(owner, name, recorder(name, getattr(owner, name)))
  return calls


def _state(value: float) -> TrainState:
  return TrainState(jnp.int32(value), {"w": jnp.full((8, 4), value)}, {}, (jnp.zeros(3),))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_the_main_thread_launches_programs(asynchronous, tmp_path, monkeypatch):
  """Processes that launch programs in different orders hang; a thread of each would launch them at any moment."""
  jax.clear_caches()  # so that the first launch of each program is seen
  calls = record_launches(monkeypatch)
  saver = checkpoint.Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
  for step in range(1, 6):
    saver.save(step, _state(step), {})
  assert saver.wait() and checkpoint.steps(saver.root) == [5]
  saver.close()
  names = {name for name, _, _ in calls}
  assert {"__call__", "sync_global_processes"} <= names  # the recorder sees both kinds
  assert [call for call in calls if call[2] != threading.main_thread().name] == []
