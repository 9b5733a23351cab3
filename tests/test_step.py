"""The compiled training step on a mesh: what it moves between devices."""

from pathlib import Path

import jax

from beit_jax.objectives import stages
from beit_jax.plan import abstract, hlo
from tests import tiny


def test_logits_are_not_regrouped():
  """Every device keeps the logits of its own images, although FSDP shards the vocabulary of the head's kernel."""
  tokenizer = stages.Stage("tokenizer", tiny.config("dvae", **{"model.vocab_size": 512}), Path("tokenizer"))
  mesh = {"mesh.data": -1, "mesh.fsdp": 8}
  config = tiny.config("beit", batch_size=16, **mesh, **{"tokenizer.init_from": "tokenizer"})
  run = stages.Stage("run", config, Path("run"), {"tokenizer.init_from": tokenizer})
  compiled = abstract.make_step(run, jax.devices()).trace().lower().compile()
  collectives = hlo.read(compiled.as_text()).collectives
  assert "all-gather" in collectives and "all-to-all" not in collectives
