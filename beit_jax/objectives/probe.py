"""What is in the features of a frozen encoder: a linear classifier on every block in one pass, and k-NN.

Follows unilm `beit/run_linear_eval.py` (features, init, summed losses) and DINO's `eval_knn.py` (the vote).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, losses, metrics, transfer, trees
from beit_jax.data import pipeline
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import UserError
from beit_jax.models.beit import Beit
from beit_jax.models.heads import LinearProbes, block_features
from beit_jax.objectives import base
from beit_jax.objectives import encoder as encoder_keys
from beit_jax.run import checkpoint
from beit_jax.runtime import sharding
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import fingerprint


class Probe(base.Objective):
  """The frozen encoder: that of the checkpoint `encoder.init_from`, or a random one as `model` says.

  The fields of a loaded encoder come from its checkpoint; `model` then only sets how it computes (dtype).
  """

  kind = "probe"

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    if source.multi_label or not source.num_classes:
      raise UserError(f"config key 'data': probes need data with one label an image ({source.description})")
    self.num_classes = source.num_classes
    if config.encoder.init_from:
      fields, self._loaded = self._load(config.encoder.init_from)
    else:
      fields = encoder_keys.encoder_fields(config.model, self.image_size, pretrain=True)
      self._loaded = None
    fields |= dict(final_norm=False, use_mask_token=False, drop_path_rate=0.0, dtype=config.model.dtype)
    self.encoder = Beit(**fields)
    self.blocks = list(range(self.encoder.depth))
    self.eval_metrics = ("loss", "acc1", *(f"acc1_{i:02d}" for i in self.blocks))
    shapes = jax.eval_shape(self._init_encoder)
    base.check_size(shapes)
    if self._loaded is None:
      log.info("encoder: random, %d parameters", trees.num_params(shapes))
    else:
      grid = self.encoder.grid_size
      params = {"encoder": self._loaded}
      found = transfer.encoder_params(params, {"encoder": shapes}, grid, grid, log.info)
      self._loaded = trees.unflatten(found)["encoder"]

  @functools.cached_property
  def encoder_params(self):
    return jax.jit(self._init_encoder)() if self._loaded is None else self._loaded

  def _init_encoder(self):
    key = jax.random.fold_in(jax.random.key(self.config.seed), 7)
    with base.building():
      return self.encoder.init(key, jnp.zeros((1, *self.image_size, 3)))["params"]

  def _load(self, path):
    pretrained = self.load_frozen(path)
    if pretrained.kind not in ("backbone", "mim", "classifier"):
      raise UserError(f"config key 'encoder.init_from': a {pretrained.kind} has no BEiT encoder ({path})")
    fields = dict(pretrained.encoder_fields)
    problems = encoder_keys.disagreeing_pixels(self.config.data, pretrained, log.info)
    if tuple(fields["image_size"]) != self.image_size:
      problems.append(f"data.image_size: the encoder is for {fields['image_size']}, here {self.image_size}")
    if problems:
      raise UserError("encoder.init_from: checkpoint and run disagree:\n  " + "\n  ".join(problems))
    log.info("encoder: %s", pretrained.description.get("path"))
    params = pretrained.params
    return fields, params if pretrained.kind == "backbone" else params["encoder"]

  @classmethod
  def model_fields(cls):
    return {**encoder_keys.encoder_schema(), "drop_path_rate": 0.0}

  def views(self):
    return {"image": (self.image_size, self.config.data.interpolation)}

  def features(self, frozen, batch):
    """float32 [L, B, 2D], L the blocks asked for."""
    data = self.config.data
    image = augment.normalize(augment.to_float(batch["image"]), data.mean, data.std)
    out = self.encoder.apply({"params": frozen["encoder"]}, image)[1]
    return jax.lax.stop_gradient(block_features({f"{i:02d}": out[f"block_{i:02d}"] for i in self.blocks}))

  def frozen_params(self, mesh):
    del mesh
    return {"encoder": self.encoder_params}

  def _sums(self, logits, batch):
    """acc1 of every block and, where they are a loss's, the summed cross-entropy. logits [L, B, C]."""
    valid = batch["valid"].astype(jnp.float32)
    count = valid.sum()
    right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32) * valid  # [L, B]
    nll = jax.vmap(losses.soft_target_cross_entropy, (0, None))(
      logits, jax.nn.one_hot(batch["label"], self.num_classes)
    )
    sums = {f"acc1_{block:02d}": (right[i].sum(), count) for i, block in enumerate(self.blocks)}
    return {"loss": ((nll * valid).sum(), count), **sums}

  def summarize(self, sums):
    """Adds the best block's accuracy (blocks count from 0, as everywhere in this code) and logs the curve."""
    values = super().summarize(sums)
    curve = {block: values[f"acc1_{block:02d}"] for block in self.blocks}
    best = max(curve, key=curve.get)
    for block, value in curve.items():
      log.info(
        "block %2d  %5.1f %%  %s%s", block, 100 * value, "#" * round(50 * value), "  best" * (block == best)
      )
    return {**values, "acc1": curve[best], "best_block": float(best)}

  def report(self, rows, results, folder):
    curve = [(block, results[f"acc1_{block:02d}"]) for block in self.blocks]
    return [metrics.write_csv(folder / "per_block.csv", [("block", "acc1"), *curve])]

  def describe(self):
    fields = base.module_fields(Beit)
    encoder = {name: getattr(self.encoder, name) for name in fields}
    return dict(
      kind=self.kind,
      module=dict(encoder=encoder, num_classes=self.num_classes),
      preprocessing=self.image_preprocessing(),
      labels=list(self.source.class_names),
      encoder=dict(sha256=fingerprint(jax.device_get(self.encoder_params))),
    )


class LinearProbe(Probe):
  """A linear classifier on the features of every block, all trained at once; the losses are summed."""

  kind = "linear_probe"

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    self.module = LinearProbes(self.num_classes)

  def init(self, key):
    features = jnp.zeros((self.encoder.depth, 1, 2 * self.encoder.width))
    return self.module.init(key, features)

  def loss(self, variables, frozen, batch, key, step):
    del key, step
    sums = self._sums(self.module.apply(variables, self.features(frozen, batch)), batch)
    return sums["loss"][0], (sums, {})

  def eval_step(self, variables, frozen, batch):
    return self._sums(self.module.apply(variables, self.features(frozen, batch)), batch)

  def load_params(self, path, shapes):
    folder, ema = checkpoint.find(path), self.config.eval.ema
    description = checkpoint.read_description(folder)
    for key, mine in (("encoder", self.describe()["encoder"]), ("labels", list(self.source.class_names))):
      if description.get(key) != mine:
        raise UserError(
          f"eval_only: the probe in {folder} was trained with another encoder or other classes ({key})"
        )
    if ema and not (folder / "ema").is_dir():
      raise UserError(f"eval.ema: {folder} has no averaged weights (optimizer.ema_decay was 0)")
    found, wanted = (
      trees.flatten(checkpoint.load_params(folder, "ema" if ema else "params")),
      trees.flatten(shapes),
    )
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in wanted.items()}:
      raise UserError(f"eval_only: {folder} holds no linear probe of this encoder and these classes")
    return found, str(folder)

  def adapt(self, pretrained, shapes):
    raise UserError("init_from: a linear probe starts fresh; the frozen encoder is encoder.init_from")


class Knn(Probe):
  """Weighted vote of the k nearest training images (cosine) on the features of every block. Trains nothing."""

  kind = "knn"
  trains = False

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    if not 0 < config.knn.k <= len(source) or config.knn.temperature <= 0:
      raise UserError(
        f"config key 'knn': k={config.knn.k} must lie in [1, {len(source)}] (the training images) and temperature="
        f"{config.knn.temperature} be positive"
      )
    if not set(config.knn.blocks) <= set(self.blocks):
      raise UserError(
        f"config key 'knn.blocks': {config.knn.blocks}, but the encoder has blocks 0 to {self.blocks[-1]}"
      )
    self.blocks = sorted(set(config.knn.blocks)) or self.blocks

  def init(self, key):
    del key
    return {"params": {}}

  def frozen_params(self, mesh):
    """The encoder, and the features of all training images, scaled to length 1: float32 [L, N, 2D] on every device."""
    frozen = jax.device_put(super().frozen_params(mesh), sharding.replicated(mesh))
    size = -(-self.config.eval.batch_size // mesh.size) * mesh.size
    host = pipeline.eval_batches(
      self.source,
      self.reader(),
      rows=sharding.local_rows(mesh, size),
      batch_size=size,
      workers=self.config.data.workers,
      threads=self.config.data.threads,
      bad_images=BadImageTracker(self.source, self.config.data.max_bad, shuffled=False),
    )
    extract = jax.jit(
      lambda frozen, batch: (_unit(self.features(frozen, batch)), batch["label"], batch["valid"]),
      out_shardings=sharding.replicated(mesh),
    )
    parts = [jax.device_get(extract(frozen, sharding.put_batch(mesh, batch, size))) for batch in host]
    features, labels, valid = (
      np.concatenate(part, -2 if i == 0 else 0) for i, part in enumerate(zip(*parts, strict=True))
    )
    log.info("k-NN: %d training images, %.1f MB of features", valid.sum(), features.nbytes / 1e6)
    return {**frozen, "bank": features[:, valid], "label": labels[valid]}

  def eval_step(self, variables, frozen, batch):
    del variables
    vote = functools.partial(
      knn_vote,
      label=frozen["label"],
      num_classes=self.num_classes,
      k=self.config.knn.k,
      temperature=self.config.knn.temperature,
    )
    query = _unit(self.features(frozen, batch))
    votes = jax.lax.map(lambda pair: vote(*pair), (query, frozen["bank"]))  # one block at a time: [L, B, C]
    sums = self._sums(votes, batch)
    del sums["loss"]  # votes are no logits
    return sums


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def knn_vote(query, bank, *, label, num_classes, k, temperature):
  """Each of the k nearest adds exp(cosine / temperature) to its class: [B, C].

  query [B, F] and bank [N, F] hold vectors of length 1, label int32 [N].
  """
  nearest, index = jax.lax.top_k(query @ bank.T, k)  # [B, k]
  return jnp.einsum("bk,bkc->bc", jnp.exp(nearest / temperature), jax.nn.one_hot(label[index], num_classes))
