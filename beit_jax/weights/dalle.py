"""Tokenizers of other people: OpenAI's `encoder.pkl` and `decoder.pkl`, and FLAVA's image codebook (that encoder)."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models.dvae import Dvae
from beit_jax.weights.files import lazy, torchfile
from beit_jax.weights.pretrained import Pretrained, fingerprint
from beit_jax.weights.unilm import read_params

# map_pixels is (x + 0.125) / 1.25; the rest is what BEiT does (unilm beit/datasets.py).
PREPROCESSING = dict(
  mean=(-0.125,) * 3,
  std=(1.25,) * 3,
  image_size=(112, 112),
  crop_pct=1.0,
  interpolation="lanczos",
  resize="short_side",
)


def openai_name(name: str) -> str:
  """Our parameter's name -> OpenAI's; "encoder" and "decoder" stay, since there they are two files."""
  part, _, rest = name.partition("/")
  rest = re.sub(r"/kernel$", "/w", re.sub(r"/bias$", "/b", rest)).replace("output/", "output/conv/")
  return f"{part}/blocks.{rest.replace('/', '.')}"


def flava_name(name: str) -> str:
  """Our parameter's name -> that of `FlavaImageCodebook`; the decoder, which that lacks, under `decoder/`."""
  part, _, rest = openai_name(name).partition("/")
  rest = re.sub(r"(group_\d+)\.", r"\1.group.", rest).replace("res_path.", "res_path.path.")
  rest = re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", rest))
  return rest if part == "encoder" else f"{part}/{rest}"


def is_flava(state: lazy.State) -> bool:
  return any(name.endswith("blocks.input.weight") for name in state)


def is_openai(state: lazy.State) -> bool:
  return "blocks.input.w" in state


def openai_state(path: Path, opened: lazy.State | None = None) -> lazy.State:
  """Tensors of one pickle, or of the encoder and decoder in a folder, under `encoder/` and `decoder/`.

  `opened`: the tensors of `path`, where they have been read already (a plain state dict).
  """
  paths = sorted(path.glob("*.pkl")) if path.is_dir() else [path]
  state: lazy.State = {}
  seen: dict[str, Path] = {}
  for file in paths:
    content = torchfile.load(file) if opened is None else opened
    if isinstance(content, torchfile.Inert):
      tensors = torchfile.module_tensors(content)
    else:
      tensors = content if isinstance(content, dict) else {}
    first = tensors.get("blocks.input.w")
    if len(getattr(first, "shape", ())) != 4:
      raise UserError(
        f"{file}: not a tokenizer of OpenAI's: no 'blocks.input.w' among its {len(tensors)} tensors"
      )
    part = "encoder" if first.shape[-1] == 7 else "decoder"
    if part in seen:
      raise UserError(
        f"{path}: two {part}s, {seen[part].name} and {file.name}; keep one encoder and one decoder"
      )
    seen[part] = file
    state |= {f"{part}/{name}": value for name, value in tensors.items()}
  if "encoder" not in seen:
    raise UserError(f"{path}: a decoder alone is no tokenizer; give encoder.pkl or the folder with both")
  return state


def import_tokenizer(state: lazy.State, naming: Any, source: lazy.Source) -> Pretrained:
  """The tokenizer of a state dict whose names are `naming` of ours; with or without a decoder.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped.
  """
  path = source.path

  def shape(name):
    there = naming(name)
    if there not in state:
      raise UserError(f"{path}: not a tokenizer of DALL-E's form: {there!r} is missing")
    if len(state[there].shape) != 4 or 0 in state[there].shape:
      raise UserError(f"{path}: {there!r} has shape {state[there].shape}, expected four axes")
    return state[there].shape

  stem = naming("encoder/group_1/block_1/res_path/conv_1/kernel")
  count = lambda pattern: len({m[1] for n in state for m in [re.search(pattern, n)] if m})  # noqa: E731
  encoder_only = "^" + re.escape(stem.split("group_1")[0])
  fields = dict(
    n_hid=shape("encoder/input/kernel")[0],
    vocab_size=shape("encoder/output/kernel")[0],
    group_count=count(encoder_only + r"(group_\d+)\."),
    n_blk_per_group=count(encoder_only + r"group_1\..*?(block_\d+)\."),
    **{k: v for k, v in source.fields.items() if k == "dtype"},
  )
  with_decoder = naming("decoder/input/kernel") in state
  if with_decoder:
    fields["n_init"] = shape("decoder/input/kernel")[0]
  if not 1 <= fields["group_count"] <= 8 or not 1 <= fields["n_blk_per_group"] <= 64:
    raise UserError(
      f"{path}: a tokenizer of {fields['group_count']} groups x {fields['n_blk_per_group']} blocks"
    )
  module = Dvae(**fields)
  image = jax.ShapeDtypeStruct((1, 8 * module.stride, 8 * module.stride, 3), jnp.float32)
  shapes = {
    n: v.shape
    for n, v in trees.flatten(jax.eval_shape(module.init, jax.random.key(0), image)["params"]).items()
  }
  shapes = {n: tuple(v) for n, v in shapes.items() if with_decoder or n.startswith("encoder/")}
  params = read_params(state, shapes, naming, path, source.left_out)
  preprocessing = lazy.check_preprocessing(source.preprocessing or PREPROCESSING, path)
  description = {
    **source.described,
    **dict(
      kind="tokenizer", module=fields, preprocessing=preprocessing, format=source.format, path=str(path)
    ),
    "left_out": source.left_out,
  }
  description["sha256"] = fingerprint(params)
  return Pretrained("tokenizer", params, module, preprocessing, description)


def export_flava(tokenizer: Pretrained) -> tuple[lazy.State, lazy.State, dict[str, Any]]:
  """(the encoder's tensors, the decoder's, config.json) of a `FlavaImageCodebook` folder.

  Raises:
    UserError: transformers' class is fixed at four groups.
  """
  module = tokenizer.module
  if module.group_count != 4:
    raise UserError(
      f"this tokenizer has {module.group_count} groups; transformers' FlavaImageCodebook always has 4. Save it as orbax"
    )
  state = {flava_name(n): lazy.to_torch(v, n) for n, v in trees.flatten(tokenizer.params).items()}
  decoder = {n.removeprefix("decoder/"): np.asarray(v) for n, v in state.items() if n.startswith("decoder/")}
  encoder = {n: v for n, v in state.items() if not n.startswith("decoder/")}
  config = dict(
    architectures=["FlavaImageCodebook"],
    model_type="flava_image_codebook",
    num_groups=module.group_count,
    num_blocks_per_group=module.n_blk_per_group,
    input_channels=3,
    hidden_size=module.n_hid,
    vocab_size=module.vocab_size,
  )
  return encoder, decoder, config
