"""`profile_steps` traces exactly the requested steps; by default, none."""

import gzip
import json

import pytest

from beit_jax import train
from beit_jax.config import ranges
from beit_jax.errors import UserError
from tests import tiny


def test_the_requested_steps_are_traced(tmp_path, monkeypatch):
  began, ended = [], []
  start, stop = train.loop.Trace.before, train.loop.Trace.close

  def before(self, step, state):
    start(self, step, state)
    began.append((step, self._running))

  def close(self):
    ended.append(self._running)
    stop(self)

  monkeypatch.setattr(train.loop.Trace, "before", before)
  monkeypatch.setattr(train.loop.Trace, "close", close)
  train.run(tiny.config("dvae", profile_steps=(3, 4)), tmp_path)
  assert [step for step, running in began if running] == [3, 4]
  assert ended == [True, False]  # after step 4, not at the end of the run
  (file,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
  # The host's calls of the two steps, each possibly recorded twice.
  assert sum(name == "PjitFunction(train_step)" for name in names) in (2, 4)


def test_a_run_that_ends_before_the_last_traced_step_writes_its_trace(tmp_path):
  train.run(tiny.config("dvae", profile_steps=(6, 9)), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
  (tmp_path / "profile").write_text("a file in place of the folder")
  assert train.run(tiny.config("dvae", total_steps=3, profile_steps=(1, 2)), tmp_path)["step"] == 3
  assert [r.message for r in caplog.records if f"no profile in {tmp_path / 'profile'}" in r.message]


def test_steps_are_traced_only_on_request(tmp_path, caplog):
  train.run(tiny.config("dvae", total_steps=2), tmp_path / "a")
  train.run(tiny.config("dvae", total_steps=2, profile_steps=(3, 4)), tmp_path / "b")
  assert not list(tmp_path.rglob("profile"))
  assert [r.message for r in caplog.records if "'profile_steps': the run has 2 steps" in r.message]


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (1, 101), (1, 2, 3), (1.0, 2), ("a", "b")])
def test_invalid_profile_steps_are_rejected(steps):
  with pytest.raises(UserError, match="'profile_steps'"):
    ranges.check({"profile_steps": steps})
