"""A run resumes from its newest readable checkpoint, with the same classes, the same optimizer and no fewer steps."""

import errno
import hashlib
import json
import os
import shutil

import pytest

from beit_jax import train
from beit_jax.errors import TransientError, UserError
from beit_jax.run import checkpoint, record
from beit_jax.runtime import bucket
from tests import tiny


def _config(**changes):
  return tiny.config(
    "classify", **{"total_steps": 6, "checkpoint.every_steps": 1, "checkpoint.keep": 99, **changes}
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("resume") / "run"
  train.run(_config(), workdir)
  return workdir


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG])
def test_an_unreadable_checkpoint_is_replaced_by_the_previous_one(code, run, tmp_path, monkeypatch, caplog):
  """These errors come from a bad sector. A network error says nothing about the checkpoint (next test)."""
  shutil.copytree(run, tmp_path / "run")
  (tmp_path / "run" / "result.json").unlink()
  *_, before, newest = checkpoint.steps(tmp_path / "run" / "checkpoints")
  damaged = {path.stat().st_ino for path in (tmp_path / "run" / "checkpoints" / str(newest)).rglob("*")}
  digest = hashlib.file_digest

  def broken(file, kind):
    if os.fstat(file.fileno()).st_ino in damaged:
      raise OSError(code, os.strerror(code))
    return digest(file, kind)

  monkeypatch.setattr(hashlib, "file_digest", broken)
  assert train.run(_config(), tmp_path / "run")["step"] == 6
  assert f"resuming from {tmp_path / 'run' / 'checkpoints' / str(before)}" in caplog.text
  assert "cannot be read" in caplog.text and list((tmp_path / "run" / "damaged").iterdir())


def test_an_outage_does_not_mark_a_checkpoint_as_damaged(run, tmp_path, monkeypatch):
  shutil.copytree(run, tmp_path / "run")
  (tmp_path / "run" / "result.json").unlink()

  def broken(file, kind):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

  monkeypatch.setattr(hashlib, "file_digest", broken)
  with pytest.raises(TransientError, match="Complete checkpoints in"):
    train.run(_config(), tmp_path / "run")
  assert not (tmp_path / "run" / "damaged").exists()


@pytest.mark.parametrize(
  "error, transient",
  [
    (ValueError("OUT_OF_RANGE: Error writing \"x\" [os_error_code='5']"), True),
    (ValueError("OUT_OF_RANGE: Error writing \"x\" [os_error_code='28']"), False),
    (ValueError("FAILED_PRECONDITION: [os_error_code='27'] after ABORTED"), False),
    (RuntimeError("UNAVAILABLE: later"), True),
    (OSError(errno.ENOSPC, "full"), False),
  ],
)
def test_which_errors_are_transient(error, transient):
  assert bucket.is_transient(error) is transient


def test_a_longer_run_that_was_killed_is_not_finished(run, tmp_path):
  """The result of the earlier, shorter run does not count for the longer one."""
  shutil.copytree(run, tmp_path / "run")

  def stop(self, step, *_):
    if step == 8:
      raise UserError("the end")

  longer = _config(total_steps=10)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.loop.Trace, "before", stop)
    with pytest.raises(UserError, match="the end"):
      train.run(longer, tmp_path / "run")
  result = train.run(longer, tmp_path / "run")
  assert result["step"] == 10 and json.loads(
    (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
  )


def test_total_steps_below_the_current_step_are_refused(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError, match="'total_steps': 2, but this run starts at step 6"):
    train.run(_config(total_steps=2), tmp_path / "run")
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
  assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 6


def test_renumbered_or_added_classes_are_refused(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  folder = checkpoint.find(tmp_path / "run")
  description = checkpoint.read_description(folder)
  names = description["labels"]
  with pytest.raises(UserError, match=f"class 1 was '{names[1]}' and is '{names[2]}' in the data now"):
    record.check_same_data(folder, {**description, "labels": [names[0], names[2], names[1], *names[3:]]})
  with pytest.raises(UserError, match=f"class {len(names)} was none and is 'more'"):
    record.check_same_data(folder, {**description, "labels": [*names, "more"]})
  record.check_same_data(folder, description)


@pytest.mark.parametrize(
  "changes",
  [
    {"batch_size": 32},
    {"seed": 1},
    {"data.fraction": 0.5},
    {"data.num_examples": 64},
    {"data.split": "test"},
  ],
)
def test_resume_does_not_move_the_data_position(changes, run, tmp_path):
  with pytest.raises(UserError, match=f"(?s)'resume': .*{next(iter(changes))}: .* in the checkpoint"):
    train.run(_config(resume=str(run), total_steps=8, **changes), tmp_path)
  assert not (tmp_path / "checkpoints").exists() or not checkpoint.steps(tmp_path / "checkpoints")


def test_resume_with_other_masks_or_files_is_refused(run, tmp_path, caplog):
  folder = shutil.copytree(checkpoint.find(run), tmp_path / "6")
  description = checkpoint.read_description(folder)
  changes = {"tokenizer.init_from": "unused"}
  config = tiny.config("beit", **changes)
  description["config"] = json.loads(json.dumps(config.to_dict()))
  (folder / "description.json").write_text(json.dumps(description))
  record.check_same_position(folder, description["config"], config, description)
  with pytest.raises(UserError, match="(?s)'resume': .*mask.num_masked: 25 in the checkpoint, 24"):
    other = tiny.config("beit", **changes, **{"mask.num_masked": 24})
    record.check_same_position(folder, description["config"], other, description)
  other = {**description, "dataset": {**description["dataset"], "sha256": "00"}}
  record.check_same_data(folder, other)  # a run goes on in its own folder, with a warning
  assert "has other files or classes than before" in caplog.text
  with pytest.raises(UserError, match="other files or classes than before"):
    record.check_same_position(folder, description["config"], config, other)


def test_resume_logs_what_else_differs(run, tmp_path, caplog):
  result = train.run(
    _config(resume=str(run), total_steps=7, **{"optimizer.learning_rate": 1e-4}), tmp_path / "new"
  )
  assert result["step"] == 7
  assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.0001 in the config" in caplog.text


def test_another_optimizer_state_is_refused(run, tmp_path):
  changes = {"optimizer.weight_decay_end": 0.1, "resume": str(run), "total_steps": 8}
  with pytest.raises(
    UserError, match="(?s)'resume': the optimizer's state .*weight_decay_end: None in the checkpoint"
  ):
    train.run(_config(**changes), tmp_path)


@pytest.mark.parametrize(
  "name", ["lion", "lamb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "sgd"))]
)
def test_an_optimizer_of_another_name_is_refused(name, run, tmp_path):
  changes = {"optimizer.name": name, "resume": str(run), "total_steps": 8}
  with pytest.raises(UserError, match=f"optimizer.name: 'adamw' in the checkpoint, '{name}' in the config"):
    train.run(_config(**changes), tmp_path)


def _without_added_keys(path):
  """Removes the keys that earlier versions did not write."""
  text = json.loads(path.read_text())
  added = ("residual_dtype", "in_channels", "activation", "pre_norm", "register_tokens")
  keys = ("optimizer.name", "optimizer.momentum", "data.random_erasing", *(f"model.{name}" for name in added))
  for key in keys:
    section, name = key.split(".")
    del text.get("config", text)[section][name]
  if "module" in text:
    for name in added:
      del text["module"]["encoder"][name]
  path.write_text(json.dumps(text))


def test_a_run_of_an_earlier_version_resumes(run, tmp_path):
  """A config without `optimizer.name` stands for AdamW, one without `model.residual_dtype` for `model.dtype`."""
  shutil.copytree(run, tmp_path / "run")
  folder = checkpoint.find(tmp_path / "run")
  description = checkpoint.read_description(folder)
  _without_added_keys(folder / "description.json")
  _without_added_keys(tmp_path / "run" / "config.json")
  record.check_same_model(folder, description)
  record.check_same_run(folder, _config())
  assert record.finished(_config(), tmp_path / "run")["step"] == 6
  other = _config(**{"optimizer.name": "lion"})
  with pytest.raises(UserError, match="optimizer.name: 'adamw' in the checkpoint, 'lion' in the config"):
    record.check_same_run(folder, other)
  assert record.finished(other, tmp_path / "run") is None


def test_a_run_with_another_residual_stream_resumes_and_says_so(run, tmp_path, caplog):
  """Versions without `model.residual_dtype` had a residual stream in `model.dtype`."""
  shutil.copytree(run, tmp_path / "run")
  folder = checkpoint.find(tmp_path / "run")
  _without_added_keys(folder / "description.json")
  text = json.loads((folder / "description.json").read_text())
  text["config"]["model"]["dtype"] = "bfloat16"
  (folder / "description.json").write_text(json.dumps(text))
  record.check_same_run(folder, _config(**{"model.dtype": "bfloat16"}))
  assert "model.residual_dtype: 'bfloat16' in the checkpoint, 'float32' in the config" in caplog.text


@pytest.mark.slow
def test_a_damaged_best_state_is_moved_away(tmp_path, caplog):
  best = {"checkpoint.best": "acc1", "eval.every_steps": 2}
  train.run(_config(total_steps=4, **best), tmp_path)
  for step in checkpoint.steps(tmp_path / "best" / "checkpoints"):
    (tmp_path / "best" / "checkpoints" / str(step) / "description.json").write_text("{}")
  assert train.run(_config(total_steps=6, **best), tmp_path)["step"] == 6
  assert "damaged: description.json is changed; it was moved to" in caplog.text


@pytest.mark.slow
def test_a_best_state_of_an_earlier_run_is_moved_away(tmp_path, caplog):
  best = {"checkpoint.best": "acc1", "eval.every_steps": 2}
  train.run(_config(total_steps=4, **best), tmp_path)
  for name in ("checkpoints", "saved.json", "metrics.jsonl"):
    (tmp_path / name).rename(tmp_path / f"old_{name}")
  train.run(_config(total_steps=4, seed=1, **best), tmp_path)
  found = checkpoint.read_description(checkpoint.find(tmp_path / "best"))
  assert found["config"]["seed"] == 1 and "is from an earlier run; it was moved to" in caplog.text


@pytest.mark.slow
def test_a_run_resumes_from_a_renamed_checkpoint(tmp_path, caplog):
  train.run(_config(total_steps=2), tmp_path / "first")
  (tmp_path / "first/checkpoints/2").rename(tmp_path / "renamed")
  result = train.run(_config(total_steps=3, resume=str(tmp_path / "renamed")), tmp_path / "second")
  assert result["step"] == 3 and "from step 2" in caplog.text
