"""The benchmark of training curves, small."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("torch")


@pytest.mark.slow
def test_curves_start_alike_and_fall_alike():
  command = [sys.executable, ROOT / "benchmarks" / "curve.py", "--steps=48", "--seeds=2"]
  text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  rows = [list(map(float, line.split()[1:3])) for line in text.splitlines()[1:]]
  assert len(rows) == 8
  assert all(ours == pytest.approx(theirs, abs=0.15) for ours, theirs in rows)
  assert rows[-1][0] < rows[0][0] - 0.2
