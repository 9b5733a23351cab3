"""ViTs of timm and transformers: each has the same outputs here, to 1e-5, or is refused with the reason.

The models are narrow and shallow, and every parameter is drawn anew (`test_peers.redraw`).
"""

import json
import re

import numpy as np
import pytest

import beit_jax
from beit_jax.errors import UserError
from tests.peers import timm, torch, transformers
from tests.weights.test_peers import _error, _image, _nchw, redraw

pytestmark = pytest.mark.filterwarnings("ignore")  # of third-party libraries
FAMILIES = ("beit*", "deit*", "flexivit*", "vit_*", "eva_*", "eva02_*", "test_vit*")
# These take no smaller sizes and have up to 5 billion parameters; vit_base_patch16_sapiens2 stands for them.
HUGE = re.compile(r"vit_(large|huge|giant|5b)_patch16_sapiens2")
NAMES = sorted(
  {name for pattern in FAMILIES for name in timm.list_models(pattern) if not HUGE.fullmatch(name)}
)
# Names of timm's architectures that are refused, and what the message says. All others load.
REFUSED = {
  r"beit3": "norms inside attention",
  r"rope|dinov3|lingbot|sapiens|vit_pe_|eva02": (
    "rotary (positions|ones)|attention pooling|gated|no norm|norms inside|no class token|norms of queries"
  ),
  r"relpos|_rpn_": "norms after the branches|small network",
  r"_r\d+_s|_r_s|resnet|_mci_": "stem of convolutions",
  r"siglip_gap|vit_(base|giant)_patch16_gap|vit_huge_patch\d+_gap|vit_(medium|betwixt)_patch16_gap": "no class token",
  r"siglip_\d|_map_|test_vit3": "attention pooling|global_pool='map'",
  r"radio|intern300m": "no norm after its blocks",
  r"18x2|_xp_|pwee": "parallel branches",
  r"dlittle|dwee": "differential attention",
  r"vit_giant_patch14_(dinov2|reg)": "SwiGLU",
  r"test_vit4": "missing|no class token",
}
USUAL = (  # the quick selection
  "beit_base_patch16_224",
  "deit_tiny_distilled_patch16_224",
  "deit3_small_patch16_224",
  "vit_base_patch16_224_miil",
  "vit_small_patch14_reg4_dinov2",
  "vit_so150m_patch16_reg4_gap_256",
  "vit_base_patch16_clip_quickgelu_224",
  "vit_base_patch16_gap_224",
  "vit_base_patch16_rope_ape_224",
  "vit_giant_patch14_dinov2",
)


def _small(name):
  """A narrow model of an architecture."""
  patch = int((re.search(r"patch(\d+)", name) or [0, 16])[1])
  sizes = dict(embed_dim=32, depth=2, num_heads=2)
  if "_mci_" in name:  # its stem has one size only
    return redraw(timm.create_model(name, num_classes=5))
  if "sapiens2" in name:
    sizes["num_kv_heads"] = (2, 2)
  return redraw(timm.create_model(name, num_classes=5, img_size=2 * patch, **sizes))


def _expected_refusal(name):
  return next((text for pattern, text in REFUSED.items() if re.search(pattern, name)), None)


def _load_or_refuse(name, path, **given):
  """The loaded model, or None if it is refused as the table says."""
  expected = _expected_refusal(name)
  if expected is None:
    return beit_jax.load(path, **given)
  with pytest.raises(UserError, match=expected):
    beit_jax.load(path, **given)
  return None


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in NAMES]
)
def test_timm_models_agree_or_are_refused(name, tmp_path):
  """As a folder with config.json, and as a bare file with the arguments that it leaves open."""
  model = _small(name)
  attention = getattr(model.blocks[0], "attn", model.blocks[0])
  heads = getattr(attention, "num_heads", 2)
  timm.models._hub.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
  torch.save(model.state_dict(), tmp_path / f"{name}.pth")
  pool = None if hasattr(model, "head_dist") else {"avg": "mean", "token": "cls"}.get(model.global_pool)
  bare = dict(pool=pool, activation="quick_gelu" if "quickgelu" in name else "gelu")
  for path, given in ((tmp_path / "folder", {}), (tmp_path / f"{name}.pth", bare)):
    loaded = _load_or_refuse(name, path, num_heads=heads, **given)
    if loaded is not None:
      image = _image(loaded.preprocessing["image_size"])
      assert _error(loaded.forward(image), model(_nchw(image))) <= 1e-5


HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(HF, intermediate_size=64, image_size=32)
DINO = dict(HF, mlp_ratio=2, image_size=28, patch_size=14)
TEXT = dict(HF, intermediate_size=32, vocab_size=60, bos_token_id=1, eos_token_id=2)


def _clip(config_class=None, **config):
  vision = transformers.CLIPVisionConfig(**SIZES, patch_size=16)
  if config_class is None:
    return vision
  return config_class(
    vision_config=vision.to_dict(), text_config=transformers.CLIPTextConfig(**TEXT).to_dict(), **config
  )


def _hf_config(name, **config):
  if name.startswith("CLIP"):
    whole = name in ("CLIPModel", "CLIPForImageClassification")
    return _clip(transformers.CLIPConfig if whole else None, **config)
  stem = re.match(r"(.*?)(Model|For\w+|Backbone)$", name)[1]
  sizes = DINO if stem.startswith("Dinov2") else SIZES
  return getattr(transformers, f"{stem}Config")(**{**sizes, **config})


def _hf_outputs(model, image):
  """What a model of transformers gives for ours: logits, or tokens without those that ours leave out."""
  pixels = _nchw(image)
  if type(model).__name__.startswith("CLIP") and not hasattr(model, "classifier"):
    tower = getattr(model, "vision_model", model)
    return tower.post_layernorm(tower(pixels).last_hidden_state)
  model = getattr(model, model.base_model_prefix) if hasattr(model, "decoder") else model
  output = model(pixels)
  if "logits" in output:
    return output.logits
  tokens, extra = output.last_hidden_state, output.last_hidden_state.shape[1] - 1 - _patches(model.config)
  return torch.cat([tokens[:, :1], tokens[:, 1 + extra :]], 1)


def _patches(config):
  return (config.image_size // config.patch_size) ** 2


LABELED = dict(num_labels=3)
MODELS = [  # class, config, class that `save` writes (None: the same)
  ("ViTModel", {}, None),
  ("ViTForMaskedImageModeling", {}, "ViTModel"),
  ("ViTForImageClassification", LABELED, None),
  ("ViTForImageClassification", dict(LABELED, qkv_bias=False), None),
  ("ViTForImageClassification", dict(LABELED, hidden_act="gelu_new", layer_norm_eps=1e-6), None),
  ("DeiTModel", {}, None),
  ("DeiTForMaskedImageModeling", {}, "DeiTModel"),
  ("DeiTForImageClassification", LABELED, None),
  ("DeiTForImageClassificationWithTeacher", LABELED, None),
  ("Dinov2Model", {}, None),
  ("Dinov2Backbone", {}, "Dinov2Model"),
  ("Dinov2ForImageClassification", LABELED, None),
  ("Dinov2WithRegistersModel", {}, None),
  ("Dinov2WithRegistersForImageClassification", LABELED, None),
  ("CLIPVisionModel", {}, None),
  ("CLIPVisionModelWithProjection", {}, "CLIPVisionModel"),
  ("CLIPModel", {}, "CLIPVisionModel"),
  ("CLIPForImageClassification", LABELED, None),
  ("Data2VecVisionModel", dict(use_relative_position_bias=True), None),
  ("Data2VecVisionForImageClassification", dict(LABELED, use_relative_position_bias=True), None),
  (
    "Data2VecVisionForImageClassification",
    dict(LABELED, use_absolute_position_embeddings=True, use_mean_pooling=False),
    None,
  ),
]


@pytest.mark.parametrize(("name", "config", "saved_as"), MODELS)
def test_hf_models_agree_in_both_directions(name, config, saved_as, tmp_path):
  model = redraw(getattr(transformers, name)(_hf_config(name, **config)))
  model.save_pretrained(tmp_path / "theirs")
  loaded = beit_jax.load(tmp_path / "theirs")
  assert loaded.kind == ("classifier" if "labels" in str(config) else "backbone")
  image = _image(loaded.preprocessing["image_size"])
  if name != "Dinov2Backbone":  # gives maps
    assert _error(loaded.forward(image), _hf_outputs(model, image)) <= 1e-5

  beit_jax.save(loaded, tmp_path / "ours", format="hf")
  written = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
  assert written == [saved_as or name]
  again, info = getattr(transformers, written[0]).from_pretrained(tmp_path / "ours", output_loading_info=True)
  missing = {key for key in info["missing_keys"] if not key.startswith("pooler.dense.")}  # ours have none
  assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
  assert _error(loaded.forward(image), _hf_outputs(again.eval(), image)) <= 1e-5
  np.testing.assert_array_equal(beit_jax.load(tmp_path / "ours").forward(image), loaded.forward(image))


@pytest.mark.parametrize(
  ("name", "config", "message"),
  [
    ("Dinov2Model", dict(use_swiglu_ffn=True), "SwiGLU"),
    ("ViTModel", dict(hidden_act="silu"), "hidden_act is 'silu'"),
    ("YolosModel", dict(image_size=[32, 32]), "model_type is 'yolos'"),
  ],
)
def test_hf_models_that_are_refused(name, config, message, tmp_path):
  model = getattr(transformers, name)(_hf_config(name, **config))
  model.save_pretrained(tmp_path)
  with pytest.raises(UserError, match=message):
    beit_jax.load(tmp_path)


def _bare(tmp_path, name, **args):
  model = redraw(
    timm.create_model(name, embed_dim=32, depth=2, num_heads=2, img_size=32, num_classes=5, **args)
  )
  torch.save(model.state_dict(), tmp_path / f"{name}.pth")
  return model, tmp_path / f"{name}.pth"


def test_a_bare_vit_file_warns_and_takes_pool_and_activation(tmp_path, caplog):
  """The same tensors belong to models with other pooling and activation, whose outputs are far apart."""
  image = _image(32)
  for args, given in (
    (dict(global_pool="avg", fc_norm=False), dict(pool="mean")),
    (dict(act_layer="quick_gelu"), dict(pool="cls", activation="quick_gelu")),
    (dict(act_layer="gelu_tanh", global_pool="avg"), dict(activation="gelu_tanh")),
  ):
    model, path = _bare(tmp_path, "vit_base_patch16_224", **args)
    wanted = model(_nchw(image))
    assert _error(beit_jax.load(path, num_heads=2, **given).forward(image), wanted) <= 1e-5
    caplog.clear()
    guess = beit_jax.load(path, num_heads=2)
    assert "activation=" in caplog.text and "activation" in guess.description["assumed"]
    assert ("pool='cls'" in caplog.text) == ("fc_norm.weight" not in model.state_dict())
    assert _error(guess.forward(image), wanted) > 3e-5
  caplog.clear()
  beit_jax.load(path, num_heads=2, activation="gelu_tanh", pool="mean")
  assert "assumed" not in caplog.text.replace("preprocessing of its images; assumed", "")


def test_what_contradicts_the_file_or_is_unknown_is_refused(tmp_path):
  _, path = _bare(tmp_path, "vit_base_patch16_224", global_pool="avg")
  with pytest.raises(UserError, match="pool='cls' was given, but the file says 'mean'"):
    beit_jax.load(path, num_heads=2, pool="cls")
  with pytest.raises(UserError, match="activation='relu'.*gelu"):
    beit_jax.load(path, num_heads=2, activation="relu")
  _, path = _bare(tmp_path, "vit_base_patch16_clip_224")
  with pytest.raises(UserError, match="activation of this CLIP"):
    beit_jax.load(path, num_heads=2)
  _, path = _bare(tmp_path, "beit_base_patch16_224")
  with pytest.raises(UserError, match="activation='quick_gelu' was given, but the file says 'gelu'"):
    beit_jax.load(path, activation="quick_gelu")


@pytest.mark.parametrize(
  "name",
  ["vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_quickgelu_224"],
)
def test_other_vits_are_saved_for_timm(name, tmp_path):
  """timm builds the same model from the folder that we write, and so do we."""
  model = _small(name)
  timm.models._hub.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
  loaded = beit_jax.load(tmp_path / "theirs", num_heads=2)
  beit_jax.save(loaded, tmp_path / "ours", format="timm")
  image = _image(loaded.preprocessing["image_size"])
  again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
  assert _error(loaded.forward(image), again(_nchw(image))) <= 1e-5
  np.testing.assert_array_equal(beit_jax.load(tmp_path / "ours").forward(image), loaded.forward(image))


@pytest.mark.slow
def test_data2vec_segmenters_agree(tmp_path):
  config = _hf_config(
    "Data2VecVisionForSemanticSegmentation",
    num_labels=4,
    num_hidden_layers=6,
    out_indices=[2, 3, 4, 5],
    image_size=64,
    use_relative_position_bias=True,
  )
  model = redraw(transformers.Data2VecVisionForSemanticSegmentation(config))
  model.save_pretrained(tmp_path)
  image = _image(64)
  logits = model(_nchw(image)).logits
  wanted = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").permute(0, 2, 3, 1)
  assert _error(beit_jax.load(tmp_path).forward(image), wanted) <= 1e-5
