"""Loads weights from every format and saves them; nothing in a file is executed.

`load` detects the format. `beit_jax.load` and `beit_jax.save` are these functions.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax.errors import FlaxError

from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.weights import dalle, hf, mmseg, orbax, timm, unilm
from beit_jax.weights.files import lazy, safetensors, torchfile
from beit_jax.weights.pretrained import Pretrained, module_fields

Size = tuple[int, int]
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
WRAPPERS = ("model", "module", "state_dict", "teacher", "student")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
PREFIXES = ("module.", "_orig_mod.", "backbone.")
# What well-formed files with wrong contents can raise.
DAMAGED = (ArithmeticError, AttributeError, FlaxError, LookupError, RecursionError, TypeError, ValueError)
OWN_KEY = "beit_jax"  # our description inside other formats


def load(
  path: str | Path,
  *,
  num_heads: int | None = None,
  image_size: int | Size | None = None,
  step: int | None = None,
  ema: bool = False,
  out_indices: tuple[int, ...] | None = None,
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
  weights = [location / name for name in HF_FILES if (location / name).is_file()]
  if location.is_dir() and (checkpoint.is_run(location) or not (weights or list(location.glob("*.pkl")))):
    for name, value in (("num_heads", num_heads), ("image_size", image_size), ("out_indices", out_indices)):
      if value is not None:
        raise UserError(f"{name}={value!r}: a beit_jax checkpoint states this itself; omit it")
    with _as_user_errors(location):
      return orbax.load(location, step=step, ema=ema)
  if step is not None:
    raise UserError(f"step={step}: only a run of beit_jax has steps, and {location} is none")
  with _as_user_errors(location):
    try:
      model = _load_foreign(weights[0] if weights else location, num_heads, size, ema, out_indices)
    except OSError as error:
      raise UserError(f"{error.filename or location}: cannot be read ({error.strerror or error})") from None
  if out_indices is not None and "out_indices" not in module_fields(model.module):
    raise UserError(
      f"out_indices={out_indices!r}: only a segmentation model taps blocks, and {location} holds a {model.kind}"
    )
  return model


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
  path: Path, num_heads: int | None, image_size: Size | None, ema: bool, out_indices: tuple[int, ...] | None
) -> Pretrained:
  if path.is_dir() or path.suffix == ".pkl":
    return _load_openai(path)
  state, facts, left_out = _read(path, ema)
  if dalle.is_flava(state):
    return _load_flava(path, state)
  if dalle.is_openai(state):
    return _load_openai(path, state)
  if hf.is_beit(state):
    source = _hf_source(path, state)
  elif mmseg.is_segmenter(state):
    source = lazy.Source(state, path, "unilm", **facts)
  else:
    source = _timm_or_unilm_source(path, state, facts, image_size)
  source.left_out = left_out + source.left_out
  if mmseg.is_segmenter(source.state):
    return mmseg.import_segmenter(source, num_heads, image_size, out_indices)
  return unilm.import_beit(source, num_heads, image_size)


def _hf_source(path: Path, state: lazy.State) -> lazy.Source:
  state, left_out = hf.to_unilm(state, path)
  facts = hf.read_config(path.parent)
  size, kernel = facts["fields"]["image_size"], state.get("patch_embed.proj.weight")
  if size[0] != size[1] and not facts["described"] and kernel is not None:
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
  facts = {**timm.read_config(path.parent, state), **facts}
  if timm.is_vit(state):
    size = image_size or facts.get("fields", {}).get("image_size")
    state, left_out = timm.vit_to_unilm(state, path, size)
    return lazy.Source(state, path, "timm", **facts, left_out=left_out)
  if any(re.fullmatch(r"(module\.)?linear\.\d+\.weight", name) for name in state):
    raise UserError(
      f"{path}: the heads of a linear probe (run_linear_eval.py) without their encoder; load the pre-trained model"
    )
  is_unilm = any(
    re.match(r"mask_token$|lm_head\.|rel_pos_bias\.|.*relative_position_index", name) for name in state
  )
  return lazy.Source(state, path, "unilm" if is_unilm else "timm", **facts)


def _load_openai(path: Path, opened: lazy.State | None = None) -> Pretrained:
  source = lazy.Source(dalle.openai_state(path, opened), path, "dalle")
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


def _read(path: Path, ema: bool) -> tuple[lazy.State, dict[str, Any], list[str]]:
  """(tensors of a file by name, what else it states as arguments of `lazy.Source`, names that are left out)."""
  if path.name.endswith(".index.json"):
    return _read_shards(path), {}, []
  state: dict[str, Any]
  if safetensors.is_safetensors(path):
    if ema:
      raise UserError(f"{path}: a safetensors file has one set of weights; omit ema")
    state, facts = safetensors.read(path)
  elif torchfile.is_torch(path):
    state, facts = _unwrap(torchfile.load(path), path, ema)
  else:
    raise UserError(
      f"{path}: not a format this version reads; expected a run of beit_jax.main, a .pth or .safetensors file, a "
      "folder of Hugging Face's or timm's, or OpenAI's encoder.pkl"
    )
  left_out: list[str] = []
  for prefix in PREFIXES:
    if prefix == mmseg.BACKBONE and mmseg.is_segmenter(state):
      continue
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if inside and (len(inside) == len(state) or prefix == mmseg.BACKBONE):
      left_out += [name for name in state if not name.startswith(prefix)]
      state = inside
  meta = mmseg.read_meta(facts.get("meta")) if mmseg.is_segmenter(state) else {}
  return state, {**meta, **_own_facts(facts, path)}, left_out


def _own_facts(facts: dict[str, Any], path: Path) -> dict[str, Any]:
  """Our own description inside a file, or else the arguments that unilm saves with its weights."""
  if not isinstance(facts.get(OWN_KEY), str):
    return _unilm_args(facts.get("args"))
  try:
    described = json.loads(facts[OWN_KEY])
    module = described["module"]
    encoder = module.get("encoder", module)
    fields = {name: encoder[name] for name in ("num_heads", "norm_eps") if name in encoder}
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
  uses_imagenet, size = stated.get("imagenet_default_mean_and_std"), stated.get("input_size")
  if not isinstance(uses_imagenet, bool) or not isinstance(size, int):
    return {}
  statistics = unilm.IMAGENET if uses_imagenet else unilm.HALF
  return dict(preprocessing=unilm.usual_preprocessing(statistics, (size, size)))


def _unwrap(content: Any, path: Path, ema: bool) -> tuple[dict[str, torchfile.Tensor], dict[str, Any]]:
  """(the state dict inside {"model": ...} and the like, everything beside it)."""
  if isinstance(content, torchfile.Inert):
    return torchfile.module_tensors(content), {}
  facts = content if type(content) is dict else {}
  for _ in range(4):
    if type(content) is not dict:
      break
    tensors = {k: v for k, v in content.items() if type(k) is str and isinstance(v, torchfile.Tensor)}
    wrappers = EMA_WRAPPERS if ema else WRAPPERS
    inner = next((content[key] for key in wrappers if type(content.get(key)) is dict), None)
    if ema and inner is None:
      raise UserError(f"{path}: no averaged weights in it (looked for {', '.join(EMA_WRAPPERS)}); omit ema")
    if inner is None:
      if tensors:
        return tensors, facts
      break
    content, ema = inner, False
  found = list(content)[:6] if type(content) is dict else type(content).__name__
  raise UserError(f"{path}: no state dict in it; found {found}")


def _read_shards(path: Path) -> lazy.State:
  """The tensors of all files that a `model.safetensors.index.json` names."""
  try:
    names = sorted(set(map(str, json.loads(path.read_text())["weight_map"].values())))
  except (ValueError, KeyError, AttributeError, TypeError):
    raise UserError(f"{path}: not an index of safetensors files") from None
  state: dict[str, lazy.Readable] = {}
  for name in names:
    if Path(name).name != name or not (path.parent / name).is_file():
      raise UserError(f"{path}: it names {name!r}, which is not a file in this folder")
    state |= safetensors.read(path.parent / name)[0]
  return state


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
  export = {"unilm": unilm.export_file, "mmseg": mmseg.export_file}[pretrained.spec.tensor_names]
  state, under, facts = export(pretrained)
  _log_tensors(state, [])
  if target.suffix.lower() == ".safetensors":
    _write_safetensors(path, state, pretrained)
  else:
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
  log.info('in PyTorch: transformers.%s.from_pretrained("%s")', pretrained.spec.hf_class, target)


WRITERS: dict[str, Callable[[Pretrained, Path, Path], None]] = {
  "orbax": _save_orbax,
  "unilm": _save_unilm,
  "timm": _save_timm,
  "hf": _save_hf,
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
