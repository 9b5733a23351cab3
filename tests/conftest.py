"""8 fake CPU devices, full float32 products, key reuse checked; tiny configs and helpers for all tests."""

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
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
  " --xla_cpu_collective_call_terminate_timeout_seconds=900"
).strip()
os.environ.setdefault("NPROC", "64")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")

# One compilation cache for the session and its subprocesses: most tests run the same few programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="beit_jax_cache_")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])

ROOT = Path(__file__).parent.parent


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
