"""Loading and saving weights without PyTorch: golden files, every kind in every format, errors, the command."""

import argparse
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

import beit_jax
from beit_jax import train, trees
from beit_jax.convert import main as convert_main
from beit_jax.errors import UserError
from beit_jax.models.layers import relative_position_index
from beit_jax.weights import io as weights_io
from beit_jax.weights import unilm
from beit_jax.weights.files import safetensors, torchfile
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests import reference, tiny

GOLDEN = reference.HERE
PREPROCESSING = dict(
  mean=(0.1, 0.2, 0.3),
  std=(0.4, 0.5, 0.6),
  image_size=(32, 32),
  crop_pct=0.9,
  interpolation="bicubic",
  resize="squash",
)
NO_WARMUP = {"optimizer.warmup_steps": 0}
ENCODER = dict(image_size=(32, 32), patch_size=8, width=24, depth=2, num_heads=3, drop_path_rate=0.1)


def _random(kind, size=(32, 32), **fields):
  """A model with random weights."""
  if kind == "tokenizer":
    module = make_module(kind, dict(n_hid=8, n_init=8, n_blk_per_group=1, vocab_size=16, **fields))
  elif kind == "backbone":
    module = make_module(kind, {**ENCODER, "image_size": size, **fields})
  else:
    masked = dict(mim=dict(vocab_size=16), mim_pixels=dict(normalize_patches=True))
    own = masked[kind] if kind in masked else dict(num_classes=5, pool=fields.pop("pool", "mean"))
    fields = {"weight_init": "pretrain" if kind in masked else "finetune", **fields}
    module = make_module(kind, dict(encoder={**ENCODER, "image_size": size, **fields}, **own))
  rng = np.random.default_rng(0)
  shapes = unilm.param_shapes(module, size)
  params = trees.unflatten({name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
  description = dict(labels=list("abcde") if kind == "classifier" else [])
  return Pretrained(kind, params, module, {**PREPROCESSING, "image_size": size}, description)


def _assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype == np.float32
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _pth(path, arrays, texts=None):
  torchfile.save(path, arrays, texts or {})
  return path


# --- golden files ---------------------------------------------------------------------------------


def test_golden_files_load_without_pytorch(tmp_path):
  """Golden files load in a process in which torch, timm and transformers cannot be imported."""
  code = """
import sys
for name in ("torch", "timm", "transformers"):
  sys.modules[name] = None
import numpy as np
import beit_jax
from tests import reference

def nhwc(x):
  return x.transpose(0, 2, 3, 1)

def check(found, wanted, limit):
  error = np.abs(np.asarray(found) - wanted).max()
  assert error <= limit, error

arrays, _ = reference.load("mim_plus")
mim = beit_jax.load(reference.HERE / "mim_plus.pth")
mask = arrays["in/mask"].reshape(-1, 8, 8)
check(mim.forward(nhwc(arrays["in/image"]), mask), arrays["out/logits_all"], 5e-5)
assert mim.kind == "mim" and mim.preprocessing["mean"] == (0.485, 0.456, 0.406)  # the arguments in the file say so
arrays, _ = reference.load("finetune_plus")
classifier = beit_jax.load(reference.HERE / "finetune_plus.pth")
check(classifier.forward(nhwc(arrays["in/image"])), arrays["out/logits"], 5e-5)
arrays, _ = reference.load("dalle_pkl")
for path in (reference.HERE / "dalle_encoder_small_legacy.pkl", sys.argv[1]):
  tokenizer = beit_jax.load(path)
  check(tokenizer.forward(nhwc(arrays["in/mapped"])), nhwc(arrays["out/logits"]), 1e-4)
ids = tokenizer.forward(nhwc(arrays["in/mapped"])).argmax(-1)
assert (np.asarray(ids) == arrays["out/ids"]).all()
import jax
small = tokenizer.module.apply({"params": tokenizer.params}, ids.reshape(1, -1), (4, 4), method="decode")
check(small, nhwc(arrays["out/reconstruction"]), 1e-5)
assert len(tokenizer.description["sha256"]) == 64
"""
  (tmp_path / "both").mkdir()
  for part in ("encoder", "decoder"):
    (tmp_path / "both" / f"{part}.pkl").write_bytes((GOLDEN / f"dalle_{part}_small.pkl").read_bytes())
  run = subprocess.run([sys.executable, "-c", code, tmp_path / "both"], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["mim_plus", "finetune_plus"])
def test_saved_unilm_files_equal_the_reference(name, tmp_path):
  weights_io.save(weights_io.load(GOLDEN / f"{name}.pth"), tmp_path / "x.pth", format="unilm")
  theirs = torchfile.load(GOLDEN / f"{name}.pth")["model"]
  ours = torchfile.load(tmp_path / "x.pth")["model"]
  assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
  for key, value in theirs.items():
    assert ours[key].dtype == value.dtype
    np.testing.assert_array_equal(ours[key].read(), value.read())


def _v2(tmp_path, shared=True, **others):
  """A pre-training file of BEiT v2 in the reference's names: (its path, its tensors, the golden arrays)."""
  arrays, _ = reference.load("mim_v2")
  state = reference.section(arrays, "param/")
  state["rel_pos_bias.relative_position_index"] = relative_position_index((6, 6)).astype(np.int64)
  if not shared:
    state |= {f"cls_pt_lm_head.{n}": state[f"lm_head.{n}"] * 0.5 for n in ("weight", "bias")}
  path = tmp_path / f"beitv2_{shared}.pth"
  torchfile.save(path, state, others, under="model")
  return path, state, arrays


@pytest.mark.parametrize("shared", [True, False])
def test_beit_v2_files_load_and_are_saved_completely(shared, tmp_path, caplog):
  """The key set of the reference, bit-identical, `cls_pt_layers` and `cls_pt_lm_head` included."""
  path, state, arrays = _v2(tmp_path, shared)
  loaded = weights_io.load(path)
  fields = dict(early_block=1, head_blocks=2, shared_lm_head=shared)
  assert fields.items() <= loaded.describe()["module"].items() and loaded.kind == "mim"
  assert "early_block=1 is assumed" in caplog.text and "early_block" in loaded.description["assumed"]
  mask = arrays["in/mask"].reshape(-1, 6, 6)
  found = loaded.forward(arrays["in/image"].transpose(0, 2, 3, 1), mask)
  np.testing.assert_allclose(found, arrays["out/logits_all"], atol=5e-5)
  weights_io.save(loaded, tmp_path / "again.pth", format="unilm")
  again = torchfile.load(tmp_path / "again.pth")["model"]
  assert again.keys() == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(again[name].read(), value)
    assert again[name].dtype == value.dtype
  weights_io.save(loaded, tmp_path / "orbax", format="orbax")
  assert weights_io.load(tmp_path / "orbax").module == loaded.module


def test_the_early_block_of_a_file_is_used(tmp_path, caplog):
  """unilm saves its arguments; our own files have it in their description."""
  _, state, _ = _v2(tmp_path)
  arguments = argparse.Namespace(early_layers=2, input_size=48, imagenet_default_mean_and_std=True)
  torch = pytest.importorskip("torch")
  tensors = {name: torch.from_numpy(value) for name, value in state.items()}
  torch.save({"model": tensors, "args": arguments}, tmp_path / "args.pth")
  loaded = weights_io.load(tmp_path / "args.pth")
  assert loaded.module.early_block == 2 and "early_block=" not in caplog.text
  weights_io.save(loaded, tmp_path / "own.pth", format="unilm")
  assert weights_io.load(tmp_path / "own.pth").module == loaded.module and "early_block=" not in caplog.text


def test_other_formats_leave_patch_aggregation_out(tmp_path, caplog):
  path, _, arrays = _v2(tmp_path)
  weights_io.save(weights_io.load(path), tmp_path / "hf", format="hf")
  assert "the blocks of patch aggregation are left out" in caplog.text
  again = weights_io.load(tmp_path / "hf")
  assert again.module.head_blocks == 0
  found = again.forward(arrays["in/image"].transpose(0, 2, 3, 1), arrays["in/mask"].reshape(-1, 6, 6))
  np.testing.assert_allclose(found, arrays["out/logits_all"], atol=5e-5)


def test_a_backbone_of_beit_v2_has_no_patch_aggregation(tmp_path):
  params = reference.section(reference.load("mim_v2")[0], "param/")
  path = _pth(tmp_path / "b.pth", {n: v for n, v in params.items() if "lm_head" not in n})
  backbone = weights_io.load(path)
  assert backbone.kind == "backbone"
  assert {n.split(".")[0] for n in backbone.description["left_out"]} == {"cls_pt_layers"}


def test_a_pixel_model_is_saved_as_what_it_is(tmp_path):
  model = _random("mim_pixels")
  weights_io.save(model, tmp_path / "x", format="orbax")
  again = weights_io.load(tmp_path / "x")
  assert again.kind == "mim_pixels" and again.module == model.module
  _assert_same(again.params, model.params)
  assert again.forward(np.zeros((2, 32, 32, 3)), np.ones((4, 4), bool)).shape == (2, 16, 192)
  for format in ("unilm", "timm", "hf", "openmmlab"):
    with pytest.raises(UserError, match=f"a mim_pixels cannot be saved as {format}.* its formats are orbax"):
      weights_io.save(model, tmp_path / "y", format=format)


# --- saving and loading ---------------------------------------------------------------------------

PAIRS = [
  (dict(kind="mim"), ("orbax", "unilm", "hf")),
  (dict(kind="mim", rel_pos="none", abs_pos=True, layer_scale_init=0.0), ("orbax", "unilm", "hf")),
  (dict(kind="mim", size=(32, 48)), ("orbax", "unilm", "hf")),
  (dict(kind="classifier", rel_pos="per_block"), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="classifier", rel_pos="per_block", pool="cls", size=(24, 32)), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="classifier", rel_pos="none", abs_pos=True), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="classifier", rel_pos="none", abs_pos=True, size=(32, 48)), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="classifier", rel_pos="shared", layer_scale_init=0.0), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="backbone", norm_eps=1e-12), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="backbone", use_mask_token=False, final_norm=False), ("orbax", "unilm", "timm", "hf")),
  (dict(kind="tokenizer"), ("orbax", "hf")),
]
SUFFIXES = {
  "orbax": ("",),
  "unilm": (".pth", ".safetensors"),
  "timm": (".pth", ".safetensors", ""),
  "hf": ("",),
}


@pytest.mark.parametrize(
  ("fields", "format", "suffix"),
  [
    pytest.param(fields, format, suffix, id=f"{fields['kind']}{i}-{format}{suffix}")
    for i, (fields, formats) in enumerate(PAIRS)
    for format in formats
    for suffix in SUFFIXES[format]
  ],
)
def test_saving_and_loading_is_bit_identical(fields, format, suffix, tmp_path):
  model = _random(**fields)
  weights_io.save(model, tmp_path / f"x{suffix}", format=format)
  again = weights_io.load(tmp_path / f"x{suffix}")
  params = dict(model.params)
  if format == "timm":  # timm has no mask token
    params.pop("mask_token", None)
  _assert_same(again.params, params)
  assert again.kind == model.kind
  assert again.preprocessing == model.preprocessing
  assert again.description["labels"] == model.description["labels"]
  if fields["kind"] == "tokenizer":
    assert again.module == model.module
  else:
    lost = dict(use_mask_token=False) if format == "timm" and fields["kind"] == "backbone" else {}
    assert again.encoder_fields == {**model.encoder_fields, **lost}


def test_tensors_without_a_place_in_timm_are_logged(tmp_path, caplog):
  with caplog.at_level(logging.INFO, "beit_jax"):
    weights_io.save(_random("backbone"), tmp_path / "x.pth", format="timm")
  assert "left out, since the format has no place for it: mask_token" in caplog.text


@pytest.mark.parametrize(
  ("kind", "format", "message"),
  [
    ("mim", "timm", "a mim cannot be saved as timm.*its formats are orbax, unilm, hf"),
    ("tokenizer", "timm", "a tokenizer cannot be saved as timm.*orbax, hf"),
    ("tokenizer", "unilm", "a tokenizer cannot be saved as unilm.*orbax, hf"),
    ("mim", "onnx", "format 'onnx' is unknown; the formats are orbax, unilm, timm, hf"),
  ],
)
def test_impossible_formats_are_refused(kind, format, message, tmp_path):
  with pytest.raises(UserError, match=message):
    beit_jax.save(_random(kind), tmp_path / "x", format=format)
  assert list(tmp_path.iterdir()) == []


def test_tokenizer_with_other_groups_is_refused_as_flava(tmp_path):
  with pytest.raises(UserError, match="3 groups.*always has 4"):
    weights_io.save(_random("tokenizer", group_count=3), tmp_path / "x", format="hf")


def test_existing_files_are_not_overwritten(tmp_path):
  (tmp_path / "x.pth").write_bytes(b"precious")
  with pytest.raises(UserError, match="is not overwritten"):
    weights_io.save(_random("mim"), tmp_path / "x.pth", format="unilm")
  assert (tmp_path / "x.pth").read_bytes() == b"precious"


# --- incomplete and wrong files -------------------------------------------------------------------


def _state(**fields):
  return unilm.export_beit(_random(**{"kind": "classifier", "rel_pos": "per_block", **fields}), buffers=False)


def test_missing_num_heads_and_image_size_are_asked_for(tmp_path):
  path = _pth(tmp_path / "abs.pth", _state(rel_pos="none", abs_pos=True))
  with pytest.raises(UserError, match="number of attention heads.*give num_heads="):
    weights_io.load(path)
  assert weights_io.load(path, num_heads=3).module.encoder["num_heads"] == 3
  with pytest.raises(UserError, match="num_heads=5 does not divide the width 24"):
    weights_io.load(path, num_heads=5)
  path = _pth(tmp_path / "wide.pth", _state(size=(24, 64)))
  with pytest.raises(UserError, match=r"no square grid; give image_size=\(height, width\)"):
    weights_io.load(path)
  assert weights_io.load(path, image_size=(24, 64)).module.encoder["image_size"] == (24, 64)
  path = _pth(tmp_path / "square.pth", _state())
  with pytest.raises(UserError, match="num_heads=4 was given, but the file says 3"):
    weights_io.load(path, num_heads=4)
  with pytest.raises(
    UserError, match=r"image_size=\(64, 64\) gives a grid of \(8, 8\).*it fits \(32, 32\).*init_from"
  ):
    weights_io.load(path, image_size=64)


def test_num_heads_of_standard_sizes_is_assumed_with_a_warning(tmp_path, caplog):
  state = {
    "cls_token": np.zeros((1, 1, 192), np.float32),
    "pos_embed": np.zeros((1, 5, 192), np.float32),
    "patch_embed.proj.weight": np.zeros((192, 3, 16, 16), np.float32),
    **{f"blocks.{i}.mlp.fc1.weight": np.zeros((768, 192), np.float32) for i in range(12)},
  }
  with pytest.raises(UserError, match="missing"):
    weights_io.load(_pth(tmp_path / "x.pth", state))
  assert "num_heads=3 is assumed" in caplog.text


def test_all_problems_are_listed_at_once(tmp_path):
  state = _state()
  del state["blocks.1.mlp.fc2.bias"]
  state["norm_of_mine.weight"] = np.zeros(3, np.float32)
  state["blocks.0.attn.proj.weight"] = np.zeros((24, 25), np.float32)
  with pytest.raises(UserError) as error:
    weights_io.load(_pth(tmp_path / "x.pth", state))
  for fact in (
    "3 tensors do not fit",
    "missing     blocks.1.mlp.fc2.bias (24,)",
    "unexpected  norm_of_mine.weight (3,)",
    "mis-shaped  blocks.0.attn.proj.weight (24, 25), expected (24, 24)",
  ):
    assert fact in str(error.value)


def test_wrappers_and_prefixes_are_removed(tmp_path):
  """Wrappers such as {"module": ...} and prefixes such as `module.` (DINO's `backbone.` too) are removed."""
  state = _state()
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "plain.pth", format="unilm")
  plain = weights_io.load(tmp_path / "plain.pth")
  path = _pth(tmp_path / "prefix.pth", {f"module.{name}": value for name, value in state.items()})
  _assert_same(weights_io.load(path).params, plain.params)
  mixed = {f"backbone.{name}": value for name, value in state.items()} | {
    "head.last.weight": state["cls_token"]
  }
  loaded = weights_io.load(_pth(tmp_path / "dino.pth", mixed))
  _assert_same(loaded.params, plain.params)
  assert loaded.description["left_out"] == ["head.last.weight"]
  with pytest.raises(UserError, match="no averaged weights"):
    weights_io.load(path, ema=True)


def test_linear_probe_without_encoder_is_refused(tmp_path):
  state = {
    "module.linear.0.weight": np.zeros((10, 48), np.float32),
    "module.linear.0.bias": np.zeros(10, np.float32),
  }
  with pytest.raises(UserError, match="heads of a linear probe"):
    weights_io.load(_pth(tmp_path / "probe.pth", state))


def test_other_files_are_refused(tmp_path):
  with pytest.raises(UserError, match="not a BEiT or ViT that this version knows"):
    weights_io.load(_pth(tmp_path / "resnet.pth", {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)}))
  (tmp_path / "page.pth").write_text("{}")
  with pytest.raises(UserError, match="not a format this version reads"):
    weights_io.load(tmp_path / "page.pth")
  with pytest.raises(UserError, match="only a run of beit_jax has steps"):
    weights_io.load(tmp_path / "page.pth", step=3)
  (tmp_path / "cut.pkl").write_bytes(b"\x80")
  with pytest.raises(UserError, match="damaged, or not a PyTorch file"):
    weights_io.load(tmp_path / "cut.pkl")
  decoder = tmp_path / "decoder.pkl"
  decoder.write_bytes((GOLDEN / "dalle_decoder_small.pkl").read_bytes())
  with pytest.raises(UserError, match="a decoder without an encoder cannot tokenize"):
    weights_io.load(decoder)


def test_half_precision_files_become_float32(tmp_path):
  state = {name: value.astype(np.float16) for name, value in _state().items()}
  safetensors.write(tmp_path / "x.safetensors", state, {})
  loaded = weights_io.load(tmp_path / "x.safetensors")
  assert all(leaf.dtype == np.float32 for leaf in trees.flatten(loaded.params).values())


def test_saved_safetensors_have_the_mode_of_new_files(tmp_path):
  """The library on its own makes files that only their owner can read."""
  safetensors.write(tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32)}, {})
  (tmp_path / "y").touch()
  assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_an_export_inside_a_run_does_not_hide_its_checkpoints(tmp_path):
  run, other = _random("classifier", rel_pos="per_block"), _random("mim")
  weights_io.save(run, tmp_path / "run" / "checkpoints" / "7", format="orbax")
  safetensors.write(tmp_path / "run" / "model.safetensors", unilm.export_beit(other), {})
  (tmp_path / "run" / "notes.pkl").write_bytes(b"")
  assert weights_io.load(tmp_path / "run").kind == "classifier"
  assert weights_io.load(tmp_path / "run", step=7).kind == "classifier"
  weights_io.save(run, tmp_path / "007", format="orbax")
  assert weights_io.load(tmp_path / "007").kind == "classifier"


def test_assumed_values_stay_assumed(tmp_path):
  """After saving under another name, assumed values are the same and still listed as assumed."""
  first = weights_io.load(_pth(tmp_path / "beitv2_x.pth", _state()))
  assert first.preprocessing["mean"][0] == 0.485 and first.description["assumed"] == ["preprocessing"]
  for name, format in (("mine.pth", "unilm"), ("mine.safetensors", "timm"), ("hub", "timm"), ("hf", "hf")):
    weights_io.save(first, tmp_path / name, format=format)
    again = weights_io.load(tmp_path / name)
    assert again.preprocessing == first.preprocessing
    assert again.description["assumed"] == ["preprocessing"]
    assert again.description["sha256"] == first.description["sha256"]


def _edit(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_edited_hf_files_override_our_description(tmp_path):
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "x", format="hf")
  _edit(tmp_path / "x" / "config.json", layer_norm_eps=1e-12)
  _edit(tmp_path / "x" / "preprocessor_config.json", image_mean=[0.9, 0.9, 0.9])
  again = weights_io.load(tmp_path / "x")
  assert again.encoder_fields["norm_eps"] == 1e-12 and again.preprocessing["mean"] == (0.9,) * 3


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    ("config.json", dict(image_size="224"), "image_size is '224'"),
    ("config.json", dict(image_size=None), "image_size is None"),
    ("config.json", dict(image_size=[32, 32, 3]), "image_size is"),
    ("config.json", dict(layer_norm_eps="1e-6"), "layer_norm_eps is '1e-6'"),
    ("config.json", dict(num_attention_heads=0), "num_attention_heads is 0"),
    ("config.json", dict(hidden_act="silu"), "hidden_act is 'silu'"),
    ("config.json", dict(beit_jax="{"), "damaged, or of a form"),
    ("preprocessor_config.json", dict(size={}), "of a form this version does not know"),
    ("preprocessor_config.json", dict(size=0), "of a form this version does not know"),
    ("preprocessor_config.json", dict(image_mean=0.5), "of a form this version does not know"),
    ("preprocessor_config.json", dict(image_std=[1, 0, 1]), "std=.*, expected three numbers other than 0"),
  ],
)
def test_unsupported_hf_configs_are_refused(file, changes, message, tmp_path):
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "x", format="hf")
  _edit(tmp_path / "x" / file, **changes)
  with pytest.raises(UserError, match=message):
    weights_io.load(tmp_path / "x")


@pytest.mark.parametrize("text", ["[]", "null", "{", "3"])
def test_hf_configs_must_be_json_objects(text, tmp_path):
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "x", format="hf")
  (tmp_path / "x" / "config.json").write_text(text)
  with pytest.raises(UserError, match="must be JSON objects|not JSON"):
    weights_io.load(tmp_path / "x")


def test_unsupported_hf_preprocessing_is_ignored(tmp_path, caplog):
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "x", format="hf")
  for changes in (dict(do_rescale=False), dict(rescale_factor=1 / 127.5), dict(resample=77)):
    _edit(tmp_path / "x" / "preprocessor_config.json", **changes)
    assert weights_io.load(tmp_path / "x").description["assumed"] == ["preprocessing"]
    assert "beit_jax does not support" in caplog.text
    _edit(tmp_path / "x" / "preprocessor_config.json", do_rescale=True, rescale_factor=1 / 255, resample=3)
  _edit(tmp_path / "x" / "preprocessor_config.json", do_normalize=False)
  assert weights_io.load(tmp_path / "x").preprocessing["std"] == (1.0, 1.0, 1.0)


def test_labels_with_gaps_are_ignored(tmp_path, caplog):
  weights_io.save(_random("classifier", rel_pos="per_block"), tmp_path / "x", format="hf")
  _edit(tmp_path / "x" / "config.json", id2label={"0": "a", "1": "b", "4": "c"}, beit_jax=None)
  assert weights_io.load(tmp_path / "x").description["labels"] == []
  assert "every class from 0" in caplog.text


def test_unsupported_timm_configs_are_refused(tmp_path):
  weights_io.save(
    _random("classifier", rel_pos="none", abs_pos=True, pool="cls"), tmp_path / "x", format="timm"
  )
  config = json.loads((tmp_path / "x" / "config.json").read_text())
  _edit(tmp_path / "x" / "config.json", model_args={**config["model_args"], "act_layer": "silu"})
  with pytest.raises(UserError, match="act_layer='silu'"):
    weights_io.load(tmp_path / "x")
  _edit(tmp_path / "x" / "config.json", model_args=config["model_args"], global_pool="max")
  with pytest.raises(UserError, match="global_pool='max'"):
    weights_io.load(tmp_path / "x")


@pytest.mark.parametrize(
  "arguments",
  [
    dict(image_size="32"),
    dict(image_size=(32,)),
    dict(image_size=(32, 32, 3)),
    dict(image_size=0),
    dict(num_heads=0),
    dict(num_heads=-3),
    dict(num_heads=True),
  ],
)
def test_invalid_arguments_are_refused(arguments, tmp_path):
  path = _pth(tmp_path / "abs.pth", _state(rel_pos="none", abs_pos=True))
  with pytest.raises(UserError, match=f"{next(iter(arguments))}=.*expected"):
    weights_io.load(path, **arguments)


def test_unwritable_targets_are_refused(tmp_path):
  model = _random("classifier", rel_pos="per_block")
  (tmp_path / "file").write_text("x")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  for path, message in (
    (tmp_path / "file" / "x.pth", "cannot be written"),
    (tmp_path / ("x" * 300), "cannot be written"),
    (tmp_path / "link", "is not overwritten"),
    ("/dev/null", "is not overwritten"),
    (tmp_path / "x.npz", "end the name in"),
  ):
    with pytest.raises(UserError, match=message):
      weights_io.save(model, path, format="timm" if str(path).endswith("npz") else "unilm")
  with pytest.raises(UserError, match="cannot be saved"):
    weights_io.save(_random("mim"), tmp_path / "a" / "b" / "x.pth", format="timm")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_integer_tensors_are_refused(tmp_path):
  state = {name: value.astype(np.int8) for name, value in _state().items()}
  safetensors.write(tmp_path / "x.safetensors", state, {})
  with pytest.raises(UserError, match="the file holds int8 there"):
    weights_io.load(tmp_path / "x.safetensors")
  with pytest.raises(UserError, match="one set of weights"):
    weights_io.load(tmp_path / "x.safetensors", ema=True)


def test_openai_tokenizer_loads_from_other_file_formats(tmp_path):
  arrays, _ = reference.load("dalle_pkl")
  state = reference.section(arrays, "param/encoder/")
  wanted = weights_io.load(GOLDEN / "dalle_encoder_small.pkl")
  safetensors.write(tmp_path / "x.safetensors", state, {})
  _assert_same(weights_io.load(tmp_path / "x.safetensors").params, wanted.params)
  _assert_same(weights_io.load(_pth(tmp_path / "x.pth", state)).params, wanted.params)


# --- the command, and fine-tuning from files ------------------------------------------------------


def test_convert_command(tmp_path, capsys):
  source = str(GOLDEN / "mim_plus.pth")
  command = [sys.executable, "-m", "beit_jax.convert", source, str(tmp_path / "x"), "--format=hf", "-v"]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  for fact in (
    "blocks.2.attn.q_bias",
    "encoder/block_02/attn/q_bias",
    "(48,)",
    "relative_position_index",
    "left out",
  ):
    assert fact in run.stderr
  assert json.loads((tmp_path / "x" / "config.json").read_text())["layer_norm_eps"] == 1e-6
  assert convert_main([str(tmp_path / "x"), str(tmp_path / "y"), "--format=timm"]) == 2
  assert "error: a mim cannot be saved as timm" in capsys.readouterr().err
  assert convert_main([str(tmp_path / "nowhere"), str(tmp_path / "y"), "--format=timm"]) == 2
  assert "no such file" in capsys.readouterr().err
  assert convert_main([str(GOLDEN / "malicious_encoder.pkl"), str(tmp_path / "y"), "--format=orbax"]) == 2
  assert "posix.system" in capsys.readouterr().err and not (tmp_path / "y").exists()


@pytest.mark.slow
def test_exports_of_a_run_start_the_same_fine_tuning(tmp_path, tokenizer_run, caplog):
  """Fine-tuning starts with bit-identical losses from a run, from its hf export and from its orbax export."""
  config = tiny.config("beit", total_steps=1, **NO_WARMUP, **{"tokenizer.init_from": str(tokenizer_run)})
  train.run(config, tmp_path / "mim")
  beit_jax.save(beit_jax.load(tmp_path / "mim"), tmp_path / "out", format="hf")
  beit_jax.save(beit_jax.load(tmp_path / "mim"), tmp_path / "orbax", format="orbax")
  results = []
  for start in ("mim", "out", "orbax"):
    changes = {"init_from": str(tmp_path / start), "total_steps": 1, **NO_WARMUP}
    results.append(train.run(tiny.config("classify", **changes), tmp_path / f"from_{start}"))
  assert results[0]["first"]["loss"] == results[1]["first"]["loss"] == results[2]["first"]["loss"]
  with pytest.raises(UserError, match="only weights, no optimizer state; use init_from"):
    train.run(tiny.config("classify", resume=str(tmp_path / "orbax")), tmp_path / "no")


def test_eval_only(tmp_path, capsys):
  """Evaluating a run from its folder and from a unilm file gives the same numbers."""
  result = train.run(tiny.config("classify", total_steps=2, **NO_WARMUP), tmp_path / "run")
  again = train.run(tiny.config("classify", eval_only=True), tmp_path / "run")
  assert again["eval"] == result["eval"] and again["images_per_second"] > 0
  assert json.loads((tmp_path / "run" / "eval.json").read_text()) == again
  beit_jax.save(beit_jax.load(tmp_path / "run"), tmp_path / "x.pth", format="unilm")
  file = {"eval_only": True, "init_from": str(tmp_path / "x.pth")}
  assert train.run(tiny.config("classify", **file), tmp_path / "file")["eval"] == result["eval"]
  with pytest.raises(UserError, match="no fitting head/bias, head/kernel"):
    train.run(tiny.config("classify", **file, **{"model.num_classes": 9}), tmp_path / "other")
  with pytest.raises(UserError, match="give init_from, or the workdir of a run"):
    train.run(tiny.config("classify", eval_only=True), tmp_path / "empty")
  with pytest.raises(UserError, match="eval.split"):
    train.run(tiny.config("classify", **file, **{"eval.split": ""}), tmp_path / "none")


def test_classifier_at_224_initializes_a_run_at_384(tmp_path, caplog):
  """The log says that the tables are resized and the head is replaced."""
  encoder = dict(patch_size=16, rel_pos="per_block")
  weights_io.save(_random("classifier", size=(224, 224), **encoder), tmp_path / "x.pth", format="unilm")
  model = dict(width=24, depth=2, num_heads=3, patch_size=16)
  changes = {
    **{f"model.{key}": value for key, value in model.items()},
    **{"init_from": str(tmp_path / "x.pth"), "data.image_size": 384, "total_steps": 1, "batch_size": 8},
    **{"data.mean": (0.1, 0.2, 0.3), "data.std": (0.4, 0.5, 0.6), "eval.split": "", **NO_WARMUP},
  }
  with caplog.at_level(logging.INFO, "beit_jax"):
    result = train.run(tiny.config("classify", **changes), tmp_path / "run")
  assert result["step"] == 1 and np.isfinite(result["last"]["loss"])
  for fact in (
    "resized from grid (14, 14) to (24, 24)",
    "head/kernel: starts fresh, (24, 8), instead of (24, 5)",
  ):
    assert fact in caplog.text


@pytest.mark.parametrize("side, crop_pct", [(32, 1.0), (48, 0.875), (224, 0.875), (384, 1.0)])
def test_assumed_crop_at_evaluation(side, crop_pct):
  """unilm resizes and crops at evaluation only above 32 pixels."""
  assert unilm.usual_preprocessing(unilm.HALF, (side, side))["crop_pct"] == crop_pct
