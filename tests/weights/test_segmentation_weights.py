"""Loading and saving segmentation models: mmseg's checkpoints, `BeitForSemanticSegmentation`, our own folders.

Without PyTorch the comparisons with transformers are skipped; `.ci/run` installs it.
"""

import dataclasses
import functools
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beit_jax
from beit_jax import transfer, trees
from beit_jax.convert import main as convert_main
from beit_jax.errors import UserError
from beit_jax.models import beit
from beit_jax.run import checkpoint
from beit_jax.weights import io as weights_io
from beit_jax.weights import mmseg as segmentation
from beit_jax.weights.files import safetensors, torchfile
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import reference
from tests.models.test_segmentation_models import MMSEG_NAMES

PREPROCESSING = dict(
  mean=(0.1, 0.2, 0.3),
  std=(0.4, 0.5, 0.6),
  image_size=(64, 64),
  crop_pct=1.0,
  interpolation="bilinear",
  resize="squash",
)
ENCODER = dict(
  image_size=(64, 64),
  patch_size=16,
  width=8,
  depth=4,
  num_heads=2,
  rel_pos="per_block",
  drop_path_rate=0.1,
  weight_init="finetune",
  scan=True,
)
PALETTE = [[10 * i, 3, 255] for i in range(5)]


def _redraw(name, leaf, rng):
  """Random values: none is zero or one, variances and scales are positive, weighted sums have a scale near one."""
  noise = rng.normal(size=leaf.shape).astype(np.float32)
  if name.endswith(("scale", "var")):
    return np.exp(0.3 * noise)
  return noise * np.float32(np.prod(leaf.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.2)


@functools.cache
def _shapes(size, **fields):
  """(the segmenter, the shapes of its variables); tracing it takes most of the time of a test."""
  module = make_module("segmenter", {**fields, "encoder": dict(fields["encoder"])})
  return module, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def _random(*, size=(64, 64), head="upernet", taps=(0, 1, 2, 3), channels=None, **encoder):
  """A segmenter with random weights and statistics."""
  encoder = tuple({**ENCODER, "image_size": size, **encoder}.items())
  fields = dict(num_classes=5, out_indices=taps, channels=channels, aux_channels=6, head=head)
  module, shapes = _shapes(size, encoder=encoder, **fields)
  rng = np.random.default_rng(0)
  variables = dict(trees.named_map(lambda name, leaf: _redraw(name, leaf, rng), shapes))
  description = dict(labels=list("abcde"), palette=PALETTE, reduce_zero_label=True)
  params = variables.pop("params")
  return Pretrained(
    "segmenter", params, module, {**PREPROCESSING, "image_size": size}, description, variables
  )


def _image(size, batch=2):
  return np.random.default_rng(1).standard_normal((batch, *size, 3), np.float32)


def _logits(model, image):
  """The decoder's logits before they are resized; scanning over the blocks saves compile time."""
  module = model.module.clone(encoder={**model.module.encoder, "scan": True})
  return jax.jit(module.apply)({"params": model.params, **model.collections}, image)["logits"]


def _assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype == np.float32
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _assert_same_model(a, b):
  """Checks that weights, statistics, module and description are equal."""
  _assert_same(a.params, b.params)
  _assert_same(a.collections, b.collections)
  assert a.encoder_fields == b.encoder_fields and a.preprocessing == b.preprocessing
  for field in dataclasses.fields(a.module):
    if field.name not in ("encoder", "parent", "name"):
      assert getattr(a.module, field.name) == getattr(b.module, field.name)
  for key in ("labels", "palette", "reduce_zero_label"):
    assert a.description[key] == b.description[key]


def _pth(path, arrays, meta=None):
  torchfile.save(path, arrays, {"meta": meta} if meta is not None else {}, under="state_dict")
  return path


def _edit(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- saving and loading ---------------------------------------------------------------------------

CASES = [
  (dict(), ("orbax", "unilm", "hf")),
  (dict(size=(64, 96), rel_pos="none", abs_pos=True, layer_scale_init=0.0), ("orbax", "unilm", "hf")),
  (dict(depth=5, taps=(0, 1, 2, 3), norm_eps=1e-12, size=(64, 32)), ("orbax", "unilm", "hf")),
  (dict(rel_pos="shared", channels=6), ("orbax", "unilm")),
  (dict(head="setr_pup", channels=6), ("orbax", "unilm")),
]
SUFFIXES = {"orbax": ("",), "unilm": (".pth", ".safetensors"), "hf": ("",)}


@pytest.mark.parametrize(
  ("fields", "format", "suffix"),
  [
    pytest.param(fields, format, suffix, id=f"{i}-{format}{suffix}")
    for i, (fields, formats) in enumerate(CASES)
    for format in formats
    for suffix in SUFFIXES[format]
  ],
)
def test_saving_and_loading_is_bit_identical(fields, format, suffix, tmp_path):
  model = _random(**fields)
  beit_jax.save(model, tmp_path / f"x{suffix}", format=format)
  again = beit_jax.load(tmp_path / f"x{suffix}")
  _assert_same_model(again, model)
  beit_jax.save(again, tmp_path / "y", format="orbax")
  assert beit_jax.load(tmp_path / "y").description["sha256"] == again.description["sha256"]


def test_images_of_any_size_give_logits_of_the_model_size(tmp_path):
  model = _random()
  images = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
  logits = model(images)
  assert logits.shape == (2, 64, 64, 5)
  squashed = model.preprocess(images)
  assert squashed.shape == (2, 64, 64, 3)
  np.testing.assert_array_equal(model.forward(squashed), logits)
  small = np.asarray(_logits(model, squashed))
  assert small.shape == (2, 16, 16, 5)
  np.testing.assert_allclose(np.asarray(logits)[:, :2, :2].mean((1, 2)), small[:, 0, 0], atol=0.5)


def test_folder_without_statistics_is_refused(tmp_path):
  """Every tensor is checked in our own format too."""
  model = _random()
  _assert_same(_save_and_load(model, tmp_path / "good").collections, model.collections)
  with pytest.raises(UserError, match="batch_stats/fpn1/bn/mean: found nothing, expected"):
    _save_and_load(dataclasses.replace(model, collections={}), tmp_path / "bad")


def _save_and_load(model, path):
  weights_io.save(model, path, format="orbax")
  assert checkpoint.find(path) == path
  return weights_io.load(path)


def test_statistics_are_read_from_the_state_of_a_run(tmp_path):
  """A run keeps the statistics with the optimizer state in `rest`."""
  model = _random()
  checkpoint.write_model(tmp_path / "run", model.params, model.describe())
  (tmp_path / "run" / "digest.json").unlink()
  rest = dict(step=np.int32(3), collections=model.collections, opt_state={"count": np.int32(3)})
  checkpoint.write_model(tmp_path / "other", rest, {})
  (tmp_path / "other" / "params").rename(tmp_path / "run" / "rest")
  checkpoint.write_digest(tmp_path / "run")
  _assert_same_model(weights_io.load(tmp_path / "run"), model)


# --- mmseg ----------------------------------------------------------------------------------------


def _golden(meta=True):
  """The reference's checkpoint (tests/golden/seg.npz), as mmseg would save it."""
  arrays, config = reference.load("seg")
  state = {**reference.section(arrays, "param/"), **reference.section(arrays, "buffer/")}
  text = (
    "model = dict(backbone=dict(type='BEiT', out_indices=[0, 2, 3, 4]), head=dict(in_index=[0, 1, 2, 3]))\n"
  )
  text += "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\n"
  text += "train = dict(reduce_zero_label=True)\ntest = dict(reduce_zero_label=True)\n"
  meta = dict(config=text, CLASSES=list("abcdefg"), PALETTE=[[i, i, i] for i in range(7)], epoch=3)
  return arrays, config, state, meta


def test_reference_checkpoint(tmp_path):
  """The file loads as its config states, gives the reference's logits and is saved with the same names and values."""
  arrays, config, state, meta = _golden()
  model = weights_io.load(
    _pth(tmp_path / "x.pth", state, meta), image_size=tuple(config["backbone"]["img_size"])
  )
  assert model.kind == "segmenter" and model.module.out_indices == (0, 2, 3, 4)
  assert model.description["assumed"] == [] and model.description["reduce_zero_label"] is True
  assert model.preprocessing["mean"] == (0.485, 0.456, 0.406)
  assert model.preprocessing["std"] == (0.229, 0.224, 0.225)
  assert model.description["labels"] == list("abcdefg") and model.description["palette"][6] == [6, 6, 6]
  found = _logits(model, arrays["in/image"].transpose(0, 2, 3, 1))
  np.testing.assert_allclose(found, arrays["out/logits"].transpose(0, 2, 3, 1), atol=1e-4)

  weights_io.save(model, tmp_path / "y.pth", format="unilm")
  content = torchfile.load(tmp_path / "y.pth")
  written = {name: value.read() for name, value in content["state_dict"].items()}
  extra = {name for name in written if name.endswith(("relative_position_index", "num_batches_tracked"))}
  assert len(extra) == 5 + 14  # one for each block and for each batch normalization
  assert written.keys() - extra == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(written[name], value, err_msg=name)
  assert content["meta"] == {key: meta[key] for key in ("CLASSES", "PALETTE")}


def test_names_agree_with_the_map():
  """The map of tests/models/test_segmentation_models.py, maintained by hand, translates each name back to ours."""
  model = _random()
  flat = {**trees.flatten(model.params), **trees.flatten(model.collections["batch_stats"])}
  for ours in flat:
    name = segmentation.mmseg_name(ours)
    for pattern, replacement in MMSEG_NAMES:
      name = re.sub(pattern, replacement, name)
    assert name == ours


def test_names_of_setr_pup():
  state = segmentation.export_mmseg(_random(head="setr_pup", channels=6))
  heads = {n: v.shape for n, v in state.items() if not n.startswith("backbone.")}
  norm = lambda stem, size: {f"{stem}.{name}": (size,) for name in ("weight", "bias")}
  batch_norm = lambda stem, size: {
    **norm(stem, size),
    **{f"{stem}.{name}": (size,) for name in ("running_mean", "running_var")},
    f"{stem}.num_batches_tracked": (),
  }
  wanted = {}
  for head, convs in (("decode_head", 4), *((f"auxiliary_head.{i}", 1) for i in range(3))):
    wanted |= norm(f"{head}.norm", 8)
    for i in range(convs):
      wanted[f"{head}.up_convs.{i}.0.conv.weight"] = (6, 6 if i else 8, 3, 3)
      wanted |= batch_norm(f"{head}.up_convs.{i}.0.bn", 6)
    wanted |= {f"{head}.conv_seg.weight": (5, 6, 1, 1), f"{head}.conv_seg.bias": (5,)}
  assert heads == wanted


def test_unused_pyramid_of_setr_pup_is_left_out(tmp_path):
  state = segmentation.export_mmseg(_random(head="setr_pup", channels=6), buffers=False)
  state |= {"backbone.fpn2.0.bias": np.zeros(8, np.float32), "backbone.fpn1.1.weight": np.ones(8, np.float32)}
  model = weights_io.load(_pth(tmp_path / "x.pth", state), out_indices=(0, 1, 2, 3))
  _assert_same(model.params, _random(head="setr_pup", channels=6).params)
  assert {"backbone.fpn2.0.bias", "backbone.fpn1.1.weight"} <= set(model.description["left_out"])


def test_blocks_and_statistics_are_assumed_with_a_warning(tmp_path, caplog):
  """12 blocks give (3, 5, 7, 11), as in every released config; other depths need `out_indices`."""
  model = _random(depth=12, taps=(3, 5, 7, 11))
  state = segmentation.export_mmseg(model)
  loaded = weights_io.load(_pth(tmp_path / "x.pth", {f"module.{n}": v for n, v in state.items()}))
  _assert_same(loaded.params, model.params)
  assert loaded.module.out_indices == (3, 5, 7, 11)
  assert loaded.description["assumed"] == ["preprocessing", "out_indices"]
  assert loaded.preprocessing["mean"] == (0.485, 0.456, 0.406) and loaded.preprocessing["resize"] == "squash"
  assert "out_indices=(3, 5, 7, 11) is assumed" in caplog.text
  weights_io.save(loaded, tmp_path / "y.pth", format="unilm")
  assert weights_io.load(tmp_path / "y.pth").description["assumed"] == ["preprocessing", "out_indices"]
  assert weights_io.load(tmp_path / "x.pth", out_indices=(0, 1, 2, 9)).module.out_indices == (0, 1, 2, 9)
  short = _pth(tmp_path / "short.pth", segmentation.export_mmseg(_random()))
  with pytest.raises(UserError, match="which of its 4 blocks the decoder taps; give out_indices="):
    weights_io.load(short)
  for wrong in ((0, 1, 2, 4), (0, 2, 1, 3), (0, 1, 2), "0123"):
    with pytest.raises(UserError, match="expected four rising numbers of blocks from 0 to 3"):
      weights_io.load(short, out_indices=wrong)


@pytest.mark.parametrize(
  "meta",
  [
    None,
    "text",
    dict(CLASSES="abcde", PALETTE=[[0, 0, 300]] * 5),
    dict(CLASSES=list("ab"), PALETTE=[[0, 0, 0]] * 2),
    dict(CLASSES=[1, 2, 3, 4, 5], PALETTE=[[0, 0]] * 5, config="out_indices=[1.2.3]\nmean=[1, 2]"),
    dict(
      config="out_indices=[0, 1, 2, 3]\nother = dict(out_indices=[0, 1, 1, 3])\nmean=[0,0,0]", dataset_meta=3
    ),
  ],
)
def test_meta_of_another_form_is_ignored(meta, tmp_path):
  path = _pth(tmp_path / "x.pth", segmentation.export_mmseg(_random()), meta)
  model = weights_io.load(path, out_indices=(0, 1, 2, 3))
  assert model.description["labels"] == [] and not model.description.get("palette")
  assert model.description["assumed"] == ["preprocessing"]


def test_meta_of_mmseg_1(tmp_path):
  meta = dict(
    dataset_meta=dict(classes=list("vwxyz"), palette=PALETTE), cfg="a = dict(out_indices=(0, 1, 2, 3))"
  )
  model = weights_io.load(_pth(tmp_path / "x.pth", segmentation.export_mmseg(_random()), meta))
  assert model.description["labels"] == list("vwxyz") and model.description["palette"] == PALETTE
  assert model.module.out_indices == (0, 1, 2, 3)


def test_all_problems_are_listed_at_once(tmp_path):
  state = segmentation.export_mmseg(_random())
  del state["backbone.blocks.1.mlp.fc2.bias"], state["decode_head.psp_modules.2.1.bn.running_var"]
  state["decode_head.mine"] = np.zeros(3, np.float32)
  state["backbone.fpn1.0.weight"] = np.zeros((8, 8, 4, 4), np.float32)
  with pytest.raises(UserError) as error:
    weights_io.load(_pth(tmp_path / "x.pth", state), out_indices=(0, 1, 2, 3))
  for fact in (
    "4 tensors do not fit",
    "missing     backbone.blocks.1.mlp.fc2.bias (8,)",
    "missing     decode_head.psp_modules.2.1.bn.running_var (8,)",
    "unexpected  decode_head.mine (3,)",
    "mis-shaped  backbone.fpn1.0.weight (8, 8, 4, 4), expected (8, 8, 2, 2)",
  ):
    assert fact in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"decode_head.conv_seg.weight": None}, "decode_head.conv_seg.weight gives the number of classes"),
    ({"decode_head.conv_seg.weight": (5, 0, 1, 1)}, r"expected 4 axes, found \(5, 0, 1, 1\)"),
    ({"auxiliary_head.conv_seg.weight": (5,)}, r"auxiliary_head.conv_seg.weight.*found \(5,\)"),
    ({"backbone.cls_token": None}, "expected 'cls_token' with 3 axes, found nothing"),
    ({"backbone.blocks.4.gamma_1": (8,)}, "tensors do not fit"),
    ({"backbone.blocks.9.gamma_1": (8,)}, "not numbered from 0 without a gap"),
    ({"decode_head.conv_seg.weight": (2**20, 8, 1, 1)}, "mis-shaped|expected"),
  ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
  state = segmentation.export_mmseg(_random())
  for name, shape in change.items():
    state.pop(name, None)
    if shape is not None:
      state[name] = np.zeros(shape, np.float32)
  with pytest.raises(UserError, match=message):
    weights_io.load(_pth(tmp_path / "x.pth", state), out_indices=(0, 1, 2, 3))


def test_integer_tensors_are_refused(tmp_path):
  state = segmentation.export_mmseg(_random())
  state["backbone.fpn1.1.running_var"] = np.ones(8, np.int64)
  with pytest.raises(UserError, match="fpn1/bn/var: the file holds int64"):
    weights_io.load(_pth(tmp_path / "x.pth", state), out_indices=(0, 1, 2, 3))


def test_only_the_encoder_of_other_decoders_is_read(tmp_path):
  """Only the backbone is read; the names of all other tensors are listed as left out."""
  state = {n: v for n, v in segmentation.export_mmseg(_random()).items() if re.match(r"backbone\.(?!fpn)", n)}
  state["decode_head.pixel_decoder.weight"] = np.zeros(3, np.float32)
  model = weights_io.load(_pth(tmp_path / "x.pth", state))
  assert model.kind == "backbone"
  assert "decode_head.pixel_decoder.weight" in model.description["left_out"]
  with pytest.raises(UserError, match="only a segmentation model taps blocks.*holds a backbone"):
    weights_io.load(tmp_path / "x.pth", out_indices=(0, 1, 2, 3))


def test_encoder_initializes_a_classifier(tmp_path):
  """The bias tables are resized, and the log says that the decoder is not used."""
  weights_io.save(_random(), tmp_path / "x.pth", format="unilm")
  loaded = weights_io.load(tmp_path / "x.pth")
  encoder = {**ENCODER, "image_size": (96, 96)}
  classifier = beit.BeitForImageClassification(encoder, 3)
  shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))["params"]
  said = []
  found = transfer.encoder_params(loaded.params, shapes, (4, 4), (6, 6), said.append)
  wanted = {name for name in trees.flatten(shapes) if name.startswith("encoder/")}
  assert found.keys() == wanted
  assert any("not used of the checkpoint: auxiliary_head, decode_head, fpn1, fpn2" in line for line in said)


# --- transformers ---------------------------------------------------------------------------------


def test_identity_block_is_appended_for_hf_and_removed_again(tmp_path):
  """transformers cannot tap its last block: 4 blocks with a tapped last one are saved as 5 and loaded as 4."""
  weights_io.save(_random(), tmp_path / "x", format="hf")
  config = json.loads((tmp_path / "x" / "config.json").read_text())
  assert config["num_hidden_layers"] == 5 and config["out_indices"] == [2, 3, 4, 5]
  assert config["drop_path_rate"] == pytest.approx(0.1 * 4 / 3)
  assert config["id2label"]["4"] == "e" and config["semantic_loss_ignore_index"] == 255
  processor = json.loads((tmp_path / "x" / "preprocessor_config.json").read_text())
  assert processor["do_reduce_labels"] is True and processor["size"] == {"height": 64, "width": 64}
  tensors, _ = safetensors.read(tmp_path / "x" / "model.safetensors")
  assert not tensors["beit.encoder.layer.4.lambda_1"].read().any()
  loaded = weights_io.load(tmp_path / "x")
  assert loaded.encoder_fields["depth"] == 4 and loaded.module.out_indices == (0, 1, 2, 3)
  weights_io.save(_random(depth=5), tmp_path / "y", format="hf")  # the fifth block is not the identity
  assert json.loads((tmp_path / "y" / "config.json").read_text())["num_hidden_layers"] == 5
  assert weights_io.load(tmp_path / "y").encoder_fields["depth"] == 5


@pytest.mark.parametrize(
  ("out_indices", "found"),
  [
    ([2, 3, 4, 5], (0, 1, 2, 3)),
    ([-4, -3, -2, -1], (0, 1, 2, 3)),
    ([2, 3, 4, 6], "expected four rising numbers from 2 to 5"),  # the last block has no number
    ([1, 2, 3, 4], "expected four rising numbers"),  # the embedding
    ([0, 2, 3, 4], "expected four rising numbers"),  # in transformers the last block, before the others
    ([2, 3, 3, 4], "expected four rising numbers"),
    ([5], "expected four rising numbers"),
    ([2, 3, 4, "5"], "expected four rising numbers"),
    ([2.0, 3.0, 4.0, 5.0], "expected four rising numbers"),
    ({"a": 1}, "expected four rising numbers"),
    (None, "out_indices is None, expected four rising numbers"),
  ],
)
def test_hf_stages_are_translated_to_blocks(out_indices, found, tmp_path):
  weights_io.save(_random(), tmp_path / "x", format="hf")
  _edit(tmp_path / "x" / "config.json", out_indices=out_indices)
  if isinstance(found, tuple):
    assert weights_io.load(tmp_path / "x").module.out_indices == found
  else:
    with pytest.raises(UserError, match=found):
      weights_io.load(tmp_path / "x")
    assert weights_io.load(tmp_path / "x", out_indices=(0, 1, 2, 3)).module.out_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(pool_scales=[1, 2, 3, 4]), r"pool_scales is \[1, 2, 3, 4\], expected \[1, 2, 3, 6\]"),
    (dict(auxiliary_num_convs=2), "auxiliary_num_convs is 2, expected 1"),
    (dict(auxiliary_concat_input=True), "auxiliary_concat_input is True, expected False"),
    (dict(num_attention_heads=0), "num_attention_heads is 0"),
    (dict(image_size=128), "does not fit"),
  ],
)
def test_unsupported_hf_configs_are_refused(changes, message, tmp_path):
  weights_io.save(_random(), tmp_path / "x", format="hf")
  _edit(tmp_path / "x" / "config.json", **changes)
  with pytest.raises(UserError, match=message):
    weights_io.load(tmp_path / "x")


def test_missing_auxiliary_head_starts_from_random_values(tmp_path, caplog):
  model = _random()
  weights_io.save(model, tmp_path / "x", format="hf")
  path = tmp_path / "x" / "model.safetensors"
  tensors, metadata = safetensors.read(path)
  kept = {name: value.read() for name, value in tensors.items() if not name.startswith("auxiliary_head")}
  path.unlink()
  safetensors.write(path, kept, metadata)
  _edit(tmp_path / "x" / "config.json", use_auxiliary_head=False, auxiliary_num_convs=7)
  loaded = weights_io.load(tmp_path / "x")
  assert "no auxiliary head, which only training uses" in caplog.text
  assert loaded.description["assumed"] == ["auxiliary_head"]
  np.testing.assert_array_equal(_logits(loaded, _image((64, 64))), _logits(model, _image((64, 64))))


@pytest.mark.parametrize(
  ("fields", "format", "message"),
  [
    (dict(head="setr_pup"), "hf", "head 'setr_pup' cannot be saved as hf.*Its formats are orbax, unilm"),
    (dict(channels=6), "hf", "channels=6 cannot be saved as hf.*as wide as its encoder, 8.*orbax, unilm"),
    (dict(), "timm", "a segmenter cannot be saved as timm.*its formats are orbax, unilm, hf, openmmlab"),
  ],
)
def test_impossible_formats_are_refused(fields, format, message, tmp_path):
  with pytest.raises(UserError, match=message):
    beit_jax.save(_random(**fields), tmp_path / "x", format=format)
  assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def peers():
  """PyTorch and transformers; a test that uses this fixture is skipped if they are not installed."""
  from tests import peers

  return peers


def _theirs(peers, **config):
  """A model of transformers with random values in every parameter and running statistic."""
  torch = peers.torch
  model = peers.transformers.BeitForSemanticSegmentation(peers.transformers.BeitConfig(**config))
  generator = torch.Generator().manual_seed(0)
  for name, value in [*model.named_parameters(), *model.named_buffers()]:
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
      noise = torch.exp(0.3 * noise)
    elif value.ndim == 1 or "lambda" in name:
      noise = 0.2 * noise
    elif value.ndim == 4 or name.endswith("weight"):
      noise = noise / np.sqrt(np.prod(value.shape[1:]))
    else:
      noise = 0.5 * noise
    if value.is_floating_point():
      value.data.copy_(noise)
  return model.eval()


def _their_logits(peers, model, image):
  with peers.torch.no_grad():
    pixels = peers.torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    return model(pixels).logits.numpy().transpose(0, 2, 3, 1)


def _check_both_directions(peers, model, path, size):
  """Compares logits after loading transformers' folder, and after transformers loads ours; returns both models."""
  model.save_pretrained(path / "theirs")
  loaded = beit_jax.load(path / "theirs")
  image = _image(size, batch=1)
  wanted, found = _their_logits(peers, model, image), np.asarray(_logits(loaded, image))
  assert found.shape == wanted.shape and wanted.std() > 0.1
  beit_jax.save(loaded, path / "ours", format="hf")
  again, info = type(model).from_pretrained(path / "ours", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert again.config.layer_norm_eps == model.config.layer_norm_eps
  back = _their_logits(peers, again.eval(), image)
  errors = [float(np.abs(a - wanted).max()) for a in (found, back)]
  logging.getLogger("beit_jax").info("largest differences to transformers: %s", errors)
  assert max(errors) <= 1e-4, errors
  return loaded, again


SMALL = dict(
  hidden_size=32,
  num_attention_heads=4,
  intermediate_size=96,
  image_size=64,
  num_labels=7,
  auxiliary_channels=16,
)
RELATIVE = dict(use_relative_position_bias=True)


@pytest.mark.filterwarnings("ignore")  # of third-party libraries
@pytest.mark.parametrize(
  "config",
  [
    dict(num_hidden_layers=12, out_indices=[3, 5, 7, 11], **RELATIVE),
    dict(num_hidden_layers=5, out_indices=[2, 3, 4, -1], use_absolute_position_embeddings=True)
    | dict(layer_norm_eps=1e-6, layer_scale_init_value=0.0),
    dict(num_hidden_layers=6, out_indices=[2, 3, 4, 6], use_shared_relative_position_bias=True)
    | dict(use_mean_pooling=False, use_mask_token=True),
    dict(num_hidden_layers=6, out_indices=[2, 3, 4, 6], **RELATIVE) | dict(image_size=[64, 96]),
  ],
  ids=["twelve", "absolute", "shared", "rectangle"],
)
def test_hf_models_agree(config, peers, tmp_path):
  config = {**SMALL, **config}
  size = config["image_size"] if isinstance(config["image_size"], list) else [config["image_size"]] * 2
  if (
    size[0] != size[1]
  ):  # transformers resizes these tables (hf.resize_rectangular_tables), so only loading can agree
    model = _theirs(peers, **config)
    model.save_pretrained(tmp_path / "theirs")
    image = _image(size)
    found = _logits(beit_jax.load(tmp_path / "theirs"), image)
    np.testing.assert_allclose(found, _their_logits(peers, model, image), atol=1e-4)
    return
  loaded, again = _check_both_directions(peers, _theirs(peers, **config), tmp_path, size)
  layers = config["num_hidden_layers"]
  blocks = tuple(i % (layers + 1) - 2 for i in config["out_indices"])
  assert loaded.module.out_indices == blocks
  assert again.config.num_hidden_layers == layers and again.config.out_indices == [i + 2 for i in blocks]


@pytest.mark.filterwarnings("ignore")
def test_hf_stage_numbers_are_two_higher(peers, tmp_path, caplog):
  """[3, 5, 7, 11] taps blocks 1, 3, 5, 9; `out_indices=` taps unilm's, which are saved as [5, 7, 9, 13] of 13."""
  model = _theirs(peers, **SMALL, num_hidden_layers=12, out_indices=[3, 5, 7, 11], **RELATIVE)
  model.save_pretrained(tmp_path / "theirs")
  image = _image((64, 64))
  wanted = _their_logits(peers, model, image)
  as_computed = beit_jax.load(tmp_path / "theirs")
  assert as_computed.module.out_indices == (1, 3, 5, 9)
  assert "to mean the blocks (1, 3, 5, 9)" in caplog.text
  np.testing.assert_allclose(_logits(as_computed, image), wanted, atol=1e-4)
  released = beit_jax.load(tmp_path / "theirs", out_indices=(3, 5, 7, 11))
  assert np.abs(_logits(released, image) - wanted).max() > 0.1

  beit_jax.save(released, tmp_path / "ours", format="hf")
  again = type(model).from_pretrained(tmp_path / "ours").eval()
  assert again.config.num_hidden_layers == 13 and again.config.out_indices == [5, 7, 9, 13]
  np.testing.assert_allclose(_logits(released, image), _their_logits(peers, again, image), atol=1e-4)
  _assert_same(beit_jax.load(tmp_path / "ours").params, released.params)
  with pytest.raises(
    ValueError, match="out_indices"
  ):  # with 12 blocks transformers has no number for the last
    peers.transformers.BeitConfig(**SMALL, num_hidden_layers=12, out_indices=[5, 7, 9, 13])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [dict(), dict(rel_pos="none", abs_pos=True, layer_scale_init=0.0)])
def test_our_models_agree_in_transformers(fields, peers, tmp_path):
  """The appended block depends on whether the model has LayerScale."""
  model = _random(**fields)
  beit_jax.save(model, tmp_path / "x", format="hf")
  again = peers.transformers.BeitForSemanticSegmentation.from_pretrained(tmp_path / "x").eval()
  image = _image((64, 64))
  np.testing.assert_allclose(_logits(model, image), _their_logits(peers, again, image), atol=1e-4)
  assert again.config.id2label[4] == "e" and again.config.auxiliary_channels == 6
  processor = peers.transformers.AutoImageProcessor.from_pretrained(tmp_path / "x", backend="pil")
  image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
  for stored, wanted in ((0, 255), (5, 4), (255, 255)):
    out = processor(image, np.full((90, 120), stored, np.uint8), return_tensors="np")
    assert (out["labels"][0] == wanted).all()
  theirs = out["pixel_values"][0].transpose(1, 2, 0)
  assert np.abs(theirs - np.asarray(model.preprocess([image]))[0]).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_hf_folders_of_every_form_are_read(peers, tmp_path):
  """Shards, pytorch_model.bin and the in-memory names of transformers 5 give the same parameters."""
  model = _theirs(peers, **SMALL, num_hidden_layers=5, out_indices=[2, 3, 4, 5], **RELATIVE)
  model.save_pretrained(tmp_path / "plain")
  wanted = beit_jax.load(tmp_path / "plain")
  model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
  for name in ("bin", "memory"):
    (tmp_path / name).mkdir()
    model.config.save_pretrained(tmp_path / name)
  peers.torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
  peers.safetensors_torch.save_file(model.state_dict(), tmp_path / "memory" / "model.safetensors")
  for name in ("shards", "bin", "memory"):
    found = beit_jax.load(tmp_path / name)
    _assert_same(found.params, wanted.params)
    _assert_same(found.collections, wanted.collections)


@pytest.mark.filterwarnings("ignore")
def test_written_pth_loads_with_weights_only(peers, tmp_path):
  model = _random()
  beit_jax.save(model, tmp_path / "x.pth", format="unilm")
  content = peers.torch.load(tmp_path / "x.pth", weights_only=True)
  assert content["meta"] == {"CLASSES": list("abcde"), "PALETTE": PALETTE}
  assert content["state_dict"]["backbone.fpn1.1.num_batches_tracked"].shape == ()
  stats = model.collections["batch_stats"]["fpn1"]["bn"]["mean"]
  np.testing.assert_array_equal(content["state_dict"]["backbone.fpn1.1.running_mean"], stats)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_base_model_at_640_pixels(peers, tmp_path):
  """The released size: 12 blocks of width 768, 150 classes."""
  config = dict(image_size=640, num_labels=150, out_indices=[3, 5, 7, 11], **RELATIVE)
  loaded, _ = _check_both_directions(peers, _theirs(peers, **config), tmp_path, (640, 640))
  assert round(trees.num_params(loaded.params) / 1e6) == 163


# --- the command ----------------------------------------------------------------------------------


def test_convert_command(tmp_path, capsys):
  """Converts mmseg -> hf -> orbax -> mmseg and prints a table of every tensor."""
  path = _pth(tmp_path / "x.pth", segmentation.export_mmseg(_random()))
  run = lambda source, target, *args: convert_main([str(tmp_path / source), str(tmp_path / target), *args])
  assert run("x.pth", "hf", "--format=hf") == 2
  assert "give out_indices=" in capsys.readouterr().err
  assert run("x.pth", "hf", "--format=hf", "--out_indices=0,1,2,3", "-v") == 0
  text = capsys.readouterr()
  assert re.search(
    r"decode_head\.psp_modules\.0\.1\.bn\.running_mean +decode_head/psp_0/bn/mean", text.out + text.err
  )
  assert run("hf", "orbax", "--format=orbax") == 0
  assert run("orbax", "y.safetensors", "--format=unilm") == 0
  assert run("hf", "z.pth", "--format=timm") == 2
  written, _ = safetensors.read(tmp_path / "y.safetensors")
  for name, value in torchfile.load(path)["state_dict"].items():
    np.testing.assert_array_equal(written[name].read(), value.read(), err_msg=name)
