"""Checks Python and the packages against the bounds that the installed beit_jax declares."""

import importlib.metadata
import platform

from beit_jax.doctor.findings import FAIL, OK, WARN, Found


def within(version: str, bounds: str) -> bool:
  """Whether a version satisfies bounds such as ">=0.10,<0.12"; every version satisfies ""."""
  from packaging.specifiers import SpecifierSet  # not above: the doctor must start without it

  return SpecifierSet(bounds).contains(version, prereleases=True)


def requirements(package: str) -> dict[str, str]:
  """Returns what an installed package needs on this machine, without its extras: name -> bounds."""
  from packaging.requirements import Requirement

  needs = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
  needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
  return {need.name: ",".join(sorted(map(str, need.specifier), reverse=True)) for need in needs}


def installed(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def versions(machine: object = None) -> Found:
  del machine
  python = platform.python_version()
  try:
    needs = [("beit_jax", *need) for need in requirements("beit_jax").items()]
    bounds = importlib.metadata.metadata("beit_jax")["Requires-Python"] or ""
  except importlib.metadata.PackageNotFoundError:
    needs, bounds = [("beit_jax", name, "") for name in ("jax", "jaxlib", "flax", "numpy")], ""
    yield WARN, "beit_jax is not installed, so its bounds on versions are not known", "pip install -e ."
  if not within(python, bounds):
    yield FAIL, f"python {python}, beit_jax needs {bounds}", "create an environment with such a Python"
  if installed("jax"):
    needs.append(("jax", "jaxlib", requirements("jax").get("jaxlib", "")))
  have = {name: installed(name) or "missing" for _, name, _ in needs}
  for by, name, bounds in needs:
    if have[name] == "missing" or not within(have[name], bounds):
      yield FAIL, f"{name} {have[name]}, {by} needs {bounds or 'it'}", f"pip install '{name}{bounds}'"
  yield OK, ", ".join([f"python {python}", *(f"{name} {version}" for name, version in have.items())]), ""
