"""Complete checkpoints of DINO: a student and a teacher, each with its head, and the center.

`beit_jax.load` takes the teacher's backbone of them. A run that goes on takes everything.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log
from beit_jax.weights import contents, orbax, timm, unilm
from beit_jax.weights import io as weights_io
from beit_jax.weights.files import lazy
from beit_jax.weights.kinds import make_module
from beit_jax.weights.pretrained import Pretrained

HEAD, GAIN = "head.last_layer.weight_v", "head.last_layer.weight_g"


def load(path: str, *, ema: bool = False) -> Pretrained:
  """Loads what a run of DINO starts from.

  Args:
    path: as for `beit_jax.load`.
    ema: see `beit_jax.load`.

  Returns:
    A model of kind "dino" with the student's parameters and the collection "teacher", if the checkpoint is one of a run
    of DINO, ours or facebookresearch's; else the model that `beit_jax.load` gives.

  Raises:
    UserError: as `beit_jax.load`; or the head is not one that this version has.
  """
  model = weights_io.load(path, ema=ema)
  location = bucket.path(model.description["path"])
  if "part_of" in model.description and location.is_dir():
    return orbax.load(location, ema=ema, whole=True)
  parts = contents.parts(location) if location.is_file() else {}
  if all(HEAD in parts.get(name, {}) for name in ("student", "teacher")):
    return _complete(model, parts, location)
  return model


def _complete(model: Pretrained, parts: dict[str, dict[str, lazy.Readable]], path: Path) -> Pretrained:
  """The model of a checkpoint of facebookresearch's `main_dino.py`; `model` is the backbone of its teacher."""
  student = parts["student"]
  outputs, bottleneck = student[HEAD].shape
  hidden = student["head.mlp.0.weight"].shape[0] if "head.mlp.0.weight" in student else 0
  fields = dict(encoder=model.encoder_fields, outputs=outputs, hidden=hidden, bottleneck=bottleneck)
  module = make_module("dino", fields)
  shapes = unilm.param_shapes(module, model.encoder_fields["image_size"])
  params, teacher = (_params(parts[name], shapes, model, path, name) for name in ("student", "teacher"))
  stored = parts.get("dino_loss", {}).get("center")
  if stored is None:
    log.warning("%s: no center of the teacher's outputs (dino_loss) in it; it starts at zero", path)
  center = np.zeros(outputs, np.float32) if stored is None else np.asarray(stored.read(), np.float32)
  if center.size != outputs:
    raise UserError(f"{path}: the center has {center.size} values, the head {outputs} outputs")
  description = {**model.description, "kind": "dino", "module": fields}
  collections = {"teacher": {"params": teacher, "center": center.reshape(-1)}}
  return dataclasses.replace(
    model, kind="dino", params=params, module=module, description=description, collections=collections
  )


def _params(
  state: dict[str, lazy.Readable],
  shapes: dict[str, lazy.Shape],
  model: Pretrained,
  path: Path,
  name: str,
) -> dict[str, Any]:
  """The parameters of the student or of the teacher."""
  gain = state.get(GAIN)
  if gain is not None and not np.allclose(gain.read(), 1.0):
    raise UserError(
      f"{path}: the last layer of the {name}'s head has a gain that was trained (norm_last_layer=False), which this "
      "version does not implement; start from the backbone alone, saved as a file of its own"
    )
  inside = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
  size = tuple(model.encoder_fields["image_size"])
  encoder, left_out = timm.vit_to_unilm(inside, path, (size[0], size[1]))
  head = {n: v for n, v in state.items() if n.startswith("head.") and n != GAIN}
  source = lazy.Source(state, path, "timm")
  return unilm.read_params(source, {**encoder, **head}, shapes, _foreign_name, left_out)


def _foreign_name(name: str) -> str:
  """Our parameter's name -> facebookresearch's for the head, unilm's for the encoder."""
  if not name.startswith("head/"):
    return unilm.torch_name(name)
  if name == "head/last_layer/kernel":
    return HEAD
  name = re.sub(r"mlp_(\d)", lambda match: f"mlp.{2 * int(match[1])}", name)
  return name.replace("kernel", "weight").replace("/", ".")
