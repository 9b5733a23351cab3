"""`beit-jax COMMAND ...` and `python -m beit_jax COMMAND ...`: the same as `python -m beit_jax.COMMAND ...`."""

import runpy
import sys

COMMANDS = {
  "main": "train, evaluate, run a config",
  "convert": "convert weights between formats",
  "predict": "run a model on images",
  "plan": "memory, communication and time of a run on a machine that need not exist",
  "doctor": "check a machine before a run",
  "tokenize": "compute the visual tokens of a data set once",
}


def main() -> None:
  """Runs the command that the first argument names; `--help` behind it shows that of the command."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in COMMANDS:
    sys.argv = [f"beit-jax {name}", *sys.argv[2:]]
    runpy.run_module(f"beit_jax.{name}", run_name="__main__", alter_sys=True)
    return
  text = "usage: beit-jax COMMAND [ARGUMENT ...]\n\n" + "\n".join(
    f"  {k:<10}{v}" for k, v in COMMANDS.items()
  )
  if name in ("-h", "--help"):
    print(text)
    return
  print(f"error: {name!r} is not a command\n{text}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  main()
