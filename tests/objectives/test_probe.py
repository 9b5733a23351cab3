"""Linear probe and k-NN on a frozen encoder: features, the loss by hand, the vote, whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beit_jax
from beit_jax import train, trees
from beit_jax.data import examples, pipeline, sources
from beit_jax.errors import BadImage, UserError
from beit_jax.models.beit import Beit
from beit_jax.models.heads import LinearProbes, block_features
from beit_jax.objectives import LinearProbe, probe
from beit_jax.run import checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """A masked image model with random weights, saved in our format."""
  from beit_jax.weights.kinds import make_module
  from beit_jax.weights.pretrained import Pretrained

  encoder = dict(image_size=(16, 16), patch_size=2, width=32, depth=2, num_heads=2, weight_init="finetune")
  module = make_module("mim", dict(encoder=encoder, vocab_size=16))
  params = module.init(jax.random.key(5), np.zeros((1, 16, 16, 3)))["params"]
  look = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(16, 16), crop_pct=1.0)
  look |= dict(interpolation="bicubic", resize="short_side")
  path = tmp_path_factory.mktemp("backbone") / "model"
  beit_jax.save(Pretrained("mim", params, module, look), path, format="orbax")
  return path


def test_features_are_cls_and_the_mean_of_the_patches_of_every_block():
  module = Beit(image_size=(8, 8), patch_size=2, width=8, depth=3, num_heads=2, final_norm=False)
  image = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  params = module.init(jax.random.key(1), image)
  last, out = module.apply(params, image)
  features = block_features(out)
  assert features.shape == (3, 4, 16)
  np.testing.assert_array_equal(features[2, :, :8], last[:, 0])  # not normalized
  np.testing.assert_allclose(features[0, :, 8:], out["block_00"][:, 1:].mean(1), rtol=1e-6)


def test_probes_start_small_and_are_independent():
  features = jax.random.normal(jax.random.key(0), (3, 4, 64))
  module = LinearProbes(10)
  params = module.init(jax.random.key(1), features)
  flat = trees.flatten(params["params"])
  kernels = np.concatenate([np.ravel(v) for n, v in flat.items() if n.endswith("kernel")])
  assert kernels.std() == pytest.approx(0.01, rel=0.05)
  assert all((np.asarray(v) == 0).all() for n, v in flat.items() if n.endswith("bias"))
  grads = jax.grad(lambda p: module.apply(p, features)[1].sum())(params)["params"]
  assert all((np.abs(v).max() > 0) == n.startswith("head_01") for n, v in trees.flatten(grads).items())


def test_the_loss_is_the_sum_over_blocks_and_the_encoder_stays(backbone, tmp_path):
  config = tiny.config("linear_probe", **{"encoder.init_from": str(backbone), "total_steps": 3})
  source = sources.make_source(config.data.to_dict())
  objective = LinearProbe(config, source)
  variables = objective.init(jax.random.key(0))
  batch = {
    "image": np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8),
    "label": np.arange(4, dtype=np.int32),
    "valid": np.array([True, True, True, False]),
  }
  frozen = objective.frozen_params(None)
  sums = objective.eval_step(variables, frozen, batch).metrics
  loaded = beit_jax.load(backbone)
  x = loaded.preprocess(batch["image"])
  _, out = Beit(**loaded.module.encoder).apply({"params": loaded.params["encoder"]}, x, train=False)
  logits = LinearProbes(8).apply(variables, block_features(out))
  log_probs = jax.nn.log_softmax(logits)
  wanted = -sum(log_probs[layer, i, i] for layer in range(2) for i in range(3))
  np.testing.assert_allclose(sums["loss"][0], wanted, rtol=1e-5)
  assert sums["loss"][1] == 3
  before = {n: np.array(v) for n, v in trees.flatten(objective.encoder_params).items()}
  result = train.run(config, tmp_path / "run")
  assert set(result["eval"]) == {"loss", "acc1", "acc1_00", "acc1_01", "best_block"}
  assert result["eval"]["acc1"] == max(result["eval"]["acc1_00"], result["eval"]["acc1_01"])
  kept = checkpoint.load_params(checkpoint.find(tmp_path / "run"))
  assert {n.split("/")[0] for n in trees.flatten(kept)} == {"head_00", "head_01"}
  after = trees.flatten(beit_jax.load(backbone).params["encoder"])
  for name, value in before.items():
    np.testing.assert_array_equal(value, after[name])
  only = tiny.config("linear_probe", **{"encoder.init_from": str(backbone), "eval_only": True})
  again = train.run(only, tmp_path / "run")
  assert again["eval"] == pytest.approx(result["eval"], rel=1e-6)
  assert (tmp_path / "run" / "per_block.csv").read_text().startswith("block,acc1\n0,")
  other = tiny.config("linear_probe", **{"seed": 5, "eval_only": True})
  with pytest.raises(UserError, match="another encoder"):
    train.run(other, tmp_path / "run")
  with pytest.raises(UserError, match="heads of a linear probe without their encoder"):
    beit_jax.load(tmp_path / "run")


def test_vote_by_hand():
  """Three neighbors at angles 0, 60 and 90 degrees, T = 0.5: exp(2) for class 1, exp(1) + exp(0) for class 0."""
  bank = jnp.array([[1.0, 0.0], [0.5, 3**0.5 / 2], [0.0, 1.0], [-1.0, 0.0]])
  votes = probe.knn_vote(
    jnp.array([[1.0, 0.0]]), bank, label=jnp.array([1, 0, 0, 2]), num_classes=3, k=3, temperature=0.5
  )
  np.testing.assert_allclose(votes[0], [np.exp(1) + 1, np.exp(2), 0], rtol=1e-6)


def test_knn_finds_the_training_images_themselves(backbone, tmp_path):
  """With k = 1 every training image finds itself: 100 %, also on another mesh."""
  changes = {"encoder.init_from": str(backbone), "knn.k": 1, "eval.split": "train", "eval.num_examples": 96}
  result = train.run(tiny.config("knn", **changes), tmp_path / "run")
  assert result["eval"]["acc1_00"] == result["eval"]["acc1_01"] == 1.0 and result["examples"] == 96
  changes = {**changes, "eval.split": "test", "knn.k": 5, "knn.blocks": (1,)}
  results = [
    train.run(tiny.config("knn", **changes, **{"mesh.data": n}), tmp_path / f"mesh{n}")["eval"]
    for n in (1, 4)
  ]
  assert results[0] == results[1] and set(results[0]) == {"acc1", "acc1_01", "best_block"}
  assert 0 < results[0]["acc1"] < 1


def test_knn_leaves_a_broken_image_out(backbone, tmp_path, monkeypatch, caplog):
  decode = examples.decode

  def broken(example, index, *field):
    if index == 3:
      raise BadImage("example 3 is broken")
    return decode(example, index, *field)

  monkeypatch.setattr(pipeline, "decode", broken)
  train.run(tiny.config("knn", **{"encoder.init_from": str(backbone), "data.max_bad": 0.1}), tmp_path)
  assert "k-NN: 95 training images" in caplog.text


@pytest.mark.parametrize(
  "changes, fact",
  [
    ({"data.mean": (0.4, 0.5, 0.5)}, "data.mean"),
    ({"data.image_size": 32}, "data.image_size"),
    ({"knn.k": 97}, "knn"),
    ({"knn.blocks": (2,)}, "blocks 0 to 1"),
  ],
)
def test_mistakes(changes, fact, backbone, tmp_path):
  with pytest.raises(UserError, match=fact):
    train.run(tiny.config("knn", **{"encoder.init_from": str(backbone), **changes}), tmp_path)
