"""Training a tokenizer of one's own: the discrete VAE (DALL-E paper, section 2.1 and appendix A.2)."""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, losses
from beit_jax.data import drawing
from beit_jax.errors import CollapseError, UserError
from beit_jax.models.dvae import Dvae, map_pixels, unmap_pixels
from beit_jax.objectives import base
from beit_jax.runtime.logs import log

RECONSTRUCTIONS = ("logit_laplace", "l1", "l2")


class TokenizerTraining(base.Objective):
  """Image -> tokens -> image under a Gumbel-softmax relaxation whose temperature falls.

  loss = reconstruction (mean over pixels and channels) + kl_weight * KL(q || uniform) (mean over tokens, nats).
  In evaluation tokens are hard (argmax) and errors are those of pixels in [0, 1].
  """

  kind = "tokenizer"
  eval_metrics = ("loss", "mae", "mse", "codebook_usage", "perplexity")

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    self.module = Dvae(**dict(config.model))
    stride = self.module.stride
    if any(side % stride for side in self.token_image_size):
      raise UserError(
        f"config key 'data.token_image_size': {self.token_image_size} is not divisible by the tokenizer's stride "
        f"{stride} = 2 ** (model.group_count - 1)"
      )
    if config.loss.reconstruction not in RECONSTRUCTIONS:
      raise UserError(
        f"config key 'loss.reconstruction': {config.loss.reconstruction!r} is unknown; there are {RECONSTRUCTIONS}"
      )

  @classmethod
  def model_fields(cls):
    return base.module_fields(Dvae)

  def views(self):
    return {"token_image": (self.token_image_size, self.config.data.token_interpolation)}

  def init(self, key):
    with base.building():
      return self.module.init(key, jnp.zeros((1, *self.token_image_size, 3)))

  def schedules(self, step):
    """(temperature, KL weight) at `step`: cosine annealing; linear rise from 0."""
    loss = self.config.loss
    done = jnp.minimum(step / max(loss.temperature_steps, 1), 1.0)
    temperature = loss.temperature_end + (loss.temperature - loss.temperature_end) * 0.5 * (
      1 + jnp.cos(jnp.pi * done)
    )
    return temperature, loss.kl_weight * jnp.minimum(step / max(loss.kl_warmup_steps, 1), 1.0)

  def _reconstruction(self, mean, log_scale, target):
    """Loss per element, [B, H, W, 3]; `target` is map_pixels'd."""
    if self.config.loss.reconstruction == "logit_laplace":
      return losses.logit_laplace(mean, log_scale, target)
    difference = jax.nn.sigmoid(mean) - target
    return jnp.abs(difference) if self.config.loss.reconstruction == "l1" else difference**2

  def loss(self, variables, frozen, batch, key, step):
    del frozen
    image = augment.to_float(batch["token_image"])
    if self.config.data.color_jitter:
      keys = augment.example_keys(self.config.seed, batch["example_key"], "jitter")
      (image,) = augment.color_jitter(keys, [image], self.config.data.color_jitter)
    target = map_pixels(image)
    temperature, kl_weight = self.schedules(step)
    straight_through = self.config.loss.straight_through
    out = self.module.apply(
      variables, target, temperature=temperature, straight_through=straight_through, key=key
    )
    reconstruction = self._reconstruction(out["mean"], out["log_scale"], target).mean((1, 2, 3))  # [B]
    kl = losses.kl_to_uniform(out["logits"]).mean((1, 2))  # [B]
    loss = reconstruction + kl_weight * kl
    count = jnp.asarray(len(image), jnp.float32)
    mae = jnp.abs(unmap_pixels(jax.nn.sigmoid(out["mean"])) - image).mean((1, 2, 3))
    sums = {
      "loss": (loss.sum(), count),
      "reconstruction_loss": (reconstruction.sum(), count),
      "kl": (kl.sum(), count),
      "mae": (mae.sum(), count),
      "temperature": (temperature * count, count),
      "kl_weight": (kl_weight * count, count),
    }
    return sums["loss"][0], (sums, {})

  def eval_step(self, variables, frozen, batch):
    del frozen
    image, valid = augment.to_float(batch["token_image"]), batch["valid"].astype(jnp.float32)
    logits = self.module.apply(variables, map_pixels(image), method="logits")
    hard = jax.nn.one_hot(logits.argmax(-1), self.module.vocab_size)  # [B, h, w, V]
    mean, log_scale = self.module.apply(variables, hard, method="decode_soft")
    loss = self._reconstruction(mean, log_scale, map_pixels(image)).mean((1, 2, 3))
    error = unmap_pixels(jax.nn.sigmoid(mean)) - image
    count = valid.sum()
    return {
      "loss": ((loss * valid).sum(), count),
      "mae": ((jnp.abs(error).mean((1, 2, 3)) * valid).sum(), count),
      "mse": (((error**2).mean((1, 2, 3)) * valid).sum(), count),
      "token_counts": ((hard.sum((1, 2)) * valid[:, None]).sum(0), count),
    }

  def summarize(self, sums):
    counts, _ = sums.pop("token_counts")
    share = counts / max(counts.sum(), 1)
    used = share[share > 0]
    return {
      **super().summarize(sums),
      "codebook_usage": float((counts > 0).mean()),
      "perplexity": float(np.exp(-(used * np.log(used)).sum())),
    }

  def check_eval(self, step, metrics):
    collapse = self.config.collapse
    if step < collapse.after_steps or metrics["codebook_usage"] >= collapse.min_usage:
      return
    message = (
      f"the codebook has collapsed: after {step} steps only {metrics['codebook_usage']:.2%} of its "
      f"{self.module.vocab_size} words are in use (perplexity {metrics['perplexity']:.1f}, "
      f"collapse.min_usage={collapse.min_usage}). Lower optimizer.learning_rate or loss.kl_weight, or raise "
      "loss.temperature_end; collapse.stop=False lets the run go on"
    )
    if collapse.stop:
      raise CollapseError(message)
    log.error(message)

  def figures(self, variables, frozen, batch):
    """Rows: image, its reconstruction from hard tokens."""
    image = augment.to_float(batch["token_image"])
    ids = self.module.apply(variables, image, method="tokenize")
    grid = tuple(side // self.module.stride for side in self.token_image_size)
    decoded = self.module.apply(variables, ids, grid, method="decode")
    return {
      "reconstructions": drawing.table({"image": np.asarray(image), "from its tokens": np.asarray(decoded)})
    }

  def describe(self):
    return dict(
      kind=self.kind,
      module={name: getattr(self.module, name) for name in base.module_fields(Dvae)},
      preprocessing=dict(
        mean=(-0.125,) * 3,  # (x + 0.125) / 1.25 is map_pixels
        std=(1.25,) * 3,
        image_size=self.token_image_size,
        crop_pct=self.config.data.crop_pct,
        interpolation=self.config.data.token_interpolation,
        resize="short_side",
      ),
    )
