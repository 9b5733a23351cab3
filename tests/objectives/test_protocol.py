"""The protocol of an objective: its facts fit its config, and collections follow each update."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from beit_jax import step as step_lib
from beit_jax.config import parse
from beit_jax.data import sources
from beit_jax.errors import UserError
from beit_jax.objectives import OBJECTIVES, LossOutput, base, objective_of, schemas, stages
from beit_jax.objectives.classify import Classification
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from tests import tiny


def _dotted(section, prefix=""):
  for key, value in section.items():
    yield from _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_facts_fit_the_config(name):
  objective = OBJECTIVES[name]
  sections = objective.config_section()
  assert "model" in sections and objective.labels in ("none", "class", "map")
  assert all("init_from" in sections[section] for section in objective.frozen_sections)
  for pattern, _ in objective.value_ranges:
    assert any(re.fullmatch(pattern, key) for key in _dotted(sections)), pattern


class _Counting(Classification):
  """Adds up all labels in a collection, and keeps a copy of the updated bias of the head."""

  def init(self, key):
    variables = super().init(key)
    bias = jnp.zeros_like(variables["params"]["head"]["bias"])
    return {**variables, "seen": {"labels": jnp.zeros(()), "bias": bias}}

  def loss(self, variables, frozen, batch, key, step):
    collections = {"seen": variables["seen"]}
    parameters = {"params": variables["params"]}
    output = super().loss(parameters, frozen, batch, key, step)
    return LossOutput(output.metrics, collections, {"labels": batch["label"].sum().astype(jnp.float32)})

  def after_update(self, params, collections, statistics, step):
    labels = collections["seen"]["labels"] + statistics["labels"]
    return {"seen": {"labels": labels, "bias": params["head"]["bias"]}}


@pytest.mark.parametrize("microbatches", [1, 4])
def test_collections_follow_the_update(microbatches):
  """Statistics are summed over microbatches; `after_update` sees the new parameters."""
  config = tiny.config("classify", **{"model.drop_path_rate": 0.0})
  objective = _Counting(config, sources.make_source(config.data.to_dict()))
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  tx = step_lib.make_optimizer(config, step_lib.make_schedules(config, 6, 6), shapes, objective.depth)
  mesh = sharding.make_mesh(1, 1)
  batch = {name: np.zeros(s.shape, s.dtype) for name, s in objective.batch_shapes(8).items()}
  batch |= {"label": np.arange(8, dtype=np.int32) % 3, "valid": np.ones(8, bool)}
  with jax.set_mesh(mesh):
    state, _, shardings = train_state.create(lambda: objective.init(jax.random.key(0)), tx, mesh)
    step = step_lib.make_train_step(objective, tx, microbatches, jax.random.key(1), shardings)
    for count in (1, 2):
      state, _ = step(state, {}, batch)
      assert float(state.collections["seen"]["labels"]) == count * batch["label"].sum()
      bias = state.params["head"]["bias"]
      assert np.abs(bias).max() > 0
      np.testing.assert_array_equal(state.collections["seen"]["bias"], bias)


@pytest.mark.parametrize(
  "name", sorted(tiny.RUNS.keys() - {"linear_probe", "knn"})
)  # no stage starts from these
def test_the_expected_result_is_what_a_run_describes(name, tokenizer_run):
  """Plans of later stages rest on it: the same kind, module fields and parameters as those of the run itself."""
  uses_tokens = name in ("beit", "beit_v2")
  changes = {"tokenizer.init_from": str(tokenizer_run), "model.vocab_size": 16} if uses_tokens else {}
  changes |= {"model.num_classes": 8} if name == "classify" else {}
  changes |= {"teacher.init_from": "a teacher", "model.teacher_dim": 32} if name == "vqkd" else {}
  config = tiny.config(name, **changes)
  teacher = OBJECTIVES["classify"].expected_result(tiny.config("classify", **{"model.num_classes": 8}))
  load = (lambda path: teacher) if name == "vqkd" else None
  objective = objective_of(config)(config, sources.make_source(config.data.to_dict()), load)
  expected, described = objective_of(config).expected_result(config), objective.describe()
  assert expected.kind == described["kind"]
  assert base.field_values(expected.module) == described["module"]
  assert expected.preprocessing == {key: described["preprocessing"][key] for key in expected.preprocessing}
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  assert jax.tree.map(lambda x: x.shape, expected.params) == jax.tree.map(lambda x: x.shape, shapes)


def _stages(**runs):
  config = ConfigDict({"stages": tuple(runs), "summary": (), "seed": 0})
  for name, run in runs.items():
    config[name] = parse.complete(run, schemas(), name)
  return config


def test_stages_use_the_results_of_earlier_ones(tmp_path):
  config = _stages(
    tokenizer=dict(objective="dvae"),
    pretrain=dict(objective="beit", tokenizer=dict(init_from="stage:tokenizer")),
    finetune=dict(objective="classify", init_from="stage:pretrain"),
    probe=dict(objective="knn", encoder=dict(init_from="stage:pretrain")),
  )
  found = stages.resolve(config, tmp_path)
  assert [stage.name for stage in found] == ["tokenizer", "pretrain", "finetune", "probe"]
  assert [set(stage.uses) for stage in found] == [
    set(),
    {"tokenizer.init_from"},
    {"init_from"},
    {"encoder.init_from"},
  ]
  assert found[3].uses["encoder.init_from"] is found[1]
  assert config.probe.encoder.init_from == str(tmp_path / "pretrain")
  assert not any(stage.is_replaced for stage in found)


def test_an_imported_tokenizer_replaces_its_stage(tmp_path):
  config = _stages(
    tokenizer=dict(objective="dvae", init_from="dall_e"),
    pretrain=dict(objective="beit", tokenizer=dict(init_from="stage:tokenizer")),
  )
  tokenizer, pretrain = stages.resolve(config, tmp_path)
  assert tokenizer.is_replaced and not pretrain.uses and config.pretrain.tokenizer.init_from == "dall_e"


def test_a_stage_must_come_earlier(tmp_path):
  config = _stages(finetune=dict(objective="classify", init_from="stage:pretrain"))
  with pytest.raises(UserError, match="'finetune.init_from': 'stage:pretrain' names no earlier stage"):
    stages.resolve(config, tmp_path)
