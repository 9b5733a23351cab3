"""Imports go one way, names keep their promise, every config builds."""

import ast
from pathlib import Path

import pytest

import beit_jax
from beit_jax import masking, objectives, transfer
from beit_jax.config import parse as config_lib
from tests.conftest import ROOT

# A file imports only from rows below its own (and from its own package).
ROWS = (
  ("main", "convert", "plan", "predict", "doctor", "tokenize", "__init__"),
  ("train",),
  ("evaluate", "step"),
  ("objectives",),
  ("weights",),
  ("data", "transfer", "metrics", "augment"),
  ("run",),
  ("config",),
  ("models",),
  ("runtime", "optim"),
  ("masking", "losses", "trees", "errors"),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def _unit(path: Path) -> str:
  return path.relative_to(ROOT / "beit_jax").parts[0].removesuffix(".py")


def _imports(path: Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "beit_jax":
      parts = node.module.split(".")[1:]
      yield from ([parts[0]] if parts else [alias.name for alias in node.names])
    elif isinstance(node, ast.Import):
      yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("beit_jax."))


@pytest.mark.parametrize(
  "path", sorted((ROOT / "beit_jax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_one_way(path):
  unit = _unit(path)
  assert unit in LEVEL, f"{path} belongs to no row"
  for name in _imports(path):
    if name != unit:
      assert LEVEL[name] > LEVEL[unit], f"{path} imports {name}"


def test_models_know_nothing_of_config_data_and_sharding():
  for path in (ROOT / "beit_jax" / "models").glob("*.py"):
    assert not set(_imports(path)) & {"config", "data", "sharding", "optim"}, path


def test_contract_names():
  for function in (masking.block_mask, masking.block_mask_at_most, masking.random_mask):
    assert callable(function)
  for function in (beit_jax.load, beit_jax.save, transfer.resize_rel_pos_table, transfer.resize_pos_embed):
    assert callable(function)


def test_full_size_recipe_is_that_of_the_paper():
  """Table 12: batch 2048, lr 1.5e-3, 800 epochs, warm-up 10, clip 3.0; unilm's masks: 75 of 196, blocks from 16."""
  stage = config_lib.load(f"{ROOT}/configs/beit_base.py", [], objectives.model_fields()).pretrain
  o = stage.optimizer
  assert (stage.batch_size, stage.total_epochs, o.warmup_epochs) == (2048, 800, 10)
  assert (o.learning_rate, o.min_lr, o.weight_decay, o.clip_norm) == (1.5e-3, 1e-5, 0.05, 3.0)
  assert (stage.mask.num_masked, stage.mask.min_block_patches, stage.mask.kind) == (75, 16, "block")
  assert (stage.data.image_size, stage.data.token_image_size, stage.data.color_jitter) == (224, 112, 0.4)
  large = config_lib.load(f"{ROOT}/configs/beit_large.py", [], objectives.model_fields()).pretrain
  assert large.optimizer.clip_norm == 1.0 and large.model.variant == "large"
