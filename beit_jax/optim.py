"""AdamW with warm-up + cosine, the weight-decay rule, layer-wise lr decay, and the report about them.

Follows unilm `beit/optim_factory.py` and `beit/utils.py`. Differs on purpose: layer decay also works when
weight decay is 0 (there it is silently dropped), and `warmup_steps` may be given without epochs.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beit_jax import trees

# Which parameters weight decay applies to; first match wins. Everything that is a vector in PyTorch, plus
# pos_embed and cls_token, is spared; mask_token and the relative-position tables are decayed (unilm).
WEIGHT_DECAY_RULES: tuple[tuple[str, bool], ...] = (
  (r"(^|/)(bias|scale|gamma_1|gamma_2|q_bias|v_bias|pos_embed|cls_token)$", False),
  (r"(^|/)(kernel|mask_token|relative_position_bias_table)$", True),
)


def warmup_cosine(
  step: Any, *, peak: float, end: float, warmup_steps: int, total_steps: int, start: float = 0.0, xp: Any = np
) -> Any:
  """Value at `step` (scalar or array) of unilm's `cosine_scheduler`; `xp` is numpy (float64) or jax.numpy.

  `linspace(start, peak, warmup_steps)`, then `end + (peak - end) * (1 + cos(pi * i / n)) / 2` over the `n`
  steps left: the first value of a warm-up is `start` and the peak occurs twice. Constant after the end.
  """
  step = xp.minimum(step, total_steps - 1)
  ramp = start + (peak - start) * step / max(warmup_steps - 1, 1)
  fraction = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
  cosine = end + 0.5 * (peak - end) * (1 + xp.cos(xp.pi * fraction))
  return xp.where(step < warmup_steps, ramp, cosine)


def warmup_poly(
  step: Any, *, peak: float, end: float, warmup_steps: int, total_steps: int, power: float = 1.0, xp: Any = np
) -> Any:
  """mmcv's PolyLrUpdater with linear warm-up from 1e-6 of it: `(peak - end) * (1 - step / total) ** power + end`.

  The warm-up multiplies that curve, by 1e-6 at step 0 and 1 from `warmup_steps` on.
  """
  value = (peak - end) * (1 - xp.minimum(step, total_steps) / total_steps) ** power + end
  share = xp.minimum(step / max(warmup_steps, 1), 1.0)
  return value * (1 - (1 - share) * (1 - 1e-6)) if warmup_steps else value


def layer_id(name: str, depth: int) -> int:
  """0: patch embedding, tokens, positions; i + 1: block i; depth + 1: everything after (norm, heads, shared table)."""
  if re.search(r"(^|/)encoder/(patch_embed|cls_token|mask_token|pos_embed)", name):
    return 0
  block = re.search(r"(^|/)encoder/block_(\d+)/", name)
  return int(block.group(2)) + 1 if block else depth + 1


def layer_scale(name: str, depth: int, layer_decay: float) -> float:
  """Factor of the learning rate: layer_decay ** (depth + 1 - layer_id)."""
  return layer_decay ** (depth + 1 - layer_id(name, depth))


def weight_decay_tree(params: Any, no_decay: tuple[str, ...] = ()) -> Any:
  """bool per parameter: does weight decay apply; `no_decay` are further regexes to spare."""
  rules = tuple((pattern, False) for pattern in no_decay) + WEIGHT_DECAY_RULES
  return trees.match_rules(rules, params)


def make_optimizer(
  params: Any,
  *,
  schedule: Callable[[Any], Any],
  weight_decay: float | Callable[[Any], Any],
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  clip_norm: float = 0.0,
  layer_decay: float = 1.0,
  depth: int = 0,
  no_decay: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """Clip the global norm, Adam, decoupled weight decay, layer scale, learning rate: in this order.

  Args:
    params: the parameters, or their shapes; only the paths are read.
    schedule: step -> learning rate; `weight_decay`: a number or step -> number.
    clip_norm: 0 turns clipping off.
    layer_decay: 1 turns it off; needs the encoder's `depth`.

  The layer scale multiplies the whole update, as torch's per-group learning rate does (weight decay too).
  """
  scales = trees.named_map(lambda name, _: layer_scale(name, depth, layer_decay), params)
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.scale_by_adam(*betas, eps),
    optax.add_decayed_weights(weight_decay, mask=weight_decay_tree(params, no_decay)),
    optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    optax.scale_by_learning_rate(schedule),
  )


def group_report(
  params: Any, *, depth: int, layer_decay: float, weight_decay: float, no_decay: tuple[str, ...] = ()
) -> str:
  """A table of the parameter groups: layer id, lr scale, weight decay, tensors, parameters, examples."""
  flat = trees.flatten(params)
  decays = trees.flatten(weight_decay_tree(params, no_decay))
  groups: dict[tuple, list[str]] = {}
  for name in flat:
    groups.setdefault((layer_id(name, depth), decays[name]), []).append(name)
  lines = [f"{'layer':>5} {'lr scale':>11} {'decay':>7} {'tensors':>7} {'parameters':>12}  first"]
  for (layer, decay), names in sorted(groups.items()):
    scale, count = layer_scale(names[0], depth, layer_decay), sum(flat[n].size for n in names)
    wd = weight_decay if decay else 0.0
    lines.append(f"{layer:>5} {scale:>11.6g} {wd:>7.3g} {len(names):>7} {count:>12,}  {names[0]}")
  lines.append(f"{'all':>5} {'':>11} {'':>7} {len(flat):>7} {trees.num_params(params):>12,}")
  return "\n".join(lines)
