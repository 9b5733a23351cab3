"""`python -m beit_jax.main`: mistakes give exit status 2 and a helpful message; a whole chain in a subprocess."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from etils import epath
from PIL import Image

from beit_jax import main as main_lib
from beit_jax import objectives, train
from beit_jax.config import parse
from beit_jax.data import sources
from beit_jax.doctor import __main__ as doctor
from beit_jax.errors import UserError
from beit_jax.objectives import stages as stages_lib
from beit_jax.run import record
from tests import tiny
from tests.conftest import ROOT


def _config_file(path, run: dict):
  plain = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in run.items()}
  text = f"""
  from ml_collections import ConfigDict

  def get_config():
    return ConfigDict({plain!r})
  """
  path.write_text(textwrap.dedent(text))
  return path


def _run(tmp_path, run: dict, *flags):
  config = _config_file(tmp_path / "config.py", run)
  return main_lib.main([f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags])


def _fails(capsys, status, *facts):
  error = capsys.readouterr().err
  assert status == 2
  assert error.count("error: ") == 1 and "Traceback" not in error
  for fact in facts:
    assert fact in error, error


def test_wrong_key(tmp_path, capsys):
  status = _run(tmp_path, tiny.raw("dvae"), "--config.data.crop_scal=(0.1,1.0)")
  _fails(capsys, status, "'data.crop_scal' is unknown", "did you mean 'crop_scale'")


def test_wrong_key_in_the_file(tmp_path, capsys):
  _fails(capsys, _run(tmp_path, tiny.raw("dvae", **{"model.n_hidden": 3})), "'model.n_hidden'", "'n_hid'")


def test_wrong_type(tmp_path, capsys):
  status = _run(tmp_path, tiny.raw("dvae"), "--config.optimizer.learning_rate=fast")
  _fails(capsys, status, "'optimizer.learning_rate'", "type float", "'fast'")


def test_missing_data_set(tmp_path, capsys):
  flags = (
    "--config.data.source=tfds",
    "--config.data.name=no_such_set",
    f"--config.data.data_dir={tmp_path}",
  )
  _fails(capsys, _run(tmp_path, tiny.raw("dvae"), *flags), "no_such_set", "tfds build", "data.data_dir")


def test_image_size_that_the_patch_does_not_divide(tmp_path, capsys):
  status = _run(tmp_path, tiny.raw("classify"), "--config.data.image_size=17")
  _fails(capsys, status, "'data.image_size'", "(17, 17)", "patch_size=2", "(16, 16)")


def test_checkpoint_of_another_architecture(tmp_path, capsys, tokenizer_run):
  status = _run(tmp_path, tiny.raw("classify"), f"--config.init_from={tokenizer_run}")
  _fails(capsys, status, "init_from", "tokenizer has no BEiT encoder")


def test_checkpoint_of_another_width(tmp_path, capsys):
  assert _run(tmp_path, tiny.raw("classify", total_steps=1)) == 0
  capsys.readouterr()
  flags = (f"--config.init_from={tmp_path / 'run'}", "--config.model.width=48")
  config = _config_file(tmp_path / "config.py", tiny.raw("classify"))
  status = main_lib.main([f"--config={config}", f"--workdir={tmp_path / 'other'}", *flags])
  _fails(
    capsys,
    status,
    "disagree",
    "model.width: the checkpoint has 32, this run 48",
  )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
  _fails(
    capsys, _run(tmp_path, tiny.raw("beit")), "'tokenizer.init_from'", "stage:tokenizer", "configs/dvae.py"
  )


def test_token_grid_that_does_not_match(tmp_path, capsys, tokenizer_run):
  flags = (f"--config.tokenizer.init_from={tokenizer_run}", "--config.data.token_image_size=32")
  _fails(
    capsys,
    _run(tmp_path, tiny.raw("beit"), *flags),
    "'data.token_image_size'",
    "(16, 16) tokens",
    "(8, 8) patches",
  )


def test_masks_that_could_be_empty(tmp_path, capsys, tokenizer_run):
  flags = (
    *(f"--config.tokenizer.init_from={tokenizer_run}", "--config.mask.kind=block_at_most"),
    *("--config.mask.num_masked=1", "--config.mask.min_block_patches=16"),
  )
  _fails(
    capsys, _run(tmp_path, tiny.raw("beit"), *flags), "'mask.min_block_patches'", "empty with probability"
  )


def test_batch_that_the_mesh_does_not_divide(tmp_path, capsys):
  flags = ("--config.mesh.data=8", "--config.batch_size=12")
  _fails(capsys, _run(tmp_path, tiny.raw("dvae"), *flags), "'batch_size'", "12", "8 devices")


@pytest.mark.parametrize(
  ("argv", "fact"),
  [
    ([], "--config is missing"),
    (["--config=nowhere.py"], "no such file"),
    (["--config=configs/quickstart.py", "--frobnicate=1"], "unknown flag --frobnicate"),
    (["--config=configs/beit_base.py:nonsense"], "nonsense"),
  ],
)
def test_flags(argv, fact, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  _fails(capsys, main_lib.main(argv), fact)


def _subprocess(*arguments, **environment):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
  command = [sys.executable, *arguments]
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


STAGES = """
  from ml_collections import ConfigDict

  def get_config():
    summary = (("accuracy", "finetune.eval.acc1", ".3f"),)
    return ConfigDict(dict(stages=("tokenizer", "pretrain", "finetune"), summary=summary, **{stages!r}))
"""


def _stages(tmp_path, **data):
  stages = {
    "tokenizer": tiny.raw("dvae", total_steps=2, figures=True),
    "pretrain": tiny.raw(
      "beit", total_steps=3, **{"tokenizer.init_from": "stage:tokenizer", "optimizer.warmup_steps": 0}
    ),
    "finetune": tiny.raw("classify", total_steps=2, init_from="stage:pretrain"),
  }
  plain = {name: run.to_dict() for name, run in stages.items()}
  path = tmp_path / "config.py"
  path.write_text(textwrap.dedent(STAGES.format(stages=plain)))
  return path


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"pretrain.mask.num_masked": 65}, "'mask.num_masked': 65 must lie in [1, 64]"),
    ({"pretrain.batch_size": 7, "pretrain.microbatches": 2}, "'batch_size': 7 is not a multiple"),
    ({"finetune.model.width": 48}, "model.width: the checkpoint has 32, this run 48"),
    ({"finetune.init_from": "/no/such/folder"}, "/no/such/folder"),
    ({"finetune.init_from": "stage:tokenizer"}, "a tokenizer has no BEiT encoder to start from"),
    ({"finetune.data.source": "folder", "finetune.data.root": "/no/images"}, "data.root='/no/images'"),
    ({"finetune.checkpoint.best": "mAP"}, "'checkpoint.best': 'mAP' is not evaluated"),
    ({"pretrain.model.patch_size": 4}, "'data.token_image_size'"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_one_starts(changes, fact, tmp_path, capsys):
  flags = [f"--config={_stages(tmp_path)}", f"--workdir={tmp_path / 'run'}"]
  flags += [f"--config.{key}={value}" for key, value in changes.items()]
  _fails(capsys, main_lib.main(flags), fact, f"stage {next(iter(changes)).partition('.')[0]!r}: ")
  assert not (tmp_path / "run" / "tokenizer").exists()
  assert doctor.main(flags) == 1
  assert fact in capsys.readouterr().out


def test_a_later_stage_that_resumes_at_another_place_of_the_data(tmp_path, capsys):
  stages = {"one": tiny.raw("classify"), "two": tiny.raw("classify", resume="stage:one", batch_size=32)}
  config = _config_file(tmp_path / "config.py", {"stages": tuple(stages), **stages})
  flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  _fails(capsys, main_lib.main(flags), "'resume'", "batch_size: 16 in the checkpoint, 32 in the config")
  assert not (tmp_path / "run" / "one").exists()


def test_stages_are_validated_without_opening_the_data_again(tmp_path, monkeypatch):
  """The stages' own runs get the data of the validation; equal data sections are opened once."""
  opened = []
  original = sources.make_source
  monkeypatch.setattr(sources, "make_source", lambda data: opened.append(data["split"]) or original(data))
  runs = stages_lib.resolve(parse.load(str(_stages(tmp_path)), [], objectives.schemas()), tmp_path / "run")
  data = train.check_stages(runs)
  assert list(data) == ["tokenizer", "pretrain", "finetune"]
  assert opened == ["train", "test"] * 2  # the data section of `pretrain` is another
  monkeypatch.setattr(train.loop, "_train", lambda *arguments: arguments[-1])
  for run in runs:
    assert train.run(run.config, run.folder, run.name, data[run.name]) is data[run.name]
  assert len(opened) == 4


def test_a_finished_stage_is_not_checked_again(tmp_path, monkeypatch):
  """Its mesh may be that of another machine."""
  runs = stages_lib.resolve(parse.load(str(_stages(tmp_path)), [], objectives.schemas()), tmp_path / "run")
  runs[0].config.mesh.fsdp = 64
  with pytest.raises(UserError, match="stage 'tokenizer': .*mesh.fsdp"):
    train.check_stages(runs)
  finished = lambda config, folder: {"step": 1} if folder == runs[0].folder else None
  monkeypatch.setattr(record, "finished", finished)
  assert list(train.check_stages(runs)) == ["pretrain", "finetune"]


def test_whole_chain_without_tensorflow_or_torch(tmp_path):
  """The command runs where neither can be imported (tensorboardX would load torch if it could).

  The same command again skips what is done.
  """
  config = _stages(tmp_path)
  code = (
    "import sys; sys.modules.update(tensorflow=None, torch=None); "
    "from beit_jax.main import main; sys.exit(main(sys.argv[1:]))"
  )
  arguments = ("-c", code, f"--config={config}", f"--workdir={tmp_path / 'run'}")
  first = _subprocess(*arguments)
  assert first.returncode == 0, first.stderr
  assert "accuracy  0." in first.stdout
  results = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert list(results) == ["tokenizer", "pretrain", "finetune"]
  assert (tmp_path / "run" / "tokenizer" / "figures" / "reconstructions.png").exists()
  again = _subprocess("-m", "beit_jax.main", *arguments[2:])
  assert again.returncode == 0, again.stderr
  assert again.stderr.count("finished earlier") == 3


def test_module_reports_mistakes_with_status_2():
  done = _subprocess(
    "-m", "beit_jax.main", "--config=configs/quickstart.py", "--config.tokenizer.batchsize=3"
  )
  assert done.returncode == 2
  assert done.stderr.startswith(
    "error: config key 'tokenizer.batchsize' is unknown, did you mean 'batch_size'"
  )
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_tokenizer_stage_can_be_skipped(tmp_path, tokenizer_run):
  config = _stages(tmp_path)
  flags = (
    f"--config={config}",
    f"--workdir={tmp_path / 'run'}",
    f"--config.tokenizer.init_from={tokenizer_run}",
  )
  assert main_lib.main([*flags, "--config.pretrain.data.image_size=16"]) == 0
  assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["finetune", "pretrain"]


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
def test_own_images_of_any_kind(tmp_path, labelled):
  """configs/own_images.py on a folder of color, gray, 16-bit, palette and odd-sized images."""
  rng = np.random.default_rng(0)
  folder = tmp_path / "images"
  for i in range(24):
    sub = folder / ("ab"[i % 2] if labelled else "")
    sub.mkdir(parents=True, exist_ok=True)
    h, w = int(rng.integers(20, 60)), int(rng.integers(20, 60))
    pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
    kinds = (
      lambda p: Image.fromarray(p),
      lambda p: Image.fromarray(p[..., 0]),
      lambda p: Image.fromarray(p[..., 0].astype(np.uint16) * 256),
      lambda p: Image.fromarray(p).convert("P"),
      lambda p: Image.fromarray(p).convert("RGBA"),
    )
    kinds[i % 5](pixels).save(sub / f"{i}.png")
  flags = [f"--config={ROOT}/configs/own_images.py", f"--workdir={tmp_path / 'run'}"]
  flags += [
    f"--config.data.root={folder}",
    "--config.batch_size=8",
    "--config.total_steps=2",
    "--config.mesh.data=1",
  ]
  flags += [
    "--config.optimizer.warmup_steps=1",
    "--config.tokenizer.model.n_hid=8",
    "--config.pretrain.model.depth=1",
  ]
  assert main_lib.main(flags) == 0
  assert (tmp_path / "run" / "pretrain" / "figures" / "masked_image_modelling.png").exists()
  for stage, metric in (("tokenizer", "codebook_usage"), ("pretrain", "mim_acc")):
    result = json.loads((tmp_path / "run" / stage / "result.json").read_text())
    assert result["examples"] == 21 and metric in result["eval"]  # three images of 24 are held out


def test_a_run_that_failed_waits_for_no_thread():
  """A failed save of Orbax leaves threads behind that wait for ten minutes."""
  script = (
    "import sys, threading, time\nfrom beit_jax.runtime import distributed\n"
    "def main(argv):\n  threading.Thread(target=time.sleep, args=(600,)).start()\n  print('said')\n  return 2\n"
    "distributed.run(main, [])\n"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (2, "said\n")


@pytest.mark.parametrize(
  "folder, chosen, processes, wanted",
  [
    ("/runs/a", None, 1, "/runs/a/compile_cache"),
    ("/runs/a", "/shared", 1, "/shared"),
    ("/runs/a", None, 2, None),  # a folder that not all of them see
    ("/runs/a", "/shared", 2, "/shared"),
    ("gs://bucket/a", None, 1, None),
  ],
)
def test_where_compiled_programs_are_kept(folder, chosen, processes, wanted):
  assert main_lib.compile_cache(epath.Path(folder), chosen, processes) == wanted


@pytest.mark.slow
def test_a_second_start_compiles_nothing_again(tmp_path):
  """JAX's log tells; a program that cannot be read is compiled again."""
  config = _config_file(tmp_path / "config.py", tiny.raw("dvae", total_steps=2))
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  environment |= dict(
    JAX_PLATFORMS="cpu", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", PYTHONPATH=str(ROOT)
  )
  environment |= dict(JAX_LOGGING_LEVEL="DEBUG")

  def hit():
    command = [sys.executable, "-m", "beit_jax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    for name in ("result.json", "config.json", "metrics.jsonl", "saved.json"):
      (tmp_path / "run" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return "Persistent compilation cache hit for 'jit_train_step'" in done.stderr

  assert [hit(), hit()] == [False, True]
  (program,) = (tmp_path / "run" / "compile_cache").glob("jit_train_step*-cache")
  program.write_bytes(program.read_bytes()[:1000])
  assert not hit()
