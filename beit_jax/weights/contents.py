"""Finds the state dict of one model among everything else that a file holds.

A training checkpoint also has optimizer states, random states and copies of the model, in dicts inside each other, and
training libraries put prefixes in front of the names. docs/weights.md lists the forms.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit_jax.errors import UserError
from beit_jax.runtime.logs import log
from beit_jax.weights import mmseg
from beit_jax.weights.files import lazy, safetensors, torchfile

# Parts of names that DDP, torch.compile, FSDP, activation checkpointing and Lightning insert anywhere.
WRAPPERS = re.compile(
  r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\.(?=.)"
)
# Two names that show where an encoder lies: of unilm and timm, of OpenMMLab, of transformers and of its CLIP.
ANCHORS = (
  ("cls_token", "patch_embed.proj.weight"),
  ("cls_token", "patch_embed.projection.weight"),
  ("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"),
  ("embeddings.class_embedding", "embeddings.patch_embedding.weight"),
)
# In front of an encoder, with the head beside it: transformers' names of the encoder; OpenMMLab's, with its head.
INNER = re.compile(r"(?<![^.])(beit|vit|deit|dinov2|dinov2_with_registers|data2vec_vision|vision_model)\.$")
BACKBONE = re.compile(r"(?<![^.])backbone\.$")
AVERAGED = re.compile(r"(?<![^._])ema(?![^._])")
# Of several copies of a model these are not taken: DINO and iBOT evaluate the teacher, MoCo the base encoder.
SECOND = re.compile(r"(?<![^.])(student|momentum_encoder)\.")
# Of DALL-E or FLAVA, possibly inside a larger model; of BEiT v2.
TOKENIZER = re.compile(r"(?<![^.])blocks\.input\.(w|weight)$|^quantize\.embedding\.weight$")
MAX_DEPTH = 4  # of dicts inside each other
# Beginnings of files that are no weights, as regular expressions, and what to do about them.
OTHER_FILES = (
  (rb"$", "empty; download or copy it again"),
  (rb"\s*<", "an HTML or XML page, as a failed download leaves it; download the file again"),
  (
    rb"version https://git-lfs",
    "a Git LFS pointer, a text in place of the weights; fetch them with `git lfs pull` or `hf download`",
  ),
  (rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "a compressed file or a tar archive; unpack it first"),
  (rb"\x89HDF", "an HDF5 file of Keras or TensorFlow; convert the model with transformers"),
  (rb"GGUF", "a GGUF file; take the model's .safetensors or .pth file"),
  (rb"\x93NUMPY", "a NumPy array without a name; take the model's .safetensors or .pth file"),
)


class Contents(NamedTuple):
  """The state dict of a file, everything that the file states beside it, and the names that were left out."""

  state: dict[str, lazy.Readable]
  facts: dict[str, Any]
  left_out: list[str]


class _Candidate(NamedTuple):
  """A dict of tensors and the prefix of a model in it; `label` names both."""

  label: str
  tensors: dict[str, Any]
  prefix: str

  @property
  def place(self) -> str:
    """Where it lies, for messages."""
    return self.label.rstrip(".") or "(the top)"


def read(path: Path, ema: bool = False) -> Contents:
  """Opens a file, or the shards that an index names, and takes the state dict of its model.

  Args:
    path: the file.
    ema: take the averaged copy of the model.

  Raises:
    UserError: the file is no file of weights, holds no model, or holds several.
  """
  content: Any
  facts: dict[str, Any] = {}
  if path.name.endswith(".index.json"):
    content = _read_shards(path)
  elif safetensors.is_safetensors(path):
    if ema:
      raise UserError(f"{path}: a safetensors file has one set of weights; omit ema")
    content, facts = safetensors.read(path)
  else:
    content = _read_torch(path)
    facts = content if type(content) is dict else {}
  return _choose(content, facts, path, ema)


def parts(path: Path) -> dict[str, dict[str, lazy.Readable]]:
  """All state dicts in a file of PyTorch by their place, such as "student", without wrappers in front of the names."""
  content = _read_torch(path) if torchfile.is_torch(path) else {}
  return {
    label.rstrip("."): {
      name: value
      for name, value in _without_wrappers(tensors, path).items()
      if not isinstance(value, torchfile.Inert)
    }
    for label, tensors in _dicts_of_tensors(content)
  }


def _read_torch(path: Path) -> Any:
  if torchfile.is_torch(path):
    return torchfile.load(path)
  with path.open("rb") as file:
    start = file.read(512)
  found = next((text for pattern, text in OTHER_FILES if re.match(pattern, start, re.DOTALL)), None)
  if found:
    raise UserError(f"{path}: not weights but {found}")
  raise UserError(
    f"{path}: not a format this version reads; expected a run of beit_jax.main, a .pth or .safetensors file, a "
    "folder of Hugging Face's or timm's, or OpenAI's encoder.pkl"
  )


def _read_shards(path: Path) -> dict[str, Any]:
  """The tensors of all files that a `model.safetensors.index.json` or `pytorch_model.bin.index.json` names."""
  try:
    names = sorted(set(map(str, json.loads(path.read_text())["weight_map"].values())))
  except (ValueError, KeyError, AttributeError, TypeError):
    raise UserError(f"{path}: not an index of the files of a model") from None
  content: dict[str, Any] = {}
  for name in names:
    shard = path.parent / name
    if Path(name).name != name or not shard.is_file():
      raise UserError(f"{path}: it names {name!r}, which is not a file in this folder")
    part = safetensors.read(shard)[0] if safetensors.is_safetensors(shard) else _read_torch(shard)
    if type(part) is not dict:
      raise UserError(f"{shard}: not a part of a state dict")
    content |= part
  return content


def _choose(content: Any, facts: dict[str, Any], path: Path, ema: bool) -> Contents:
  """Takes the one model that the content holds."""
  dicts = [(label, _without_wrappers(tensors, path)) for label, tensors in _dicts_of_tensors(content)]
  if not dicts:
    found = list(content)[:6] if type(content) is dict else torchfile.type_name(content)
    raise UserError(f"{path}: no state dict in it; found {str(found)[:200]}; nothing was executed")
  models = [_Candidate(label + p, tensors, p) for label, tensors in dicts for p in _prefixes(tensors)]
  if not models:  # not a model that is known by these names; other modules look at all its tensors
    most = max(len(tensors) for _, tensors in dicts)
    models = [_Candidate(label, tensors, "") for label, tensors in dicts if len(tensors) == most]
  chosen = _the_one(models, facts, path, ema)
  inside = {
    n.removeprefix(chosen.prefix): v for n, v in chosen.tensors.items() if n.startswith(chosen.prefix)
  }
  for name, value in inside.items():
    # Beside a state dict that is the whole file lie other facts, such as `args`.
    if isinstance(value, torchfile.Inert) and ("." in name or chosen.label):
      raise UserError(
        f"{path}: {name!r} in its state dict is a {value.name[:200]}, not a plain tensor; nothing was executed. If you "
        "trust the file, save the plain tensors with PyTorch and load that file"
      )
  state = {name: value for name, value in inside.items() if not isinstance(value, torchfile.Inert)}
  if state and all(tuple(value.shape) == (0,) for value in state.values()):
    raise UserError(
      f"{path}: all its tensors are empty: DeepSpeed (ZeRO stage 3) or FSDP keeps them in other files. Let it write "
      "one file with the whole state dict"
    )
  left_out = [name for name in chosen.tensors if not name.startswith(chosen.prefix)]
  others = ", ".join(model.place for model in models if model is not chosen)
  if others:
    log.info("%s: took the model under %s; also in the file: %s", path, chosen.place, others[:500])
  return Contents(state, facts, left_out)


def _dicts_of_tensors(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (path of keys, each with a dot; tensors and inert objects) for every dict or module that has tensors."""
  seen: set[int] = set()
  waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
  for keys, node in waiting:  # grows while it is read
    label = "".join(f"{key}." for key in keys)
    if isinstance(node, torchfile.Inert):
      found: dict[str, Any] = dict(torchfile.module_tensors(node, seen))
    elif type(node) is dict and id(node) not in seen:
      seen.add(id(node))
      entries = {key: value for key, value in node.items() if type(key) is str}
      leaves = (torchfile.Tensor, lazy.LazyTensor, torchfile.Inert)
      found = {key: value for key, value in entries.items() if isinstance(value, leaves)}
      if len(keys) < MAX_DEPTH:
        inner = (dict, torchfile.Inert)
        waiting += [((*keys, key[:100]), value) for key, value in entries.items() if isinstance(value, inner)]
    else:
      continue
    if any(not isinstance(value, torchfile.Inert) for value in found.values()):
      yield label, found


def _without_wrappers(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
  result = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
  if len(result) != len(tensors):
    raise UserError(
      f"{path}: it holds the same names with and without prefixes such as 'module.'; save the state dict of one model"
    )
  return result


def _prefixes(tensors: dict[str, Any]) -> list[str]:
  """The prefixes under which a model lies; [""] if it lies at the top."""
  found: dict[str, None] = {}
  for last, other in ANCHORS:
    for name in tensors:
      prefix = name.removesuffix(last)
      if name.endswith(last) and prefix[-1:] in ("", ".") and prefix + other in tensors:
        prefix = INNER.sub("", prefix) if last.startswith("embeddings.") else prefix
        found[_with_head(prefix, tensors, is_openmmlab="projection" in other and last == "cls_token")] = None
  if any(map(TOKENIZER.search, tensors)):
    return [""]
  return [""] if "" in found else list(found)


def _with_head(prefix: str, tensors: dict[str, Any], is_openmmlab: bool) -> str:
  """The prefix without `backbone.`, if beside the backbone lies a head that is read with it."""
  outer = BACKBONE.sub("", prefix)
  inside = {name.removeprefix(outer): tensors[name] for name in tensors if name.startswith(outer)}
  return outer if is_openmmlab or mmseg.is_segmenter(inside) else prefix


def _the_one(models: list[_Candidate], facts: dict[str, Any], path: Path, ema: bool) -> _Candidate:
  """Chooses among copies of a model."""
  averaged = [model for model in models if AVERAGED.search(model.label)]
  if ema and ("message_hub" in facts or not averaged):
    # mmengine's EMAHook exchanges both when it saves.
    where = (
      "mmengine has put them into state_dict" if "message_hub" in facts else "looked for a key with 'ema'"
    )
    raise UserError(f"{path}: no averaged weights in it ({where}); omit ema")
  rest = averaged if ema else [model for model in models if model not in averaged] or models
  rest = [model for model in rest if not SECOND.search(model.label)] or rest
  if len(rest) > 1:
    places = ", ".join(model.place for model in rest[:8])
    raise UserError(
      f"{path}: it holds {len(rest)} models, under {places[:500]}. Save the state dict of the one that "
      "you mean as a file of its own"
    )
  return rest[0]
