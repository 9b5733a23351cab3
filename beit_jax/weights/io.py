"""Loads weights from every format and saves them; nothing in a file is executed.

`load` detects the format. `beit_jax.load` and `beit_jax.save` are these functions.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from flax.errors import FlaxError

from beit_jax.errors import UserError
from beit_jax.models.beit import POOLS
from beit_jax.models.layers import ACTIVATIONS
from beit_jax.run import checkpoint
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.weights import contents, dalle, hf, mmseg, openmmlab, orbax, timm, unilm, vqkd
from beit_jax.weights.files import lazy, safetensors, torchfile
from beit_jax.weights.kinds import module_fields
from beit_jax.weights.pretrained import Pretrained

Size = tuple[int, int]
HF_FILES = (
  *("model.safetensors", "model.safetensors.index.json"),
  *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
# What well-formed files with wrong contents can raise.
DAMAGED = (ArithmeticError, AttributeError, FlaxError, LookupError, RecursionError, TypeError, ValueError)
OWN_KEY = "beit_jax"  # our description inside other formats
# Files in a folder that holds no model by itself (regular expressions), and what to give instead.
FOLDERS = (
  (
    r"mp_rank_\d+_model_states\.pt",
    "a checkpoint of DeepSpeed; give its file {}, or with ZeRO stage 3 the file that its zero_to_fp32.py writes",
  ),
  (
    r".*\.distcp",
    "a distributed checkpoint of PyTorch; make a file of it with `python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch FOLDER FILE` and give that",
  ),
  (r"checkpoint-\w+|global_step\d+", "a folder with several checkpoints; give one of them: {}"),
  (r".*\.(pth|pt|ckpt|bin|tar|safetensors)", "a folder with files of weights; give one of them: {}"),
  (
    r".*\.(h5|msgpack|pb|onnx)",
    "a folder without weights of PyTorch; it holds {}. Convert them with transformers",
  ),
)


def load(
  path: str | Path,
  *,
  num_heads: int | None = None,
  image_size: int | Size | None = None,
  step: int | None = None,
  ema: bool = False,
  out_indices: tuple[int, ...] | None = None,
  pool: str | None = None,
  activation: str | None = None,
) -> Pretrained:
  """Loads a model; see `beit_jax.load`."""
  location = bucket.path(path)
  if not location.exists():
    raise UserError(f"{location}: no such file or folder")
  if bucket.remote(location) and not checkpoint.is_run(location):
    location = bucket.fetch(location)
  if num_heads is not None and not _is_positive(num_heads):
    raise UserError(f"num_heads={num_heads!r}: expected a positive integer")
  size = _check_size(image_size)
  choices = dict(pool=pool, activation=activation)
  _check_choices(choices)
  weights = [location / name for name in HF_FILES if (location / name).is_file()]
  if location.is_dir() and (checkpoint.is_run(location) or not (weights or list(location.glob("*.pkl")))):
    given = dict(num_heads=num_heads, image_size=image_size, out_indices=out_indices, **choices)
    for name, value in given.items():
      if value is not None:
        raise UserError(f"{name}={value!r}: a beit_jax checkpoint states this itself; omit it")
    if not checkpoint.is_run(location):
      _check_is_no_other_folder(location)
    with _as_user_errors(location):
      return orbax.load(location, step=step, ema=ema)
  if step is not None:
    raise UserError(f"step={step}: only a run of beit_jax has steps, and {location} is none")
  with _as_user_errors(location):
    try:
      model = _load_foreign(weights[0] if weights else location, num_heads, size, ema, out_indices, choices)
    except OSError as error:
      raise UserError(f"{error.filename or location}: cannot be read ({error.strerror or error})") from None
  if out_indices is not None and "out_indices" not in module_fields(model.module):
    raise UserError(
      f"out_indices={out_indices!r}: only a segmentation model taps blocks, and {location} holds a {model.kind}"
    )
  _check_contradictions(model, choices, location)
  return model


def _check_is_no_other_folder(folder: Path) -> None:
  """Raises a UserError that says what lies in a folder which is no model, if it is known."""
  names = sorted((file.name for file in folder.iterdir()), key=lambda name: (len(name), name))
  for pattern, text in FOLDERS:
    found = [name for name in names if re.fullmatch(pattern, name)]
    if found:
      raise UserError(f"{folder}: " + text.format(", ".join(found[:6]) + (", ..." if found[6:] else "")))


def _check_choices(choices: dict[str, str | None]) -> None:
  known: dict[str, Collection[str]] = dict(pool=POOLS, activation=ACTIVATIONS)
  for name, value in choices.items():
    if value is not None and value not in known[name]:
      raise UserError(f"{name}={value!r}: expected one of {', '.join(known[name])}")


def _check_contradictions(model: Pretrained, choices: dict[str, str | None], path: Path) -> None:
  """Compares what was given with what the file says."""
  found = {**(model.encoder_fields if model.has_encoder else {}), **module_fields(model.module)}
  for name, given in choices.items():
    if given is not None and name not in found:
      raise UserError(f"{name}={given!r}: a {model.kind} has no {name}, and {path} holds one")
    if given is not None and found[name] != given and (given, found[name]) != ("mean", "norm_mean"):
      raise UserError(f"{path}: {name}={given!r} was given, but the file says {found[name]!r}; omit it")


@contextlib.contextmanager
def _as_user_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except DAMAGED as error:
    raise UserError(f"{path}: damaged, or of a form this version does not know ({error!r})") from error


def _is_positive(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_size(image_size: Any) -> Size | None:
  """(height, width) of one or two numbers."""
  if image_size is None:
    return None
  size = (image_size, image_size) if isinstance(image_size, int) else image_size
  if isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_positive, size)):
    return size[0], size[1]
  raise UserError(f"image_size={image_size!r}: expected a number of pixels, or (height, width)")


def _load_foreign(
  path: Path,
  num_heads: int | None,
  image_size: Size | None,
  ema: bool,
  out_indices: tuple[int, ...] | None,
  choices: dict[str, str | None],
) -> Pretrained:
  if path.is_dir():
    return _load_openai(path, {file: contents.read(file).state for file in sorted(path.glob("*.pkl"))})
  found = contents.read(path, ema)
  state, left_out = _without_decoder(found.state)
  left_out = found.left_out + left_out
  if dalle.is_flava(state):
    return _load_flava(path, state)
  if dalle.is_openai(state):
    return _load_openai(path, {path: state})
  if vqkd.is_vqkd(state):
    facts = _own_facts(found.facts, path)
    return vqkd.import_tokenizer(lazy.Source(state, path, "unilm", **facts), num_heads, image_size)
  if openmmlab.is_openmmlab(state):
    state, unused = openmmlab.to_unilm(state, path)
    left_out += unused
  is_segmenter = mmseg.is_segmenter(state)
  stated = mmseg.read_meta(found.facts.get("meta"))
  facts = stated if is_segmenter else {key: stated[key] for key in ("labels",) if key in stated}
  facts |= _own_facts(found.facts, path)
  if hf.is_vit(state):
    source = _hf_source(path, state)
  elif is_segmenter:
    source = lazy.Source(state, path, "unilm", **facts)
  else:
    source = _timm_or_unilm_source(path, state, facts, image_size)
    if timm.is_vit(state):
      source = timm.with_choices(source, **choices)
  source.left_out = left_out + source.left_out
  if mmseg.is_segmenter(source.state):
    return mmseg.import_segmenter(source, num_heads, image_size, out_indices)
  return unilm.import_beit(source, num_heads, image_size)


def _without_decoder(state: lazy.State) -> tuple[lazy.State, list[str]]:
  """Leaves out the decoder of a masked autoencoder and its mask token; the encoder never sees masked patches."""
  if not any(re.search(r"(^|\.)decoder_embed\.weight$", name) for name in state):
    return state, []
  pattern = r"^(decoder_(embed|blocks|norm|pred)\.|decoder_pos_embed$|decoder\.|mask_token$)"
  left_out = [name for name in state if re.match(pattern, name)]
  return {name: value for name, value in state.items() if name not in set(left_out)}, left_out


def _hf_source(path: Path, state: lazy.State) -> lazy.Source:
  state, left_out = hf.to_unilm(state, path)
  facts = hf.read_config(path.parent)
  size, kernel = facts["fields"]["image_size"], state.get("patch_embed.proj.weight")
  has_tables = any(name.endswith(unilm.TABLE) for name in state)
  if size[0] != size[1] and has_tables and not facts["described"] and kernel is not None:
    log.warning(
      "%s: its grid is rectangular, so its bias tables are read like transformers 5.23 does, as (width, height)",
      path,
    )
    state = hf.resize_rectangular_tables(state, size, kernel.shape[-1])
  if mmseg.is_segmenter(state):
    state = mmseg.from_hf(state)
    facts["fields"] |= mmseg.read_hf(path.parent)
  return lazy.Source(state, path, "hf", **facts, left_out=left_out)


def _timm_or_unilm_source(
  path: Path, state: lazy.State, facts: dict[str, Any], image_size: Size | None
) -> lazy.Source:
  stated = timm.read_config(path.parent, state)
  facts = {**stated, **facts, "fields": {**facts.get("fields", {}), **stated.get("fields", {})}}
  if not any(name.endswith(unilm.TABLE) for name in state):
    timm.check_names(path.name, path)
  if timm.is_vit(state):
    size = image_size or facts.get("fields", {}).get("image_size")
    state, left_out = timm.vit_to_unilm(state, path, size)
    return lazy.Source(state, path, "timm", **facts, left_out=left_out)
  if any(re.fullmatch(r"linear\.\d+\.weight", name) for name in state):
    raise UserError(
      f"{path}: the heads of a linear probe (run_linear_eval.py) without their encoder; load the pre-trained model"
    )
  is_unilm = any(
    re.match(r"mask_token$|lm_head\.|rel_pos_bias\.|.*relative_position_index", name) for name in state
  )
  return lazy.Source(state, path, "unilm" if is_unilm else "timm", **facts)


def _load_openai(path: Path, states: dict[Path, lazy.State]) -> Pretrained:
  source = lazy.Source(dalle.openai_state(path, states), path, "dalle")
  return dalle.import_tokenizer(source, dalle.openai_name)


def _load_flava(path: Path, state: lazy.State) -> Pretrained:
  """FLAVA's image codebook, possibly inside another model, with a decoder that `save` has put beside it."""
  stem = "blocks.input.weight"
  prefix = next(name for name in state if name.endswith(stem)).removesuffix(stem)
  inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
  left_out = [name for name in state if not name.startswith(prefix)]
  decoder, config = path.parent / "decoder.safetensors", path.parent / "config.json"
  if decoder.is_file():
    inside |= {f"decoder/{name}": value for name, value in safetensors.read(decoder)[0].items()}
  try:
    text = json.loads(config.read_text()).get(OWN_KEY) if config.is_file() else None
    described = json.loads(text) if text else {}
  except ValueError:
    raise UserError(f"{config}: not JSON") from None
  source = lazy.Source(
    inside,
    path,
    "hf",
    fields=described.get("module", {}),
    preprocessing=described.get("preprocessing"),
    described=described,
    left_out=left_out,
  )
  return dalle.import_tokenizer(source, dalle.flava_name)


def _own_facts(facts: dict[str, Any], path: Path) -> dict[str, Any]:
  """Our own description inside a file, or else the arguments that unilm saves with its weights."""
  if not isinstance(facts.get(OWN_KEY), str):
    return _unilm_args(facts.get("args"))
  try:
    described = json.loads(facts[OWN_KEY])
    module = described["module"]
    encoder = module.get("encoder", module)
    fields = {name: encoder[name] for name in ("num_heads", "norm_eps", "activation") if name in encoder}
    fields |= {name: module[name] for name in ("pool", "early_block") if name in module}
    if "image_size" in encoder:
      fields["image_size"] = tuple(encoder["image_size"])
    return dict(
      fields=fields,
      preprocessing=described["preprocessing"],
      **({"labels": list(described["labels"])} if described.get("labels") else {}),
      assumed=list(described.get("assumed") or []),
      described=described,
    )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path}: the description in it is damaged ({error!r})") from None


def _unilm_args(args: Any) -> dict[str, Any]:
  stated = args.state if isinstance(args, torchfile.Inert) else {}
  early = stated.get("early_layers")
  fields = {"fields": {"early_block": early}} if _is_positive(early) else {}
  uses_imagenet, size = stated.get("imagenet_default_mean_and_std"), stated.get("input_size")
  if not isinstance(uses_imagenet, bool) or not isinstance(size, int):
    return fields
  statistics = unilm.IMAGENET if uses_imagenet else unilm.HALF
  return dict(preprocessing=unilm.usual_preprocessing(statistics, (size, size)), **fields)


def save(pretrained: Pretrained, path: str | Path, *, format: str) -> None:
  """Saves a model; see `beit_jax.save`."""
  if bucket.remote(bucket.path(path)):
    raise UserError(f"{path}: models are saved on disk only; copy them with `gcloud storage cp -r`")
  path = Path(os.path.expanduser(path)).absolute()
  if format not in WRITERS:
    raise UserError(f"format {format!r} is unknown; the formats are {', '.join(WRITERS)}")
  if format not in pretrained.spec.formats:
    raise UserError(
      f"a {pretrained.kind} cannot be saved as {format}, which has no such model; its formats are "
      + ", ".join(pretrained.spec.formats)
    )
  if format != "orbax" and len(pretrained.preprocessing["mean"]) != 3:
    raise UserError(f"format {format!r} is for images of 3 channels; save models of other images as 'orbax'")
  is_free = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
  if not is_free:
    raise UserError(f"{path} exists and is not overwritten; choose another name")
  if format == "timm" and path.suffix and path.suffix.lower() not in SUFFIXES:
    raise UserError(f"{path}: end the name in {' or '.join(SUFFIXES)}, or without a suffix for a folder")
  temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[format](pretrained, temporary, path)
    if path.is_dir():
      path.rmdir()
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary)
    elif temporary.is_file():
      temporary.unlink()
  log.info("saved %s as %s: %s", pretrained.kind, format, path)


# Writers get the model, the temporary path to write to, and the final path, for its suffix and for messages.


def _save_orbax(pretrained: Pretrained, path: Path, target: Path) -> None:
  del target
  orbax.save(pretrained, path)


def _save_unilm(pretrained: Pretrained, path: Path, target: Path) -> None:
  exports = {"unilm": unilm.export_file, "mmseg": mmseg.export_file, "vqkd": vqkd.export_file}
  export = exports[pretrained.spec.tensor_names]
  state, under, facts = export(pretrained)
  _log_tensors(state, [])
  if target.suffix.lower() == ".safetensors":
    _write_safetensors(path, state, pretrained)
  else:
    torchfile.save(path, state, {**facts, **_own_text(pretrained)}, under=under)


def _save_openmmlab(pretrained: Pretrained, path: Path, target: Path) -> None:
  if target.suffix.lower() == ".safetensors":
    raise UserError(f"{target}: OpenMMLab does not read safetensors files; end the name in .pth")
  state, under, facts = openmmlab.export_file(pretrained)
  _log_tensors(state, [])
  torchfile.save(path, state, {**facts, **_own_text(pretrained)}, under=under)


def _save_timm(pretrained: Pretrained, path: Path, target: Path) -> None:
  state, architecture, args, left_out = timm.export(pretrained)
  _log_tensors(state, left_out)
  call = "".join(f", {key}={value!r}" for key, value in args.items())
  if target.suffix.lower() == ".safetensors":
    _write_safetensors(path, state, pretrained)
  elif target.suffix:
    torchfile.save(path, state, _own_text(pretrained))
  else:
    path.mkdir()
    _write_safetensors(path / "model.safetensors", state, pretrained)
    _write_json(path / "config.json", timm.hub_config(pretrained, architecture, args))
    log.info('in PyTorch: timm.create_model("local-dir:%s", pretrained=True)', target)
    return
  log.info('in PyTorch: timm.create_model("%s"%s, checkpoint_path="%s")', architecture, call, target)


def _save_hf(pretrained: Pretrained, path: Path, target: Path) -> None:
  exports = {"unilm": hf.export, "mmseg": mmseg.export_hf, "dalle": dalle.export_flava}
  folder = exports[pretrained.spec.tensor_names](pretrained)
  _log_tensors(folder.state, [])
  path.mkdir()
  _write_safetensors(path / "model.safetensors", folder.state, pretrained)
  if folder.decoder is not None:
    safetensors.write(path / "decoder.safetensors", folder.decoder, {"format": "pt"})
  if folder.processor is not None:
    _write_json(path / "preprocessor_config.json", folder.processor)
  _write_json(path / "config.json", {**folder.config, **_own_text(pretrained)})
  log.info('in PyTorch: transformers.%s.from_pretrained("%s")', folder.config["architectures"][0], target)


WRITERS: dict[str, Callable[[Pretrained, Path, Path], None]] = {
  "orbax": _save_orbax,
  "unilm": _save_unilm,
  "timm": _save_timm,
  "hf": _save_hf,
  "openmmlab": _save_openmmlab,
}


def _own_text(pretrained: Pretrained) -> dict[str, str]:
  return {OWN_KEY: json.dumps(pretrained.describe(), sort_keys=True)}


def _log_tensors(state: lazy.Arrays, left_out: list[str]) -> None:
  lazy.report("written", [(name, "", value.shape) for name, value in state.items()], left_out)
  if left_out:
    log.info("left out, since the format has no place for it: %s", ", ".join(left_out))


def _write_safetensors(path: Path, state: lazy.Arrays, pretrained: Pretrained) -> None:
  safetensors.write(path, state, {"format": "pt", **_own_text(pretrained)})


def _write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
