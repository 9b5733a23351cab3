"""8 fake CPU devices, full float32 products, programs compiled quickly and once; fixtures for all tests.

Several workers run the tests (pytest-xdist): this file is read by the process that starts them, whose environment they
inherit, then by each of them.

BEIT_JAX_TEST_GPU=1 leaves the platform alone, on a machine with a GPU (docs/benchmarks.md).
"""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

# Eight devices on two cores: their collectives block threads of XLA's pools, whose size NPROC sets, and XLA ends the
# process when a participant is 40 s late, which a busy machine can bring about.
TIMEOUTS = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
  " --xla_cpu_collective_call_terminate_timeout_seconds=900"
)
if TIMEOUTS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {TIMEOUTS}".strip()
os.environ.setdefault("NPROC", "64")

ON_GPU = os.environ.get("BEIT_JAX_TEST_GPU") == "1"
if not ON_GPU:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")

# XLA's optimisations take two thirds of the time of most tests, whose programs then run for milliseconds.
QUICK_COMPILES = "JAX_DISABLE_MOST_OPTIMIZATIONS"  # subprocesses read it
# Files that compare numbers with other implementations: compiled as for a user.
OPTIMISED = {
  "test_augment",
  "test_peers",
  "test_segmentation_weights",
  "test_full_size",
  "test_kills",
  "test_models",
  "test_optim",
  "test_segmentation_models",
  "test_transfer",
}

# One compilation cache for all workers and subprocesses: most tests run the same few programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="beit_jax_cache_")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _optimisations(request):
  """Off but for OPTIMISED; what was compiled the other way is forgotten."""
  quick = not ON_GPU and request.module.__name__.rpartition(".")[2] not in OPTIMISED
  if quick != (os.environ.get(QUICK_COMPILES) == "1"):
    os.environ[QUICK_COMPILES] = str(int(quick))
    jax.config.update(QUICK_COMPILES.lower(), quick)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _logs_reach_pytest():
  """`main` turns propagation of the package's log off; tests read it."""
  log = logging.getLogger("beit_jax")
  log.setLevel(logging.INFO)
  yield
  for handler in list(log.handlers):
    log.removeHandler(handler)
    handler.close()
  log.propagate = True


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory):
  """The folder of a tiny tokenizer, trained for a few steps: 16 words, stride 2, 16x16 pixels -> 8x8 tokens."""
  from beit_jax import train
  from tests import tiny

  workdir = tmp_path_factory.mktemp("tokenizer")
  train.run(tiny.config("dvae"), workdir)
  return workdir
