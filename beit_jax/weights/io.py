"""Weights in and out, exact and without executing anything: `load` detects the format, `save` writes one."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax.errors import FlaxError

from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.weights import dalle, hf, orbax, timm, unilm
from beit_jax.weights import mmseg as segmentation
from beit_jax.weights.files import lazy, safetensors, torchfile
from beit_jax.weights.pretrained import Pretrained

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
WRAPPERS = ("model", "module", "state_dict", "teacher", "student")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema")
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
WRAPPERS = ("model", "module", "state_dict", "teacher", "student")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema")
FORMATS = {
  "backbone": ("orbax", "unilm", "timm", "hf"),
  "mim": ("orbax", "unilm", "hf"),
  "classifier": ("orbax", "unilm", "timm", "hf"),
  "segmenter": ("orbax", "unilm", "hf"),
  "tokenizer": ("orbax", "hf"),
}
FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
PREFIXES = ("module.", "_orig_mod.", "backbone.")
DAMAGED = (ArithmeticError, AttributeError, FlaxError, LookupError, RecursionError, TypeError, ValueError)
OWN_TEXT = "beit_jax"  # under this name our description travels inside other formats


def load(
  path: str | Path,
  *,
  num_heads: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  step: int | None = None,
  ema: bool = False,
  out_indices: tuple[int, ...] | None = None,
) -> Pretrained:
  """Loads a model, whatever wrote it.

  Args:
    path: a run of `beit_jax.main` or a folder written by `save`; a `.pth`, `.bin` or `.safetensors` of unilm, mmseg or
      timm; a folder of timm's or Hugging Face's; OpenAI's `encoder.pkl`, or a folder with that and `decoder.pkl`.
    num_heads, image_size: what a file of others may leave open. image_size: pixels, int or (height, width).
    step: of a run, instead of its newest checkpoint.
    ema: the averaged weights, where both are kept.
    out_indices: the four blocks that the decoder of a segmentation model of others taps, counted from 0, instead of
      what its file says. `(3, 5, 7, 11)` for a model of transformers gives unilm's blocks (docs/weights.md).

  Raises:
    UserError: nothing usable is at `path`, it says otherwise than the arguments, or tensors are missing,
      unexpected or mis-shaped (all are listed).
  """
  path = bucket.path(path)
  if not path.exists():
    raise UserError(f"{path}: no such file or folder")
  if bucket.remote(path) and not checkpoint.is_run(path):
    path = bucket.fetch(path)
  size = (image_size, image_size) if isinstance(image_size, int) else image_size
  whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0  # noqa: E731
  if size is not None and not (isinstance(size, tuple | list) and len(size) == 2 and all(map(whole, size))):
    raise UserError(f"image_size={image_size!r}: expected a number of pixels, or (height, width)")
  if num_heads is not None and not whole(num_heads):
    raise UserError(f"num_heads={num_heads!r}: expected a positive whole number")
  weights = [path / name for name in HF_FILES if (path / name).is_file()]
  if path.is_dir() and (checkpoint.is_run(path) or not (weights or list(path.glob("*.pkl")))):
    for name, value in (("num_heads", num_heads), ("image_size", image_size), ("out_indices", out_indices)):
      if value is not None:
        raise UserError(f"{name}={value!r}: a beit_jax checkpoint says this itself; leave it out")
    try:
      return orbax.load(path, step=step, ema=ema)
    except DAMAGED as error:
      raise UserError(f"{path}: damaged, or of a form this version does not know ({error!r})") from error
  if step is not None:
    raise UserError(f"step={step}: only a run of beit_jax has steps, {path} has not")
  try:
    model = _load_foreign(weights[0] if weights else path, num_heads, size and tuple(size), ema, out_indices)
  except OSError as error:
    raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
  except DAMAGED as error:
    raise UserError(f"{path}: damaged, or of a form this version does not know ({error!r})") from error
  if out_indices is not None and model.kind != "segmenter":
    raise UserError(
      f"out_indices={out_indices!r}: only a segmentation model taps blocks, {path} holds a {model.kind}"
    )
  return model


def _load_foreign(path: Path, num_heads, image_size, ema: bool, out_indices) -> Pretrained:
  if path.is_dir() or path.suffix == ".pkl":
    return _load_openai(path)
  state, facts = _read(path, ema)
  if dalle.is_flava(state):
    return _load_flava(path, state)
  if dalle.is_openai(state):
    return _load_openai(path, state)
  left_out = facts.pop("left_out")
  if hf.is_beit(state):
    state, dropped = hf.to_unilm(state, path)
    facts, format = hf.read_config(path.parent), "hf"
    size, patch = facts["fields"]["image_size"], state.get("patch_embed.proj.weight")
    if size[0] != size[1] and not facts["described"] and patch is not None:
      log.warning(
        "%s: rectangular; its bias tables are read as transformers 5.23 does, (width, height)", path
      )
      state = hf.undo_rectangles(state, size, patch.shape[-1])
    if segmentation.is_segmenter(state):
      state = segmentation.from_hf(state)
      facts["fields"] |= segmentation.read_hf(path.parent)
  elif segmentation.is_segmenter(state):
    dropped, format = [], "unilm"
  else:
    facts = {**timm.read_config(path.parent, state), **facts}
    dropped, format = [], "timm"
    if timm.is_vit(state):
      size = image_size or facts.get("fields", {}).get("image_size")
      state, dropped = timm.vit_to_unilm(state, path, size)
    elif any(re.fullmatch(r"(module\.)?linear\.\d+\.weight", name) for name in state):
      raise UserError(
        f"{path}: the heads of a linear probe (run_linear_eval.py) without their encoder; load the pre-trained model"
      )
    elif any(
      name == "mask_token"
      or name.startswith(("lm_head.", "rel_pos_bias."))
      or "relative_position_index" in name
      for name in state
    ):
      format = "unilm"
  source = lazy.Source(state, path, format, **facts, left_out=left_out + dropped)
  if segmentation.is_segmenter(state):
    return segmentation.import_segmenter(source, num_heads, image_size, out_indices)
  return unilm.import_beit(source, num_heads, image_size)


def _load_openai(path: Path, opened: lazy.State | None = None) -> Pretrained:
  state = dalle.openai_state(path, opened)
  return dalle.import_tokenizer(state, dalle.openai_name, lazy.Source(state, path, "dalle"))


def _read(path: Path, ema: bool) -> tuple[lazy.State, dict[str, Any]]:
  """Tensors of a file by name, and what else it says (arguments of `lazy.Source`)."""
  if path.name.endswith(".index.json"):
    return _read_shards(path), {"left_out": []}
  if safetensors.is_safetensors(path):
    if ema:
      raise UserError(f"{path}: a safetensors file has one set of weights; leave ema out")
    state, metadata = safetensors.read(path)
    texts: dict[str, Any] = dict(metadata)
  elif torchfile.is_torch(path):
    state, texts = _unwrap(torchfile.load(path), path, ema)
  else:
    raise UserError(
      f"{path}: not a format this version reads; expected a run of beit_jax.main, a .pth or .safetensors file, a "
      "folder of Hugging Face's or timm's, or OpenAI's encoder.pkl"
    )
  left_out: list[str] = []
  for prefix in PREFIXES:
    if prefix == "backbone." and segmentation.is_segmenter(state):
      continue
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if inside and (len(inside) == len(state) or prefix == "backbone."):
      left_out += [name for name in state if not name.startswith(prefix)]
      state = inside
  said = segmentation.read_meta(texts.get("meta")) if segmentation.is_segmenter(state) else {}
  return state, {**said, **_facts(texts, path), "left_out": left_out}


def _facts(texts: dict[str, Any], path: Path) -> dict[str, Any]:
  """Our own description inside the file, or the arguments that unilm saves with its weights."""
  facts: dict[str, Any] = {}
  if isinstance(texts.get(OWN_TEXT), str):
    try:
      described = json.loads(texts[OWN_TEXT])
      module = described["module"]
      encoder = module.get("encoder", module)
      facts = dict(described=described, labels=list(described.get("labels") or []))
      facts |= dict(preprocessing=described["preprocessing"], assumed=list(described.get("assumed") or []))
      facts["fields"] = {name: encoder[name] for name in ("num_heads", "norm_eps") if name in encoder}
      if "image_size" in encoder:
        facts["fields"]["image_size"] = tuple(encoder["image_size"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{path}: the description in it is damaged ({error!r})") from None
    return facts
  args = texts.get("args")
  if isinstance(args, torchfile.Inert) and isinstance(args.state.get("imagenet_default_mean_and_std"), bool):
    size = args.state.get("input_size")
    if isinstance(size, int):
      statistics = unilm.IMAGENET if args.state["imagenet_default_mean_and_std"] else unilm.HALF
      crop_pct = 0.875 if size < 384 else 1.0
      shape = dict(image_size=(size, size), crop_pct=crop_pct, interpolation="bicubic", resize="short_side")
      facts["preprocessing"] = {**statistics, **shape}
  return facts


def _unwrap(content: Any, path: Path, ema: bool) -> tuple[lazy.State, dict[str, Any]]:
  """The state dict inside {"model": ...} and the like."""
  if isinstance(content, torchfile.Inert):
    return torchfile.module_tensors(content), {}
  texts = content if type(content) is dict else {}
  for _ in range(4):
    if type(content) is not dict:
      break
    tensors = {k: v for k, v in content.items() if type(k) is str and isinstance(v, torchfile.Tensor)}
    inner = next(
      (content[k] for k in (EMA_WRAPPERS if ema else WRAPPERS) if type(content.get(k)) is dict), None
    )
    if ema and inner is None:
      raise UserError(
        f"{path}: no averaged weights in it (looked for {', '.join(EMA_WRAPPERS)}); leave ema out"
      )
    if inner is None:
      if tensors:
        return tensors, texts
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
  state: lazy.State = {}
  for name in names:
    if Path(name).name != name or not (path.parent / name).is_file():
      raise UserError(f"{path}: it names {name!r}, which is no file in this folder")
    state |= safetensors.read(path.parent / name)[0]
  return state


def _load_flava(path: Path, state: lazy.State) -> Pretrained:
  prefix = next(name for name in state if name.endswith("blocks.input.weight")).removesuffix(
    "blocks.input.weight"
  )
  left_out = [name for name in state if not name.startswith(prefix)]
  state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
  decoder = path.parent / "decoder.safetensors"
  if decoder.is_file():
    state |= {f"decoder/{name}": value for name, value in safetensors.read(decoder)[0].items()}
  config = path.parent / "config.json"
  try:
    text = json.loads(config.read_text()).get(OWN_TEXT) if config.is_file() else None
    described = json.loads(text) if text else {}
  except ValueError:
    raise UserError(f"{config}: not JSON") from None
  facts = dict(
    described=described, preprocessing=described.get("preprocessing"), fields=described.get("module", {})
  )
  return dalle.import_tokenizer(
    state, dalle.flava_name, lazy.Source(state, path, "hf", **facts, left_out=left_out)
  )


def save(pretrained: Pretrained, path: str | Path, *, format: str) -> None:
  """Writes a model; nothing is there before it is whole.

  Args:
    path: a folder for "orbax" and "hf"; for "unilm" and "timm" a file, `.safetensors` or anything else for PyTorch's
      form (written without PyTorch); for "timm" a name without a suffix is a folder for `timm`'s "local-dir:".

  Raises:
    UserError: the format has no such model, or something is at `path` already.
  """
  if bucket.remote(bucket.path(path)):
    raise UserError(f"{path}: models are saved on disk only; copy them with `gcloud storage cp -r`")
  path = Path(os.path.expanduser(path)).absolute()
  writers: dict[str, Callable[[Pretrained, Path, Path], None]] = {
    "orbax": lambda pretrained, path, target: orbax.save(pretrained, path),
    "unilm": _save_unilm,
    "timm": _save_timm,
    "hf": _save_hf,
  }
  if format not in writers:
    raise UserError(f"format {format!r} is unknown; there are {', '.join(writers)}")
  if format not in pretrained.spec.formats:
    raise UserError(
      f"a {pretrained.kind} cannot be saved as {format}, which has no such model; its formats are "
      + ", ".join(pretrained.spec.formats)
    )
  free = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
  if not free:
    raise UserError(f"{path} exists; nothing is overwritten, give another name")
  if format == "timm" and path.suffix and path.suffix.lower() not in FILES:
    raise UserError(f"{path}: end the name in {' or '.join(FILES)}, or in nothing for a folder")
  temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[format](pretrained, temporary, path)
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


def _text(pretrained: Pretrained) -> dict[str, str]:
  return {OWN_TEXT: json.dumps(pretrained.describe(), sort_keys=True)}


def _write_tensors(
  path: Path,
  state: lazy.State,
  pretrained: Pretrained,
  left_out: list[str],
  suffix: str,
  meta: dict[str, Any] | None = None,
) -> None:
  """A file of tensors with our description; in PyTorch's form with `meta` as mmseg saves it, else as unilm."""
  lazy.report("written", [(name, "", value.shape) for name, value in state.items()], left_out)
  if left_out:
    log.info("left out, since the format has no place for it: %s", ", ".join(left_out))
  if suffix.lower() == ".safetensors":
    safetensors.write(path, state, {"format": "pt", **_text(pretrained)})
  elif meta is None:
    torchfile.save(path, state, _text(pretrained))
  else:
    torchfile.save(path, state, {"meta": meta, **_text(pretrained)}, under="state_dict")


def _save_unilm(pretrained: Pretrained, path: Path, target: Path) -> None:
  if pretrained.kind == "segmenter":
    meta = segmentation.export_meta(pretrained)
    _write_tensors(path, segmentation.export_mmseg(pretrained), pretrained, [], target.suffix, meta)
  else:
    _write_tensors(path, unilm.export_beit(pretrained), pretrained, [], target.suffix)


def _save_timm(pretrained: Pretrained, path: Path, target: Path) -> None:
  state, architecture, args, left_out = timm.export(pretrained)
  call = "".join(f", {key}={value!r}" for key, value in args.items())
  if target.suffix:
    _write_tensors(path, state, pretrained, left_out, target.suffix)
    log.info('in PyTorch: timm.create_model("%s"%s, checkpoint_path="%s")', architecture, call, target)
    return
  path.mkdir()
  _write_tensors(path / "model.safetensors", state, pretrained, left_out, ".safetensors")
  _write_json(path / "config.json", timm.hub_config(pretrained, architecture, args))
  log.info('in PyTorch: timm.create_model("local-dir:%s", pretrained=True)', target)


def _save_hf(pretrained: Pretrained, path: Path, target: Path) -> None:
  path.mkdir()
  if pretrained.kind == "tokenizer":
    state, decoder, config = dalle.export_flava(pretrained)
    if decoder:  # which transformers has no class for; beit_jax.load finds it here
      safetensors.write(path / "decoder.safetensors", decoder, {"format": "pt"})
  else:
    export = segmentation.export_hf if pretrained.kind == "segmenter" else hf.export
    state, config, processor = export(pretrained)
    _write_json(path / "preprocessor_config.json", processor)
  _write_tensors(path / "model.safetensors", state, pretrained, [], ".safetensors")
  _write_json(path / "config.json", {**config, **_text(pretrained)})
  log.info('in PyTorch: transformers.%s.from_pretrained("%s")', config["architectures"][0], target)


def _write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
