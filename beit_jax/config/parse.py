"""Reads a run's configuration: a file and `--config.key=value` flags, laid over the defaults and validated.

A config file defines `get_config(variant)`, which returns plain `ml_collections` values: either one run, or
`stages = ("a", "b")` with one run under each name. `Schema` holds the keys of an objective with their defaults: an
unknown key or a value of another type is a `UserError` that names the nearest key.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beit_jax.config import ranges
from beit_jax.config.defaults import DEFAULTS, EitherOf, OptionalOf
from beit_jax.config.ranges import show
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

USAGE = "usage: python -m beit_jax.main --config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]"
Overrides = Sequence[tuple[str, Any]]
MAX_HINTS = 2  # keys that a message about an unknown key names


class Schema(NamedTuple):
  """What a config of one objective may hold.

  Attributes:
    sections: the objective's own sections with their defaults, `model` among them.
    rules: the rules of the objective's own sections, besides those in ranges.py.
  """

  sections: dict[str, Any]
  rules: ranges.Table = ()

  @property
  def keys(self) -> dict[str, Any]:
    """All keys of a run with their defaults, nested as in the config."""
    return {**DEFAULTS, **self.sections}


def load(spec: str, overrides: Overrides, schemas: Mapping[str, Schema]) -> ConfigDict:
  """Combines a config file, the defaults and command-line overrides into a complete config.

  In a staged config `--config.STAGE.key=value` sets a key of one stage, and `--config.key=value` sets it in every
  stage that has it. `--config.seed=1` is added to the seed of each stage.

  Args:
    spec: `FILE[:variant]`.
    overrides: (dotted key, value) pairs; a value is a Python value, or text as on the command line (`parse_value`).
    schemas: objective -> its schema.

  Returns:
    One complete run, or `stages`, `summary` and `comparison` with one complete run under each stage's name.

  Raises:
    UserError: the file cannot be used, a key is unknown, or a value has another type or is out of its range.
  """
  raw = load_file(spec)
  if "stages" not in raw:
    config, schema = _lay_over_defaults(raw, schemas, "")
    for dotted, value in overrides:
      set_dotted(config, dotted, value, schema.keys)
    ranges.check(config.to_dict(), table=schema.rules)
    return config
  return _load_stages(spec, raw, overrides, schemas)


def _load_stages(
  spec: str, raw: Mapping[str, Any], overrides: Overrides, schemas: Mapping[str, Schema]
) -> ConfigDict:
  names = raw["stages"]
  if not isinstance(names, tuple | list) or not names:
    raise UserError(f"--config={spec}: stages={show(names)} must be the names of one or more stages")
  settings = {
    "stages": tuple(names),
    "summary": raw.get("summary", ()),  # see run/summary.py
    "comparison": raw.get("comparison", {}),  # see run/comparison.py
    "seed": 0,
  }
  config, keys, tables = ConfigDict(settings), dict(settings), {}
  for name in names:
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_-]+", name) or name in config:
      raise UserError(
        f"--config={spec}: {show(name)} cannot name a stage; use letters, digits, _ and -, each name once, and not "
        "stages, summary, comparison or seed"
      )
    if name not in raw:
      raise UserError(f"--config={spec}: stage {name!r} is listed but not defined")
    config[name], schema = _lay_over_defaults(raw[name], schemas, name)
    keys[name], tables[name] = schema.keys, schema.rules
  unknown = set(raw) - set(config)
  if unknown:
    raise UserError(f"--config={spec}: keys {sorted(map(str, unknown))} are neither stages nor settings")
  for dotted, value in overrides:
    if dotted.split(".")[0] in config:
      set_dotted(config, dotted, value, keys)
    else:
      _set_in_stages(config, dotted, value, keys)
  for name in config.stages:
    if name not in names:
      raise UserError(f"config key 'stages': {show(name)} is none of the stages {', '.join(names)}")
  ranges.check_summary(config.summary)
  for name in names:
    config[name].seed += config.seed
    ranges.check(config[name].to_dict(), name, table=tables[name])
  return config


def _set_in_stages(config: ConfigDict, dotted: str, value: Any, keys: Mapping[str, Any]) -> None:
  """Sets a key in every stage that has it."""
  stages = [name for name in keys if isinstance(config[name], ConfigDict) and "objective" in config[name]]
  having = [name for name in stages if dotted in _leaves(config[name]) or dotted in config[name]]
  if not having:
    leaves = [leaf for name in stages for leaf in _leaves(config[name])]
    hint = _hint(dotted, leaves) or _similar(dotted, [*leaves, *_leaves(config)])
    raise UserError(f"config key {show(dotted)} is in none of the stages {', '.join(stages)}{hint}")
  if len(having) < len(stages):
    log.info("--config.%s: set in %s, the other stages have no such key", dotted, ", ".join(having))
  for name in having:
    set_dotted(config, f"{name}.{dotted}", value, keys)


def complete(run: Mapping[str, Any], schemas: Mapping[str, Schema], stage: str = "") -> ConfigDict:
  """Lays one run's config over the defaults of its objective and checks every value.

  Args:
    run: the keys that differ from the defaults.
    schemas: objective -> its schema.
    stage: the stage's name, for messages.

  Raises:
    UserError: a key is unknown, or a value has another type or is out of its range.
  """
  config, schema = _lay_over_defaults(run, schemas, stage)
  ranges.check(config.to_dict(), stage, table=schema.rules)
  return config


def _lay_over_defaults(
  run: Mapping[str, Any], schemas: Mapping[str, Schema], stage: str
) -> tuple[ConfigDict, Schema]:
  if not isinstance(run, dict | ConfigDict):
    raise UserError(
      f"config{' of stage ' + stage if stage else ''}: found {show(run)}, expected a ConfigDict"
    )
  objective = run.get("objective", DEFAULTS["objective"])
  if not isinstance(objective, str) or objective not in schemas:
    raise UserError(f"config key 'objective': {show(objective)} is unknown; there are {sorted(schemas)}")
  schema = schemas[objective]
  config = ConfigDict(_initial_values(schema.keys))
  overlay(config, dict(run.items()), schema.keys, stage)
  return config, schema


def _initial_values(keys: Mapping[str, Any]) -> dict[str, Any]:
  """Defaults without their markers. Every config gets its own placeholders, which ml_collections would share."""

  def value(default: Any) -> Any:
    if isinstance(default, OptionalOf):
      return placeholder(default.type) if default.default is None else default.default
    if isinstance(default, EitherOf):
      return default.default
    return _initial_values(default) if isinstance(default, dict) else default

  return {key: value(default) for key, default in keys.items()}


def overlay(
  config: ConfigDict,
  changes: Mapping[str, Any],
  keys: Mapping[str, Any],
  where: str = "",
  root: ConfigDict | None = None,
) -> None:
  """Writes nested `changes` into `config`.

  Args:
    config: a complete config or one of its sections; changed in place.
    changes: new values, nested like the config.
    keys: the defaults of `config` (see `Schema.keys`), which tell each key's type.
    where: dotted name of the section, for messages.
    root: the whole config, in which messages look for an unknown key; default: `config`.

  Raises:
    UserError: a key is unknown or a value has another type.
  """
  for key, value in changes.items():
    _set(config, key, value, keys, where, root or config)


def set_dotted(config: ConfigDict, dotted: str, value: Any, keys: Mapping[str, Any]) -> None:
  """Sets one key, for example `set_dotted(config, "data.crop", "pad", keys)`; arguments and errors as `overlay`."""
  *parents, last = dotted.split(".")
  node, where = config, ""
  for parent in parents:
    if parent not in node or not isinstance(node[parent], ConfigDict):
      _set(node, parent, {}, keys, where, config, last)  # raises: the key is unknown or no section
    node, keys, where = node[parent], keys[parent], f"{where}.{parent}" if where else parent
  if isinstance(node.get(last), ConfigDict):
    raise UserError(
      f"config key {dotted!r} is a section; set one of its keys: {', '.join(sorted(node[last]))}"
    )
  if isinstance(value, str) and last in keys:
    value = _value_of_text(value, keys[last])
  _set(node, last, value, keys, where, config)


def _value_of_text(text: str, default: Any) -> Any:
  """`parse_value`; a key of type str takes a number as its text (`--config.data.split=2017`)."""
  value = parse_value(text)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return text if is_number and isinstance(default, str) else value


def _set(
  config: ConfigDict,
  key: str,
  value: Any,
  keys: Mapping[str, Any],
  where: str,
  root: ConfigDict,
  last: str = "",
) -> None:
  """Sets a key of a section.

  Args:
    config: the section.
    key: the key.
    value: its new value.
    keys: the defaults of the section.
    where: dotted name of the section.
    root: the whole config, in which messages look for an unknown key.
    last: the last part of the dotted key, if `key` is one of its parents.
  """
  name = f"{where}.{key}" if where else key
  if not isinstance(key, str) or key not in config:
    hint = _hint(last or key, _leaves(root)) or _similar(key, list(config))
    raise UserError(
      f"config key {show(name)} is unknown{hint}; the keys here are: {', '.join(sorted(config))}"
    )
  if isinstance(config[key], ConfigDict):
    if not isinstance(value, dict | ConfigDict):
      raise UserError(
        f"config key {name!r} is a section with the keys {', '.join(sorted(config[key]))}, got {show(value)}"
      )
    overlay(config[key], dict(value.items()), keys[key], name, root)
    return
  with config.ignore_type():
    config[key] = _convert(value, keys[key], name)


def _hint(key: Any, leaves: Sequence[str]) -> str:
  """The keys of other sections that have the name of an unknown key."""
  last = str(key).rpartition(".")[2]
  names = dict.fromkeys(repr(name) for name in leaves if name.rpartition(".")[2] == last)
  return f", did you mean {' or '.join(list(names)[:MAX_HINTS])}?" if names else ""


def _similar(key: Any, names: Sequence[str]) -> str:
  near = difflib.get_close_matches(str(key)[:100], names, 1, 0.5)
  return f", did you mean {near[0]!r}?" if near else ""


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
  """The dotted names of all keys that are no sections."""
  return [
    name
    for key, value in config.items()
    for name in (_leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"])
  ]


def _convert(value: Any, default: Any, name: str) -> Any:
  """The value in the type of its key: whole floats become ints, ints become floats, lists become tuples."""
  if isinstance(default, OptionalOf) and value is None:
    return None
  if isinstance(default, OptionalOf):
    types: tuple[type, ...] = (default.type,)
  else:
    types = default.types if isinstance(default, EitherOf) else (type(default),)
  if types == (float,) and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
    value = float(value)
  if int in types and isinstance(value, float) and value.is_integer():
    value = int(value)
  if tuple in types and isinstance(value, list):
    value = tuple(value)
  if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
    wanted = " or ".join(kind.__name__ for kind in types)
    raise UserError(
      f"config key {name!r} must be of type {wanted}, found {show(value)} ({type(value).__name__})"
    )
  return value


def load_file(spec: str) -> Mapping[str, Any]:
  """Runs `get_config` of `FILE[:variant]` and returns its result.

  Raises:
    UserError: there is no such file or variant, or the file's own code fails; names the line.
  """
  name, _, variant = spec.partition(":")
  path = (
    name if os.path.isfile(name) else shipped().get(name.removeprefix("configs/").removesuffix(".py"), "")
  )
  if not path:
    raise UserError(f"--config={show(name)}: no such file; the ready-made ones are {', '.join(shipped())}")
  with _errors_of(path, path):
    get_config = getattr(_import_file(path), "get_config", None)
  if not callable(get_config):
    raise UserError(f"--config={path}: the file has no get_config(variant) function")
  takes_variant = bool(inspect.signature(get_config).parameters)
  if variant and not takes_variant:
    raise UserError(f"--config={spec}: {path} has no variants")
  with _errors_of(path, spec):
    found = get_config(variant) if takes_variant and variant else get_config()
  if not isinstance(found, dict | ConfigDict):
    raise UserError(f"--config={spec}: get_config gave {show(found)}; expected a ConfigDict")
  return found


def shipped() -> dict[str, str]:
  """The configs that come with the library: name -> file. They lie in `configs/` of a checkout or of the package."""
  package = Path(__file__).resolve().parent.parent
  checkout = package.parent
  folder = (checkout if (checkout / "setup.py").is_file() else package) / "configs"
  return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


def _import_file(path: str) -> ModuleType:
  module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f"{path} is no Python file; a config is one with a get_config(variant) function")
  module = importlib.util.module_from_spec(module_spec)
  sys.path.insert(0, str(Path(path).resolve().parent))  # a config may import its neighbors
  writes_bytecode, sys.dont_write_bytecode = (
    sys.dont_write_bytecode,
    True,
  )  # no __pycache__ beside the user's file
  try:
    module_spec.loader.exec_module(module)
  finally:
    sys.dont_write_bytecode = writes_bytecode
    sys.path.pop(0)
  return module


@contextlib.contextmanager
def _errors_of(path: str, spec: str) -> Iterator[None]:
  """Turns errors of a config file's own code into a UserError with the line of the file."""
  try:
    yield
  except (UserError, SyntaxError, ImportError) as error:
    raise UserError(f"--config={spec}: {error}") from None
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f"line {lines[-1]}: " if lines else ""
    raise UserError(f"--config={spec}: {line}{type(error).__name__}: {error}") from error


def parse_args(argv: Sequence[str], usage: str = USAGE) -> tuple[str, str, list[tuple[str, Any]]]:
  """Reads `--config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]`.

  Returns:
    (spec, workdir, overrides); the values of overrides are text.

  Raises:
    UserError: a flag is unknown or has no value; ends with `usage`.
  """
  spec, workdir, overrides = "", "", []
  items = iter(argv)
  for item in items:
    name, equals, value = item.partition("=")
    if not name.startswith("--"):
      raise UserError(f"unexpected argument {item!r}; {usage}")
    if not equals:
      following = next(items, None)
      if following is None:
        raise UserError(f"{name} needs a value; {usage}")
      value = following
    if name == "--config":
      spec = value
    elif name == "--workdir":
      workdir = value
    elif name.startswith("--config."):
      overrides.append((name.removeprefix("--config."), value))
    else:
      raise UserError(f"unknown flag {name}; {usage}")
  if not spec:
    raise UserError(f"--config is missing; {usage}")
  return spec, workdir, overrides


def default_workdir(spec: str) -> str:
  """`configs/name.py:variant` -> "runs/name_variant"."""
  path, _, variant = spec.partition(":")
  return f"runs/{Path(path).stem}{'_' if variant else ''}{variant}"


def parse_value(text: str) -> Any:
  """The Python literal that `text` spells, else the text itself; `true`, `false` and `none` in any case."""
  words = {"true": True, "false": False, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about text that begins like a number
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def pair(size: Any, key: str) -> tuple[int, int]:
  """int or (height, width) -> (height, width); `key` is the config key, for messages."""
  sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
  if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
    raise UserError(f"config key {key!r} must be a positive int or (height, width), found {show(size)}")
  return sides


def duration(section: ConfigDict, what: str, steps_per_epoch: int, default: int | None = None) -> int:
  """`{what}_steps` of a section, or `{what}_epochs` in steps, or the default.

  Raises:
    UserError: both keys are set, or neither is and there is no default.
  """
  steps, epochs = section[f"{what}_steps"], section[f"{what}_epochs"]
  if steps is not None and epochs is not None:
    raise UserError(f"config keys '{what}_steps'={steps} and '{what}_epochs'={epochs} are both set; keep one")
  if steps is not None:
    return steps
  if epochs is not None:
    return math.ceil(epochs * steps_per_epoch - 1e-9)
  if default is None:
    raise UserError(f"config: neither '{what}_steps' nor '{what}_epochs' is set")
  return default
