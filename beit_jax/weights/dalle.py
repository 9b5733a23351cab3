"""Reads and writes foreign tokenizers: OpenAI's `encoder.pkl` and `decoder.pkl`, and FLAVA's image codebook.

FLAVA's image codebook is the same encoder in Hugging Face transformers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models.dvae import Dvae
from beit_jax.weights import hf
from beit_jax.weights.files import lazy
from beit_jax.weights.pretrained import Pretrained, fingerprint
from beit_jax.weights.unilm import param_shapes, read_params

# map_pixels is (x + 0.125) / 1.25; the rest is BEiT's preprocessing (unilm beit/datasets.py).
PREPROCESSING = dict(
  mean=(-0.125,) * 3,
  std=(1.25,) * 3,
  image_size=(112, 112),
  crop_pct=1.0,
  interpolation="lanczos",
  resize="short_side",
)
FLAVA_GROUPS = 4


def openai_name(name: str) -> str:
  """Our parameter's name -> OpenAI's, under "encoder/" or "decoder/", since theirs are two files."""
  part, _, rest = name.partition("/")
  rest = re.sub(r"/kernel$", "/w", re.sub(r"/bias$", "/b", rest)).replace("output/", "output/conv/")
  return f"{part}/blocks.{rest.replace('/', '.')}"


def flava_name(name: str) -> str:
  """Our parameter's name -> that of `FlavaImageCodebook`; the decoder, which it lacks, under "decoder/"."""
  part, _, rest = openai_name(name).partition("/")
  rest = re.sub(r"(group_\d+)\.", r"\1.group.", rest).replace("res_path.", "res_path.path.")
  rest = re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", rest))
  return rest if part == "encoder" else f"{part}/{rest}"


def is_flava(state: lazy.State) -> bool:
  """Whether a state dict has the names of `FlavaImageCodebook`, possibly inside another model."""
  return any(name.endswith("blocks.input.weight") for name in state)


def is_openai(state: lazy.State) -> bool:
  """Whether a state dict has OpenAI's names."""
  return "blocks.input.w" in state


def openai_state(path: Path, states: dict[Path, lazy.State]) -> lazy.State:
  """The tensors of one file or of all files in a folder, under "encoder/" and "decoder/".

  Args:
    path: the file or the folder.
    states: the state dict of each file.

  Raises:
    UserError: a file is not a part of OpenAI's tokenizer, a part occurs twice, or there is no encoder.
  """
  state: dict[str, lazy.Readable] = {}
  files: dict[str, Path] = {}
  for file, tensors in states.items():
    first = tensors.get("blocks.input.w")
    if first is None or len(first.shape) != 4:
      raise UserError(
        f"{file}: not a part of OpenAI's tokenizer: no 'blocks.input.w' among its {len(tensors)} tensors"
      )
    part = "encoder" if first.shape[-1] == 7 else "decoder"
    if part in files:
      raise UserError(
        f"{path}: two {part}s, {files[part].name} and {file.name}; keep one encoder and one decoder"
      )
    files[part] = file
    state |= {f"{part}/{name}": value for name, value in tensors.items()}
  if "encoder" not in files:
    raise UserError(
      f"{path}: a decoder without an encoder cannot tokenize; give encoder.pkl, or the folder with both"
    )
  return state


def import_tokenizer(source: lazy.Source, to_foreign_name: Callable[[str], str]) -> Pretrained:
  """Builds the tokenizer of a state dict, with or without a decoder.

  Args:
    source: the file.
    to_foreign_name: `openai_name` or `flava_name`.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped.
  """
  state, path = source.state, source.path

  def channels(name: str) -> int:
    theirs = to_foreign_name(name)
    if theirs not in state:
      raise UserError(f"{path}: not a tokenizer like DALL-E's: {theirs!r} is missing")
    if len(state[theirs].shape) != 4 or 0 in state[theirs].shape:
      raise UserError(f"{path}: {theirs!r} has shape {state[theirs].shape}, expected four axes")
    return state[theirs].shape[0]

  def count(pattern: str) -> int:
    return len({match[1] for match in (re.search(pattern, name) for name in state) if match})

  encoder = "^" + re.escape(to_foreign_name("encoder/group_1/kernel").split("group_1")[0])
  fields: dict[str, Any] = dict(
    n_hid=channels("encoder/input/kernel"),
    vocab_size=channels("encoder/output/kernel"),
    group_count=count(encoder + r"(group_\d+)\."),
    n_blk_per_group=count(encoder + r"group_1\..*?(block_\d+)\."),
  )
  fields |= {name: value for name, value in source.fields.items() if name in ("dtype", "residual_dtype")}
  has_decoder = to_foreign_name("decoder/input/kernel") in state
  if has_decoder:
    fields["n_init"] = channels("decoder/input/kernel")
  if not 1 <= fields["group_count"] <= 8 or not 1 <= fields["n_blk_per_group"] <= 64:
    raise UserError(
      f"{path}: a tokenizer of {fields['group_count']} groups x {fields['n_blk_per_group']} blocks"
    )
  module = Dvae(**fields)
  shapes = param_shapes(module, (8 * module.stride, 8 * module.stride))
  shapes = {name: shape for name, shape in shapes.items() if has_decoder or name.startswith("encoder/")}
  params = read_params(source, state, shapes, to_foreign_name, source.left_out)
  preprocessing = lazy.check_preprocessing(source.preprocessing or PREPROCESSING, path)
  description = {
    **source.described,
    "kind": "tokenizer",
    "module": fields,
    "preprocessing": preprocessing,
    "format": source.format,
    "path": str(path),
    "left_out": source.left_out,
    "sha256": fingerprint(params),
  }
  return Pretrained("tokenizer", params, module, preprocessing, description)


def export_flava(tokenizer: Pretrained) -> hf.Folder:
  """Translates a tokenizer into a `FlavaImageCodebook`; transformers has no class for the decoder.

  Raises:
    UserError: the tokenizer does not have four groups, as transformers' class always does.
  """
  module = tokenizer.module
  assert isinstance(module, Dvae)
  if module.group_count != FLAVA_GROUPS:
    raise UserError(
      f"this tokenizer has {module.group_count} groups; transformers' FlavaImageCodebook always has {FLAVA_GROUPS}. "
      "Save it as orbax"
    )
  state = {flava_name(n): lazy.to_torch(v, n) for n, v in trees.flatten(tokenizer.params).items()}
  decoder = {n.removeprefix("decoder/"): np.asarray(v) for n, v in state.items() if n.startswith("decoder/")}
  encoder = {n: v for n, v in state.items() if not n.startswith("decoder/")}
  config = dict(
    architectures=[tokenizer.spec.hf_class],
    model_type="flava_image_codebook",
    num_groups=module.group_count,
    num_blocks_per_group=module.n_blk_per_group,
    input_channels=3,
    hidden_size=module.n_hid,
    vocab_size=module.vocab_size,
  )
  return hf.Folder(encoder, config, decoder=decoder or None)
