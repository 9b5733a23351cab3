"""Everything that can be optimised. A new objective is a file here and a line in `OBJECTIVES`."""

from beit_jax.objectives.base import Objective
from beit_jax.objectives.beit import MaskedImageModeling
from beit_jax.objectives.classify import Classification
from beit_jax.objectives.dvae import TokenizerTraining
from beit_jax.objectives.probe import Knn, LinearProbe
from beit_jax.objectives.segment import Segmentation

OBJECTIVES: dict[str, type[Objective]] = {
  "dvae": TokenizerTraining,
  "beit": MaskedImageModeling,
  "classify": Classification,
  "segment": Segmentation,
  "linear_probe": LinearProbe,
  "knn": Knn,
}


def model_fields() -> dict[str, dict]:
  """Objective -> the keys of its config's `model` section with their defaults."""
  return {name: objective.model_fields() for name, objective in OBJECTIVES.items()}
