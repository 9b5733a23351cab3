"""Comparisons over seeds: statistics, tables, the plot, and stages that fail."""

import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from scipy import stats

from beit_jax import main, train
from beit_jax.errors import TransientError, UserError
from beit_jax.run import comparison

COMPARISON = dict(
  title="Table 4",
  columns=("top-1", "mIoU"),
  paper="paper, ImageNet and ADE20K",
  rows=(
    ("BEiT", ("beit_*.eval.acc1", "seg_beit_*.eval.mIoU"), ("82.86", "44.65")),
    ("- block_mask", ("random_*.eval.acc1", ""), ("82.77", "42.93")),
    ("800 epochs", ("long_*.eval.acc1", "seg_long_*.eval.mIoU"), ("83.19", "45.58")),
  ),
)
VALUES = {"beit": (0.50, 0.54, 0.52), "random": (0.49, 0.50, 0.51), "seg_beit": (0.30,)}
RESULTS = {
  f"{name}_{seed}": {"eval": {"mIoU" if name.startswith("seg") else "acc1": value}}
  for name, values in VALUES.items()
  for seed, value in enumerate(values)
}


def test_differences_are_paired_by_seed_and_intervals_are_students():
  results = {name: value for name, value in RESULTS.items() if name != "random_1"}  # one seed failed
  table = comparison.cells(COMPARISON, results)
  assert table[1][0].values == {"0": 0.49, "2": 0.51}
  np.testing.assert_allclose(table[1][0].differences, [-0.01, -0.01])
  values = list(table[0][0].values.values())
  low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
  assert comparison.half_interval(values) == pytest.approx((high - low) / 2)
  assert np.isnan(comparison.half_interval([0.5]))


def test_tables_name_the_papers_numbers_and_what_is_missing(tmp_path):
  text = comparison.write(COMPARISON, RESULTS, tmp_path).splitlines()
  assert text[1].split("  ")[-1] == "mIoU (paper, ImageNet and ADE20K)"
  assert re.split("  +", text[2]) == ["BEiT", "52.0 ± 2.0 (3)", "82.86", "30.0 (1)", "44.65"]
  first, mean, difference, published, *others = re.split("  +", text[3])
  assert (first, mean, published) == ("- block_mask", "50.0 ± 1.0 (3)", "82.77")
  assert difference.startswith("-2.0 [-") and others == ["no result", "42.93"]
  assert re.split("  +", text[4])[1:] == ["no result", "83.19", "no result", "45.58"]
  markdown = (tmp_path / "comparison.md").read_text().splitlines()
  assert {line.count("|") for line in markdown[2:]} == {8}
  latex = (tmp_path / "comparison.tex").read_text()
  assert {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")} == {6}
  assert r"block\_mask" in latex and r"52.0 $\pm$ 2.0" in latex
  xml.etree.ElementTree.parse(tmp_path / "comparison.svg")


@pytest.mark.parametrize(
  "change",
  [
    {"rows": (("BEiT", ("beit.eval.acc1", ""), ("", "")),)},
    {"rows": (("BEiT", ("beit_*.eval.acc1",), ("", "")),)},
    {"sum": 3},
  ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(change):
  with pytest.raises(UserError, match="config key 'comparison"):
    comparison.check({**COMPARISON, **change})


CONFIG = """
from tests import tiny

def get_config():
  run = tiny.raw("classify")
  stages = {f"{name}_{seed}": {**run, "seed": seed} for name in ("one", "two") for seed in range(2)}
  stages["after"] = {**run, "init_from": "stage:two_1"}
  return dict(
    stages=tuple(stages),
    comparison=dict(
      title="Two", columns=("top-1",), paper="paper", rows=tuple(
        (name, (f"{name}_*.eval.acc1",), ("",)) for name in ("one", "two")
      ),
    ),
    **stages,
  )
"""


def _run_stub(failures):
  def run(config, folder, name, data):
    if name in failures:
      raise failures[name]
    return {"eval": {"acc1": 0.5 + 0.1 * config.seed}}

  return run


def test_a_stage_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
  (tmp_path / "config.py").write_text(CONFIG)
  arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
  monkeypatch.setattr(train, "run", _run_stub({"two_1": UserError("the loss is not finite")}))
  assert main.main(arguments) == 2
  output = capsys.readouterr()
  assert "2 of 5 stages have no result" in output.err
  assert "two_1: the loss is not finite" in output.err and "after: needs two_1" in output.err
  assert sorted(json.loads((tmp_path / "run" / "summary.json").read_text())) == ["one_0", "one_1", "two_0"]
  assert re.search(r"two +50.0 \(1\) +\+0.0", output.out)
  assert (tmp_path / "run" / "comparison.svg").exists()
  monkeypatch.setattr(train, "run", _run_stub({"two_1": TransientError("the network is down")}))
  assert main.main(arguments) == 75
