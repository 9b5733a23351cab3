"""The compiled training step on a mesh: what it moves between devices, and in which dtype it adds gradients."""

from pathlib import Path

import jax
import pytest

from beit_jax.objectives import stages
from beit_jax.plan import abstract, hlo
from tests import tiny


def _step(objective, **changes):
  """The training step of a tiny run on all eight devices; BEiT's tokenizer need not exist."""
  changes = {"mesh.data": -1, "batch_size": 16, **changes}
  tokenizer = stages.Stage("tokenizer", tiny.config("dvae", **{"model.vocab_size": 512}), Path("tokenizer"))
  if objective == "beit":
    changes["tokenizer.init_from"] = "tokenizer"
  run = stages.Stage("run", tiny.config(objective, **changes), Path("run"))
  run.uses["tokenizer.init_from"] = tokenizer
  return abstract.make_step(run, jax.devices())


@pytest.mark.parametrize("fsdp", [1, 4, 8])
@pytest.mark.parametrize("objective", ["beit", "classify", "segment"])
def test_activations_are_not_regrouped(objective, fsdp):
  """Every device keeps the logits of its own images, whatever axis of the head's kernel is sharded."""
  step = _step(objective, **{"mesh.fsdp": fsdp, "batch_size": 16})
  text = step.trace().lower().compile().as_text()
  assert "all-to-all" not in hlo.read(text).collectives
