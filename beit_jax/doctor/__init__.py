"""Looks at a machine before a long run: `python -m beit_jax.doctor`."""
