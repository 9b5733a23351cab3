"""The runs of a config: one, or its stages with the results that each takes from earlier ones."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from beit_jax.errors import UserError
from beit_jax.objectives import Objective, objective_of
from beit_jax.objectives.base import Loader
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained

PREFIX = "stage:"


@dataclasses.dataclass
class Stage:
  """One run of a config.

  Attributes:
    name: the stage's name; "" for a config without stages.
    config: the complete config, in which folders have replaced "stage:NAME".
    folder: the run's workdir.
    uses: config key -> the earlier stage whose result it names.
  """

  name: str
  config: ConfigDict
  folder: Path
  uses: dict[str, "Stage"] = dataclasses.field(default_factory=dict)

  @property
  def objective(self) -> type[Objective]:
    return objective_of(self.config)

  @property
  def is_replaced(self) -> bool:
    """Whether the stage is not run, because `init_from` names a model that takes the place of its result."""
    return bool(self.name and self.objective.import_replaces_run and self.config.init_from)


def checkpoint_keys(config: ConfigDict) -> list[str]:
  """The config keys that may name a checkpoint or "stage:NAME"."""
  return [
    "init_from",
    "resume",
    *(f"{name}.init_from" for name in objective_of(config).frozen_sections),
  ]


def resolve(config: ConfigDict, folder: Path) -> list[Stage]:
  """Lists the runs of a config in order, and replaces "stage:NAME" by the folder of that stage's result.

  Args:
    config: a complete config, with stages or without; the configs of its runs are changed in place.
    folder: the workdir; stages run in sub-folders.

  Returns:
    All stages, those included that an imported model replaces (`Stage.is_replaced`).

  Raises:
    UserError: a key names no earlier stage.
  """
  if "stages" not in config:
    return [Stage("", config, folder)]
  stages: dict[str, Stage] = {}
  for name in config.stages:
    stage = Stage(name, config[name], folder / name)
    for key in checkpoint_keys(stage.config):
      section, last = _section(stage.config, key)
      value = section[last] or ""
      if not value.startswith(PREFIX):
        continue
      earlier = stages.get(value.removeprefix(PREFIX))
      if earlier is None:
        raise UserError(
          f"config key '{name}.{key}': {value!r} names no earlier stage; there are {list(stages)}"
        )
      section[last] = earlier.config.init_from if earlier.is_replaced else str(earlier.folder)
      if not earlier.is_replaced:
        stage.uses[key] = earlier
    stages[name] = stage
  return list(stages.values())


def loader(pending: Iterable[Stage], load_other: Loader = weights_io.load) -> Loader:
  """A loader of models for a run that is only planned or checked.

  Args:
    pending: stages that have not run yet; their models have shapes in place of parameters.
    load_other: loads every other model.
  """
  results = {str(stage.folder): stage for stage in pending}

  def load(path: str) -> Pretrained:
    stage = results.get(path)
    return load_other(path) if stage is None else stage.objective.expected_result(stage.config).loaded

  return load


def _section(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """The section that holds a dotted key, and the last part of the key."""
  section, _, last = key.rpartition(".")
  return (config[section] if section else config), last
