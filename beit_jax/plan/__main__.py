"""`python -m beit_jax.plan --config=FILE[:variant] --topology=v5e:16x16 [--stage=NAME] [--config.key=value ...]`

Compiles the training step of a run for a slice that need not be there, and says whether it fits, what it computes and
moves, how long it would take, and what the input has to supply. For TPUs: `pip install -e '.[plan]'`. `cpu:8` needs
nothing. Neither the data nor a trained tokenizer has to exist.

Further flags: `--json`; `--examples=N` of the training data, where nobody knows; `--utilization=0.4`, the share of the
chips' peak at which products run; `--rate_per_core=500`, images/s that a core reads; `--hbm_gib=G`, memory of a device
instead of the published; `--tries=6`, settings to compile when the one asked for does not fit.

Exit status 0: fits; 2: the setting as given does not fit, or a mistake in the command. What does fit is then named.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.plan import report, roofline, search, topology

USAGE = (
  "usage: python -m beit_jax.plan --config=FILE[:variant] --topology=v5e:16x16 [--stage=NAME] [--config.key=value ...] "
  "[--json]"
)
# Flag -> (kind, default, smallest).
FLAGS: dict[str, tuple[type, Any, float]] = {
  "topology": (str, None, 0),
  "stage": (str, None, 0),
  "examples": (int, None, 1),
  "utilization": (float, 0.4, 0.01),
  "rate_per_core": (float, 500.0, 1),
  "hbm_gib": (float, None, 0.001),
  "tries": (int, 6, 0),
}
MARK = "beit_jax.plan: "  # as in compile.py, which imports JAX


def take_flags(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
  """(values of `FLAGS` and "json", what is left for `config.parse_args`).

  Raises:
    UserError: a value of another kind or too small, or no topology.
  """
  values: dict[str, Any] = {name: default for name, (_, default, _) in FLAGS.items()} | {"json": False}
  rest = []
  items = iter(argv)
  for item in items:
    name, equals, value = item.removeprefix("--").partition("=")
    if item == "--json":
      values["json"] = True
    elif not item.startswith("--") or name not in FLAGS:
      rest.append(item)
      if item.startswith("--") and not equals:
        rest += [word for word in [next(items, None)] if word is not None]
    else:
      value = value if equals else next(items, "")
      kind, _, least = FLAGS[name]
      try:
        values[name] = kind(value)
      except ValueError:
        raise UserError(f"--{name}={value}: expected a {'whole ' * (kind is int)}number") from None
      if not value or kind is not str and not least <= values[name] < 1e12:
        raise UserError(
          f"--{name}={value}: expected {'something' if kind is str else f'{least:g} or more'}; {USAGE}"
        )
  if not values["topology"]:
    raise UserError(f"--topology is missing; {USAGE}")
  if values["utilization"] > 1:
    raise UserError(f"--utilization={values['utilization']:g}: a share of the peak, at most 1")
  return values, rest


def compile_apart(where: topology.Topology, asked: dict[str, Any]) -> dict[str, Any]:
  """`compile_step` in a process of its own.

  Raises:
    UserError: what it raised, or that it died.
  """
  command = [sys.executable, "-m", "beit_jax.plan.compile"]
  environment = {**os.environ, **topology.environment(where)}
  done = subprocess.run(
    command, input=json.dumps(asked), env=environment, capture_output=True, text=True, errors="replace"
  )
  answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
  if answers:
    answer = json.loads(answers[-1].removeprefix(MARK))
    if "error" in answer:
      raise UserError(answer["error"])
    return answer
  if done.returncode < 0:
    raise UserError(
      f"the compiler was ended by signal {-done.returncode}"
      + (": this machine has too little memory for it" if done.returncode == -9 else "")
      + "; compile for fewer chips, or with --config.model.scan=True, which makes the program smaller"
    )
  said = [line for line in done.stderr.splitlines() if line.strip()]
  raise UserError(f"the compiler failed ({done.returncode}): {' / '.join(said[-3:])[-1500:]}")


def make(values: dict[str, Any], spec: str, overrides: list[tuple[str, Any]]) -> dict[str, Any]:
  """The plan of a setting, and of others when it does not fit."""
  where = topology.parse(values["topology"])
  chip = where.chip
  hbm = values["hbm_gib"] * topology.GIB if values["hbm_gib"] else chip.hbm / chip.devices if chip else None

  def look(more: list[tuple[str, Any]]) -> dict[str, Any]:
    asked = dict(spec=spec, overrides=[*overrides, *more], topology=where.name)
    found = compile_apart(where, asked | {key: values[key] for key in ("stage", "examples")})
    found["fits"] = found["fits"] and (hbm is None or found["memory"]["peak"] <= hbm)
    return found

  found, tried = look([]), []
  if not found["fits"]:
    for setting in search.settings(found, hbm):
      if len(tried) >= values["tries"]:
        break
      prefix = f"{found['stage']}." if found["stage"] else ""
      flags = search.flags(found["stage"], setting)
      try:
        other = look([(prefix + key, value) for key, value in setting.items()])
      except UserError as error:
        print(f"{' '.join(flags)} cannot be planned: {error}", file=sys.stderr)
        continue
      tried.append(dict(flags=flags, fits=other["fits"], peak=other["memory"].get("peak")))
      if other["fits"]:
        break
  limit = found["memory"].pop("limit", None)
  roof = None
  if "collectives" in found:
    roof = roofline.estimate(found, where, values["utilization"], values["rate_per_core"])
  return dict(
    config=spec,
    topology=where.name,
    chips=where.chips,
    hosts=where.hosts,
    fits=found["fits"],
    hbm=values["hbm_gib"] and hbm or limit or hbm,
    found=found,
    xla_counts="loops" in found and not found["loops"] and bool(found["xla"]["flops"]),
    roofline=roof,
    tried=tried,
    compiler=_versions(where),
  )


def _versions(where: topology.Topology) -> str:
  names = ("jax",) if where.kind == "cpu" else ("jax", "libtpu")
  return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def main(argv: list[str]) -> int:
  try:
    values, rest = take_flags(argv)
    try:
      spec, workdir, overrides = config_lib.parse_args(rest)
    except UserError as error:
      raise UserError(str(error).replace(config_lib.USAGE, USAGE)) from None
    if workdir:
      raise UserError("--workdir: a plan writes nothing; leave it out")
    plan = make(values, spec, overrides)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 130
  print(json.dumps(plan) if values["json"] else report.text(plan, topology.parse(values["topology"])))
  return 0 if plan["fits"] else 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
