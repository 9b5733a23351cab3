"""Reads and writes segmentation models: unilm's mmseg checkpoints, transformers' `BeitForSemanticSegmentation`.

Both are translated into mmseg's names first, which the docstring of models/upernet.py lists.

transformers counts the embedding as a stage and then looks one place before the number that it is given
(modeling_beit.py, BeitForSemanticSegmentation.forward). Its stage i is therefore block i - 2 counted from 0, and its
last block has no number. Reading gives what transformers computes. Writing keeps our blocks: if the decoder taps the
last one, a further block that does nothing is appended, and reading removes it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models import setr, upernet
from beit_jax.models.upernet import OUT_INDICES, BeitForSemanticSegmentation
from beit_jax.runtime.logs import log
from beit_jax.weights import hf, unilm
from beit_jax.weights.files import lazy
from beit_jax.weights.kinds import make_module, variable_shapes
from beit_jax.weights.pretrained import Pretrained

BACKBONE = "backbone."
# Our names -> mmseg's; `unilm.torch_name` translates those of the encoder.
NAMES = (
  (r"^fpn1/up_0/", "backbone.fpn1.0."),
  (r"^fpn1/bn/", "backbone.fpn1.1."),
  (r"^fpn1/up_1/", "backbone.fpn1.3."),
  (r"^fpn2/", "backbone.fpn2.0."),
  (r"^auxiliary_head_(\d)/", r"auxiliary_head.\1."),
  (r"/psp_(\d)/", r".psp_modules.\1.1."),
  (r"/(lateral|fpn)_(\d)/", r".\1_convs.\2."),
  (r"^(auxiliary_head)/conv_(\d)/", r"\1.convs.\2."),
  (r"(^decode_head/|^auxiliary_head\.\d\.)up_(\d)/", r"\1up_convs.\2.0."),
  (r"([./])(mean|var)$", r"\1running_\2"),
  (r"([./])(kernel|scale)$", r"\1weight"),
  (r"/", "."),
)
# transformers' names, as 5.23 saves them and as it has them in memory -> mmseg's.
HF_NAMES = (
  (r"^fpn\.fpn1\.conv_transpose1\.", "fpn1.0."),
  (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
  (r"^fpn\.fpn1\.conv_transpose2\.", "fpn1.3."),
  (r"^fpn\.fpn2\.(?!0\.)", "fpn2.0."),
  (r"\.psp_modules\.blocks\.(\d)\.conv\.", r".psp_modules.\1.1."),
  (r"\.psp_bottleneck\.", ".bottleneck."),
  (r"\.convolution\.", ".conv."),
  (r"(_head\..*)\.normalization\.", r"\1.bn."),
  (r"(_head\.)classifier\.", r"\1conv_seg."),
  (r"^(?!decode_head\.|auxiliary_head\.)", BACKBONE),
)
# Counters and index buffers, and what the encoder of another task has and this one does not use.
LEFT_OUT = (
  r"\.num_batches_tracked$|^(n_averaged|steps)$|relative_position_index$|attn\.k_bias$"
  r"|^backbone\.(mask_token$|(norm|fc_norm|head|lm_head)\.)"
)
HF_FIXED = dict(pool_scales=list(upernet.POOL_SCALES), auxiliary_num_convs=1, auxiliary_concat_input=False)


def is_segmenter(state: lazy.State) -> bool:
  """Whether a state dict of mmseg or transformers has a decoder of UPerNet or SETR-PUP; PSPNet and SETR-MLA do not."""
  has_laterals = any(name.startswith("decode_head.lateral_convs.") for name in state)
  convs = {
    match[1] for match in (re.match(r"decode_head\.up_convs\.\d\.(\d)\.", name) for name in state) if match
  }
  return has_laterals or convs == {"0"}


def mmseg_name(name: str) -> str:
  """Our parameter's or statistic's name -> mmseg's."""
  if name.startswith("encoder/"):
    return BACKBONE + unilm.torch_name(name)
  return lazy.rename(name, NAMES)


def from_hf(state: lazy.State) -> lazy.State:
  """Translates what `hf.to_unilm` made of transformers' state dict into mmseg's names."""
  return {lazy.rename(name, HF_NAMES): value for name, value in state.items()}


def read_hf(folder: Path) -> dict[str, Any]:
  """Reads what config.json and preprocessor_config.json say about the heads, as `lazy.Source.fields`.

  Raises:
    UserError: they describe heads that ours cannot represent.
  """
  config, processor = hf.read_files(folder)
  for key, wanted in HF_FIXED.items():
    is_used = config.get("use_auxiliary_head", True) or not key.startswith("auxiliary")
    if is_used and config.get(key, wanted) != wanted:
      raise UserError(f"{folder / 'config.json'}: {key} is {config[key]!r}, expected {wanted!r}")
  facts = dict(stages=config.get("out_indices", config.get("segmentation_indices")))
  reduce = processor.get("do_reduce_labels", processor.get("reduce_labels"))
  return facts | ({"reduce_zero_label": reduce} if type(reduce) is bool else {})


def read_meta(meta: Any) -> dict[str, Any]:
  """Reads mmseg's `meta`: names and colors of the classes, and tapped blocks and pixel statistics from its config.

  Args:
    meta: whatever the file holds under that name; parts of another form are ignored.

  Returns:
    Arguments of `lazy.Source`.
  """
  meta = meta if type(meta) is dict else {}
  inner = meta.get("dataset_meta")  # of mmseg 1
  inner = inner if type(inner) is dict else {}
  classes, palette = (meta.get(name.upper(), inner.get(name)) for name in ("classes", "palette"))
  fields: dict[str, Any] = {}
  facts: dict[str, Any] = {"fields": fields}
  if type(classes) in (list, tuple) and classes and all(type(name) is str for name in classes):
    facts["labels"] = list(classes)
  if type(palette) in (list, tuple) and palette and all(_are_numbers(c, 3, 0, 255) for c in palette):
    fields["palette"] = [list(color) for color in palette]
  text = meta.get("config", meta.get("cfg"))
  text = text if type(text) is str else ""
  try:
    taps, mean, std = (_stated_numbers(text, key) for key in ("out_indices", "mean", "std"))
  except ValueError:
    taps = mean = std = None
  if taps:
    fields["out_indices"] = tuple(map(int, taps))
  if mean and std and "to_rgb=False" not in text:
    pixels = {name: tuple(round(x / 255, 6) for x in value) for name, value in (("mean", mean), ("std", std))}
    facts["preprocessing"] = {**_usual_preprocessing((0, 0)), **pixels}
  zero = set(re.findall(r"\breduce_zero_label=(True|False)\b", text))
  if len(zero) == 1:
    fields["reduce_zero_label"] = zero == {"True"}
  return facts


def _stated_numbers(config: str, key: str) -> tuple[float, ...] | None:
  """The list of numbers that the text of a config gives to a key, if it is the same everywhere."""
  texts = re.findall(rf"\b{key}=[\[(](\d[\d., ]*\d)[\])]", config)
  found = {tuple(map(float, text.split(","))) for text in texts}
  return found.pop() if len(found) == 1 else None


def _are_numbers(value: Any, count: int, low: int, high: int) -> bool:
  is_list = type(value) in (list, tuple) and len(value) == count
  return is_list and all(type(n) is int and low <= n <= high for n in value)


def _usual_preprocessing(image_size: tuple[int, int]) -> dict[str, Any]:
  """unilm's pixel statistics and mmcv's resampling; the whole image is squashed to the model's size."""
  return {
    **unilm.IMAGENET,
    **dict(image_size=image_size, crop_pct=1.0, interpolation="bilinear", resize="squash"),
  }


def check_taps(taps: Any, depth: int, where: str) -> tuple[int, ...]:
  """Returns valid block numbers, counted from 0, as a tuple.

  Raises:
    UserError: they are not four rising numbers below `depth`; the message starts with `where`.
  """
  taps = tuple(taps) if isinstance(taps, list | tuple) else taps
  if not _are_numbers(taps, 4, 0, depth - 1) or list(taps) != sorted(set(taps)):
    raise UserError(f"{where}: expected four rising numbers of blocks from 0 to {depth - 1}")
  return taps


def _hf_taps(stages: Any, layers: int, path: Path) -> tuple[int, ...]:
  """transformers' `out_indices` for a model of so many blocks -> blocks counted from 0."""
  stages = list(stages) if isinstance(stages, list | tuple) else stages
  taps = [(i - 1) % (layers + 1) - 1 for i in stages] if _are_numbers(stages, 4, -layers, layers) else []
  if not taps or taps != sorted(set(taps)) or taps[0] < 0:
    raise UserError(
      f"{path.parent / 'config.json'}: out_indices is {stages!r}, expected four rising numbers from 2 to {layers}: "
      f"transformers' stage i is block i - 2 counted from 0, so that the last of {layers} blocks has none. To tap "
      "other blocks, give out_indices= (blocks counted from 0)"
    )
  released = OUT_INDICES.get(layers)
  if stages == list(released or ()):
    log.warning(
      "%s: transformers takes out_indices %s to mean the blocks %s (counted from 0); beit_jax does the same. "
      "unilm's models were trained with the blocks %s: load with out_indices=%s to tap those",
      path,
      stages,
      tuple(taps),
      released,
      released,
    )
  return tuple(taps)


def _taps(source: lazy.Source, depth: int, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], bool]:
  """(tapped blocks counted from 0, whether they are a guess)."""
  if given is not None:
    return check_taps(given, depth, f"out_indices={given!r}"), False
  if source.format == "hf":
    return _hf_taps(source.fields.get("stages"), depth, source.path), False
  module = source.described.get("module", {}) if source.described.get("kind") == "segmenter" else {}
  stated = module.get("out_indices", source.fields.get("out_indices"))
  if stated is not None:
    return check_taps(stated, depth, f"{source.path}: its out_indices are {stated!r}"), False
  if depth not in OUT_INDICES:
    raise UserError(
      f"{source.path}: the file does not state which of its {depth} blocks the decoder taps; give out_indices="
    )
  log.warning(
    "%s: out_indices=%s is assumed, as in every released model of %d blocks; give out_indices= if yours differs",
    source.path,
    OUT_INDICES[depth],
    depth,
  )
  return OUT_INDICES[depth], True


def _is_identity(state: lazy.State, number: int) -> bool:
  """Whether both branches of a block give zeros: LayerScale, or the last layer of each branch, is zero."""
  stem = f"{BACKBONE}blocks.{number}."
  scales = [f"{stem}gamma_{i}" for i in (1, 2)]
  last = [f"{stem}{part}.{what}" for part in ("attn.proj", "mlp.fc2") for what in ("weight", "bias")]
  names = scales if scales[0] in state else last
  return all(name in state and not np.any(state[name].read()) for name in names)


def import_segmenter(
  source: lazy.Source,
  num_heads: int | None,
  image_size: tuple[int, int] | None,
  out_indices: tuple[int, ...] | None,
) -> Pretrained:
  """Builds the model of a state dict in mmseg's names; `collections` gets the batch statistics.

  Args:
    source: the file.
    num_heads: what the file may leave open.
    image_size: (height, width) in pixels, which the file may leave open.
    out_indices: the blocks that the decoder taps, counted from 0, instead of those that the file states.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped, or asks for what cannot be inferred.
  """
  uses_setr = any(name.startswith("decode_head.up_convs.") for name in source.state)
  # unilm's encoder makes the feature pyramid even if the head does not use it.
  state, left_out = unilm.drop(source, LEFT_OUT + (r"|^backbone\.fpn\d\." if uses_setr else ""))
  depth = len({m[1] for m in (re.match(r"backbone\.blocks\.(\d+)\.", name) for name in state) if m})
  taps, is_guess = _taps(source, depth, out_indices)
  if source.format == "hf" and taps[-1] < depth - 1 and _is_identity(state, depth - 1):
    pattern = rf"^backbone\.blocks\.{depth - 1}\."
    state, left_out = unilm.drop(dataclasses.replace(source, state=state, left_out=left_out), pattern)
  fields = _module_fields(source, state, num_heads, image_size)
  fields |= dict(out_indices=taps, head="setr_pup" if uses_setr else "upernet")
  fields |= _head_fields(source, state, fields["encoder"]["width"], uses_setr)
  variables, fresh = _read_variables(source, state, fields, left_out)
  source = dataclasses.replace(
    source,
    labels=_of_every_class(source, "labels", source.labels, fields["num_classes"]),
    described={**source.described, **_dataset_facts(source, fields["num_classes"])},
    assumed=source.assumed + (["out_indices"] if is_guess else []) + fresh,
  )
  return unilm.finish(
    source,
    kind="segmenter",
    fields=fields,
    variables=variables,
    preprocessing=_usual_preprocessing(fields["encoder"]["image_size"]),
    left_out=left_out,
  )


def _module_fields(
  source: lazy.Source, state: lazy.State, num_heads: int | None, image_size: tuple[int, int] | None
) -> dict[str, Any]:
  """The module's fields apart from those of the heads: the encoder, and what a description of ours adds."""
  encoder = {name.removeprefix(BACKBONE): v for name, v in state.items() if name.startswith(BACKBONE)}
  _, fields = unilm.infer(dataclasses.replace(source, state=encoder), num_heads, image_size)
  fields = {k: v for k, v in fields.items() if k not in ("use_mask_token", "final_norm")}
  return unilm.add_described_fields(source, "segmenter", {"encoder": {**fields, "weight_init": "finetune"}})


def _dataset_facts(source: lazy.Source, num_classes: int) -> dict[str, Any]:
  """What the file says about its data set: the colors of the classes, and whether label 0 means no class."""
  facts: dict[str, Any]
  facts = {name: source.fields[name] for name in ("palette", "reduce_zero_label") if name in source.fields}
  if "palette" in facts:
    facts["palette"] = _of_every_class(source, "palette", facts["palette"], num_classes)
  return facts


def _of_every_class(source: lazy.Source, name: str, values: list[Any], num_classes: int) -> list[Any]:
  if len(values or ()) in (0, num_classes):
    return values
  log.warning("%s: not used: %s of %d classes; it has %d", source.path, name, len(values), num_classes)
  return []


def _head_fields(source: lazy.Source, state: lazy.State, width: int, uses_setr: bool) -> dict[str, Any]:
  """Numbers of classes and channels of the heads, from shapes; channels None if they are the module's default."""

  def classifier_shape(head: str) -> lazy.Shape:
    name = f"{head}.conv_seg.weight"
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != 4 or 0 in shape:
      raise UserError(
        f"{source.path}: {name} gives the number of classes: expected 4 axes, found {shape or 'nothing'}"
      )
    return shape

  num_classes, channels = classifier_shape("decode_head")[:2]
  has_aux = any(name.startswith("auxiliary_head.") for name in state)
  aux_head = "auxiliary_head.0" if uses_setr else "auxiliary_head"
  default = setr.SETR_CHANNELS if uses_setr else width
  described = source.described.get("module", {}).get("channels")
  return dict(
    num_classes=num_classes,
    channels=None if channels == default and described is None else channels,
    aux_channels=classifier_shape(aux_head)[1] if has_aux else 256,
  )


def _read_variables(
  source: lazy.Source, state: lazy.State, fields: dict[str, Any], left_out: list[str]
) -> tuple[dict[str, Any], list[str]]:
  """Reads the variables and checks every tensor against the module.

  Returns:
    ({"params": ..., "batch_stats": ...}, names of the parts that start from new random values).
  """
  variables = variable_shapes(make_module("segmenter", fields), fields["encoder"]["image_size"])
  flat = {name: trees.flatten(variables[name]) for name in ("params", "batch_stats")}
  shapes = {name: tuple(leaf.shape) for part in flat.values() for name, leaf in part.items()}
  fresh: dict[str, Any] = {}
  if fields["head"] == "upernet" and not any(name.startswith("auxiliary_head.") for name in state):
    head = upernet.FcnHead(fields["num_classes"], fields["aux_channels"], jnp.float32)
    created = head.init(jax.random.key(0), jnp.zeros((1, 1, 1, fields["encoder"]["width"])))
    for collection in created.values():
      fresh |= {f"auxiliary_head/{n}": np.asarray(leaf) for n, leaf in trees.flatten(collection).items()}
    log.warning(
      "%s has no auxiliary head, which only training uses: that of this model starts from random values",
      source.path,
    )
  wanted = {name: shape for name, shape in shapes.items() if name not in fresh}
  read = trees.flatten(unilm.read_params(source, state, wanted, mmseg_name, left_out)) | fresh
  tree = {kind: trees.unflatten({name: read[name] for name in part}) for kind, part in flat.items()}
  return tree, ["auxiliary_head"] if fresh else []


def export_mmseg(pretrained: Pretrained, *, buffers: bool = True) -> lazy.Arrays:
  """The state dict in mmseg's names and PyTorch's layout.

  Args:
    pretrained: a segmenter.
    buffers: add the indices and counters that mmseg saves.
  """
  flat = {**trees.flatten(pretrained.params), **trees.flatten(pretrained.collections["batch_stats"])}
  state = {mmseg_name(name): lazy.to_torch(value, name) for name, value in flat.items()}
  if buffers:
    state |= unilm.index_buffers(pretrained, state)
    counters = [name for name in state if name.endswith(".running_var")]
    state |= {name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64) for name in counters}
  return dict(sorted(state.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, ...]:
  """A sort key that gives roughly mmseg's order: backbone, decoder, auxiliary heads."""
  parts = (BACKBONE, "decode_head.", "auxiliary_head.")
  inside = unilm.order(name.removeprefix(BACKBONE)) if name.startswith(BACKBONE) else ()
  return (next(i for i, part in enumerate(parts) if name.startswith(part)), *inside)


def export_file(pretrained: Pretrained) -> tuple[lazy.Arrays, str, dict[str, Any]]:
  """The content of mmseg's file: (state dict, its key, what else the file holds).

  `meta` gets CLASSES and PALETTE, if they are known for every class.
  """
  names = dict(CLASSES="labels", PALETTE="palette")
  found = {key: list(pretrained.description.get(name) or ()) for key, name in names.items()}
  num_classes = _module(pretrained).num_classes
  meta = {key: value for key, value in found.items() if len(value) == num_classes}
  return export_mmseg(pretrained), "state_dict", {"meta": meta}


def _module(pretrained: Pretrained) -> BeitForSemanticSegmentation:
  assert isinstance(pretrained.module, BeitForSemanticSegmentation)
  return pretrained.module


def export_hf(pretrained: Pretrained) -> hf.Folder:
  """Translates a segmenter into a `BeitForSemanticSegmentation` of transformers.

  Raises:
    UserError: transformers has no such head.
  """
  module, fields = _module(pretrained), pretrained.encoder_fields
  instead = "Its formats are orbax, unilm"
  if module.head != "upernet":
    raise UserError(
      f"a segmenter with head {module.head!r} cannot be saved as hf: transformers has UPerNet only. {instead}"
    )
  depth, width = fields["depth"], fields["width"]
  if module.channels not in (None, width):
    raise UserError(
      f"a segmenter with channels={module.channels} cannot be saved as hf: transformers' decoder is as wide as its "
      f"encoder, {width}. {instead}"
    )
  state = export_mmseg(pretrained)
  encoder = {
    name.removeprefix(BACKBONE): value
    for name, value in state.items()
    if re.match(r"backbone\.(?!fpn)", name) and not name.endswith("relative_position_index")
  }
  taps = check_taps(module.out_indices, depth, f"out_indices={module.out_indices}")
  if taps[-1] == depth - 1:  # transformers has no number for the last block
    encoder |= _identity_block(encoder, depth)
    # The rate is that of the last block; all others keep theirs.
    fields = {**fields, "drop_path_rate": fields["drop_path_rate"] * depth / max(depth - 1, 1)}
    depth += 1
  result = hf.to_hf_names(encoder, pretrained.kind)
  for name, value in state.items():
    if not name.startswith(BACKBONE) or name.startswith(f"{BACKBONE}fpn"):
      result[name.removeprefix(BACKBONE).replace(".conv_seg.", ".classifier.")] = value
  settings = pretrained.description.get("config", {}).get("segment", {})  # of a run
  config = hf.encoder_config({**fields, "depth": depth}) | dict(
    architectures=[pretrained.spec.hf_class],
    use_mask_token=False,
    use_mean_pooling=True,
    out_indices=[i + 2 for i in taps],
    use_auxiliary_head=True,
    auxiliary_channels=module.aux_channels,
    auxiliary_loss_weight=settings.get("aux_weight", 0.4),
    semantic_loss_ignore_index=255,
    **HF_FIXED,
    **hf.class_names(pretrained),
  )
  processor = hf.processor_config(pretrained.preprocessing, "BeitImageProcessor")
  zero = pretrained.description.get("reduce_zero_label", settings.get("reduce_zero_label", False))
  return hf.Folder(result, config, processor={**processor, "do_reduce_labels": zero})


def _identity_block(encoder: lazy.Arrays, depth: int) -> lazy.Arrays:
  """The tensors of block `depth` that does nothing: norms are the identity, everything else is zero."""
  block = {}
  for name, value in encoder.items():
    if name.startswith(f"blocks.{depth - 1}."):
      fill = np.ones_like if re.search(r"norm\d\.weight$", name) else np.zeros_like
      block[name.replace(f".{depth - 1}.", f".{depth}.", 1)] = fill(value)
  return block
