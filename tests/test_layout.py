"""Imports go down the layers only and never in a circle; contract names exist; the main recipe is the paper's."""

import ast
from pathlib import Path

import pytest

import beit_jax
from beit_jax import masking, objectives, transfer
from beit_jax.config import parse as config_lib
from beit_jax.weights import kinds
from tests.conftest import ROOT

# The layers of docs/architecture.md. A module imports only from rows below its own and from its own folder.
ROWS = (
  ("main", "convert", "plan", "predict", "doctor", "tokenize", "__init__", "__main__"),
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
MAX_TOP_LEVEL_MODULES = 15
PACKAGE = ROOT / "beit_jax"


def module_name(path: Path) -> str:
  """The dotted name of a file of the library, without the leading `beit_jax.`; "__init__" for the package itself."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(source: str) -> set[str]:
  """The modules of the library that a source text imports, inside functions too, named as in `MODULES`.

  Imports of the package itself (`import beit_jax`) are left out: every module of a package imports the package.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        # `from a import b` imports the module a.b if it exists, otherwise the name b of module a.
        submodule = f"{node.module}.{alias.name}"
        found.add(submodule if submodule.removeprefix("beit_jax.") in MODULES else node.module)
  return {name.removeprefix("beit_jax.") for name in found if name.startswith("beit_jax.")}


def import_circle(graph: dict[str, set[str]]) -> list[str]:
  """The nodes of one circle in the graph, the first one repeated at the end; [] if there is no circle."""
  finished: set[str] = set()

  def visit(name: str, path: list[str]) -> list[str]:
    if name in path:
      return [*path[path.index(name) :], name]
    if name not in finished:
      for other in sorted(graph.get(name, ())):
        if circle := visit(other, [*path, name]):
          return circle
      finished.add(name)
    return []

  for name in sorted(graph):
    if circle := visit(name, []):
      return circle
  return []


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_the_layers(name):
  layer = name.split(".")[0]
  assert layer in LEVEL, f"{name} belongs to no layer"
  for other in {module.split(".")[0] for module in imported_modules(MODULES[name].read_text())} - {layer}:
    assert LEVEL[other] > LEVEL[layer], f"{name} imports {other}"


def test_no_import_circles():
  assert not import_circle({name: imported_modules(path.read_text()) for name, path in MODULES.items()})
  assert import_circle({"a": {"b"}, "b": {"c", "d"}, "d": {"a"}}) == ["a", "b", "d", "a"]


def test_few_modules_at_the_top_level():
  assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL_MODULES


def test_models_do_not_import_config_data_sharding_or_optimizer():
  for name, path in MODULES.items():
    if name.split(".")[0] == "models":
      names = imported_modules(path.read_text())
      assert not {n.split(".")[0] for n in names} & {"config", "data", "optim"}, name
      assert "runtime.sharding" not in names, name


def test_contract_names():
  for function in (masking.block_mask, masking.block_mask_at_most, masking.random_mask):
    assert callable(function)
  for function in (beit_jax.load, beit_jax.save, transfer.resize_rel_pos_table, transfer.resize_pos_embed):
    assert callable(function)


def test_full_size_recipe_is_that_of_the_paper():
  """Table 12: batch 2048, lr 1.5e-3, 800 epochs, warm-up 10, clip 3.0. Masks as in unilm: 75 of 196, blocks from 16."""
  stage = config_lib.load(f"{ROOT}/configs/beit_base.py", [], objectives.schemas()).pretrain
  o = stage.optimizer
  assert (stage.batch_size, stage.total_epochs, o.warmup_epochs) == (2048, 800, 10)
  assert (o.learning_rate, o.min_lr, o.weight_decay, o.clip_norm) == (1.5e-3, 1e-5, 0.05, 3.0)
  assert (stage.mask.num_masked, stage.mask.min_block_patches, stage.mask.kind) == (75, 16, "block")
  assert (stage.data.image_size, stage.data.token_image_size, stage.data.color_jitter) == (224, 112, 0.4)
  large = config_lib.load(f"{ROOT}/configs/beit_large.py", [], objectives.schemas()).pretrain
  assert large.optimizer.clip_norm == 1.0 and large.model.variant == "large"


# Where the names of objectives and kinds of models may be compared: the two tables.
TABLES = ("objectives", "weights.kinds")


def compared_names(source: str, names: set[str]) -> list[str]:
  """The comparisons of something called `kind` or `objective` with one of `names`, as source text."""
  found = []
  for node in ast.walk(ast.parse(source)):
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    values = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
    called = {side.attr for side in sides if isinstance(side, ast.Attribute)}
    called |= {side.id for side in sides if isinstance(side, ast.Name)}
    if called & {"kind", "objective"} and values & names:
      found.append(ast.unparse(node))
  return found


@pytest.mark.parametrize("name", MODULES)
def test_objectives_and_kinds_are_compared_in_their_tables_only(name):
  """A new objective or kind of model is one row of a table, not an `if` elsewhere."""
  names = {*objectives.OBJECTIVES, *kinds.KINDS}
  assert name in TABLES or not compared_names(MODULES[name].read_text(), names)


def test_comparisons_are_found():
  source = (
    'a = run.objective == "beit"\nb = kind in ("mim", "x")\nc = kind == "x"\nd = "mim" in run.kind.sections'
  )
  assert compared_names(source, {"beit", "mim"}) == ["run.objective == 'beit'", "kind in ('mim', 'x')"]
