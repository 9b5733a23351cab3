"""Everything that can be optimised. A new objective is a file here and a line in `OBJECTIVES`."""

from beit_jax.objectives.base import Objective
from beit_jax.objectives.beit import Beit
from beit_jax.objectives.classify import Classify
from beit_jax.objectives.dvae import Dvae
from beit_jax.objectives.probe import Knn, LinearProbe
from beit_jax.objectives.segment import Segment

OBJECTIVES: dict[str, type[Objective]] = {
  "dvae": Dvae,
  "beit": Beit,
  "classify": Classify,
  "segment": Segment,
  "linear_probe": LinearProbe,
  "knn": Knn,
}


def model_fields() -> dict[str, dict]:
  """Objective -> the keys of its config's `model` section with their defaults."""
  return {name: objective.model_fields() for name, objective in OBJECTIVES.items()}
