"""Reads and writes the tokenizers of BEiT v2 (unilm `beit2/modeling_vqkd.py`)."""

import dataclasses
import re
from typing import Any

from beit_jax import trees
from beit_jax.models.beit import Beit
from beit_jax.weights import unilm
from beit_jax.weights.files import lazy
from beit_jax.weights.kinds import make_module, module_fields, variable_shapes
from beit_jax.weights.pretrained import Pretrained

# A training checkpoint also has the teacher (unilm drops the same when it loads a tokenizer).
LEFT_OUT = r"^(teacher_model|scaling_layer|loss)\."
CODEBOOK = {
  "codebook/weight": "quantize.embedding.weight",
  "codebook/cluster_size": "quantize.cluster_size",
  "codebook/initialized": "quantize.embedding.initted",
  "codebook/initial_cluster_size": "quantize.embedding.cluster_size",
  "codebook/initial_weight": "quantize.embedding.embed_avg",
}
WORDS = CODEBOOK["codebook/weight"]


def is_vqkd(state: lazy.State) -> bool:
  """Whether a state dict has the names of unilm's `VQKD`."""
  return WORDS in state


def torch_name(name: str) -> str:
  """Our variable's name, with its collection in front -> unilm's."""
  if name in CODEBOOK:
    return CODEBOOK[name]
  part, _, rest = name.removeprefix("params/").partition("/")
  if part.endswith("task_layer"):
    rest = rest.replace("fc1", "0").replace("fc2", "2")
  return f"{part}.{re.sub(r'^norm.', 'fc_norm.', unilm.torch_name(rest))}"


def import_tokenizer(
  source: lazy.Source, num_heads: int | None, image_size: tuple[int, int] | None
) -> Pretrained:
  """Builds the tokenizer of a state dict.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped, or asks for what cannot be inferred.
  """
  state, left_out = unilm.drop(source, LEFT_OUT)
  inner = {
    n.removeprefix("encoder.").replace("fc_norm.", "norm."): v
    for n, v in state.items()
    if n.startswith("encoder.")
  }
  _, encoder = unilm.infer(dataclasses.replace(source, state=inner), num_heads, image_size)
  encoder = {**module_fields(Beit(**encoder)), "weight_init": "finetune"}

  def shape(name: str, ndim: int) -> lazy.Shape:
    return unilm.check_shape(state, name, ndim, source.path)

  vocab_size, code_dim = shape(WORDS, 2)
  blocks = {match[1] for match in (re.match(r"decoder\.blocks\.(\d+)\.", name) for name in state) if match}
  fields: dict[str, Any] = dict(
    encoder=encoder,
    vocab_size=vocab_size,
    code_dim=code_dim,
    decoder_depth=len(blocks),
    teacher_dim=shape("decode_task_layer.2.weight", 2)[0],
  )
  fields = unilm.add_described_fields(source, "vqkd", fields)
  size = encoder["image_size"]
  shapes = trees.flatten(variable_shapes(make_module("vqkd", fields), size))
  shapes = {name: tuple(leaf.shape) for name, leaf in shapes.items()}
  return unilm.finish(
    source,
    kind="vqkd",
    fields=fields,
    variables=unilm.read_params(source, state, shapes, torch_name, left_out),
    preprocessing=unilm.usual_preprocessing(unilm.HALF, size),
    left_out=left_out,
  )


def export_file(pretrained: Pretrained) -> tuple[lazy.Arrays, str, dict[str, Any]]:
  """The content of unilm's file: (state dict, its key, what else the file holds). It has no decoder to pixels."""
  flat = trees.flatten(pretrained.variables)
  kept = {name: value for name, value in flat.items() if not name.startswith("params/pixel_")}
  return {torch_name(name): lazy.to_torch(value, name) for name, value in kept.items()}, "model", {}
