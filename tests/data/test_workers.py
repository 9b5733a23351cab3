"""Data workers of programs that are not a module with a guard: standard input, and a script that runs at import."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # each starts two processes

SCRIPT = """
import numpy as np
from beit_jax.data import pipeline, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from tests import tiny

reader = ViewReader({"image": ((8, 8), "bicubic")}, tiny.config("classify").data.to_dict())
options = dict(rows=np.arange(4), batch_size=4, total_steps=2, start_step=0, seed=0, workers=1)
try:
  batches = pipeline.train_batches(sources.ShapesSource("train", 8, 16), reader, **options)
  print(sum(len(batch["image"]) for batch in batches))
except UserError as error:
  print(error)
"""


def _run(*arguments, text=None):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, *arguments]
  done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_program_from_standard_input_has_workers():
  assert _run("-", text=SCRIPT).split() == ["8"]


def test_a_script_without_a_guard_is_told_so(tmp_path):
  (tmp_path / "script.py").write_text(SCRIPT)
  out = _run(tmp_path / "script.py")
  assert "data workers ended with status 1" in out and "if __name__ == '__main__':" in out
