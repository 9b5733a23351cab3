"""DINO against golden numbers of facebookresearch/dino, and three steps against a plain PyTorch loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import optim, trees
from beit_jax import step as step_lib
from beit_jax.data import sources
from beit_jax.models import beit, dino
from beit_jax.objectives.dino import SelfDistillation
from beit_jax.run import state as train_state
from beit_jax.runtime import sharding
from tests import reference, tiny

ARRAYS, CONFIG = reference.load("dino")
STEPS_PER_EPOCH = 7


class Given(SelfDistillation):
  """Takes the views of a batch as they are: normalized and augmented."""

  def augmented_crops(self, batch):
    return [batch[name] for name in self.crops]


def _objective(steps_per_epoch=STEPS_PER_EPOCH, **changes):
  config = tiny.config(
    "dino",
    **{
      "batch_size": CONFIG["batch"],
      "total_steps": None,
      "total_epochs": float(CONFIG["epochs"]),
      "data.num_examples": CONFIG["batch"] * steps_per_epoch,
      "data.image_size": CONFIG["global"],
      "data.mean": (0.0, 0.0, 0.0),
      "data.std": (1.0, 1.0, 1.0),
      "local.image_size": CONFIG["local"],
      "local.count": CONFIG["locals"],
      "model.width": CONFIG["dim"],
      "model.depth": CONFIG["depth"],
      "model.num_heads": CONFIG["heads"],
      "model.patch_size": CONFIG["patch"],
      "model.outputs": CONFIG["out"],
      "model.hidden": CONFIG["hidden"],
      "model.bottleneck": CONFIG["bottleneck"],
      "model.drop_path_rate": 0.0,
      "loss.teacher_temperature": CONFIG["teacher_temp"],
      "loss.warmup_teacher_temperature": CONFIG["warmup_teacher_temp"],
      "loss.temperature_warmup_epochs": CONFIG["warmup_teacher_temp_epochs"],
      "loss.student_temperature": CONFIG["student_temp"],
      "loss.center_momentum": CONFIG["center_momentum"],
      "loss.teacher_momentum": CONFIG["teacher_momentum"],
      "optimizer.clip_norm": CONFIG["clip"],
      "optimizer.decay": ("cls_token$", "pos_embed$"),
      **changes,
    },
  )
  return Given(config, sources.make_source(config.data.to_dict()))


def _parts(name, value):
  """A tensor of the reference -> its parts under our names, in our layout. The bias of k has no counterpart."""
  if name.endswith("attn.qkv.bias"):
    stem = reference.beit_name(name.removeprefix("backbone.").removesuffix("qkv.bias"))
    q, _, v = np.split(value, 3)
    return {f"{stem}q_bias": q, f"{stem}v_bias": v}
  if name == "head.last_layer.weight_g":
    np.testing.assert_allclose(value, 1.0, atol=1e-6)
    return {}
  if name == "head.last_layer.weight_v":
    return {"head/last_layer/kernel": value.T}
  if name.startswith("head.mlp."):
    _, _, number, kind = name.split(".")
    kernel = kind == "weight"
    return {f"head/mlp_{int(number) // 2}/{'kernel' if kernel else 'bias'}": value.T if kernel else value}
  ours = reference.beit_name(name.removeprefix("backbone."))
  if ours.endswith("kernel"):
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
  return {ours: value}


def _tree(prefix):
  flat = {}
  for name, value in reference.section(ARRAYS, prefix).items():
    flat |= _parts(name, value)
  return trees.unflatten(flat)


def _variables():
  teacher = {"params": _tree("param/teacher/"), "center": ARRAYS["in/center"][0]}
  return {"params": _tree("param/student/"), "teacher": teacher}


def _batch():
  crops = {
    "global_crops": [ARRAYS["in/global_0"], ARRAYS["in/global_1"]],
    "local_crops": [ARRAYS[f"in/local_{i}"] for i in range(CONFIG["locals"])],
  }
  batch = {name: np.stack([view.transpose(0, 2, 3, 1) for view in views], 1) for name, views in crops.items()}
  keys = np.stack([np.zeros(CONFIG["batch"]), np.arange(CONFIG["batch"])], 1).astype(np.uint32)
  return {**batch, "example_key": keys, "valid": np.ones(CONFIG["batch"], bool)}


def _by_view(outputs):
  """[B, V, K] -> the reference's order, [V * B, K]."""
  return np.asarray(outputs).swapaxes(0, 1).reshape(-1, outputs.shape[-1])


@functools.cache
def _grads(step):
  objective = _objective()

  def loss(params):
    variables = {**_variables(), "params": params}
    output = objective.loss(variables, {}, _batch(), jax.random.key(0), step)
    return output.metrics["loss"].total / output.metrics["loss"].n, output

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(_variables()["params"])


def test_the_tree_is_that_of_the_module():
  shapes = jax.eval_shape(_objective().init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, _variables())


def test_features_of_a_local_view_golden():
  fields, params = _objective().module.encoder, _variables()["params"]["encoder"]
  found = dino.interpolate_positions(jnp.asarray(params["pos_embed"]), (4, 4), (2, 2))
  np.testing.assert_allclose(found, ARRAYS["out/local_pos_embed"], atol=2e-5)
  tokens = jax.jit(lambda params, image: dino.encode(fields, params, image))(
    params, _batch()["local_crops"][:, 0]
  )
  np.testing.assert_allclose(tokens[:, 0], ARRAYS["out/local_features"], atol=2e-5)


def test_outputs_golden():
  module, variables, batch = _objective().module, _variables(), _batch()
  crops = [batch["global_crops"], batch["local_crops"]]
  project = jax.jit(module.project)
  found = project(variables["params"], crops)
  np.testing.assert_allclose(_by_view(found), ARRAYS["out/student"], atol=5e-5)
  found = project(variables["teacher"]["params"], crops[:1])
  np.testing.assert_allclose(_by_view(found), ARRAYS["out/teacher"], atol=5e-5)
  one = jax.jit(module.apply)(variables, batch["global_crops"][:, 0])  # the module itself
  np.testing.assert_allclose(one, ARRAYS["out/student"][: len(one)], atol=5e-5)


def test_loss_gradients_and_step_golden():
  (loss, output), grads = _grads(CONFIG["epoch"] * STEPS_PER_EPOCH)
  np.testing.assert_allclose(loss, ARRAYS["out/loss"], rtol=1e-5)
  reference.assert_gradients_close(grads, _tree("grad/"))
  flat = trees.flatten(grads)
  norms = [
    np.sqrt(sum(np.square(flat[part]).sum() for part in _parts(name, value)))
    for name, value in reference.section(ARRAYS, "grad/").items()
  ]
  np.testing.assert_allclose(norms, ARRAYS["out/grad_norms"], rtol=1e-5)

  o, variables = CONFIG["optimizer"], _variables()
  tx = optim.make_optimizer(
    variables["params"],
    schedule=lambda _: o["lr"],
    weight_decay=o["weight_decay"],
    clip_norm=o["clip_grad_per_tensor"],
    clip="tensor",
    decay=("cls_token$", "pos_embed$"),
  )

  @jax.jit
  def update(params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)

  params = update(variables["params"], grads)
  _assert_close(params, _tree("stepped/student/"), atol=1e-4)
  after = _objective().after_update(params, {"teacher": variables["teacher"]}, output.statistics, 0)
  _assert_close(after["teacher"]["params"], _tree("stepped/teacher/"), atol=1e-4)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), _tree("stepped/teacher/"), _tree("param/teacher/"))
  assert max(jax.tree.leaves(moved)) > 1e-3  # so that 1e-4 sees an average that was left out
  np.testing.assert_allclose(after["teacher"]["center"], ARRAYS["out/center"][0], atol=1e-5)


def test_clipping_of_each_tensor():
  """Every tensor of PyTorch has the norm 0.3 or its own; q_bias and v_bias are one tensor."""
  _, grads = _grads(CONFIG["epoch"] * STEPS_PER_EPOCH)
  clipped = jax.jit(lambda grads: optim.clip_each(CONFIG["clip"]).update(grads, optax.EmptyState())[0])(grads)
  flat, wanted = trees.flatten(clipped), reference.section(ARRAYS, "grad/")
  for (name, value), norm in zip(wanted.items(), ARRAYS["out/grad_norms"], strict=True):
    for part, golden in _parts(name, value).items():
      golden = golden * min(CONFIG["clip"] / (norm + 1e-6), 1.0)
      np.testing.assert_allclose(flat[part], golden, atol=2e-5 * np.abs(golden).max(), err_msg=part)


def _assert_close(found, wanted, atol):
  found, wanted = trees.flatten(found), trees.flatten(wanted)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, atol=atol, rtol=0, err_msg=name)


def test_schedules_golden():
  objective = _objective(
    **{
      "optimizer.learning_rate": 0.0005 * 64 / 256,
      "optimizer.min_lr": 1e-6,
      "optimizer.warmup_epochs": 3.0,
      "optimizer.weight_decay": 0.04,
      "optimizer.weight_decay_end": 0.4,
    }
  )
  steps = np.arange(CONFIG["epochs"] * STEPS_PER_EPOCH)
  schedules = step_lib.make_schedules(objective.config, STEPS_PER_EPOCH, len(steps))
  close = dict(atol=1e-12, rtol=0)
  np.testing.assert_allclose(objective.teacher_momentum(steps), ARRAYS["out/momentum_schedule"], **close)
  for name in ("weight_decay", "learning_rate"):
    np.testing.assert_allclose(schedules[name](steps), ARRAYS[f"out/{name}_schedule"], **close)
  found = objective.teacher_temperature(steps[::STEPS_PER_EPOCH])
  np.testing.assert_allclose(found, ARRAYS["out/teacher_temperature"], **close)


def test_parameter_count_of_the_base_model():
  """Encoder: that of ViT-B/16 without biases of k. Head: 768 -> 2048 -> 2048 -> 256 -> 65,536."""
  d, depth, patches, outputs = 768, 12, 196, 65_536
  block = (d * 3 * d + 2 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
  encoder = (16 * 16 * 3 * d + d) + d + (1 + patches) * d + depth * block + 2 * d
  head = (d * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 256 + 256) + 256 * outputs
  config = tiny.config(
    "dino",
    **{f"model.{key}": value for key, value in beit.VARIANTS["base"].items()},
    **{"model.variant": "base", "model.patch_size": 16, "model.outputs": outputs},
    **{"model.hidden": 2048, "model.bottleneck": 256, "data.image_size": 224, "local.image_size": 96},
  )
  objective = SelfDistillation(config, sources.make_source(config.data.to_dict()))
  shapes = jax.eval_shape(objective.init, jax.random.key(0))
  assert trees.num_params(shapes["params"]["encoder"]) == encoder == 85_798_656 - 12 * d
  assert trees.num_params(shapes["params"]) == encoder + head
  assert trees.num_params(shapes["teacher"]) == encoder + head + outputs


# A plain PyTorch loop, written from the formulas.


def _torch_encoder(state, image, torch):
  F, dim = torch.nn.functional, CONFIG["dim"]
  p = {name.removeprefix("backbone."): value for name, value in state.items()}

  def norm(x, name):
    return F.layer_norm(x, (dim,), p[f"{name}.weight"], p[f"{name}.bias"], CONFIG["layer_norm_eps"])

  def linear(x, name):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

  x = F.conv2d(image, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=CONFIG["patch"])
  side, positions = x.shape[-1], p["pos_embed"]
  full = CONFIG["global"] // CONFIG["patch"]
  x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
  if side != full:
    table = positions[:, 1:].reshape(1, full, full, dim).permute(0, 3, 1, 2)
    table = F.interpolate(table, scale_factor=((side + 0.1) / full,) * 2, mode="bicubic")
    positions = torch.cat([positions[:, :1], table.flatten(2).mT], 1)
  x = x + positions
  for i in range(CONFIG["depth"]):
    y = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
    q, k, v = y.reshape(*y.shape[:2], 3, CONFIG["heads"], -1).permute(2, 0, 3, 1, 4)
    y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    x = x + linear(y.transpose(1, 2).reshape(x.shape), f"blocks.{i}.attn.proj")
    y = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
    x = x + linear(y, f"blocks.{i}.mlp.fc2")
  return norm(x, "norm")[:, 0]


def _torch_outputs(state, views, torch):
  F = torch.nn.functional
  x = torch.cat([_torch_encoder(state, view, torch) for view in views])
  for i in (0, 2, 4):
    x = F.linear(F.gelu(x) if i else x, state[f"head.mlp.{i}.weight"], state[f"head.mlp.{i}.bias"])
  kernel = state["head.last_layer.weight_v"]
  return F.linear(F.normalize(x, dim=-1), kernel / kernel.norm(dim=1, keepdim=True)).chunk(len(views))


def _torch_loop(objective, schedules, steps, torch):
  """(losses, center, student, teacher) after some steps in float64."""
  student, teacher = (
    {
      name: torch.tensor(value, dtype=torch.float64)
      for name, value in reference.section(ARRAYS, f"param/{who}/").items()
      if not name.endswith("weight_g")
    }
    for who in ("student", "teacher")
  )
  views = [ARRAYS["in/global_0"], ARRAYS["in/global_1"], *(ARRAYS[f"in/local_{i}"] for i in (0, 1))]
  views = [torch.tensor(view, dtype=torch.float64) for view in views]
  center = torch.tensor(ARRAYS["in/center"], dtype=torch.float64)
  for value in student.values():
    value.requires_grad_()
  decayed = [v for n, v in student.items() if v.ndim > 1 and not n.endswith(".bias")]
  others = [v for v in student.values() if not any(v is d for d in decayed)]
  optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
  found = []
  for step in range(steps):
    for i, group in enumerate(optimizer.param_groups):
      group["lr"] = float(schedules["learning_rate"](step))
      group["weight_decay"] = 0.0 if i else float(schedules["weight_decay"](step))
    with torch.no_grad():
      targets = _torch_outputs(teacher, views[:2], torch)
      soft = [torch.softmax((t - center) / float(objective.teacher_temperature(step)), -1) for t in targets]
    logits = [x / CONFIG["student_temp"] for x in _torch_outputs(student, views, torch)]
    terms = [
      -(q * torch.log_softmax(s, -1)).sum(-1).mean()
      for i, q in enumerate(soft)
      for j, s in enumerate(logits)
      if i != j
    ]
    loss = sum(terms) / len(terms)
    optimizer.zero_grad()
    loss.backward()
    for name, value in student.items():
      value.grad *= min(1.0, CONFIG["clip"] / (float(value.grad.norm()) + 1e-6))
      if step < objective.steps_per_epoch and name.startswith("head.last_layer"):
        value.grad = None
    optimizer.step()
    momentum = float(objective.teacher_momentum(step))
    with torch.no_grad():
      for name, value in teacher.items():
        value.mul_(momentum).add_(student[name], alpha=1 - momentum)
      mean = torch.cat(targets).mean(0, keepdim=True)
      center = CONFIG["center_momentum"] * center + (1 - CONFIG["center_momentum"]) * mean
    found.append(loss.item())
  return found, center, *({n: v.detach().numpy() for n, v in s.items()} for s in (student, teacher))


@pytest.mark.slow
def test_three_steps_equal_those_of_a_plain_pytorch_loop():
  """Two steps with a frozen last layer, then one in which it moves for the first time."""
  torch = pytest.importorskip("torch")
  steps = 3
  objective = _objective(2, **{"optimizer.weight_decay": 0.04, "optimizer.weight_decay_end": 0.4})
  total = objective.total_steps
  schedules = step_lib.make_schedules(objective.config, 2, total)
  wanted, center, student, teacher = _torch_loop(objective, schedules, steps, torch)

  variables = jax.tree.map(jnp.asarray, _variables())
  mesh = sharding.make_mesh(1, 1)
  tx = step_lib.make_optimizer(
    objective.config, schedules, variables["params"], objective.depth, objective.delayed
  )
  with jax.set_mesh(mesh):
    state, _, shardings = train_state.create(lambda: variables, tx, mesh)
    train_step = step_lib.make_train_step(objective, tx, 1, jax.random.key(0), shardings)
    found = []
    for _ in range(steps):
      state, metrics = train_step(state, {}, _batch())
      found.append(float(metrics["loss"]))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_allclose(state.collections["teacher"]["center"], center[0].numpy(), atol=1e-5)
  for tree, theirs in ((state.params, student), (state.collections["teacher"]["params"], teacher)):
    flat = {}
    for name, value in theirs.items():
      flat |= _parts(name, value)
    _assert_close(tree, trees.unflatten(flat), atol=2e-5)
  moved = np.abs(
    state.params["head"]["last_layer"]["kernel"] - variables["params"]["head"]["last_layer"]["kernel"]
  )
  assert moved.max() > 1e-4
