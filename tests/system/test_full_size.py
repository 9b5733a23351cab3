"""A classifier of the released size: unilm file, fine-tuning at 224 and 384, evaluation, transformers."""

import io
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import objectives, train
from beit_jax.config import parse as config_lib
from beit_jax.data import sources
from beit_jax.models.beit import VARIANTS, preset_fields
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests.conftest import ROOT
from tests.peers import torch, transformers

DATA = Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared" / "data" / "tfds"))
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # warnings of other libraries
  pytest.mark.skipif(
    not (DATA / "imagenet_sample").is_dir(),
    reason="this test needs photographs: TFDS_DATA_DIR has no imagenet_sample",
  ),
]


@pytest.fixture(scope="module")
def unilm_file(tmp_path_factory):
  """A file with the shapes of beit_base_patch16_224_pt22k_ft22k.pth (21,841 classes) and random parameters."""
  encoder = {**VARIANTS["base"], **preset_fields("plus", "base", pretrain=False), "weight_init": "finetune"}
  module = make_module("classifier", dict(encoder=encoder, num_classes=21841, head_init_scale=1.0))
  params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 224, 224, 3)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: np.asarray(p) + 0.02 * rng.standard_normal(p.shape, np.float32), params)
  preprocessing = dict(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=(224, 224), crop_pct=0.875)
  preprocessing |= dict(interpolation="bicubic", resize="short_side")
  path = tmp_path_factory.mktemp("unilm") / "beit_base_patch16_224_pt22k_ft22k.pth"
  beit_jax.save(Pretrained("classifier", params, module, preprocessing), path, format="unilm")
  return path


@pytest.mark.parametrize("side, steps", [(224, 3), (384, 2)])
def test_a_unilm_file_is_fine_tuned_and_exported_to_transformers(side, steps, unilm_file, tmp_path):
  changes = [
    ("init_from", str(unilm_file)),
    ("data.name", "imagenet_sample"),
    ("data.data_dir", str(DATA)),
    ("data.workers", 0),
    ("eval.split", "train[:24]"),
    ("eval.batch_size", 8),
    ("batch_size", 4),
    ("total_epochs", None),
    ("total_steps", steps),
    ("optimizer.warmup_epochs", None),
    ("optimizer.learning_rate", 1e-4),
    ("model.dtype", "float32"),
    ("model.head_init_scale", 1.0),
    ("checkpoint.best", ""),
    ("figures", False),
    ("mesh.data", 1),
    ("log_every_steps", 1),
  ]
  spec = f"{ROOT}/configs/finetune_imagenet.py:base_ft22k,{side}"
  config = config_lib.load(spec, changes, objectives.schemas())
  result = train.run(config, tmp_path / "run")
  assert np.isfinite(result["last"]["loss"]) and np.isfinite(result["eval"]["loss"])
  ours = beit_jax.load(tmp_path / "run")
  assert ours.params["head"]["kernel"].shape == (768, 1000)
  beit_jax.save(ours, tmp_path / "hf", format="hf")
  theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path / "hf").eval()
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
  source = sources.make_source({**config.data.to_dict(), "split": "train[:3]"})
  for i in range(3):
    image = Image.open(io.BytesIO(source[i]["image"])).convert("RGB")
    x = ours.preprocess(np.asarray(image)[None])
    logits = np.asarray(ours.forward(x))
    with torch.no_grad():
      same = theirs(torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))).logits.numpy()
      own = theirs(**processor(image, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(same, logits, atol=1e-5 * max(1, np.abs(logits).max()))
    gap = np.abs(own - logits).max() / np.abs(logits).max()
    print(
      f"side {side} image {i}: largest logit {np.abs(logits).max():.3f}, gap after the processor {gap:.4f}"
    )
    assert gap <= 0.02
