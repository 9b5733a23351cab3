"""What all objectives that train a tokenizer share: the image they see, and the use of the codebook in evaluations."""

from typing import ClassVar

import numpy as np

from beit_jax.config import ranges
from beit_jax.data.images import ViewSizes
from beit_jax.errors import CollapseError, UserError
from beit_jax.objectives.base import Array, Objective, Variables
from beit_jax.runtime.logs import log

SECTION = dict(
  min_usage=0.02,  # the codebook has collapsed if a smaller share of it occurs in the evaluation set
  after_steps=500,
  stop=True,
)
RANGES = (
  (r"collapse\.min_usage", ranges.fraction()),
  (r"collapse\.after_steps", ranges.integer(0, ranges.MAX_STEPS)),
)


class CodebookObjective(Objective):
  """Base class of objectives whose `module` is a tokenizer.

  Their config has the section `collapse`, which is `SECTION`, and `eval_step` gives the metric "token_counts": how
  often each word occurs, [V].

  Attributes:
    collapse_advice: what the user can do about a collapse of the codebook.
  """

  import_replaces_run = True
  collapse_advice: ClassVar[str]

  def views(self) -> ViewSizes:
    return {"token_image": (self.token_image_size, self.config.data.token_interpolation)}

  def init(self, key: Array) -> Variables:
    return self._init_module(key, self.token_image_size)

  def check_token_image_size(self, stride: int, why: str) -> None:
    """Raises a UserError if the images cannot be divided into tokens."""
    if any(side % stride for side in self.token_image_size):
      raise UserError(
        f"config key 'data.token_image_size': {self.token_image_size} is not divisible by the tokenizer's stride "
        f"{stride} = {why}"
      )

  def summarize(self, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    counts, _ = sums.pop("token_counts")
    share = counts / max(counts.sum(), 1)
    used = share[share > 0]
    return {
      **super().summarize(sums),
      "codebook_usage": float((counts > 0).mean()),
      "perplexity": float(np.exp(-(used * np.log(used)).sum())),
    }

  def check_eval(self, step: int, metrics: dict[str, float]) -> None:
    collapse, module = self.config.collapse, self.module
    if step < collapse.after_steps or metrics["codebook_usage"] >= collapse.min_usage:
      return
    message = (
      f"the codebook has collapsed: after {step} steps only {metrics['codebook_usage']:.2%} of its "
      f"{module.vocab_size} words are in use (perplexity {metrics['perplexity']:.1f}, "
      f"collapse.min_usage={collapse.min_usage}). {self.collapse_advice}; with collapse.stop=False the run continues"
    )
    if collapse.stop:
      raise CollapseError(message)
    log.error(message)
