"""Segmentation models: checkpoints of unilm's mmseg, and transformers' `BeitForSemanticSegmentation`.

Both are translated into mmseg's names first, which the docstring of models/upernet.py lists.

transformers counts the embedding as a stage of its own and then looks one place before the number that it is given
(modeling_beit.py, BeitForSemanticSegmentation.forward), so that its stage i is block i - 2 counted from 0, and its last
block has no number. Reading gives what transformers computes. Writing keeps our blocks: where the decoder taps the last
one, another block that does nothing follows it; reading takes that away again.
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
from beit_jax.models.upernet import OUT_INDICES
from beit_jax.runtime.logs import log
from beit_jax.weights import hf, unilm
from beit_jax.weights.files import lazy
from beit_jax.weights.pretrained import Pretrained, make_module

BACKBONE = "backbone."
# Ours -> mmseg's, in this order; the encoder's names are unilm.torch_name's.
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
# transformers' names, as 5.23 saves them and has them in memory -> mmseg's.
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
# Counters and index buffers; what an encoder of another task has and this one does not use.
LEFT_OUT = (
  r"\.num_batches_tracked$|relative_position_index$|attn\.k_bias$"
  r"|^backbone\.(mask_token$|(norm|fc_norm|head|lm_head)\.)"
)
HF_FIXED = dict(pool_scales=list(upernet.POOL_SCALES), auxiliary_num_convs=1, auxiliary_concat_input=False)


def is_segmenter(state: lazy.State) -> bool:
  """Whether there is a decoder of UPerNet or SETR-PUP in a state dict of mmseg or transformers."""
  return any(re.match(r"decode_head\.(psp_modules|up_convs)\.", name) for name in state)


def mmseg_name(name: str) -> str:
  """Our parameter's or statistic's name -> mmseg's."""
  if name.startswith("encoder/"):
    return BACKBONE + unilm.torch_name(name)
  for pattern, replacement in NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def from_hf(state: lazy.State) -> lazy.State:
  """What `hf.to_unilm` made of transformers' state dict -> mmseg's names."""
  result: lazy.State = {}
  for name, value in state.items():
    for pattern, replacement in HF_NAMES:
      name = re.sub(pattern, replacement, name)
    result[name] = value
  return result


def read_hf(folder: Path) -> dict[str, Any]:
  """What config.json and preprocessor_config.json say of the heads, as `lazy.Source.fields`.

  Raises:
    UserError: they describe heads that ours are not.
  """
  config, processor = hf.read_files(folder)
  for key, wanted in HF_FIXED.items():
    used = config.get("use_auxiliary_head", True) or not key.startswith("auxiliary")
    if used and config.get(key, wanted) != wanted:
      raise UserError(f"{folder / 'config.json'}: {key} is {config[key]!r}, expected {wanted!r}")
  reduce = processor.get("do_reduce_labels", processor.get("reduce_labels"))
  facts = dict(stages=config.get("out_indices", config.get("segmentation_indices")))
  return facts | ({"reduce_zero_label": reduce} if type(reduce) is bool else {})


def read_meta(meta: Any) -> dict[str, Any]:
  """mmseg's `meta` as arguments of `lazy.Source`: names and colours of the classes; of its config what it needs.

  Args:
    meta: whatever the file holds under that name; what is not as expected is not used.
  """
  meta = meta if type(meta) is dict else {}
  inner = meta.get("dataset_meta")  # of mmseg 1
  classes, palette = (
    meta.get(name.upper(), inner.get(name) if type(inner) is dict else None)
    for name in ("classes", "palette")
  )
  facts: dict[str, Any] = {"fields": {}}
  if type(classes) in (list, tuple) and classes and all(type(name) is str for name in classes):
    facts["labels"] = list(classes)
  if type(palette) in (list, tuple) and palette and all(_numbers(c, 3, 0, 255) for c in palette):
    facts["fields"]["palette"] = [list(colour) for colour in palette]
  text = meta.get("config", meta.get("cfg"))
  text = text if type(text) is str else ""

  def said(key):
    """The lists of numbers that the text of the config gives to a key, if all of them are the same."""
    found = {tuple(map(float, x.split(","))) for x in re.findall(rf"\b{key}=[\[(](\d[\d., ]*\d)[\])]", text)}
    return found.pop() if len(found) == 1 else None

  try:
    taps, mean, std = said("out_indices"), said("mean"), said("std")
  except ValueError:
    taps = mean = std = None
  if taps:
    facts["fields"]["out_indices"] = tuple(map(int, taps))
  if mean and std and "to_rgb=False" not in text:
    pixels = {name: tuple(round(x / 255, 6) for x in value) for name, value in (("mean", mean), ("std", std))}
    facts["preprocessing"] = {**_usual((0, 0)), **pixels}
  zero = set(re.findall(r"\breduce_zero_label=(True|False)\b", text))
  if len(zero) == 1:
    facts["fields"]["reduce_zero_label"] = zero == {"True"}
  return facts


def _numbers(value: Any, count: int, low: int, high: int) -> bool:
  right = type(value) in (list, tuple) and len(value) == count
  return right and all(type(n) is int and low <= n <= high for n in value)


def _usual(image_size: tuple[int, int]) -> dict[str, Any]:
  """unilm's pixel statistics and mmcv's resampling; the whole image in the model's size."""
  return {
    **unilm.IMAGENET,
    **dict(image_size=image_size, crop_pct=1.0, interpolation="bilinear", resize="squash"),
  }


def check_taps(taps: Any, depth: int, where: str) -> tuple[int, ...]:
  """Blocks counted from 0 as a tuple, or a UserError that says where they come from."""
  taps = tuple(taps) if isinstance(taps, list | tuple) else taps
  if not _numbers(taps, 4, 0, depth - 1) or list(taps) != sorted(set(taps)):
    raise UserError(f"{where}: expected four rising numbers of blocks from 0 to {depth - 1}")
  return taps


def _hf_taps(stages: Any, layers: int, path: Path) -> tuple[int, ...]:
  """transformers' `out_indices` of a model of so many blocks -> blocks counted from 0."""
  given = list(stages) if isinstance(stages, list | tuple) else stages
  taps = None
  if _numbers(given, 4, -layers, layers):
    taps = [(i - 1) % (layers + 1) - 1 for i in given]
  if taps is None or taps != sorted(set(taps)) or taps[0] < 0:
    raise UserError(
      f"{path.parent / 'config.json'}: out_indices is {stages!r}, expected four rising numbers from 2 to {layers}: "
      f"transformers' stage i is block i - 2 counted from 0, so that the last of {layers} blocks has none. To tap "
      "other blocks, give out_indices= (blocks counted from 0)"
    )
  return tuple(taps)


def _taps(source: lazy.Source, depth: int, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], bool]:
  """(blocks counted from 0, whether that is a guess): given, of transformers, described by us, in mmseg's config."""
  if given is not None:
    return check_taps(given, depth, f"out_indices={given!r}"), False
  if source.format == "hf":
    stages = source.fields.get("stages")
    taps = _hf_taps(stages, depth, source.path)
    released = OUT_INDICES.get(depth)
    if released and list(stages) == list(released):
      log.warning(
        "%s: out_indices %s, which transformers takes to mean the blocks %s (counted from 0); the same is done here. "
        "unilm's models were trained with the blocks %s: out_indices=%s at loading taps those",
        *(source.path, list(stages), taps, released, released),
      )
    return taps, False
  module = source.described.get("module", {}) if source.described.get("kind") == "segmenter" else {}
  told = module.get("out_indices", source.fields.get("out_indices"))
  if told is not None:
    return check_taps(told, depth, f"{source.path}: its out_indices are {told!r}"), False
  if depth not in OUT_INDICES:
    raise UserError(
      f"{source.path}: nothing in it tells which of its {depth} blocks the decoder taps; give out_indices="
    )
  log.warning(
    "%s: out_indices=%s is assumed, as in every released model of %d blocks; give out_indices= if yours differs",
    *(source.path, OUT_INDICES[depth], depth),
  )
  return OUT_INDICES[depth], True


def _is_identity(state: lazy.State, number: int) -> bool:
  """Whether both branches of a block give zeros: LayerScale is zero, or what comes last in them."""
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
  """The model of a state dict in mmseg's names, with the statistics of its batch normalisations in `collections`.

  Args:
    out_indices: the blocks that the decoder taps, from 0, instead of what the file says.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped, or asks for what cannot be inferred.
  """
  setr_pup = any(name.startswith("decode_head.up_convs.") for name in source.state)
  # unilm's encoder makes the feature pyramid whether or not the head uses it.
  pattern = LEFT_OUT + (r"|^backbone\.fpn\d\." if setr_pup else "")
  left_out = source.left_out + [name for name in source.state if re.search(pattern, name)]
  state = {name: value for name, value in source.state.items() if not re.search(pattern, name)}
  depth = len({m[1] for m in (re.match(r"backbone\.blocks\.(\d+)\.", name) for name in state) if m})
  taps, guessed = _taps(source, depth, out_indices)
  if source.format == "hf" and taps[-1] < depth - 1 and _is_identity(state, depth - 1):
    block = [name for name in state if name.startswith(f"{BACKBONE}blocks.{depth - 1}.")]
    state = {name: value for name, value in state.items() if name not in block}
    left_out += block
  encoder = {name.removeprefix(BACKBONE): v for name, v in state.items() if name.startswith(BACKBONE)}
  _, fields = unilm.infer(dataclasses.replace(source, state=encoder), num_heads, image_size)
  fields = {k: v for k, v in fields.items() if k not in ("use_mask_token", "final_norm")}
  module_fields = unilm.described_fields(
    source, "segmenter", dict(encoder={**fields, "weight_init": "finetune"})
  )
  module_fields |= dict(out_indices=taps, head="setr_pup" if setr_pup else "upernet")
  module_fields |= _head_fields(source, state, fields["width"], setr_pup)
  variables, fresh = _read(source, state, module_fields, left_out)
  usual = _usual(fields["image_size"])
  facts = {k: source.fields[k] for k in ("palette", "reduce_zero_label") if k in source.fields}
  facts["labels"] = source.labels
  count = module_fields["num_classes"]
  for name in ("labels", "palette"):
    if len(facts.get(name) or ()) not in (0, count):
      log.warning("%s: %s of %d classes, but it has %d; not used", source.path, name, len(facts[name]), count)
      facts[name] = []
  source = dataclasses.replace(
    source,
    labels=facts.pop("labels"),
    described={**source.described, **facts},
    assumed=source.assumed + ["out_indices"] * guessed + fresh,
  )
  return unilm.finish(
    *(source, "segmenter", module_fields, variables["params"], usual, left_out),
    {"batch_stats": variables["batch_stats"]},
  )


def _head_fields(source: lazy.Source, state: lazy.State, width: int, setr_pup: bool) -> dict[str, Any]:
  """Classes and channels of the heads, by shapes; channels None where they are the module's default."""

  def last(head):
    name = f"{head}.conv_seg.weight"
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != 4 or 0 in shape:
      raise UserError(
        f"{source.path}: {name} tells the number of classes: expected 4 axes, found {shape or 'nothing'}"
      )
    return shape

  num_classes, channels = last("decode_head")[:2]
  aux = "auxiliary_head.0" if setr_pup else "auxiliary_head"
  aux_channels = last(aux)[1] if any(name.startswith("auxiliary_head.") for name in state) else 256
  usual = setr.SETR_CHANNELS if setr_pup else width
  told = source.described.get("module", {}).get("channels")
  return dict(
    num_classes=num_classes,
    channels=None if channels == usual and told is None else channels,
    aux_channels=aux_channels,
  )


def _read(source, state, fields, left_out) -> tuple[dict[str, Any], list[str]]:
  """({"params", "batch_stats"}, names of what starts fresh): every tensor checked against the module's."""
  module, size = make_module("segmenter", fields), fields["encoder"]["image_size"]
  variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
  flat = {kind: trees.flatten(variables[kind]) for kind in ("params", "batch_stats")}
  shapes = {name: tuple(leaf.shape) for part in flat.values() for name, leaf in part.items()}
  fresh: dict[str, Any] = {}
  if fields["head"] == "upernet" and not any(name.startswith("auxiliary_head.") for name in state):
    head = upernet.FcnHead(fields["num_classes"], fields["aux_channels"], jnp.float32)
    made = head.init(jax.random.key(0), jnp.zeros((1, 1, 1, fields["encoder"]["width"])))
    fresh = {
      f"auxiliary_head/{n}": np.asarray(leaf)
      for part in made.values()
      for n, leaf in trees.flatten(part).items()
    }
    log.warning(
      "%s has no auxiliary head, which only training uses: that of this model starts fresh", source.path
    )
  wanted = {name: shape for name, shape in shapes.items() if name not in fresh}
  read = trees.flatten(unilm.read_params(state, wanted, mmseg_name, source.path, left_out)) | fresh
  tree = {kind: trees.unflatten({name: read[name] for name in part}) for kind, part in flat.items()}
  return tree, ["auxiliary_head"] if fresh else []


def export_mmseg(pretrained: Pretrained, *, buffers: bool = True) -> lazy.State:
  """State dict in mmseg's names and PyTorch's layout; with `buffers` the indices and counters that mmseg saves."""
  flat = {**trees.flatten(pretrained.params), **trees.flatten(pretrained.collections["batch_stats"])}
  state: lazy.State = {mmseg_name(name): lazy.to_torch(value, name) for name, value in flat.items()}
  if buffers:
    state |= unilm.index_buffers(pretrained, state)
    counters = [name for name in state if name.endswith(".running_var")]
    state |= {name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64) for name in counters}
  return dict(sorted(state.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple:
  """mmseg's order, roughly: backbone, decoder, auxiliary heads."""
  parts = (BACKBONE, "decode_head.", "auxiliary_head.")
  inside = unilm.order(name.removeprefix(BACKBONE)) if name.startswith(BACKBONE) else ()
  return (next(i for i, part in enumerate(parts) if name.startswith(part)), *inside)


def export_meta(pretrained: Pretrained) -> dict[str, Any]:
  """mmseg's `meta` of a checkpoint: CLASSES and PALETTE, where they are known."""
  names = dict(CLASSES="labels", PALETTE="palette")
  found = {key: list(pretrained.description.get(name) or ()) for key, name in names.items()}
  return {key: value for key, value in found.items() if len(value) == pretrained.module.num_classes}


def export_hf(pretrained: Pretrained) -> tuple[lazy.State, dict[str, Any], dict[str, Any]]:
  """(state dict, config.json, preprocessor_config.json) of a `BeitForSemanticSegmentation`.

  Raises:
    UserError: transformers has no such head.
  """
  module, fields = pretrained.module, pretrained.encoder_fields
  instead = "Its formats are orbax, unilm"
  if module.head != "upernet":
    raise UserError(
      f"a segmenter with head {module.head!r} cannot be saved as hf: transformers has UPerNet only. {instead}"
    )
  depth, width, channels = fields["depth"], fields["width"], module.channels
  if channels not in (None, width):
    raise UserError(
      f"a segmenter with channels={channels} cannot be saved as hf: transformers' decoder is as wide as its encoder, "
      f"{width}. {instead}"
    )
  state = export_mmseg(pretrained)
  encoder = {
    name.removeprefix(BACKBONE): value
    for name, value in state.items()
    if re.match(r"backbone\.(?!fpn)", name) and not name.endswith("relative_position_index")
  }
  taps = check_taps(module.out_indices, depth, f"out_indices={module.out_indices}")
  drop_path = fields["drop_path_rate"]
  if taps[-1] == depth - 1:  # which has no number in transformers: one more block, which does nothing
    for name in [name for name in encoder if name.startswith(f"blocks.{depth - 1}.")]:
      value = np.ones_like if re.search(r"norm\d\.weight$", name) else np.zeros_like
      encoder[name.replace(f".{depth - 1}.", f".{depth}.", 1)] = value(encoder[name])
    drop_path *= depth / max(depth - 1, 1)  # of the last block: those before keep their own rates
    depth += 1
  result = hf.their_state(encoder, "segmenter")
  for name, value in state.items():
    if not name.startswith(BACKBONE) or name.startswith(f"{BACKBONE}fpn"):
      result[name.removeprefix(BACKBONE).replace(".conv_seg.", ".classifier.")] = value
  settings = pretrained.description.get("config", {}).get("segment", {})  # of a run
  config = hf.encoder_config({**fields, "depth": depth, "drop_path_rate": drop_path}) | dict(
    architectures=["BeitForSemanticSegmentation"],
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
  return result, config, {**processor, "do_reduce_labels": zero}
