"""Settings and fixtures of all tests: eight simulated CPU devices, float32 products, programs compiled fast and once.

pytest-xdist runs the tests in several workers. The process that starts them reads this file and hands on its
environment; then each worker reads it.

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

# Eight devices share a few cores. Their collectives block threads of XLA's pools, whose size NPROC sets, and XLA ends
# the process if a participant is 40 s late, which can happen on a busy machine.
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

# XLA's optimizations take two thirds of the time of most tests, whose programs then run for milliseconds.
FAST_COMPILATION = "JAX_DISABLE_MOST_OPTIMIZATIONS"  # subprocesses read it
# Files that compare numbers with other implementations are compiled as for a user.
OPTIMIZED = {
  "test_augment",
  "test_dino",
  "test_peer_loop",
  "test_peers",
  "test_segmentation_weights",
  "test_full_size",
  "test_kills",
  "test_models",
  "test_optim",
  "test_segmentation_models",
  "test_transfer",
  "test_vqkd",
}

# All workers and subprocesses share one compilation cache, since most tests run the same few programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="beit_jax_cache_")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _optimizations(request):
  """Turns XLA's optimizations off, except in the files of `OPTIMIZED`."""
  fast = not ON_GPU and request.module.__name__.rpartition(".")[2] not in OPTIMIZED
  if fast != (os.environ.get(FAST_COMPILATION) == "1"):
    os.environ[FAST_COMPILATION] = str(int(fast))
    jax.config.update(FAST_COMPILATION.lower(), fast)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _logs_reach_pytest():
  """Undoes what `logs.setup` does to the logger, so that `caplog` sees its records."""
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
