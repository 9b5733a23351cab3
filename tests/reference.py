"""Reads golden files and translates their PyTorch names and layouts into ours."""

import json
import re
from pathlib import Path

import numpy as np

from beit_jax import trees

HERE = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
  """Returns (arrays by key, the configuration) of tests/golden/<name>.npz."""
  arrays = dict(np.load(HERE / f"{name}.npz", allow_pickle=False))
  return arrays, json.loads(str(arrays.pop("meta/config"))) if "meta/config" in arrays else {}


def section(arrays: dict, prefix: str) -> dict[str, np.ndarray]:
  """The arrays whose keys start with a prefix, without that prefix."""
  return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


BEIT_NAMES = (
  (r"^blocks\.(\d+)\.", lambda m: f"encoder/block_{int(m.group(1)):02d}/"),
  (r"^cls_pt_layers\.(\d+)\.", lambda m: f"head_block_{int(m.group(1)):02d}/"),
  (r"^cls_pt_lm_head\.", "head_lm_head/"),
  (r"^(patch_embed)\.proj\.", r"encoder/\1/"),
  (r"^(cls_token|mask_token|pos_embed|norm\.|rel_pos_bias\.)", r"encoder/\1"),
  (r"\.", "/"),
  (r"norm(1|2|)/weight$", r"norm\1/scale"),
  (r"/weight$", "/kernel"),
)


def beit_name(name: str) -> str:
  """unilm's parameter name -> ours."""
  for pattern, replacement in BEIT_NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def beit_tree(flat: dict[str, np.ndarray]) -> dict:
  """A state dict in unilm's names and PyTorch layout -> our nested parameters."""
  result = {}
  for name, value in flat.items():
    ours = beit_name(name)
    if ours.endswith("kernel"):
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    result[ours] = value
  return trees.unflatten(result)


def dalle_tree(flat: dict[str, np.ndarray]) -> dict:
  """The arrays under encoder/ and decoder/ of the DALL-E files -> our nested parameters."""
  result = {}
  for name, value in flat.items():
    ours = name.replace("blocks.", "").replace("output.conv", "output").replace(".", "/")
    ours = re.sub(r"/w$", "/kernel", re.sub(r"/b$", "/bias", ours))
    result[ours] = value.transpose(2, 3, 1, 0) if ours.endswith("kernel") else value
  return trees.unflatten(result)


def encoder_fields(config: dict) -> dict:
  """A golden file's configuration -> fields of `Beit`."""
  rel_pos = (
    "shared"
    if config.get("use_shared_rel_pos_bias")
    else "per_block"
    if config["use_rel_pos_bias"]
    else "none"
  )
  return dict(
    image_size=tuple(config["img_size"]),
    patch_size=config["patch_size"],
    width=config["embed_dim"],
    depth=config["depth"],
    num_heads=config["num_heads"],
    rel_pos=rel_pos,
    abs_pos=config["use_abs_pos_emb"],
    layer_scale_init=config["init_values"] or 0.0,
  )


def assert_gradients_close(found, wanted, tolerance: float = 2e-5) -> None:
  """Checks for every tensor that max |found - wanted| <= tolerance * max |wanted|, and that the names agree."""
  found, wanted = trees.flatten(found), trees.flatten(wanted)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    limit = tolerance * np.abs(value).max() + 1e-12
    assert np.abs(np.asarray(found[name]) - value).max() <= limit, name


def assert_stepped_close(found, wanted) -> None:
  """Checks parameters after a step: Adam's first step is close to a sign, so a few values may differ more.

  99.9 % of all values must agree to 2e-6, all to 5e-4.
  """
  found, wanted = trees.flatten(found), trees.flatten(wanted)
  assert found.keys() == wanted.keys()
  difference = np.concatenate([np.abs(np.asarray(found[n]) - wanted[n]).ravel() for n in wanted])
  assert difference.max() <= 5e-4
  assert (difference <= 2e-6).mean() >= 0.999
