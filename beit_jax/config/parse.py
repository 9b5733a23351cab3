"""A run's configuration: every key with its default, and how a file and `--config.key=value` are laid over them.

A config file holds plain `ml_collections` values in `get_config(variant)`: either one run, or `stages = ("a", "b")`
with one run under each name. `DEFAULTS` is the schema: an unknown key or a wrong type is a `UserError` that names
the nearest key. The keys of `model` are the fields of the objective's module (and `variant`, `preset`).
"""

import ast
import difflib
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beit_jax.config import ranges
from beit_jax.config.ranges import show
from beit_jax.errors import UserError


class OptionalOf(NamedTuple):
  """A default of None for a key of type `kind`."""

  kind: type


DEFAULTS: dict[str, Any] = dict(
  objective="beit",  # "dvae" | "beit" | "classify" | "segment" | "linear_probe" | "knn"
  seed=0,
  batch_size=256,  # global: over all devices, processes and microbatches
  microbatches=1,  # gradient accumulation: the batch is run in that many parts
  total_steps=OptionalOf(int),  # either this or total_epochs
  total_epochs=OptionalOf(float),
  eval_only=False,  # no training: the workdir's newest checkpoint, else init_from, over eval.split -> eval.json
  init_from="",  # parameters: whatever `beit_jax.load` reads (docs/weights.md), or "stage:NAME"
  resume="",  # full state (step, optimizer) of another run folder
  log_every_steps=50,
  profile_steps=(),  # (first, last): a trace of these steps in workdir/profile
  mesh=dict(data=-1, fsdp=1),
  optimizer=dict(
    name="adamw",  # "adamw" | "lion" | "muon" (2-D kernels; Adam for the rest) | "lamb" | "sgd"
    learning_rate=1.5e-3,  # the peak, for the global batch as given: nothing is scaled behind your back
    min_lr=1e-5,
    warmup_steps=OptionalOf(int),  # either this or warmup_epochs
    warmup_epochs=OptionalOf(float),
    weight_decay=0.05,
    weight_decay_end=OptionalOf(float),  # cosine from weight_decay to this
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.9,  # of sgd
    clip_norm=0.0,  # global norm; 0 = off
    layer_decay=1.0,
    schedule="cosine",  # "cosine" | "poly"
    power=1.0,  # of poly
    ema_decay=0.0,  # of averaged weights, evaluated and saved beside the others; 0 = off
    max_skipped=5,  # updates in a row that are skipped, since loss or gradient is not finite; then the run stops
    no_decay=(),  # further regexes of parameters without weight decay
  ),
  data=dict(
    source="tfds",  # "tfds" | "folder" | "pairs" | "shapes"
    name="",  # tfds: "cifar10", "imagenet2012", "name/config:1.0.0"
    split="train",
    data_dir="",  # tfds: default $TFDS_DATA_DIR, then ~/tensorflow_datasets
    root="",  # folder
    num_examples=8192,  # shapes
    render_size=32,  # shapes
    fraction=1.0,  # keep a fixed random part of the examples
    image_key="image",
    label_key="label",  # "" = unlabelled
    label_file="",  # folder: a CSV of `file,class[,class...]` instead of class folders: several labels an image
    num_classes=OptionalOf(int),  # the data must have exactly so many classes
    image_size=224,  # int, or (height, width)
    token_image_size=112,
    crop="random_resized",  # "random_resized" | "pad" | "center"
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    flip=True,
    color_jitter=0.0,
    rand_augment="",  # "rand-m9-mstd0.5-inc1"; colour jitter is then off, as in timm
    random_erasing=0.0,  # probability
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    token_interpolation="lanczos",
    crop_pct=0.875,  # of evaluation
    resize="short_side",  # of evaluation: "short_side" | "squash"
    scaled_decode=False,  # JPEGs to fewer pixels where a training crop has more than enough; faster, other pixels
    max_bad=0.05,  # share of images that cannot be read; another takes their place, above this the run stops
    workers=0,  # processes; 0 = threads of this one
    threads=4,
  ),
  eval=dict(
    split="",  # "" = no evaluation
    num_examples=1024,  # shapes
    fraction=1.0,
    batch_size=256,
    every_steps=OptionalOf(int),  # None = at the end only
    ema=False,  # with eval_only: the averaged weights
    predictions=False,  # with eval_only: also predictions.jsonl
  ),
  checkpoint=dict(
    every_steps=1000,  # None = at evaluations and at the end only
    keep=2,
    best="",  # an eval metric ("acc1", "ema_acc1", "loss"): the best state so far is kept in workdir/best
    asynchronous=True,
  ),
  figures=True,
)

# Sections that only one objective reads.
SECTIONS: dict[str, dict[str, Any]] = {
  "dvae": dict(
    loss=dict(
      reconstruction="logit_laplace",  # "logit_laplace" | "l1" | "l2"
      kl_weight=6.6 / 192,  # of the mean KL per token against the mean loss per pixel, at 112/14 geometry
      kl_warmup_steps=5000,
      temperature=1.0,
      temperature_end=1 / 16,
      temperature_steps=150_000,  # cosine
      straight_through=False,
    ),
    collapse=dict(
      min_usage=0.02,  # share of the vocabulary seen on the eval set, below which the codebook has collapsed
      after_steps=500,
      stop=True,
    ),
  ),
  "beit": dict(
    tokenizer=dict(init_from="stage:tokenizer", cache=""),  # a run or "stage:NAME"; of beit_jax.tokenize
    mask=dict(
      kind="block",  # "block" (exactly num_masked) | "block_at_most" (v1 as released) | "random"
      num_masked=75,
      min_block_patches=16,
      max_block_patches=OptionalOf(int),
      min_aspect=0.3,
    ),
  ),
  "classify": dict(
    loss=dict(
      label_smoothing=0.1,
      mixup_alpha=0.0,
      cutmix_alpha=0.0,
      mix_prob=1.0,  # that a batch is mixed
      mix_switch_prob=0.5,  # that it is cutmix, where both are on
    ),
  ),
  "segment": dict(
    segment=dict(
      reduce_zero_label=False,  # 0 in the label map is no class, and class c is stored as c + 1 (ADE20K)
      ignore_label=255,  # this value is ignored, besides 255
      resize=(2048, 512),  # (long, short): images are resized to fit in it, in training times a random factor
      resize_ratio=(0.5, 2.0),
      cat_max_ratio=0.75,  # no class fills more of a training crop, if ten tries can help it
      photometric=True,
      aux_weight=0.4,
      mode="slide",  # of evaluation: "slide" | "whole" (squashed to data.image_size)
      stride=OptionalOf(int),  # of the windows; None = no overlap
      scales=(1.0,),  # of evaluation: softmax averaged
      flip=False,  # of evaluation
      programs=8,  # at most so many are compiled for images of any number of sizes
      class_names=(),  # of all classes, in order; () = the data set's own, if it says
      palette=(),  # "camvid", or (red, green, blue) of all classes; () = made up
    ),
  ),
  "linear_probe": dict(encoder=dict(init_from="")),  # "" = a random encoder, as `model` says
  "knn": dict(
    encoder=dict(init_from=""),
    knn=dict(k=20, temperature=0.07, blocks=()),  # DINO's k and temperature; blocks: () = all
  ),
}


def load_file(spec: str) -> ConfigDict:
  """`FILE[:variant]` -> what its `get_config` returns."""
  path, _, variant = spec.partition(":")
  if not os.path.isfile(path):  # Path.is_file would raise for a name that is too long
    raise UserError(
      f"--config={show(path)}: no such file; the ready-made ones are in configs/, e.g. configs/quickstart.py"
    )
  module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
  if module_spec is None:
    raise UserError(f"--config={path}: no Python file; a config is one with a get_config(variant) function")
  module = importlib.util.module_from_spec(module_spec)
  sys.path.insert(0, str(Path(path).resolve().parent))  # a config may import its neighbours
  try:
    module_spec.loader.exec_module(module)
  except (SyntaxError, ImportError) as error:
    raise UserError(f"--config={path}: {error}") from None
  except Exception as error:
    raise UserError(f"--config={path}: {_at_fault(error, path)}") from error
  finally:
    sys.path.pop(0)
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"--config={path}: the file has no get_config(variant) function")
  takes_variant = bool(inspect.signature(module.get_config).parameters)
  if variant and not takes_variant:
    raise UserError(f"--config={spec}: {path} has no variants")
  try:
    found = module.get_config(variant) if takes_variant and variant else module.get_config()
  except (UserError, ValueError) as error:
    raise UserError(f"--config={spec}: {error}") from None
  except Exception as error:
    raise UserError(f"--config={spec}: {_at_fault(error, path)}") from error
  if not isinstance(found, dict | ConfigDict):
    raise UserError(f"--config={spec}: get_config gave {show(found)}; expected a ConfigDict")
  return found


def _at_fault(error: Exception, path: str) -> str:
  """An error of a config file's own code, with the line of the file."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}"


def parse_value(text: str) -> Any:
  """The Python literal that `text` spells, else the text itself; `true`, `false`, `none` in any case."""
  words = {"true": True, "false": False, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of a text that begins like a number
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def overlay(base: ConfigDict, changes: dict[str, Any], where: str) -> None:
  """Writes nested `changes` into `base`; an unknown key or a value of another type is a UserError."""
  for key, value in changes.items():
    _set(base, key, value, where)


def _set(base: ConfigDict, key: str, value: Any, where: str) -> None:
  name = f"{where}.{key}" if where else key
  if not isinstance(key, str) or key not in base:
    near = difflib.get_close_matches(str(key)[:100], list(base), 1, 0.5)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise UserError(f"config key {show(name)} is unknown{hint}; the keys here are: {', '.join(sorted(base))}")
  current = base[key]
  if isinstance(current, ConfigDict):
    if not isinstance(value, (dict, ConfigDict)):
      raise UserError(
        f"config key {name!r} is a section with the keys {', '.join(sorted(current))}, got {show(value)}"
      )
    overlay(base[key], dict(value.items()), name)
    return
  wanted = base.get_type(key)
  if key in FREE_FORM:
    wanted = object
  if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
    value = float(value)
  if wanted is tuple and isinstance(value, list):
    value = tuple(value)
  if wanted is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  good = isinstance(value, wanted) and not (isinstance(value, bool) and wanted in (int, float))
  if not good and not (value is None and key in OPTIONAL):
    raise UserError(
      f"config key {name!r} must be of type {wanted.__name__}, found {show(value)} ({type(value).__name__})"
    )
  with base.ignore_type():
    base[key] = value


FREE_FORM = {"image_size", "token_image_size", "palette"}  # int or (height, width); a name or colours
# Keys whose default is "none": a placeholder above, or a size that the model's variant or the data decide.
OPTIONAL = {
  *("total_steps", "total_epochs", "warmup_steps", "warmup_epochs", "weight_decay_end", "every_steps"),
  *("max_block_patches", "width", "depth", "num_heads", "rel_pos", "abs_pos", "layer_scale_init"),
  *("vocab_size", "num_classes", "channels", "stride"),
}


def set_dotted(config: ConfigDict, dotted: str, value: Any) -> None:
  """`set_dotted(config, "data.crop", "pad")`; errors as `overlay`."""
  *parents, last = dotted.split(".")
  node, where = config, ""
  for parent in parents:
    if parent not in node or not isinstance(node[parent], ConfigDict):
      _set(node, parent, {}, where)  # raises with the right message, unless it is a section
    node, where = node[parent], f"{where}.{parent}" if where else parent
  if isinstance(node.get(last), ConfigDict):
    raise UserError(
      f"config key {dotted!r} is a section; set one of its keys: {', '.join(sorted(node[last]))}"
    )
  _set(node, last, value, where)


def complete(run: ConfigDict, model_fields: dict[str, dict[str, Any]], where: str = "") -> ConfigDict:
  """Lays one run's config over the defaults of its objective.

  Args:
    model_fields: objective -> the keys of its `model` section with their defaults.

  Raises:
    UserError: an unknown key, a value of another type, or one out of its range.
  """
  full = _lay(run, model_fields, where)
  ranges.check(full.to_dict(), where)
  return full


def _lay(run: ConfigDict, model_fields: dict[str, dict[str, Any]], where: str) -> ConfigDict:
  """`complete` without a look at the ranges."""
  if not isinstance(run, dict | ConfigDict):
    raise UserError(
      f"config{' of stage ' + where if where else ''}: found {show(run)}, expected a ConfigDict"
    )
  objective = run.get("objective", DEFAULTS["objective"])
  if not isinstance(objective, str) or objective not in model_fields:
    raise UserError(f"config key 'objective': {show(objective)} is unknown; there are {sorted(model_fields)}")
  full = ConfigDict(_fresh({**DEFAULTS, **SECTIONS[objective], "model": model_fields[objective]}))
  overlay(full, dict(run.items()), where)
  return full


def _fresh(defaults: dict[str, Any]) -> dict[str, Any]:
  """Placeholders are made anew for each run: ml_collections shares one among all configs that hold it."""
  make = lambda v: (
    placeholder(v.kind) if isinstance(v, OptionalOf) else _fresh(v) if isinstance(v, dict) else v
  )  # noqa: E731
  return {key: make(value) for key, value in defaults.items()}


def pair(size: Any, key: str) -> tuple[int, int]:
  """int or (height, width) -> (height, width)."""
  pair_ = tuple(size) if isinstance(size, tuple | list) else (size, size)
  if len(pair_) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair_):
    raise UserError(f"config key {key!r} must be a positive int or (height, width), found {show(size)}")
  return pair_


def duration(section: ConfigDict, what: str, steps_per_epoch: int, default: int | None = None) -> int:
  """`{what}_steps`, or `{what}_epochs` times the steps of an epoch; giving both is an error."""
  steps, epochs = section[f"{what}_steps"], section[f"{what}_epochs"]
  if steps is not None and epochs is not None:
    raise UserError(f"config keys '{what}_steps'={steps} and '{what}_epochs'={epochs} are both set; keep one")
  if steps is None and epochs is None:
    if default is None:
      raise UserError(f"config: neither '{what}_steps' nor '{what}_epochs' is set")
    return default
  return steps if steps is not None else math.ceil(epochs * steps_per_epoch - 1e-9)


USAGE = "usage: python -m beit_jax.main --config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]"


def parse_args(argv: list[str], usage: str = USAGE) -> tuple[str, str, list[tuple[str, Any]]]:
  """`--config=FILE[:variant] [--workdir=DIR] [--config.key=value ...]` -> (spec, workdir, overrides)."""
  spec, workdir, overrides = "", "", []
  items = iter(argv)
  for item in items:
    name, equals, value = item.partition("=")
    if not name.startswith("--"):
      raise UserError(f"unexpected argument {item!r}; {usage}")
    if not equals:
      value = next(items, None)
      if value is None:
        raise UserError(f"{name} needs a value; {usage}")
    if name == "--config":
      spec = value
    elif name == "--workdir":
      workdir = value
    elif name.startswith("--config."):
      overrides.append((name.removeprefix("--config."), parse_value(value)))
    else:
      raise UserError(f"unknown flag {name}; {usage}")
  if not spec:
    raise UserError(f"--config is missing; {usage}")
  return spec, workdir, overrides


def load(spec: str, overrides: list[tuple[str, Any]], model_fields: dict[str, dict[str, Any]]) -> ConfigDict:
  """File, defaults and overrides -> a complete config: one run, or `stages` with one complete run under each name.

  In a staged config `--config.STAGE.key=value` sets a key of one stage and `--config.key=value` that of every
  stage; `--config.seed=1` is added to the seed of each.
  """
  raw = load_file(spec)
  if "stages" not in raw:
    config = _lay(raw, model_fields, "")
    for dotted, value in overrides:
      set_dotted(config, dotted, value)
    ranges.check(config.to_dict())
    return config
  names = raw["stages"]
  if not isinstance(names, tuple | list) or not names:
    raise UserError(f"--config={spec}: stages={show(names)} must be the names of one or more stages")
  config = ConfigDict({"stages": tuple(names), "summary": raw.get("summary", ()), "seed": 0})
  for name in names:
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_-]+", name) or name in config:
      raise UserError(
        f"--config={spec}: {show(name)} cannot name a stage: a word of letters, digits, _ and -, each but once, and "
        "none of stages, summary and seed"
      )
    if name not in raw:
      raise UserError(f"--config={spec}: stage {name!r} is listed but not defined")
    config[name] = _lay(raw[name], model_fields, name)
  unknown = set(raw) - set(config)
  if unknown:
    raise UserError(f"--config={spec}: keys {sorted(map(str, unknown))} are neither stages nor settings")
  for dotted, value in overrides:
    if dotted.split(".")[0] in config:
      set_dotted(config, dotted, value)
    else:
      for name in names:
        set_dotted(config, f"{name}.{dotted}", value)
  for name in config.stages:
    if name not in names:
      raise UserError(f"config key 'stages': {show(name)} is none of the stages {', '.join(names)}")
  ranges.check_summary(config.summary)
  for name in names:
    config[name].seed += config.seed
    ranges.check(config[name].to_dict(), name)
  return config
