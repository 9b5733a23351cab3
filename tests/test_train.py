"""The training loop: meshes, accumulation, stop and resume, data workers, checkpoints, averaged weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beit_jax
from beit_jax import step as step_lib
from beit_jax import train, trees
from beit_jax.errors import CollapseError, UserError
from beit_jax.objectives.base import LossOutput, Metric
from beit_jax.run import checkpoint
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import tiny


def _losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([row["loss"] for row in rows if "loss" in row])


def _params(workdir, step=None):
  return trees.flatten(checkpoint.load_params(checkpoint.find(workdir, step)))


def _beit(tokenizer, **changes):
  return tiny.config("beit", **{"tokenizer.init_from": str(tokenizer), **changes})


@pytest.fixture(scope="module")
def whole_run(tokenizer_run, tmp_path_factory):
  """10 steps on one device, checkpoints at 3, 6, 9 and 10."""
  workdir = tmp_path_factory.mktemp("whole")
  result = train.run(_beit(tokenizer_run, **{"checkpoint.every_steps": 3, "checkpoint.keep": 9}), workdir)
  return workdir, result


def _assert_same_run(workdir, other):
  """Losses to rtol 1e-5; 99.9 % of the parameters within 1e-6, all within 5e-4."""
  np.testing.assert_allclose(_losses(workdir), _losses(other), rtol=1e-5)
  mine, theirs = _params(workdir), _params(other)
  difference = np.concatenate([np.abs(mine[n] - theirs[n]).ravel() for n in theirs])
  assert difference.max() <= 5e-4
  assert (difference <= 1e-6).mean() >= 0.999


@pytest.mark.parametrize(
  "mesh", [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((8, 1), (4, 2), (2, 4))]
)
def test_the_mesh_does_not_change_the_run(mesh, whole_run, tokenizer_run, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)  # or nothing of this tiny model would be sharded
  config = _beit(tokenizer_run, **{"mesh.data": mesh[0], "mesh.fsdp": mesh[1]})
  train.run(config, tmp_path)
  _assert_same_run(whole_run[0], tmp_path)


def test_fsdp_spreads_parameters_and_moments(monkeypatch):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)
  mesh = sharding.make_mesh(2, 4)
  shapes = {
    "params": {
      "mlp": {"kernel": jax.ShapeDtypeStruct((16, 64), np.float32)},
      "bias": jax.ShapeDtypeStruct((64,), np.float32),
    }
  }
  shapes["opt_state"] = [{"mu": shapes["params"]}]
  found = trees.flatten(sharding.param_shardings(mesh, shapes))
  for prefix in ("params", "opt_state/0/mu"):
    assert found[f"{prefix}/mlp/kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert found[f"{prefix}/bias"].spec == jax.sharding.PartitionSpec()


@pytest.mark.slow
def test_accumulation_does_not_change_the_run(whole_run, tokenizer_run, tmp_path):
  """Even if images have different numbers of masked patches. Without stochastic depth, whose keys differ."""
  one, four = tmp_path / "one", tmp_path / "four"
  common = {"model.drop_path_rate": 0.0, "mask.kind": "block_at_most", "total_steps": 4}
  train.run(_beit(tokenizer_run, **common), one)
  train.run(_beit(tokenizer_run, **common, microbatches=4), four)
  _assert_same_run(one, four)


@pytest.mark.parametrize("stop", [3, 9])
def test_stop_and_resume_is_bit_identical(stop, whole_run, tokenizer_run, tmp_path):
  """Step 3 lies in the first epoch (6 steps an epoch), step 9 in the second."""
  workdir = tmp_path / "resumed"
  shutil.copytree(whole_run[0], workdir)
  for step in checkpoint.steps(workdir / "checkpoints"):
    if step > stop:
      shutil.rmtree(workdir / "checkpoints" / str(step))
  (workdir / "result.json").unlink()
  train.run(_beit(tokenizer_run, **{"checkpoint.every_steps": 3, "checkpoint.keep": 9}), workdir)
  _assert_bit_identical(workdir, whole_run[0])
  np.testing.assert_array_equal(_losses(workdir), _losses(whole_run[0]))


def _assert_bit_identical(workdir, other):
  for item in ("params", "rest"):
    mine, theirs = (
      trees.flatten(checkpoint.load_params(checkpoint.find(path), item)) for path in (workdir, other)
    )
    assert mine.keys() == theirs.keys() and len(mine) > 0
    for name, value in theirs.items():
      np.testing.assert_array_equal(mine[name], value, err_msg=name)


def test_resume_on_another_mesh(whole_run, tokenizer_run, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)
  workdir = tmp_path / "resumed"
  shutil.copytree(whole_run[0], workdir)
  for step in (6, 9, 10):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  train.run(_beit(tokenizer_run, **{"mesh.data": 2, "mesh.fsdp": 4}), workdir)
  _assert_same_run(whole_run[0], workdir)


def test_data_workers_do_not_change_the_run(whole_run, tokenizer_run, tmp_path):
  """A run without workers, resumed in mid-epoch with two worker processes, is bit-identical."""
  workdir = tmp_path / "workers"
  shutil.copytree(whole_run[0], workdir)
  for step in (6, 9, 10):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  changes = {"checkpoint.every_steps": 3, "checkpoint.keep": 9, "data.workers": 2}
  train.run(_beit(tokenizer_run, **changes), workdir)
  _assert_bit_identical(workdir, whole_run[0])


def test_metrics_figures_and_description(whole_run):
  workdir, result = whole_run
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [row["step"] for row in rows if "loss" in row]
  assert steps == list(range(1, 11))
  for key in ("loss", "learning_rate", "weight_decay", "grad_norm", "images_per_second", "mim_acc"):
    assert key in rows[0]
  assert "data_wait" in rows[0] and rows[0]["weight_decay"] == 0.05
  assert rows[0]["learning_rate"] == 0.0  # a warm-up starts at 0
  assert rows[0]["loss"] == pytest.approx(np.log(16), abs=0.1)
  assert 0 <= result["eval"]["mim_acc"] <= 1 and "loss" in result["eval"]
  description = checkpoint.read_description(checkpoint.find(workdir))
  assert description["kind"] == "mim" and len(description["tokenizer"]["sha256"]) == 64
  for key in ("version", "module", "preset", "preprocessing", "dataset", "config", "packages"):
    assert key in description
  assert list((workdir / "tensorboard").iterdir())
  assert json.loads((workdir / "config.json").read_text())["mask"]["num_masked"] == 25


def test_a_finished_run_is_not_run_again(whole_run, tokenizer_run):
  workdir, result = whole_run
  before = (workdir / "metrics.jsonl").read_text()
  config = _beit(tokenizer_run, **{"checkpoint.every_steps": 3, "checkpoint.keep": 9})
  assert train.run(config, workdir) == result
  assert (workdir / "metrics.jsonl").read_text() == before


def test_fine_tuning_starts_from_pre_training(whole_run, tmp_path, caplog):
  config = tiny.config(
    "classify",
    init_from=str(whole_run[0]),
    total_steps=1,
    **{"optimizer.learning_rate": 0.0, "optimizer.min_lr": 0.0},
  )
  train.run(config, tmp_path)
  before, after = _params(whole_run[0]), _params(tmp_path)
  for name in ("encoder/block_01/mlp/fc1/kernel", "encoder/patch_embed/kernel"):
    np.testing.assert_array_equal(before[name], after[name])
  for i in range(2):
    np.testing.assert_array_equal(
      after[f"encoder/block_{i:02d}/attn/relative_position_bias_table"],
      before["encoder/rel_pos_bias/relative_position_bias_table"],
    )


def test_a_damaged_checkpoint_falls_back_loudly(whole_run, tokenizer_run, tmp_path, caplog):
  workdir = tmp_path / "damaged"
  shutil.copytree(whole_run[0], workdir)
  newest = workdir / "checkpoints" / "10"
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1  # a single bit
  victim.write_bytes(data)
  (workdir / "checkpoints" / "9" / "digest.json").unlink()  # and an unfinished one
  assert "changed" in checkpoint.fault(newest)
  (workdir / "result.json").unlink()
  train.run(_beit(tokenizer_run, **{"checkpoint.every_steps": 3, "checkpoint.keep": 9}), workdir)
  assert "damaged" in caplog.text and "unfinished" in caplog.text and "resuming from" in caplog.text
  assert len(list((workdir / "damaged").iterdir())) == 2
  _assert_bit_identical(workdir, whole_run[0])


def test_another_architecture_is_refused(whole_run, tokenizer_run):
  with pytest.raises(UserError) as error:
    train.run(_beit(tokenizer_run, **{"model.width": 48}), whole_run[0])
  for fact in ("model.width", "32", "48", "--workdir"):
    assert fact in str(error.value)


@pytest.mark.slow
def test_another_tokenizer_is_refused(whole_run, tokenizer_run, tmp_path):
  """A tokenizer with its words in another order would be accepted silently and ruin the run."""
  other = tmp_path / "tokenizer"
  train.run(tiny.config("dvae", total_steps=1, seed=5), other)
  with pytest.raises(UserError, match="tokenizer's sha256"):
    train.run(_beit(other), whole_run[0])


def test_other_pixel_statistics_are_refused(whole_run, tmp_path):
  changes = {"init_from": str(whole_run[0]), "data.mean": (0.1, 0.2, 0.3)}
  with pytest.raises(
    UserError, match=r"data.mean: the checkpoint was trained with .*, this run has \(0.1, 0.2, 0.3\)"
  ):
    train.run(tiny.config("classify", **changes), tmp_path / "run")


def test_collapse_alarm(tmp_path, caplog):
  config = tiny.config("dvae", total_steps=2, **{"collapse.after_steps": 1})
  config.collapse.min_usage = 1.1  # more than there can be
  with pytest.raises(CollapseError, match="codebook has collapsed"):
    train.run(config, tmp_path / "stop")
  config.collapse.stop = False
  train.run(config, tmp_path / "go")
  assert "codebook has collapsed" in caplog.text


def test_zero_updates_is_an_error(tmp_path):
  config = tiny.config("classify", total_epochs=3.0, **{"data.num_examples": 10})
  config.total_steps = None
  with pytest.raises(
    UserError, match="not make a single update: its 10 examples are 0 batches of batch_size=16"
  ):
    train.run(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_other_reconstruction_losses_and_straight_through(reconstruction, tmp_path):
  changes = {"loss.reconstruction": reconstruction, "loss.straight_through": True, "total_steps": 2}
  result = train.run(tiny.config("dvae", **changes), tmp_path)
  assert 0 < result["eval"]["mae"] < 1 and 0 < result["eval"]["codebook_usage"] <= 1


@pytest.mark.slow
def test_figures(whole_run, tokenizer_run, tmp_path):
  for name, config in {
    "reconstructions": tiny.config("dvae", total_steps=1, figures=True),
    "masked_image_modelling": _beit(tokenizer_run, total_steps=3, figures=True),
    "predictions": tiny.config("classify", total_steps=1, figures=True),
  }.items():
    train.run(config, tmp_path / name)
    assert (tmp_path / name / "figures" / f"{name}.png").stat().st_size > 1000


def test_overfits_one_batch(tmp_path):
  """The whole program learns: 16 images, 60 steps, from chance (1/8) to near certainty."""
  config = tiny.config(
    "classify",
    total_steps=80,
    log_every_steps=40,
    **{"data.num_examples": 16, "data.crop": "center", "data.flip": False, "loss.label_smoothing": 0.0},
    **{
      "model.drop_path_rate": 0.0,
      "optimizer.layer_decay": 1.0,
      "optimizer.learning_rate": 3e-3,
      "eval.split": "",
    },
  )
  assert train.run(config, tmp_path)["last"]["acc1"] >= 0.9


@pytest.mark.slow
def test_one_compilation_of_the_step(whole_run, tokenizer_run, tmp_path):
  """Shapes are static: the step is traced once, whatever the masks are."""
  import chex

  chex.clear_trace_counter()
  original = train.loop.make_train_step

  def counted(objective, *args):
    objective.loss = chex.assert_max_traces(objective.loss, n=1)
    return original(objective, *args)

  train.loop.make_train_step = counted
  try:
    train.run(_beit(tokenizer_run, **{"mask.kind": "block_at_most"}), tmp_path)
  finally:
    train.loop.make_train_step = original


def test_averaged_weights_by_hand(tmp_path):
  """ema_n = d * ema_(n-1) + (1 - d) * params_n from the very first parameters; evaluated, saved, resumed, loaded."""
  changes = {"optimizer.ema_decay": 0.7, "checkpoint.every_steps": 1, "checkpoint.keep": 9, "total_steps": 4}
  config = tiny.config("classify", **changes)
  result = train.run(config, tmp_path / "run")
  assert {"loss", "acc1", "ema_loss", "ema_acc1"} <= set(result["eval"])
  folders = [tmp_path / "run" / "checkpoints" / str(step) for step in range(1, 5)]
  params = [trees.flatten(checkpoint.load_params(folder)) for folder in folders]
  kept = [trees.flatten(checkpoint.load_params(folder, "ema")) for folder in folders]
  for name in params[0]:
    for step in range(1, 4):
      wanted = 0.7 * kept[step - 1][name].astype(np.float64) + 0.3 * params[step][name]
      np.testing.assert_allclose(kept[step][name], wanted, rtol=1e-5, atol=1e-8, err_msg=name)
  # The first update has learning rate 0 (warm-up off: the full rate): the average starts at the first parameters.
  start = {n: (kept[0][n] - 0.3 * params[0][n].astype(np.float64)) / 0.7 for n in params[0]}
  np.testing.assert_allclose(start["fc_norm/scale"], 1.0, atol=1e-6)
  averaged = beit_jax.load(tmp_path / "run", ema=True)
  np.testing.assert_array_equal(averaged.params["head"]["kernel"], kept[-1]["head/kernel"])
  shutil.rmtree(folders[3])
  shutil.rmtree(folders[2])
  (tmp_path / "run" / "result.json").unlink()
  train.run(config, tmp_path / "run")
  again = trees.flatten(checkpoint.load_params(folders[3], "ema"))
  for name, value in kept[-1].items():
    np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.slow
def test_averaged_weights_of_a_run_without_them_are_refused(tmp_path):
  train.run(tiny.config("classify", total_steps=2), tmp_path)
  with pytest.raises(UserError, match="no averaged weights"):
    beit_jax.load(tmp_path, ema=True)
  train.run(tiny.config("classify", **{"total_steps": 3, "optimizer.ema_decay": 0.5}), tmp_path)
  assert beit_jax.load(tmp_path, ema=True).kind == "classifier"


@pytest.mark.slow
def test_the_best_state_is_kept(tmp_path):
  """Evaluated after every step; workdir/best holds the lowest loss seen, across a resume."""
  changes = {
    "eval.every_steps": 1,
    "checkpoint.best": "loss",
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 9,
  }
  config = tiny.config("classify", **changes, **{"optimizer.learning_rate": 0.05, "total_steps": 8})
  train.run(config, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
  best = min(losses, key=losses.get)
  kept = beit_jax.load(tmp_path / "best").description
  assert kept["step"] == best and kept["best"] == {"metric": "loss", "value": losses[best]}
  for step in (6, 8):
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
  (tmp_path / "result.json").unlink()
  train.run(config, tmp_path)
  assert beit_jax.load(tmp_path / "best").description["best"] == kept["best"]


@pytest.mark.slow
def test_a_restarted_run_forgets_the_earlier_best_state(tmp_path):
  """Checkpoints deleted, best kept, another metric: what was best before does not count, nor stand in the way.

  That is refused until what tells of the checkpoints is moved away too.
  """
  changes = {"eval.every_steps": 1, "checkpoint.best": "loss", "total_steps": 3}
  config = tiny.config("classify", **changes, **{"optimizer.learning_rate": 1e-6, "optimizer.min_lr": 0.0})
  train.run(config, tmp_path)
  assert beit_jax.load(tmp_path / "best").description["step"] > 1
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "result.json").unlink()
  other = tiny.config("classify", **{**changes, "checkpoint.best": "acc5", "seed": 1})
  with pytest.raises(UserError, match="has 3 steps"):
    train.run(other, tmp_path)
  for name in ("metrics.jsonl", "saved.json"):
    (tmp_path / name).rename(tmp_path / f"before_{name}")
  train.run(other, tmp_path)
  kept = beit_jax.load(tmp_path / "best").description
  assert kept["best"]["metric"] == "acc5"
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  scores = {row["step"]: row["eval_acc5"] for row in rows if "eval_acc5" in row}
  assert kept["step"] == max(scores, key=scores.get) and kept["best"]["value"] == max(scores.values())


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"checkpoint.best": "acc_1"}, "acc_1.*choose one of loss, acc1, acc5"),
    ({"checkpoint.best": "ema_acc1"}, "ema_acc1.*not evaluated"),
    ({"checkpoint.best": "acc1", "eval.split": ""}, "eval.split"),
    ({"data.random_erasing": 2.0}, "random_erasing"),
    ({"loss.mix_switch_prob": 5.0}, "mix_switch_prob"),
    ({"loss.label_smoothing": 3.0}, "label_smoothing"),
    ({"data.crop_pct": 0.0}, "crop_pct"),
    ({"data.interpolation": "bad"}, "interpolation.*bicubic"),
    ({"data.crop": "bad"}, "random_resized"),
    ({"data.resize": "bad"}, "squash"),
    ({"data.rand_augment": "bad"}, "rand-m9-mstd0.5-inc1"),
    ({"data.label_file": "labels.csv"}, "only for data.source='folder'"),
  ],
)
def test_mistakes_are_found_before_the_first_step(changes, fact, tmp_path):
  with pytest.raises(UserError, match=fact):
    train.run(tiny.config("classify", **changes), tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("objective", ["dvae", "classify"])
def test_training_in_float16_is_refused(objective, tmp_path):
  with pytest.raises(UserError, match="'model.dtype': .*float16.*(loss scaling|on a CPU)"):
    train.run(tiny.config(objective, **{"model.dtype": "float16"}), tmp_path)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is float16 attention on a GPU")
@pytest.mark.parametrize("objective", ["classify", "knn"])
def test_evaluation_in_float16_on_a_cpu_is_refused(objective, tmp_path):
  changes = {"model.dtype": "float16", "eval_only": True}
  with pytest.raises(UserError, match="'model.dtype': JAX has no float16 attention on a CPU"):
    train.run(tiny.config(objective, **changes), tmp_path)


def test_a_loss_that_stays_not_finite_ends_the_run(tmp_path):
  """With a learning rate of 1e30 the run stops within a few steps and saves only finite values."""
  changes = {
    "optimizer.learning_rate": 1e30,
    "optimizer.min_lr": 1e30,
    "total_steps": 30,
    "checkpoint.every_steps": 1,
  }
  with pytest.raises(UserError, match="loss nan|loss inf|norm nan|norm inf"):
    train.run(tiny.config("classify", **changes), tmp_path)
  for step in checkpoint.steps(tmp_path / "checkpoints"):
    assert step < 10
    params = checkpoint.load_params(tmp_path / "checkpoints" / str(step))
    assert all(np.isfinite(value).all() for value in trees.flatten(params).values())


@pytest.mark.parametrize("decay_end", [None, 0.5])
def test_a_skipped_step_does_not_delay_the_schedules(decay_end):
  """After a step whose loss is not finite, the applied learning rate and weight decay are those of the next step."""
  changes = {"total_steps": 20, "optimizer.name": "sgd", "optimizer.momentum": 0.0}
  changes |= {"optimizer.warmup_steps": 10, "optimizer.weight_decay": 0.1, "optimizer.layer_decay": 1.0}
  config = tiny.config("classify", **changes, **{"optimizer.weight_decay_end": decay_end})
  mesh = sharding.make_mesh(1, 1)
  with jax.set_mesh(mesh):
    plan = train.prepare(config, mesh)
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=4), jnp.float32)

    class Linear:
      """loss = scale * sum(kernel): the gradient is the batch's scale."""

      def loss(self, variables, frozen, batch, key, step):
        total = batch["scale"] * variables["params"]["kernel"].sum()
        return LossOutput({"loss": Metric(total, jnp.ones(()))})

      def after_update(self, params, collections, statistics, step):
        return collections

    tx = step_lib.make_optimizer(config, plan.schedules, {"kernel": weights}, 0)
    make = lambda: {"params": {"kernel": weights}}
    state, _, shardings = train_state.create(make, tx, mesh)
    one_step = step_lib.make_train_step(Linear(), tx, 1, jax.random.key(0), shardings)
    for number, scale in enumerate([1.0, np.nan, np.inf, 1.0, 1.0]):
      before = np.asarray(state.params["kernel"])
      state, _ = one_step(state, {}, {"scale": jnp.float32(scale)})
      rate, decay = (plan.schedules[key](number) for key in ("learning_rate", "weight_decay"))
      wanted = before - rate * (1.0 + decay * before) if np.isfinite(scale) else before
      np.testing.assert_allclose(state.params["kernel"], wanted, rtol=1e-6, err_msg=str(number))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_of_averages_outside_its_range(decay, tmp_path):
  with pytest.raises(UserError, match="ema_decay"):
    train.run(tiny.config("classify", **{"optimizer.ema_decay": decay}), tmp_path)


@pytest.mark.slow
def test_fine_tuning_a_plain_vit(tmp_path):
  """A supervised or DINO ViT, a file in timm's names: absolute positions, no tables, k biases; a fresh head."""
  encoder = dict(image_size=(16, 16), patch_size=2, width=32, depth=2, num_heads=2, weight_init="finetune")
  encoder |= dict(rel_pos="none", abs_pos=True, layer_scale_init=0.0)
  module = make_module("classifier", dict(encoder=encoder, num_classes=5, pool="cls", head_init_scale=1.0))
  params = module.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
  look = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(16, 16), crop_pct=1.0)
  look |= dict(interpolation="bicubic", resize="short_side")
  beit_jax.save(Pretrained("classifier", params, module, look), tmp_path / "vit.pth", format="timm")
  changes = {"model.preset": "paper", "init_from": str(tmp_path / "vit.pth"), "checkpoint.every_steps": 1}
  train.run(tiny.config("classify", **changes, **{"total_steps": 1}), tmp_path / "run")
  found = trees.flatten(beit_jax.load(tmp_path / "run").params)
  assert found["head/kernel"].shape == (32, 8)
  wanted = trees.flatten(params)
  moved = [np.abs(found[n] - v).max() for n, v in wanted.items() if n in found and n.startswith("encoder/")]
  assert len(moved) == len([n for n in found if n.startswith("encoder/")]) and max(moved) <= 2e-3
