"""Plans a run for a slice of accelerators that does not have to exist.

    python -m beit_jax.plan --config=FILE[:variant] --topology=v5e:16x16 [--stage=NAME] [--config.key=value ...]

Compiles the training step of the run and reports whether it fits, what it computes and moves, how long it would take,
and what the input has to supply. TPUs need `pip install -e '.[plan]'`; `cpu:8` needs nothing. Neither the data nor a
trained tokenizer has to exist.

Exit status 0: it fits. 2: the given setting does not fit (a setting that does is then named), or the command is wrong.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.plan import ANSWER, report, roofline, search, topology
from beit_jax.runtime.flags import Parser, number

USAGE = (
  "usage: python -m beit_jax.plan --config=FILE[:variant] --topology=v5e:16x16 [--stage=NAME] [--config.key=value ...] "
  "[--json]"
)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Parses the flags of this command; returns them and the rest, which is for `config.parse_args`.

  Raises:
    UserError: a flag has no value, or one of the wrong type or range; or there is no topology.
  """
  parser = Parser("python -m beit_jax.plan", USAGE.removeprefix("usage: "), __doc__, allow_abbrev=False)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  add("--topology", required=True, help="the slice, such as v5e:16x16 or cpu:8")
  add("--stage", help="the stage to plan (default: the one that computes most)")
  add("--examples", type=number(int, 1), help="number of training examples, if the data is not here")
  add("--utilization", type=number(float, 0.01, 1), default=0.4, help="fraction of the peak to assume")
  add("--rate_per_core", type=number(float, 1), default=500.0, help="images/s that one core can read")
  add("--hbm_gib", type=number(float, 0.001), help="memory of a device, instead of the published figure")
  add("--tries", type=number(int, 0), default=6, help="settings to compile if the given one does not fit")
  add("--json", action="store_true", help="print the plan as one JSON object")
  return parser.parse_known_args(argv)


def compile_in_subprocess(slice_: topology.Topology, request: dict[str, Any]) -> dict[str, Any]:
  """Runs `compile.compile_step` in a process of its own.

  Raises:
    UserError: the message of the process, or that it died.
  """
  done = subprocess.run(
    [sys.executable, "-m", "beit_jax.plan.compile"],
    input=json.dumps(request),
    env={**os.environ, **topology.environment(slice_)},
    capture_output=True,
    text=True,
    errors="replace",
  )
  answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
  if answers:
    answer = json.loads(answers[-1].removeprefix(ANSWER))
    if "error" in answer:
      raise UserError(answer["error"])
    return answer
  if done.returncode < 0:
    reason = ": this machine has too little memory for it" if done.returncode == -9 else ""
    raise UserError(
      f"the compiler was ended by signal {-done.returncode}{reason}; compile for fewer chips, or with "
      "--config.model.scan=True, which makes the program smaller"
    )
  lines = [line for line in done.stderr.splitlines() if line.strip()]
  raise UserError(f"the compiler failed ({done.returncode}): {' / '.join(lines[-3:])[-1500:]}")


def make(options: argparse.Namespace, spec: str, overrides: list[tuple[str, Any]]) -> dict[str, Any]:
  """Plans the given setting and, if it does not fit, other settings.

  Args:
    options: see `parse_args`.
    spec: the config file and its variant.
    overrides: dotted config keys and their values.

  Raises:
    UserError: the given setting cannot be planned.
  """
  slice_ = topology.parse(options.topology)
  chip = slice_.chip
  hbm = options.hbm_gib * topology.GIB if options.hbm_gib else chip.hbm / chip.devices if chip else None

  def compile_with(stage: str | None, more: list[tuple[str, Any]]) -> dict[str, Any]:
    request = dict(spec=spec, overrides=[*overrides, *more], topology=slice_.name)
    found = compile_in_subprocess(slice_, request | dict(stage=stage, examples=options.examples))
    found["fits"] = found["fits"] and (hbm is None or found["memory"]["peak"] <= hbm)
    return found

  found = compile_with(options.stage, [])
  tried: list[dict[str, Any]] = []
  stage = found["stage"]
  for setting in search.settings(found, hbm) if hbm and not found["fits"] else ():
    if len(tried) >= options.tries or (tried and tried[-1]["fits"]):
      break
    flags, prefix = search.flags(stage, setting), f"{stage}." if stage else ""
    try:
      other = compile_with(stage or None, [(prefix + key, value) for key, value in setting.items()])
    except UserError as error:
      print(f"{' '.join(flags)} cannot be planned: {error}", file=sys.stderr)
      continue
    tried.append(dict(flags=flags, fits=other["fits"], peak=other["memory"].get("peak")))
  limit = found["memory"].pop("limit", None)
  packages = ("jax",) if chip is None else ("jax", "libtpu")
  roof = None
  if "collectives" in found:
    roof = roofline.estimate(found, slice_, options.utilization, options.rate_per_core)
  return dict(
    config=spec,
    topology=slice_.name,
    chips=slice_.chips,
    hosts=slice_.hosts,
    fits=found["fits"],
    hbm=hbm if options.hbm_gib else limit or hbm,
    found=found,
    xla_counts="loops" in found and not found["loops"] and bool(found["xla"]["flops"]),
    roofline=roof,
    tried=tried,
    compiler=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
  )


def main(argv: list[str]) -> int:
  try:
    options, rest = parse_args(argv)
    spec, workdir, overrides = config_lib.parse_args(rest, USAGE)
    if workdir:
      raise UserError("--workdir: a plan writes nothing; remove this flag")
    plan = make(options, spec, overrides)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 130
  print(json.dumps(plan) if options.json else report.text(plan, topology.parse(options.topology)))
  return 0 if plan["fits"] else 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
