"""Keys on the command line: their types, hints for unknown ones, and keys that only some stages have."""

import pytest

from beit_jax import main, objectives, tokenize
from beit_jax.config import parse
from beit_jax.doctor import __main__ as doctor
from beit_jax.errors import UserError
from beit_jax.plan import __main__ as plan

ONE = "from tests import tiny\ndef get_config():\n  return tiny.raw('beit')\n"
STAGED = """
from tests import tiny
def get_config():
  stages = dict(tokenizer=tiny.raw("dvae"), pretrain=tiny.raw("beit"), finetune=tiny.raw("classify"))
  return dict(stages=tuple(stages), **stages)
"""


@pytest.fixture
def load(tmp_path):
  """`load(ONE, "--config.seed=1")` is the config that a command gets."""

  def make(text, *flags):
    (tmp_path / "config.py").write_text(text)
    spec, _, overrides = parse.parse_args([f"--config={tmp_path / 'config.py'}", *flags])
    return parse.load(spec, overrides, objectives.schemas())

  return make


@pytest.mark.parametrize("command", [main, tokenize, doctor])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(command, flag, capsys):
  assert command.main([flag]) == 0
  out, error = capsys.readouterr()
  assert f"python -m {command.__name__.removesuffix('.__main__')}" in out and not error


def test_help_of_plan(capsys):
  with pytest.raises(SystemExit) as stopped:
    plan.main(["--help"])
  assert stopped.value.code == 0 and "python -m beit_jax.plan" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("2017", "2017"),
    ("1e3", "1e3"),
    ("1_000", "1_000"),
    ("'2017'", "2017"),
    ("train", "train"),
    ("0.5", "0.5"),
  ],
)
def test_a_key_of_text_takes_numbers_as_they_are_typed(text, value, load):
  assert load(ONE, f"--config.data.split={text}").data.split == value


def test_other_types_are_unchanged(load):
  config = load(ONE, "--config.data.crop_scale=(0.2,1)", "--config.total_steps=none", "--config.figures=true")
  assert config.data.crop_scale == (0.2, 1) and config.total_steps is None and config.figures is True
  for flag, found in (
    ("data.split=none", "None"),
    ("data.split=(1,2)", "tuple"),
    ("batch_size=many", "'many'"),
  ):
    with pytest.raises(UserError, match=f"(?s)must be of type .*{found}"):
      load(ONE, f"--config.{flag}")
  with pytest.raises(UserError, match="'data.split' must be of type str, found 2017"):
    load(ONE.replace("'beit'", "'beit', **{'data.split': 2017}"))


@pytest.mark.parametrize(
  ("key", "hint"),
  [
    ("learning_rate", "did you mean 'optimizer.learning_rate'"),
    ("data.num_masked", "did you mean 'mask.num_masked'"),
    ("every_steps", "did you mean 'checkpoint.every_steps' or 'eval.every_steps'"),
    ("optimiser.learning_rate", "did you mean 'optimizer.learning_rate'"),
    ("data.crop_scal", "did you mean 'crop_scale'"),
  ],
)
def test_an_unknown_key_gets_a_hint(key, hint, load):
  with pytest.raises(UserError, match=f"'{key.removesuffix('.learning_rate')}' is unknown, {hint}"):
    load(ONE, f"--config.{key}=1")


def test_a_key_of_the_file_gets_a_hint(load):
  with pytest.raises(UserError, match="'learning_rate' is unknown, did you mean 'optimizer.learning_rate'"):
    load(ONE.replace("'beit'", "'beit', learning_rate=1e-3"))


def test_a_key_is_set_in_the_stages_that_have_it(load, caplog):
  config = load(STAGED, "--config.mask.num_masked=20", "--config.data.split=test", "--config.model.width=64")
  assert config.pretrain.mask.num_masked == 20
  assert {config[name].data.split for name in config.stages} == {"test"}
  assert (config.pretrain.model.width, config.finetune.model.width) == (64, 64)
  assert "--config.mask.num_masked: set in pretrain, the other stages have no such key" in caplog.text
  assert "data.split" not in caplog.text


@pytest.mark.parametrize(
  ("key", "hint"),
  [
    ("learning_rate", "did you mean 'optimizer.learning_rate'"),
    ("num_masked", "did you mean 'mask.num_masked'"),
    ("pretrian.mask.num_masked", "did you mean 'mask.num_masked'"),
    ("mask.num_maskd", "did you mean 'mask.num_masked'"),
  ],
)
def test_a_key_of_no_stage_gets_a_hint(key, hint, load):
  with pytest.raises(
    UserError, match=f"'{key}' is in none of the stages tokenizer, pretrain, finetune, {hint}"
  ):
    load(STAGED, f"--config.{key}=1")


def test_an_unknown_key_of_one_stage(load):
  with pytest.raises(UserError, match="'pretrain.mask.num_maskd' is unknown, did you mean 'num_masked'"):
    load(STAGED, "--config.pretrain.mask.num_maskd=1")
  with pytest.raises(UserError, match="'tokenizer.mask' is unknown, did you mean 'pretrain.mask.num_masked'"):
    load(STAGED, "--config.tokenizer.mask.num_masked=1")
