"""Models of timm and transformers have the same outputs here, and ours there, with random values in every parameter.

Freshly initialized models have zero tables and biases, which would hide errors. Without PyTorch these tests are
skipped; `.ci/run` installs it. The limit is max|a - b| <= 1e-5 max|b| in float32.
"""

import dataclasses
import logging

import numpy as np
import pytest

import beit_jax
from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.weights import unilm
from beit_jax.weights.files import safetensors, torchfile
from tests.peers import safetensors_torch, timm, torch, transformers

load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file
pytestmark = pytest.mark.filterwarnings("ignore")  # of third-party libraries
SMALL = dict(embed_dim=48, depth=3, num_heads=4, img_size=64, num_classes=7)


def redraw(model, seed=0):
  """Redraws every parameter, none as zero: tables N(0, .5), biases .1, LayerScale .1 exp(.5 N), norms 1 +- .1."""
  generator = torch.Generator().manual_seed(seed)
  for name, value in model.named_parameters():
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith("relative_position_bias_table"):
      new = 0.5 * noise
    elif name.endswith(("gamma_1", "gamma_2", "lambda_1", "lambda_2", "gamma")):
      new = 0.1 * torch.exp(0.5 * noise)
    elif name.endswith("bias"):
      new = 0.1 * noise
    elif "norm" in name and value.ndim == 1:
      new = 1 + 0.1 * noise
    elif name.endswith(("token", "embed", "embeddings")):
      new = 0.5 * noise
    else:
      new = noise / np.sqrt(np.prod(value.shape[1:]))
    value.data.copy_(new)
  return model.eval()


def _image(size, batch=2):
  height, width = (size, size) if isinstance(size, int) else size
  return np.random.default_rng(1).standard_normal((batch, height, width, 3), np.float32)


def _nchw(image):
  return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def _error(found, wanted):
  found, wanted = np.asarray(found), wanted.detach().numpy()
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


def _mask(image_size, patch=16):
  grid = (image_size // patch,) * 2
  return np.random.default_rng(2).random((2, *grid)) < 0.4


def _timm(name, **args):
  return redraw(timm.create_model(name, pretrained=False, **args))


def _save(model, path):
  torch.save(model.state_dict(), path)
  return path


@pytest.mark.parametrize(
  ("name", "args"),
  [
    ("beit_base_patch16_224", SMALL),
    ("beit_base_patch16_224", {**SMALL, "global_pool": "token", "init_values": None}),
    ("beit_base_patch16_224", {**SMALL, "use_abs_pos_emb": True, "use_rel_pos_bias": False}),
    ("vit_base_patch16_224", SMALL),
    ("vit_base_patch16_224", {**SMALL, "global_pool": "avg"}),
    ("deit3_small_patch16_224", SMALL),
    *(
      pytest.param(name, {}, marks=pytest.mark.slow)
      for name in (
        "beit_base_patch16_224",
        "beitv2_base_patch16_224",
        "beit_large_patch16_384",
        "vit_base_patch16_224",
        "deit3_small_patch16_224",
      )
    ),
  ],
)
def test_timm_classifiers_agree_in_both_directions(name, args, tmp_path, caplog):
  model = _timm(name, **args)
  heads = None if args == {} or "beit" in name and args.get("use_rel_pos_bias", True) else 4
  loaded = beit_jax.load(_save(model, tmp_path / f"{name}.pth"), num_heads=heads)
  assert loaded.kind == "classifier"
  image = _image(loaded.preprocessing["image_size"])
  wanted = model(_nchw(image))
  assert _error(loaded.forward(image), wanted) <= 1e-5

  # timm loads what we save with the call that the log prints.
  with caplog.at_level(logging.INFO, "beit_jax"):
    beit_jax.save(loaded, tmp_path / "out.safetensors", format="timm")
  call = next(line for line in caplog.text.splitlines() if "timm.create_model" in line)
  again = eval(call[call.index("timm.create_model") :], {"timm": timm}).eval()
  np.testing.assert_allclose(
    again(_nchw(image)).detach(), wanted.detach(), atol=1e-5 * float(wanted.abs().max())
  )
  assert _error(loaded.forward(image), again(_nchw(image))) <= 1e-5


def test_timm_reads_our_folder(tmp_path):
  """timm's `local-dir:` reads the folder that `save` writes for a name without a suffix, preprocessing included."""
  model = _timm("beit_base_patch16_224", **SMALL)
  loaded = beit_jax.load(_save(model, tmp_path / "model.pth"))
  beit_jax.save(loaded, tmp_path / "hub", format="timm")
  again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
  image = _image(64)
  assert _error(loaded.forward(image), again(_nchw(image))) <= 1e-5
  assert tuple(again.pretrained_cfg["mean"]) == loaded.preprocessing["mean"]
  assert beit_jax.load(tmp_path / "hub").preprocessing == loaded.preprocessing


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_224"])
def test_timm_backbones_agree(name, tmp_path):
  model = _timm(name, **{**SMALL, "num_classes": 0}, global_pool="token")
  loaded = beit_jax.load(_save(model, tmp_path / "model.pth"), num_heads=4)
  image = _image(64)
  assert loaded.kind == "backbone"
  assert _error(loaded.forward(image), model.forward_features(_nchw(image))) <= 1e-5


def test_errors_in_the_mapping_exceed_the_tolerance(tmp_path):
  """Swapping the q and v biases or reversing a table gives errors far outside the tolerance."""
  model = _timm("beit_base_patch16_224", **SMALL)
  loaded = beit_jax.load(_save(model, tmp_path / "model.pth"))
  image = _image(64)
  wanted = model(_nchw(image))
  attn = loaded.params["encoder"]["block_01"]["attn"]
  right = dict(attn)
  for wrong in (
    dict(q_bias=right["v_bias"], v_bias=right["q_bias"]),
    dict(relative_position_bias_table=right["relative_position_bias_table"][::-1]),
  ):
    attn.update(right)
    assert _error(loaded.module.apply({"params": loaded.params}, image), wanted) <= 1e-5
    attn.update(wrong)
    assert _error(loaded.module.apply({"params": loaded.params}, image), wanted) > 1e-3


HF = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=64)
FULL = dict(image_size=224)
RELATIVE = dict(use_relative_position_bias=True)
SHARED = dict(use_shared_relative_position_bias=True)
ABSOLUTE = dict(use_absolute_position_embeddings=True)


def _sizes(cases):
  small = [pytest.param(HF, case, id=f"small-{i}") for i, case in enumerate(cases)]
  return small + [
    pytest.param(FULL, case, id=f"full-{i}", marks=pytest.mark.slow) for i, case in enumerate(cases)
  ]


def _hf(cls, sizes, **config):
  return redraw(cls(transformers.BeitConfig(**sizes, **config)))


def _check_both_directions(model, tmp_path, run):
  """Compares a model that transformers saved after loading it here, and after transformers loads what we save."""
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  error = run(loaded, model)
  assert error <= 1e-5
  beit_jax.save(loaded, tmp_path / "ours", format="hf")
  again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert run(loaded, again.eval()) <= 1e-5
  assert again.config.layer_norm_eps == model.config.layer_norm_eps
  return loaded, again


@pytest.mark.parametrize(
  ("sizes", "config"),
  _sizes([SHARED, ABSOLUTE, {**RELATIVE, "layer_norm_eps": 1e-6}, {**SHARED, **ABSOLUTE}]),
)
def test_hf_masked_image_models_agree(sizes, config, tmp_path):
  model = _hf(transformers.BeitForMaskedImageModeling, sizes, **config, vocab_size=64, use_mask_token=True)
  image, mask = _image(sizes["image_size"]), _mask(sizes["image_size"])

  def run(loaded, peer):
    wanted = peer(_nchw(image), bool_masked_pos=torch.from_numpy(mask.reshape(2, -1))).logits
    return _error(loaded.forward(image, mask), wanted)

  loaded, _ = _check_both_directions(model, tmp_path, run)
  assert loaded.kind == "mim"


@pytest.mark.parametrize(
  ("sizes", "config"),
  _sizes(
    [RELATIVE, {**RELATIVE, "use_mean_pooling": False}, ABSOLUTE, {**ABSOLUTE, "layer_scale_init_value": 0.0}]
  ),
)
def test_hf_classifiers_agree(sizes, config, tmp_path):
  labels = {0: "cat", 1: "dog", 2: "axolotl"}
  model = _hf(transformers.BeitForImageClassification, sizes, **config, num_labels=3, id2label=labels)
  image = _image(sizes["image_size"])
  run = lambda loaded, peer: _error(loaded.forward(image), peer(_nchw(image)).logits)
  loaded, again = _check_both_directions(model, tmp_path, run)
  assert loaded.module.pool == ("mean" if config.get("use_mean_pooling", True) else "cls")
  assert loaded.description["labels"] == list(labels.values()) and again.config.id2label == labels


@pytest.mark.parametrize("mean_pooling", [False, True])
def test_hf_backbones_agree(mean_pooling, tmp_path):
  model = _hf(transformers.BeitModel, HF, **RELATIVE, use_mean_pooling=mean_pooling, use_mask_token=True)
  image, mask = _image(64), _mask(64)

  def run(loaded, peer):
    flat = torch.from_numpy(mask.reshape(2, -1))
    return _error(loaded.forward(image, mask), peer(_nchw(image), bool_masked_pos=flat).last_hidden_state)

  loaded, _ = _check_both_directions(model, tmp_path, run)
  assert loaded.kind == "backbone"
  assert any("fc_norm" in name for name in loaded.description["left_out"]) == mean_pooling


def test_hf_folders_of_every_form_are_read(tmp_path):
  """Shards, pytorch_model.bin and the in-memory names of transformers 5 give the same parameters."""
  model = _hf(transformers.BeitForImageClassification, HF, **RELATIVE, num_labels=3)
  model.save_pretrained(tmp_path / "plain")
  wanted = trees.flatten(beit_jax.load(tmp_path / "plain").params)
  model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
  for name, write in (
    ("bin", lambda folder: torch.save(model.state_dict(), folder / "pytorch_model.bin")),
    ("memory", lambda folder: save_file(model.state_dict(), folder / "model.safetensors")),
  ):
    (tmp_path / name).mkdir()
    model.config.save_pretrained(tmp_path / name)
    write(tmp_path / name)
  for name in ("shards", "bin", "memory"):
    found = trees.flatten(beit_jax.load(tmp_path / name).params)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[n], wanted[n]) for n in wanted)


def test_hf_two_norms_are_refused(tmp_path):
  _hf(transformers.BeitForMaskedImageModeling, HF, use_mean_pooling=False, **SHARED).save_pretrained(tmp_path)
  with pytest.raises(UserError, match="two layer norms"):
    beit_jax.load(tmp_path)


def test_hf_preprocessing_agrees_in_both_directions(tmp_path, caplog):
  """transformers' processor, from the file that we write, prepares an image like ours."""
  model = _hf(transformers.BeitForImageClassification, HF, **RELATIVE, num_labels=3)
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  beit_jax.save(loaded, tmp_path / "ours", format="hf")
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
  image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
  theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  ours = np.asarray(loaded.preprocess([image]))[0]
  assert theirs.shape == ours.shape
  # Same resampling; where the crop box falls between two pixels the two may differ by one.
  assert np.abs(theirs - ours).mean() < 0.25
  squash = dict(image_size=(64, 64), crop_pct=1.0, resize="squash", interpolation="bilinear")
  transformers.BeitImageProcessor(
    size={"height": 64, "width": 64}, resample=2, image_mean=[0.4] * 3, image_std=[0.2] * 3
  ).save_pretrained(tmp_path / "theirs")
  found = beit_jax.load(tmp_path / "theirs").preprocessing
  assert found == {"mean": (0.4,) * 3, "std": (0.2,) * 3, **squash}


@pytest.mark.parametrize("size", [[32, 64], [64, 32]])
@pytest.mark.parametrize("config", [RELATIVE, {**SHARED, "use_mean_pooling": True}])
def test_rectangular_hf_models_agree(size, config, tmp_path):
  """Tables are resized like transformers does, so that outputs agree; our own files come back unchanged."""
  sizes = {**HF, "image_size": size}
  model = _hf(transformers.BeitForImageClassification, sizes, **config, num_labels=3)
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  image = _image(size)
  assert _error(loaded.forward(image), model(_nchw(image)).logits) <= 1e-5
  beit_jax.save(loaded, tmp_path / "ours", format="hf")
  again = beit_jax.load(tmp_path / "ours")
  np.testing.assert_array_equal(again.forward(image), loaded.forward(image))


def test_backbones_without_a_norm_are_saved_for_timm(tmp_path, caplog):
  model = _hf(transformers.BeitModel, HF, **RELATIVE)
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  with caplog.at_level(logging.INFO, "beit_jax"):
    beit_jax.save(loaded, tmp_path / "out.pth", format="timm")
  call = next(line for line in caplog.text.splitlines() if "timm.create_model" in line)
  peer = eval(call[call.index("timm.create_model") :], {"timm": timm}).eval()
  image = _image(64)
  assert _error(loaded.forward(image), peer.forward_features(_nchw(image))) <= 1e-5


def test_missing_labels_are_filled_up(tmp_path):
  model = _hf(transformers.BeitForImageClassification, HF, **RELATIVE, num_labels=5)
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  loaded.description["labels"] = ["a", "b"]
  beit_jax.save(loaded, tmp_path / "ours", format="hf")
  again = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours")
  assert list(again.config.id2label.values()) == ["a", "b", "LABEL_2", "LABEL_3", "LABEL_4"]


def test_saving_a_rectangular_grid_for_hf_warns(tmp_path, caplog):
  model = _hf(transformers.BeitForImageClassification, HF, **RELATIVE, num_labels=3)
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  module = loaded.module.clone(encoder={**loaded.module.encoder, "image_size": (32, 128)})  # 2 x 8 patches
  shapes = unilm.param_shapes(module, (32, 128))
  params = trees.unflatten({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
  with caplog.at_level(logging.INFO, "beit_jax"):
    wide = dataclasses.replace(loaded, module=module, params=params)
    beit_jax.save(wide, tmp_path / "wide", format="hf")
  assert "(width, height)" in caplog.text
  assert beit_jax.load(tmp_path / "wide").module.encoder["image_size"] == (32, 128)


@pytest.mark.parametrize(
  "sizes", [dict(hidden_size=8, vocab_size=64), pytest.param({}, marks=pytest.mark.slow, id="full")]
)
def test_flava_codebook_agrees(sizes, tmp_path):
  model = redraw(transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig(**sizes)))
  model.save_pretrained(tmp_path / "theirs")
  tokenizer = beit_jax.load(tmp_path / "theirs")
  assert tokenizer.kind == "tokenizer" and "decoder" not in tokenizer.params
  image = np.random.default_rng(0).random((2, 64, 64, 3), np.float32) * 0.8 + 0.1

  def run(peer):
    return _error(tokenizer.forward(image), peer.blocks(_nchw(image)).permute(0, 2, 3, 1))

  assert run(model) <= 1e-5
  beit_jax.save(tokenizer, tmp_path / "ours", format="hf")
  again, info = transformers.FlavaImageCodebook.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert run(again.eval()) <= 1e-5
  with pytest.raises(UserError, match="without its decoder"):
    tokenizer.decode(np.zeros((1, 64), np.int32))


def test_written_pth_loads_with_weights_only(tmp_path):
  model = _timm("beit_base_patch16_224", **SMALL)
  loaded = beit_jax.load(_save(model, tmp_path / "model.pth"))
  beit_jax.save(loaded, tmp_path / "out.pth", format="unilm")
  state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
  ours = {name: value for name, value in state.items() if "relative_position_index" not in name}
  theirs = model.state_dict()
  assert ours.keys() == theirs.keys()
  assert all(torch.equal(ours[name], theirs[name]) for name in ours)
  mapped = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)["model"]
  assert all(torch.equal(mapped[name], state[name]) for name in state)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_are_read(zipped, tmp_path):
  """Both file formats, every data type, and views are read."""
  tensors = {
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "offset": torch.arange(10.0)[3:],
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    **{
      str(t): torch.ones(3, dtype=t)
      for t in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
    },
  }
  tensors["again"] = tensors["offset"]
  torch.save({"model": tensors, "epoch": 3}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
  found = torchfile.load(tmp_path / "x.pth")
  assert found["epoch"] == 3
  for name, value in tensors.items():
    np.testing.assert_array_equal(np.asarray(found["model"][name].read(), np.float64), value.double().numpy())


def test_safetensors_agree_with_the_library(tmp_path):
  tensors = {
    "a": torch.randn(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.arange(3),
    "e": torch.zeros(0),
  }
  save_file(tensors, tmp_path / "theirs.safetensors", metadata={"x": "y"})
  found, metadata = safetensors.read(tmp_path / "theirs.safetensors")
  assert metadata == {"x": "y"}
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name].read().astype(np.float64), value.double().numpy())
  arrays = {name: value.read() for name, value in found.items()}
  safetensors.write(tmp_path / "ours.safetensors", arrays, {"x": "y"})
  again = load_file(tmp_path / "ours.safetensors")
  assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)


def test_k_bias_is_dropped_exactly(tmp_path):
  """Even a large k bias has no effect on the output."""
  model = _timm("vit_base_patch16_224", **SMALL)
  for block in model.blocks:
    block.attn.qkv.bias.data[48:96] = 5.0
  loaded = beit_jax.load(_save(model, tmp_path / "model.pth"), num_heads=4)
  image = _image(64)
  assert _error(loaded.forward(image), model(_nchw(image))) <= 1e-5
  assert "blocks.0.attn.qkv.bias[k]" in loaded.description["left_out"]
  assert not any("k_bias" in name for name in trees.flatten(loaded.params))
