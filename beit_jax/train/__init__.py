"""Training: `prepare.py` validates what a config describes, `loop.py` trains it."""

from beit_jax.train.loop import run
from beit_jax.train.prepare import Data, Plan, check_examples, check_stages, check_start, make_data, prepare

__all__ = ["Data", "Plan", "check_examples", "check_stages", "check_start", "make_data", "prepare", "run"]
