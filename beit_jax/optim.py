"""Optimizers by name, learning-rate schedules, the weight-decay rule and layer-wise learning-rate decay.

Follows unilm `beit/optim_factory.py` and `beit/utils.py`, with two deliberate differences: layer decay also works
with a weight decay of 0, where unilm silently ignores it, and `warmup_steps` can be set without epochs.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from beit_jax import trees

PyTree = Any

# Whether weight decay applies to a parameter; the first matching rule wins. As in unilm, parameters that are vectors
# in PyTorch, positions, cls and register tokens are not decayed; `mask_token` and the relative-position tables are.
WEIGHT_DECAY_RULES: tuple[tuple[str, bool], ...] = (
  (r"(^|/)(bias|scale|gamma_1|gamma_2|q_bias|v_bias|pos_embed|cls_token|register_tokens)$", False),
  (r"(^|/)(kernel|mask_token|relative_position_bias_table)$", True),
)

MUON_RMS = 0.2  # typical root mean square of an update of Adam (Liu et al., 2025)


def warmup_cosine(
  step: Any, *, peak: float, end: float, warmup_steps: int, total_steps: int, start: float = 0.0, xp: Any = np
) -> Any:
  """Linear warm-up followed by cosine decay, as unilm's `cosine_scheduler`.

  The warm-up is `linspace(start, peak, warmup_steps)`; the `n` remaining steps follow
  `end + (peak - end) * (1 + cos(pi * i / n)) / 2`. The peak therefore occurs twice. The value stays constant after
  the last step.

  Args:
    step: Scalar or array of steps.
    peak: Value at the end of the warm-up.
    end: Value that the cosine approaches.
    warmup_steps: Length of the warm-up.
    total_steps: Length of the run, warm-up included.
    start: Value at step 0 of the warm-up.
    xp: `numpy` (float64) or `jax.numpy`.

  Returns:
    The value at each step.
  """
  step = xp.minimum(step, total_steps - 1)
  ramp = start + (peak - start) * step / max(warmup_steps - 1, 1)
  fraction = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
  cosine = end + 0.5 * (peak - end) * (1 + xp.cos(xp.pi * fraction))
  return xp.where(step < warmup_steps, ramp, cosine)


def warmup_poly(
  step: Any, *, peak: float, end: float, warmup_steps: int, total_steps: int, power: float = 1.0, xp: Any = np
) -> Any:
  """Polynomial decay with a linear warm-up, as mmcv's PolyLrUpdater.

  The curve is `(peak - end) * (1 - step / total_steps) ** power + end`. The warm-up multiplies it by a factor that
  rises linearly from 1e-6 at step 0 to 1 at `warmup_steps`. Arguments as in `warmup_cosine`.
  """
  value = (peak - end) * (1 - xp.minimum(step, total_steps) / total_steps) ** power + end
  progress = xp.minimum(step / max(warmup_steps, 1), 1.0)
  return value * (1 - (1 - progress) * (1 - 1e-6)) if warmup_steps else value


def layer_id(name: str, depth: int) -> int:
  """Layer of a parameter for layer-wise learning-rate decay.

  Returns:
    0 for the patch embedding, tokens and positions, i + 1 for block i, and `depth + 1` for everything else (final
    norm, heads, the shared relative-position table).
  """
  if re.search(r"(^|/)encoder/(patch_embed|cls_token|mask_token|register_tokens|pos_embed|norm_pre)", name):
    return 0
  block = re.search(r"(^|/)encoder/block_(\d+)/", name)
  return int(block.group(2)) + 1 if block else depth + 1


def layer_scale(name: str, depth: int, layer_decay: float) -> float:
  """Learning-rate factor of a parameter: `layer_decay ** (depth + 1 - layer_id)`."""
  return layer_decay ** (depth + 1 - layer_id(name, depth))


def weight_decay_tree(params: PyTree, no_decay: tuple[str, ...] = (), decay: tuple[str, ...] = ()) -> PyTree:
  """Tree of bools that says which parameters are decayed.

  Args:
    params: Parameters or their shapes.
    no_decay: Regexes of further parameters without weight decay.
    decay: Regexes of further parameters with weight decay; `no_decay` goes first.

  Raises:
    KeyError: No rule matches a parameter.
  """
  own = (*((pattern, False) for pattern in no_decay), *((pattern, True) for pattern in decay))
  rules = own + WEIGHT_DECAY_RULES
  return trees.match_rules(rules, params)


class Settings(NamedTuple):
  """The numbers that optimizers read, as in the config section `optimizer`."""

  betas: tuple[float, float]
  eps: float
  momentum: float


class Scaling(NamedTuple):
  """What tells one optimizer from another: how gradients become a direction of unit learning rate.

  Attributes:
    before_decay: maps gradients to updates; decoupled weight decay is added to these.
    after_decay: transformations of the sum of updates and weight decay.
  """

  before_decay: optax.GradientTransformation
  after_decay: tuple[optax.GradientTransformation, ...] = ()


def _adamw(settings: Settings) -> Scaling:
  return Scaling(optax.scale_by_adam(*settings.betas, settings.eps))


def _lion(settings: Settings) -> Scaling:
  return Scaling(optax.scale_by_lion(*settings.betas))


def _lamb(settings: Settings) -> Scaling:
  return Scaling(optax.scale_by_adam(*settings.betas, settings.eps), (optax.scale_by_trust_ratio(),))


def _sgd(settings: Settings) -> Scaling:
  return Scaling(optax.trace(settings.momentum) if settings.momentum else optax.identity())


def _muon(settings: Settings) -> Scaling:
  """Muon for the 2-D kernels, Adam for all other parameters.

  Muon's updates are scaled to the root mean square of Adam's, so that both groups share one learning rate and one
  weight decay (Liu et al., "Muon is Scalable for LLM Training", section 2.2).
  """

  def dimensions(updates: PyTree) -> PyTree:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

  def match_adam(updates: PyTree, _: PyTree) -> PyTree:
    return jax.tree.map(lambda update: MUON_RMS * max(update.shape) ** 0.5 * update, updates)

  def groups(params: PyTree) -> PyTree:
    return trees.named_map(
      lambda name, leaf: "muon" if name.endswith("kernel") and leaf.ndim == 2 else "adam", params
    )

  muon = optax.contrib.scale_by_muon(eps=settings.eps, weight_dimension_numbers=dimensions)
  adam = optax.scale_by_adam(*settings.betas, settings.eps)
  return Scaling(
    optax.partition({"muon": optax.chain(muon, optax.stateless(match_adam)), "adam": adam}, groups)
  )


# The values of `optimizer.name`.
OPTIMIZERS: dict[str, Callable[[Settings], Scaling]] = {
  "adamw": _adamw,
  "lion": _lion,
  "muon": _muon,
  "lamb": _lamb,
  "sgd": _sgd,
}


def clip_each(clip_norm: float) -> optax.GradientTransformation:
  """Clips every tensor by its own norm, as DINO does (facebookresearch/dino `utils.clip_gradients`).

  A tensor is one of PyTorch's: there the biases of q and v are parts of one tensor.
  """

  def clip(updates: PyTree, _: PyTree) -> PyTree:
    flat = trees.flatten(updates)
    tensors = {name: re.sub(r"/[qv]_bias$", "/qkv_bias", name) for name in flat}
    squares: dict[str, Any] = {}
    for name, tensor in tensors.items():
      squares[tensor] = squares.get(tensor, 0.0) + jnp.square(flat[name]).sum()
    factors = {
      tensor: jnp.minimum(clip_norm / (jnp.sqrt(square) + 1e-6), 1.0) for tensor, square in squares.items()
    }
    return trees.named_map(lambda name, update: update * factors[tensors[name]], updates)

  return optax.stateless(clip)


# The values of `optimizer.clip`: what one norm is taken of.
CLIPS: dict[str, Callable[[float], optax.GradientTransformation]] = {
  "global": optax.clip_by_global_norm,
  "tensor": clip_each,
}


def make_optimizer(
  params: PyTree,
  *,
  schedule: Callable[[Any], Any],
  weight_decay: float | Callable[[Any], Any],
  name: str = "adamw",
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  momentum: float = 0.9,
  clip_norm: float = 0.0,
  clip: str = "global",
  layer_decay: float = 1.0,
  depth: int = 0,
  no_decay: tuple[str, ...] = (),
  decay: tuple[str, ...] = (),
  delayed: Mapping[str, int] | None = None,
) -> optax.GradientTransformation:
  """Chains clipping by the norm, the optimizer's scaling, weight decay, layer scale and learning rate.

  The layer scale multiplies the whole update, weight decay included, as a learning rate per group does in PyTorch.

  Args:
    params: Parameters or their shapes; only the paths are read.
    schedule: Maps the step to the learning rate.
    weight_decay: Decoupled weight decay, or a function from the step to it. The learning rate multiplies it.
    name: Key of `OPTIMIZERS`.
    betas: Decay rates of the moments (all but "sgd").
    eps: Added to denominators (all but "lion" and "sgd").
    momentum: Decay rate of the momentum ("sgd").
    clip_norm: Largest norm of the gradient; 0 turns clipping off.
    clip: Key of `CLIPS`: whether that is the global norm or the norm of each tensor.
    layer_decay: Learning-rate factor from one layer to the layer below; 1 turns it off.
    depth: Number of encoder blocks, which `layer_decay` needs.
    no_decay: Regexes of further parameters without weight decay.
    decay: Regexes of further parameters with weight decay.
    delayed: Regex of parameters -> the step from which on they are trained. Before it they have neither updates nor
      moments, as in PyTorch parameters without a gradient.

  Returns:
    The gradient transformation. Its updates are to be added to the parameters.
  """
  scaling = OPTIMIZERS[name](Settings(betas, eps, momentum))

  def scale(updates: PyTree, _: PyTree) -> PyTree:
    return trees.named_map(lambda name, update: update * layer_scale(name, depth, layer_decay), updates)

  clipping = CLIPS[clip](clip_norm) if clip_norm else optax.identity()
  steps = (
    scaling.before_decay,
    optax.add_decayed_weights(weight_decay, mask=lambda params: weight_decay_tree(params, no_decay, decay)),
    *scaling.after_decay,
    optax.stateless(scale),
    optax.scale_by_learning_rate(schedule),
  )
  if not delayed:
    return optax.chain(clipping, *steps)
  trained = optax.chain(*steps)
  rules = (*((pattern, start) for pattern, start in delayed.items()), ("", 0))
  groups = {start: _from_step(trained, start) if start else trained for _, start in rules}
  return optax.chain(clipping, optax.partition(groups, trees.match_rules(rules, params)))


def _from_step(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
  return optax.conditionally_mask(inner, lambda step: step >= start)


def at_step(opt_state: optax.OptState, step: Any) -> optax.OptState:
  """Sets the counters of the schedules in a state of `make_optimizer` to a step of the run.

  Optax counts updates. A run counts skipped updates too, so without this the schedules would lag behind after one.
  Adam's own counter, for its bias correction, stays the number of updates.
  """
  transformations = optax.scale_by_schedule(float), optax.add_decayed_weights(float)
  clocks = tuple(type(jax.eval_shape(one.init, {})) for one in transformations)

  def set_clock(node: Any) -> Any:
    if isinstance(node, optax.ConditionallyMaskState):
      return node._replace(step=step, inner_state=at_step(node.inner_state, step))
    return node._replace(count=step) if isinstance(node, clocks) else node

  leaves = (*clocks, optax.ConditionallyMaskState)
  return jax.tree.map(set_clock, opt_state, is_leaf=lambda node: isinstance(node, leaves))


def group_report(
  params: PyTree,
  *,
  depth: int,
  layer_decay: float,
  weight_decay: float,
  no_decay: tuple[str, ...] = (),
  decay: tuple[str, ...] = (),
) -> str:
  """Table of the parameter groups: layer, learning-rate scale, weight decay, sizes, and the first parameter."""
  flat = trees.flatten(params)
  decays = trees.flatten(weight_decay_tree(params, no_decay, decay))
  groups: dict[tuple[int, bool], list[str]] = {}
  for name in flat:
    groups.setdefault((layer_id(name, depth), decays[name]), []).append(name)
  lines = [f"{'layer':>5} {'lr scale':>11} {'decay':>7} {'tensors':>7} {'parameters':>12}  first"]
  for (layer, is_decayed), names in sorted(groups.items()):
    scale = layer_scale(names[0], depth, layer_decay)
    count = sum(flat[name].size for name in names)
    rate = weight_decay if is_decayed else 0.0
    lines.append(f"{layer:>5} {scale:>11.6g} {rate:>7.3g} {len(names):>7} {count:>12,}  {names[0]}")
  lines.append(f"{'all':>5} {'':>11} {'':>7} {len(flat):>7} {trees.num_params(params):>12,}")
  return "\n".join(lines)
