"""Records which thread launches which program on the devices.

python -m tests.run.launches RECORD.json FLAGS...     # `beit_jax.main FLAGS`; the calls go to the file
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from jax._src import pjit  # no public function sees every launch
from jax._src.interpreters import pxla
from jax.experimental import multihost_utils
from orbax.checkpoint._src.multihost import multihost as orbax_multihost

# The launch itself, and the barriers and broadcasts that launch a program when there are several processes.
LAUNCHES = (
  (pxla.ExecuteReplicated, "__call__"),
  (multihost_utils, "sync_global_devices"),
  (multihost_utils, "broadcast_one_to_all"),
  (multihost_utils, "process_allgather"),
  (orbax_multihost, "sync_global_processes"),
  (orbax_multihost, "broadcast_one_to_all"),
)


def record(patch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
  """Returns a list that grows with (program or function and its name, thread) at each launch."""
  calls: list[tuple[str, str]] = []

  def recorder(function: str, original: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
      name = args[0].name if function == "__call__" else next((a for a in args if isinstance(a, str)), "")
      calls.append((f"{function} {name}", threading.current_thread().name))
      return original(*args, **options)

    return call

  for owner, function in LAUNCHES:
    patch.setattr(owner, function, recorder(function, getattr(owner, function)))
  # Without data for its fast path, which is in C++, `jit` launches every program through Python.
  patch.setattr(pjit, "_get_fastpath_data", lambda *_, **__: None)
  return calls


def main(argv: list[str]) -> int:
  from beit_jax import main as main_lib

  with pytest.MonkeyPatch.context() as patch:
    calls = record(patch)
    status = main_lib.main(argv[1:])
  Path(argv[0]).write_text(json.dumps(calls))
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
