"""Evaluation of frozen features: a linear classifier on every block in one pass, and k-NN.

Follows unilm `beit/run_linear_eval.py` (features, init, summed losses) and DINO's `eval_knn.py` (the vote).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses, metrics, transfer, trees
from beit_jax.config import ranges
from beit_jax.data import pipeline, views
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.images import ViewSizes
from beit_jax.data.sources import Source
from beit_jax.errors import UserError
from beit_jax.models.beit import Beit
from beit_jax.models.heads import LinearProbes, block_features
from beit_jax.objectives import base
from beit_jax.objectives.base import (
  Array,
  Batch,
  EvalOutput,
  Loader,
  LossOutput,
  Metric,
  Metrics,
  PyTree,
  Variables,
)
from beit_jax.objectives.encoder import check_dtype, encoder_fields, encoder_schema, normalization_problems
from beit_jax.run import checkpoint
from beit_jax.runtime import sharding
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained, fingerprint


class Probe(base.Objective):
  """Base class: the encoder of the checkpoint `encoder.init_from`, or a random one as `model` says.

  The fields of a loaded encoder come from its checkpoint. `model` then sets only `dtype` and
  `residual_dtype`.
  """

  kind = "probe"
  labels = "class"
  frozen_sections = ("encoder",)

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    if source.multi_label or source.num_classes < 2:
      raise UserError(
        "config key 'data': probes need data with one label per image and two or more classes "
        f"({source.description})"
      )
    self.num_classes = source.num_classes
    self._loaded_encoder = self._load_encoder(config.encoder.init_from) if config.encoder.init_from else None
    if self._loaded_encoder is None:
      fields = encoder_fields(config.model, self.image_size, pretrain=True)
    else:
      fields = self._loaded_encoder.encoder_fields
    fields |= dict(final_norm=False, use_mask_token=False, drop_path_rate=0.0)
    fields |= {name: config.model[name] for name in ("dtype", "residual_dtype")}
    check_dtype(config.model.dtype)
    self.encoder: Any = Beit(**fields)
    self.blocks = list(range(self.encoder.depth))
    self.eval_metrics = ("loss", "acc1", *(f"acc1_{i:02d}" for i in self.blocks))
    self._shapes = jax.eval_shape(self._init_encoder)
    base.check_size(self._shapes)

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    model = {**encoder_schema(), "drop_path_rate": 0.0}
    return dict(model=model, encoder=dict(init_from=""))  # "" = a random encoder, as `model` says

  @functools.cached_property
  def encoder_params(self) -> PyTree:
    """The parameters of the frozen encoder, without those that only pre-training or a head uses."""
    if self._loaded_encoder is None:
      log.info("encoder: random, %d parameters", trees.num_params(self._shapes))
      return jax.jit(self._init_encoder)()
    grid, params = self.encoder.grid_size, {"encoder": self._loaded_encoder.encoder_params}
    found = transfer.encoder_params(params, {"encoder": self._shapes}, grid, grid, log.info)
    return trees.unflatten(found)["encoder"]

  def _init_encoder(self) -> PyTree:
    key = jax.random.fold_in(jax.random.key(self.config.seed), 7)
    with base.user_errors_of_model():
      return self.encoder.init(key, jnp.zeros((1, *self.image_size, self.channels)))["params"]

  def _load_encoder(self, path: str) -> Pretrained:
    pretrained = self.load_frozen(path)
    if not pretrained.has_encoder:
      raise UserError(f"config key 'encoder.init_from': a {pretrained.kind} has no BEiT encoder ({path})")
    problems = normalization_problems(self.config.data, pretrained, log.info)
    if pretrained.encoder_fields["in_channels"] != self.channels:
      problems.append(
        f"model.in_channels: {pretrained.encoder_fields['in_channels']} there, {self.channels} here"
      )
    image_size = tuple(pretrained.encoder_fields["image_size"])
    if image_size != self.image_size:
      problems.append(f"data.image_size: the encoder is for {image_size}, here {self.image_size}")
    if problems:
      raise UserError("encoder.init_from: checkpoint and run disagree:\n  " + "\n  ".join(problems))
    log.info("encoder: %s", pretrained.description.get("path"))
    return pretrained

  def views(self) -> ViewSizes:
    return {"image": (self.image_size, self.config.data.interpolation)}

  def reader(self) -> Any:
    return views.ViewReader(self.views(), self.config.data.to_dict(), self.num_classes)

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    label = base.with_common_arrays({"label": ((), jnp.int32)}, batch_size)
    return {**super().batch_shapes(batch_size), **label}

  def features(self, frozen: PyTree, batch: Batch) -> Array:
    """float32 [L, B, 2D], L = number of `blocks`."""
    data = self.config.data
    image = augment.normalize(augment.to_float(batch["image"]), data.mean, data.std)
    out = self.encoder.apply({"params": frozen["encoder"]}, image)[1]
    return jax.lax.stop_gradient(block_features({f"{i:02d}": out[f"block_{i:02d}"] for i in self.blocks}))

  def frozen_params(self, mesh: jax.sharding.Mesh) -> PyTree:
    del mesh
    return {"encoder": self.encoder_params}

  def _sums(self, logits: Array, batch: Batch) -> Metrics:
    """The cross-entropy summed over blocks, and acc1 of every block. logits [L, B, C]."""
    valid = batch["valid"].astype(jnp.float32)
    count = valid.sum()
    right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32) * valid  # [L, B]
    nll = jax.vmap(losses.soft_target_cross_entropy, (0, None))(
      logits, jax.nn.one_hot(batch["label"], self.num_classes)
    )
    sums = {"loss": Metric((nll * valid).sum(), count)}
    for i, block in enumerate(self.blocks):
      sums[f"acc1_{block:02d}"] = Metric(right[i].sum(), count)
    return sums

  def summarize(self, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Adds the accuracy of the best block (counted from 0, as everywhere in this code) and logs the curve."""
    values = super().summarize(sums)
    curve = {block: values[f"acc1_{block:02d}"] for block in self.blocks}
    best = max(curve, key=lambda block: curve[block])
    for block, value in curve.items():
      log.info(
        "block %2d  %5.1f %%  %s%s", block, 100 * value, "#" * round(50 * value), "  best" * (block == best)
      )
    return {**values, "acc1": curve[best], "best_block": float(best)}

  def report(self, rows: dict[str, np.ndarray], results: dict[str, float], folder: Path) -> list[Path]:
    curve = [(block, results[f"acc1_{block:02d}"]) for block in self.blocks]
    return [metrics.write_csv(folder / "per_block.csv", [("block", "acc1"), *curve])]

  def describe(self) -> dict[str, Any]:
    encoder = base.field_values(self.encoder)
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

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    self.module = LinearProbes(self.num_classes)

  def init(self, key: Array) -> Variables:
    features = jnp.zeros((self.encoder.depth, 1, 2 * self.encoder.width))
    return self.module.init(key, features)

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del key, step
    return LossOutput(self._classify(variables, frozen, batch))

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    return EvalOutput(self._classify(variables, frozen, batch))

  def _classify(self, variables: Variables, frozen: PyTree, batch: Batch) -> Metrics:
    return self._sums(self.module.apply(variables, self.features(frozen, batch)), batch)

  def load_params(self, path: str, shapes: PyTree) -> tuple[dict[str, Any], str]:
    ema = self.config.eval.ema
    folder = checkpoint.find(path, items=["ema" if ema else "params"])
    description = checkpoint.read_description(folder)
    for key, mine in (("encoder", self.describe()["encoder"]), ("labels", list(self.source.class_names))):
      if description.get(key) != mine:
        raise UserError(
          f"eval_only: the probe in {folder} was trained with another encoder or other classes ({key})"
        )
    if ema and not (folder / "ema").is_dir():
      raise UserError(f"eval.ema: {folder} has no averaged weights (optimizer.ema_decay was 0)")
    found = trees.flatten(checkpoint.load_params(folder, "ema" if ema else "params"))
    wanted = trees.flatten(shapes)
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in wanted.items()}:
      raise UserError(f"eval_only: {folder} holds no linear probe of this encoder and these classes")
    return found, str(folder)

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    raise UserError("init_from: a linear probe starts fresh; the frozen encoder is encoder.init_from")


class Knn(Probe):
  """A weighted vote of the k nearest training images (by cosine) on the features of every block. Trains nothing."""

  kind = "knn"
  trains = False
  value_ranges = (
    (r"knn\.k", ranges.integer(1, 2**24)),
    (r"knn\.temperature", ranges.number(0.02, 1000)),  # exp(1 / temperature) must be a float32
    (r"knn\.blocks", ranges.block_numbers()),
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    if config.knn.k > len(source):
      raise UserError(f"config key 'knn.k': {config.knn.k} is more than the {len(source)} training images")
    if not set(config.knn.blocks) <= set(self.blocks):
      raise UserError(
        f"config key 'knn.blocks': {config.knn.blocks}, but the encoder has blocks 0 to {self.blocks[-1]}"
      )
    self.blocks = sorted(set(config.knn.blocks)) or self.blocks

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    # k and temperature are DINO's; blocks: () = all.
    return {**super().config_section(), "knn": dict(k=20, temperature=0.07, blocks=())}

  def init(self, key: Array) -> Variables:
    del key
    return {"params": {}}

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    raise NotImplementedError("k-NN trains nothing")

  def frozen_params(self, mesh: jax.sharding.Mesh) -> PyTree:
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

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
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
    del sums["loss"]  # votes are not logits
    return EvalOutput(sums)


def _unit(x: Array) -> Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def knn_vote(
  query: Array, bank: Array, *, label: Array, num_classes: int, k: int, temperature: float
) -> Array:
  """The vote of the k nearest neighbors: each adds exp(cosine / temperature) to its class.

  Args:
    query: float32 [B, F], vectors of length 1.
    bank: float32 [N, F], vectors of length 1.
    label: int32 [N], the classes of `bank`.
    num_classes: C.
    k: number of neighbors.
    temperature: of the weights.

  Returns:
    float32 [B, C].
  """
  # Without "highest" a TPU would round the products to bfloat16, a GPU to TF32.
  nearest, index = jax.lax.top_k(jnp.matmul(query, bank.T, precision="highest"), k)  # [B, k]
  votes = jax.nn.one_hot(label[index], num_classes)  # [B, k, C]
  return jnp.einsum("bk,bkc->bc", jnp.exp(nearest / temperature), votes, precision="highest")
