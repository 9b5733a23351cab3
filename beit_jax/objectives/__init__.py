"""Everything that can be trained or evaluated. A new objective is a file here and a line in `OBJECTIVES`."""

from ml_collections import ConfigDict

from beit_jax.config.parse import Schema
from beit_jax.objectives.base import EvalOutput, LossOutput, Metric, Objective
from beit_jax.objectives.beit import MaskedImageModeling
from beit_jax.objectives.classify import Classification
from beit_jax.objectives.dino import SelfDistillation
from beit_jax.objectives.dvae import TokenizerTraining
from beit_jax.objectives.probe import Knn, LinearProbe
from beit_jax.objectives.segment import Segmentation
from beit_jax.objectives.vqkd import VqkdTraining

__all__ = ["OBJECTIVES", "EvalOutput", "LossOutput", "Metric", "Objective", "objective_of", "schemas"]

OBJECTIVES: dict[str, type[Objective]] = {
  "dvae": TokenizerTraining,
  "vqkd": VqkdTraining,
  "beit": MaskedImageModeling,
  "dino": SelfDistillation,
  "classify": Classification,
  "segment": Segmentation,
  "linear_probe": LinearProbe,
  "knn": Knn,
}


def objective_of(config: ConfigDict) -> type[Objective]:
  """The class of objective that a complete config of one run names."""
  return OBJECTIVES[config.objective].variant(config)


def schemas() -> dict[str, Schema]:
  """Objective -> the config sections that only it reads, and their ranges."""
  return {name: Schema(kind.config_section(), kind.value_ranges) for name, kind in OBJECTIVES.items()}
