"""The table at the end of a staged run, and the log files."""

import json

from beit_jax.run.metric_writer import MetricWriter
from beit_jax.run.summary import summary_table

RESULTS = {
  "tokenizer": {"eval": {"mae": 0.07}},
  "finetune_0": {"eval": {"acc1": 0.5}},
  "finetune_1": {"eval": {"acc1": 0.7}},
}


def test_one_value_many_values_and_none():
  rows = (
    ("error", "tokenizer.eval.mae", ".3f"),
    ("accuracy", "finetune_*.eval.acc1", ".0%"),
    ("nothing", "scratch.eval.acc1", ".0%"),
  )
  assert summary_table(rows, RESULTS).splitlines() == ["error     0.070", "accuracy  60%   (50%, 70%)"]


def test_a_resume_forgets_what_came_after(tmp_path):
  logger = MetricWriter(tmp_path)
  for step in (1, 2, 3):
    logger.write(step, {"loss": 1.0 / step, "bad": float("nan")})
  logger.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')  # cut off by a kill
  MetricWriter(tmp_path, start_step=2).close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2]
  assert rows[1]["loss"] == 0.5 and rows[1]["bad"] is None
