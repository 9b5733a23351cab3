"""Plans a run before machines are rented: whether it fits a slice, how fast it could be, what the input must supply."""

ANSWER = "beit_jax.plan: "  # marks the result of the compiling process among the compiler's own output
