"""The forms that a file of weights may have (docs/weights.md has a table of them), and what is refused by name."""

import argparse
import collections
import datetime
import json
import pathlib
import random
import re

import numpy as np
import pytest

import beit_jax
from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.run import checkpoint
from beit_jax.weights import contents, mmseg, unilm
from beit_jax.weights import io as weights_io
from beit_jax.weights.files import safetensors, torchfile
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained
from tests.weights.test_segmentation_weights import _random as _segmenter

ENCODER = dict(image_size=(16, 16), patch_size=8, width=8, depth=2, num_heads=2)
LOOK = dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic", resize="squash")


class HistoryBuffer:
  """Stands for a class of mmengine that this project does not know."""

  def __init__(self):
    self.log = np.arange(3.0)


def _model(kind="classifier", seed=0, **encoder):
  own = dict(classifier=dict(num_classes=3, pool="mean"), mim=dict(vocab_size=5), backbone={})[kind]
  encoder = {**ENCODER, "weight_init": "finetune" if kind == "classifier" else "pretrain", **encoder}
  module = make_module(kind, encoder if kind == "backbone" else dict(encoder=encoder, **own))
  rng = np.random.default_rng(seed)
  shapes = unilm.param_shapes(module, (16, 16))
  params = trees.unflatten({name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
  return Pretrained(kind, params, module, {**LOOK, "image_size": (16, 16)})


def _state(**args):
  return unilm.export_beit(_model(**args))


def _vit():
  """The names of a plain ViT, in which q, k and v have one bias."""
  state = _state(kind="backbone", rel_pos="none", abs_pos=True, layer_scale_init=0.0)
  for name in [name for name in state if name.endswith("q_bias")]:
    q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
    state[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, np.zeros_like(q), v])
  return state


def _under(prefix, state):
  return {prefix + name: value for name, value in state.items()}


def _renamed(state, *rules):
  for pattern, replacement in rules:
    state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
  return state


def _tensors(value):
  """The value with PyTorch's tensors in place of NumPy's arrays in dicts."""
  torch = pytest.importorskip("torch")
  if type(value) is dict:
    return {key: _tensors(entry) for key, entry in value.items()}
  return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _save(path, content):
  torch = pytest.importorskip("torch")
  torch.save(_tensors(content), path)
  return path


def _assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- forms ----------------------------------------------------------------------------------------

NOTHING = {"w": np.zeros(3, np.float32)}
CLASSIFIERS = {
  "plain": lambda s, _: s,
  "DDP": lambda s, _: {"model": _under("module.", s)},
  "compiled DDP": lambda s, _: _under("_orig_mod.module.", s),
  "DDP compiled": lambda s, _: _under("module._orig_mod.", s),
  "compiled blocks": lambda s, _: _renamed(s, (r"^blocks\.(\d)\.", r"blocks.\1._orig_mod.")),
  "FSDP": lambda s, _: _under(
    "_fsdp_wrapped_module.",
    _renamed(s, (r"^blocks\.(\d)\.", r"blocks.\1._fsdp_wrapped_module._checkpoint_wrapped_module.")),
  ),
  "Lightning model": lambda s, _: {
    "state_dict": _under("model.", s) | {"criterion.weight": np.ones(3)},
    "callbacks": {HistoryBuffer: {"best": 1.0}},
    "hyper_parameters": argparse.Namespace(lr=0.1),
  },
  "Lightning net": lambda s, _: {"state_dict": _under("net._orig_mod.", s), "epoch": 3},
  "model_state_dict": lambda s, _: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: NOTHING}}},
  "net": lambda s, _: {"net": s, "acc": 0.9},
  "weights": lambda s, _: {"weights": s},
  "nested": lambda s, _: {"checkpoint": {"model": s, "step": 1}},
  "DeepSpeed": lambda s, _: {"module": s, "optimizer": None, "ds_config": {"zero": 1}},
  "AveragedModel": lambda s, _: _under("module.", s) | {"n_averaged": np.ones((), np.int64)},
  "averaged beside it": lambda s, other: {"state_dict": s, "state_dict_ema": other},
  "mmengine": lambda s, other: {
    "state_dict": s,
    "ema_state_dict": _under("module.", other),
    "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer())},
    "meta": {"experiment_name": "x", "time": datetime.datetime(2026, 1, 1)},
  },
}
ENCODERS = {
  "Lightning encoder": lambda s, _: {"state_dict": _under("encoder.", s) | _under("probe.", NOTHING)},
  "DINO": lambda s, other: {
    "student": _under("module.backbone.", other) | _under("module.head.mlp.0.", NOTHING),
    "teacher": _under("backbone.", s) | _under("head.last_layer.", NOTHING),
    "dino_loss": {"center": np.zeros(3, np.float32)},
  },
  "iBOT": lambda s, other: {
    "student": other,
    "teacher": s | {"masked_embed": np.zeros((1, 8), np.float32)} | _under("head.mlp.0.", NOTHING),
  },
  "MoCo v3": lambda s, other: {
    "state_dict": _under("module.base_encoder.", s | _under("head.0.", NOTHING))
    | _under("module.momentum_encoder.", other)
    | _under("module.predictor.0.", NOTHING)
  },
  "another decoder": lambda s, _: {
    "state_dict": _under("backbone.", s | _under("fpn1.0.", NOTHING) | _under("fpn2.0.", NOTHING))
    | _under("decode_head.pixel_decoder.", NOTHING)
    | _under("auxiliary_head.conv_seg.", NOTHING)
  },
  "PSPNet": lambda s, _: _under("backbone.", s) | _under("decode_head.psp_modules.0.1.conv.", NOTHING),
  "SETR-MLA": lambda s, _: (
    _under("backbone.", s)
    | _under("decode_head.up_convs.0.0.conv.", NOTHING)
    | _under("decode_head.up_convs.0.1.conv.", NOTHING)
  ),
  "UPerNet of mmsegmentation 1 with another pyramid": lambda s, _: {
    "state_dict": _under("backbone.", _openmmlab(s))
    | _under("neck.lateral_convs.0.conv.", NOTHING)
    | _under("decode_head.lateral_convs.0.conv.", NOTHING)
  },
  "detector": lambda s, _: {
    "model": _under("backbone.bottom_up.backbone.", s | _under("fpn3.0.", NOTHING))
    | _under("backbone.fpn_lateral2.", NOTHING)
    | _under("roi_heads.box_head.fc1.", NOTHING)
  },
  "mmdetection": lambda s, _: {
    "state_dict": _under("backbone.", _openmmlab(s)) | _under("neck.lateral_convs.0.conv.", NOTHING)
  },
}
LEFT_OUT = {
  "Lightning encoder": ["probe.w"],
  "DINO": ["head.last_layer.w"],
  "iBOT": ["masked_embed", "head.mlp.0.w"],
  "MoCo v3": ["head.0.w", "predictor.0.w"],
  "another decoder": ["fpn1.0.w", "fpn2.0.w", "decode_head.pixel_decoder.w", "auxiliary_head.conv_seg.w"],
  "PSPNet": ["decode_head.psp_modules.0.1.conv.w"],
  "SETR-MLA": ["decode_head.up_convs.0.0.conv.w", "decode_head.up_convs.0.1.conv.w"],
  "UPerNet of mmsegmentation 1 with another pyramid": [
    "neck.lateral_convs.0.conv.w",
    "decode_head.lateral_convs.0.conv.w",
  ],
  "detector": ["fpn3.0.w", "backbone.fpn_lateral2.w", "roi_heads.box_head.fc1.w"],
  "mmdetection": ["neck.lateral_convs.0.conv.w"],
}
OPENMMLAB = (
  (r"^patch_embed\.proj\.", "patch_embed.projection."),
  (r"^blocks\.", "layers."),
  (r"\.norm([12])\.", r".ln\1."),
  (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
  (r"\.mlp\.fc2\.", ".ffn.layers.1."),
  (r"^norm\.", "ln1."),
  (r"^fc_norm\.", "ln2."),
)


def _openmmlab(state):
  return _renamed(state, *OPENMMLAB)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_form_of_a_classifier(name, tmp_path):
  model, other = _model(), _state(seed=1)
  loaded = weights_io.load(_save(tmp_path / "x.pth", CLASSIFIERS[name](_state(), other)))
  assert loaded.kind == "classifier"
  _assert_same(loaded.params, model.params)


@pytest.mark.parametrize("name", ENCODERS)
def test_form_of_an_encoder(name, tmp_path, caplog):
  """The encoder is read; every other tensor of its state dict is left out by name, and other copies are named."""
  state, other = _state(kind="backbone"), _state(kind="backbone", seed=1)
  content = ENCODERS[name](state, other)
  loaded = weights_io.load(_save(tmp_path / "x.pth", content))
  assert loaded.kind == "backbone"
  _assert_same(loaded.params, _model("backbone").params)
  left_out = {n for n in loaded.description["left_out"] if not re.search("_index$|^momentum", n)}
  assert left_out == set(LEFT_OUT[name])
  copies = {"DINO": "student.backbone", "iBOT": "student", "MoCo v3": "state_dict.momentum_encoder"}
  assert f"also in the file: {copies.get(name, '-')}" in caplog.text or name not in copies


def test_form_of_a_masked_autoencoder(tmp_path):
  """The decoder and its mask token are left out by name."""
  state = {name: value for name, value in _vit().items() if name != "mask_token"}
  decoder = {
    "mask_token": np.ones((1, 1, 8), np.float32),
    "decoder_pos_embed": np.ones((1, 5, 8), np.float32),
    "decoder_embed.weight": np.ones((8, 8), np.float32),
    "decoder_blocks.0.attn.qkv.bias": np.ones(24, np.float32),
    "decoder_pred.bias": np.ones(3, np.float32),
  }
  plain = weights_io.load(_save(tmp_path / "plain.pth", state), num_heads=2)
  full = weights_io.load(_save(tmp_path / "mae.pth", {"model": state | decoder}), num_heads=2)
  _assert_same(full.params, plain.params)
  assert full.encoder_fields == plain.encoder_fields and decoder.keys() <= set(full.description["left_out"])


def test_form_of_a_masked_autoencoder_of_transformers(tmp_path):
  torch = pytest.importorskip("torch")
  from tests.peers import transformers

  size = dict(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=8,
  )
  size |= dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
  model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**size, mask_ratio=0.0)).eval()
  model.save_pretrained(tmp_path / "x")
  loaded = weights_io.load(tmp_path / "x")
  assert loaded.kind == "backbone" and "decoder.mask_token" in loaded.description["left_out"]
  image = np.random.default_rng(0).standard_normal((1, 16, 16, 3), np.float32)
  with torch.no_grad():
    pixels, order = (
      torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
      torch.arange(4.0)[None],
    )  # not shuffled
    wanted = model.vit(pixels, noise=order).last_hidden_state.numpy()
  np.testing.assert_allclose(loaded.forward(image), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "mim", "backbone"])
def test_form_of_mmpretrain(kind, tmp_path):
  state = _openmmlab(_state(kind=kind))
  heads = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}
  heads |= {"lm_head.weight": "head.cls_head.weight", "lm_head.bias": "head.cls_head.bias"}
  content = {heads.get(name, f"backbone.{name}"): value for name, value in state.items()}
  names = ["x", "y", "z"]
  meta = {"dataset_meta": {"classes": names}, "cfg": "model = dict()"}
  loaded = weights_io.load(_save(tmp_path / "x.pth", {"state_dict": content, "meta": meta}))
  assert loaded.kind == kind
  _assert_same(loaded.params, _model(kind).params)
  assert loaded.description["labels"] == (names if kind == "classifier" else [])


def test_form_of_a_plain_vit_of_mmsegmentation(tmp_path):
  """The names that PyTorch's attention has."""
  state = _vit()
  content = _renamed(
    _openmmlab(state), (r"\.attn\.qkv\.", ".attn.attn.in_proj_"), (r"\.attn\.proj\.", ".attn.attn.out_proj.")
  )
  plain = weights_io.load(_save(tmp_path / "plain.pth", state), num_heads=2)
  loaded = weights_io.load(_save(tmp_path / "x.pth", _under("backbone.", content)), num_heads=2)
  _assert_same(loaded.params, plain.params)


@pytest.mark.parametrize("kind", ["classifier", "mim", "backbone", "segmenter"])
def test_openmmlab_files_are_written(kind, tmp_path):
  """The names are those of mmpretrain's `BEiTViT` and mmsegmentation's `BEiT`; reading gives the same model."""
  model = _segmenter() if kind == "segmenter" else _model(kind)
  weights_io.save(model, tmp_path / "x.pth", format="openmmlab")
  names = set(torchfile.load(tmp_path / "x.pth")["state_dict"])
  block = "backbone.layers.0."
  wanted = {
    "backbone.cls_token",
    "backbone.patch_embed.projection.weight",
    "ln1.bias",
    "ffn.layers.0.0.weight",
  }
  wanted |= {"attn.qkv.weight", "attn.q_bias", "ffn.layers.1.bias", "gamma_2"}
  assert {name if "backbone" in name else block + name for name in wanted} <= names
  heads = {
    "classifier": {"head.fc.weight", "backbone.ln2.weight"},
    "mim": {"head.cls_head.weight", "backbone.ln1.weight", "backbone.mask_token"},
    "backbone": {"backbone.ln1.weight"},
    "segmenter": {"neck.upsample_4x.3.weight", "neck.upsample_2x.0.bias", "decode_head.conv_seg.weight"},
  }
  assert heads[kind] <= names and not any(re.search(r"blocks|norm\d|mlp|fpn\d\.", name) for name in names)
  loaded = weights_io.load(tmp_path / "x.pth")
  assert loaded.kind == kind and loaded.preprocessing == model.preprocessing
  assert loaded.encoder_fields == model.encoder_fields
  _assert_same(loaded.params, model.params)


def test_models_that_openmmlab_lacks_are_refused(tmp_path):
  for model in (
    _segmenter(rel_pos="none", abs_pos=True),
    _segmenter(layer_scale_init=0.0),
    _model(norm_eps=1e-5),
  ):
    with pytest.raises(UserError, match="cannot be saved as openmmlab"):
      weights_io.save(model, tmp_path / "x.pth", format="openmmlab")


def test_mmpretrain_with_two_norms_is_refused(tmp_path):
  state = _openmmlab(_state()) | {"ln1.weight": np.ones(8, np.float32), "ln1.bias": np.ones(8, np.float32)}
  with pytest.raises(UserError, match="two layer norms in a row"):
    weights_io.load(_save(tmp_path / "x.pth", state))


def test_form_of_mmsegmentation_1(tmp_path):
  model = _segmenter()
  state = mmseg.export_mmseg(model)
  backbone = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
  pyramid = {n: v for n, v in backbone.items() if n.startswith("fpn")}
  encoder = {n: v for n, v in backbone.items() if n not in pyramid}
  content = {n: v for n, v in state.items() if not n.startswith("backbone.")}
  content |= _under("backbone.", _openmmlab(encoder))
  content |= _under("neck.", _renamed(pyramid, ("^fpn1", "upsample_4x"), ("^fpn2", "upsample_2x")))
  meta = {"cfg": "out_indices=(0, 1, 2, 3)", "dataset_meta": {"classes": tuple("vwxyz")}}
  loaded = weights_io.load(_save(tmp_path / "x.pth", {"state_dict": content, "meta": meta}))
  assert loaded.kind == "segmenter" and loaded.description["labels"] == list("vwxyz")
  _assert_same(loaded.params, model.params)
  _assert_same(loaded.collections, model.collections)


def test_form_of_a_pickled_module(tmp_path):
  """A whole module, pickled with the names of its classes, which are never imported."""
  torch = pytest.importorskip("torch")
  root = torch.nn.Module()
  for name, value in _state().items():
    *parts, last = name.split(".")
    node = root
    for part in parts:
      if part not in node._modules:
        node.add_module(part, torch.nn.Module())
      node = node._modules[part]
    if value.dtype == np.float32:
      node.register_parameter(last, torch.nn.Parameter(torch.from_numpy(value.copy())))
  torch.save(root, tmp_path / "module.pth")
  _assert_same(weights_io.load(tmp_path / "module.pth").params, _model().params)


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_form_of_shards(index, tmp_path):
  """A folder of transformers whose tensors are in several files."""
  weights_io.save(_model(), tmp_path / "x", format="hf")
  whole = tmp_path / "x" / "model.safetensors"
  state = {name: value.read() for name, value in safetensors.read(whole)[0].items()}
  whole.unlink()
  suffix = ".bin" if "bin" in index else ".safetensors"
  shards = [f"part-{i}{suffix}" for i in (1, 2)]
  for shard, names in zip(shards, (list(state)[::2], list(state)[1::2]), strict=True):
    part = {name: state[name] for name in names}
    if suffix == ".bin":
      _save(tmp_path / "x" / shard, part)
    else:
      safetensors.write(tmp_path / "x" / shard, part, {})
  weight_map = {name: shards[i % 2] for i, name in enumerate(state)}
  (tmp_path / "x" / index).write_text(json.dumps({"weight_map": weight_map}))
  _assert_same(weights_io.load(tmp_path / "x").params, _model().params)


@pytest.mark.parametrize("key", ["state_dict_ema", "ema_state_dict", "model_ema", "ema_model"])
def test_averaged_weights_are_taken_on_request(key, tmp_path):
  path = _save(tmp_path / "x.pth", {"state_dict": _state(), key: _under("module.", _state(seed=1))})
  _assert_same(weights_io.load(path).params, _model().params)
  _assert_same(weights_io.load(path, ema=True).params, _model(seed=1).params)


def test_copies_of_models_with_other_names_are_told_apart(tmp_path):
  """The order of the copies in the file does not matter, also where the names of the tensors are unknown."""
  content = {
    "ema": {"a": np.ones(3), **NOTHING},
    "state_dict": {"a": np.zeros(3), **NOTHING},
    "optimizer": {"state": {"a": NOTHING}},
  }
  path = _save(tmp_path / "x.pth", content)
  assert [contents.read(path, ema).state["a"].read()[0] for ema in (False, True)] == [0, 1]


def test_averaged_weights_of_mmengine_are_in_the_state_dict(tmp_path):
  """mmengine exchanges the two when it saves, so `ema_state_dict` holds the weights that are not averaged."""
  content = CLASSIFIERS["mmengine"](_state(), _state(seed=1))
  with pytest.raises(UserError, match="mmengine has put them into state_dict.*omit ema"):
    weights_io.load(_save(tmp_path / "x.pth", content), ema=True)


def test_several_models_are_refused_by_name(tmp_path):
  content = {"generator": _under("vit.", _state()), "critic": _state()}
  with pytest.raises(UserError, match=r"holds 2 models, under critic, generator\.vit\. Save the state dict"):
    weights_io.load(_save(tmp_path / "x.pth", dict(sorted(content.items()))))
  with pytest.raises(UserError, match="the same names with and without prefixes"):
    weights_io.load(_save(tmp_path / "y.pth", _state() | _under("module.", _state())))


# --- objects that are no tensors ------------------------------------------------------------------


def test_form_of_a_training_checkpoint(tmp_path):
  """Objects of any type beside the state dict become inert values; none of their code is imported or run."""
  torch = pytest.importorskip("torch")
  content = {
    "model": _state(),
    "optimizer": {"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
    "args": argparse.Namespace(out=pathlib.Path("x"), size=224),
    "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    "default": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter({3: 1, (1, 2): 4, None: 5}),
    "buffer": HistoryBuffer(),
    "values": [np.float64(0.5), np.arange(4), {1, 2}, frozenset("ab"), b"x", 1j, torch.float8_e4m3fn],
    "kinds": [torch.zeros(2, dtype=torch.complex64), torch.device("cpu"), torch.zeros(2).to_sparse()],
    "deque": collections.deque([1, 2]),
  }
  for number, how in enumerate((dict(), dict(pickle_protocol=4), dict(pickle_protocol=5))):
    torch.save(_tensors(content), tmp_path / f"{number}.pth", **how)
    _assert_same(weights_io.load(tmp_path / f"{number}.pth").params, _model().params)


def test_objects_inside_the_state_dict_are_refused(tmp_path):
  torch = pytest.importorskip("torch")
  odd = {
    "HistoryBuffer": HistoryBuffer(),
    "_rebuild_sparse_tensor": torch.zeros(2).to_sparse(),
    "_reconstruct": np.ones(3),
  }
  for name, value in odd.items():
    content = {"model": {**_tensors(_state()), "blocks.1.mlp.fc2.bias": value}}
    torch.save(content, tmp_path / f"{name}.pth")
    with pytest.raises(
      UserError, match=rf"'blocks.1.mlp.fc2.bias' in its state dict is a .*{name}.*executed"
    ):
      weights_io.load(tmp_path / f"{name}.pth")


# --- files that are no weights --------------------------------------------------------------------

FILES = {
  "page": (b"\n<!DOCTYPE html><html>404", "an HTML or XML page"),
  "pointer": (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a Git LFS pointer.*git lfs pull",
  ),
  "empty": (b"", "not weights but empty"),
  "gzip": (b"\x1f\x8b\x08", "a compressed file.*unpack it first"),
  "tar": (b"x" * 257 + b"ustar\0", "a tar archive; unpack it first"),
  "keras": (b"\x89HDF\r\n", "an HDF5 file"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("file", ["x.pth", "x.pkl", "pytorch_model.bin", "model.safetensors"])
def test_other_files_are_named(name, file, tmp_path):
  (tmp_path / file).write_bytes(FILES[name][0])
  path = tmp_path / file if file.startswith("x") else tmp_path
  with pytest.raises(UserError, match=FILES[name][1]):
    weights_io.load(path)


def test_an_archive_of_arrays_is_named(tmp_path):
  np.savez(tmp_path / "x.npz", a=np.ones(3))
  with pytest.raises(UserError, match="it holds a.npy"):
    weights_io.load(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_named(tmp_path):
  torch = pytest.importorskip("torch")
  torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "x.pt")
  with pytest.raises(UserError, match="a TorchScript program; save its state_dict"):
    weights_io.load(tmp_path / "x.pt")


FOLDERS = {
  "several checkpoints": (
    ["checkpoint-500", "checkpoint-1000"],
    "give one of them: checkpoint-500, checkpoint-1000",
  ),
  "DeepSpeed": (
    ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    "DeepSpeed; give its file mp_rank_00_model_states.pt",
  ),
  "steps of DeepSpeed": (["global_step100", "latest", "zero_to_fp32.py"], "give one of them: global_step100"),
  "distributed": ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
  "files": (["log.txt", "checkpoint-99.pth"], "give one of them: checkpoint-99.pth"),
  "Flax": (["config.json", "flax_model.msgpack"], "it holds flax_model.msgpack"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_other_folders_are_named(name, tmp_path):
  for file in FOLDERS[name][0]:
    (tmp_path / file).mkdir() if "." not in file else (tmp_path / file).write_bytes(b"x")
  with pytest.raises(UserError, match=FOLDERS[name][1]):
    weights_io.load(tmp_path)


def test_empty_tensors_are_named(tmp_path):
  """The file of one process of DeepSpeed ZeRO 3 has the names of all tensors and no values."""
  empty = {name: np.zeros(0, np.float32) for name in _state()}
  with pytest.raises(UserError, match="all its tensors are empty: DeepSpeed"):
    weights_io.load(_save(tmp_path / "x.pth", {"module": empty}))


def test_resume_on_weights_names_init_from(tmp_path):
  torchfile.save(tmp_path / "x.pth", _state(), {})
  weights_io.save(_model(), tmp_path / "hf", format="hf")
  for path in ("x.pth", "hf"):
    with pytest.raises(UserError, match="config key 'resume'.*no run of beit_jax.*give it as init_from"):
      checkpoint.find_resumable(tmp_path / path)


def test_load_is_the_public_function(tmp_path):
  assert beit_jax.load(_save(tmp_path / "x.ckpt", {"net": _state()})).kind == "classifier"
