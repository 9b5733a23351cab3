"""Python and the packages against the bounds that the installed beit_jax declares."""

import importlib.metadata
import platform
import re

from beit_jax.doctor.findings import FAIL, OK, WARN, Found

PLUGINS = (
  "jax-cuda12-plugin",
  "jax-cuda12-pjrt",
  "jax-cuda13-plugin",
  "jax-cuda13-pjrt",
)  # versions as jaxlib's


def number(version: str) -> tuple[int, ...]:
  """1.20.0rc1 -> (1, 20): without what follows the release, and without zeros at its end."""
  found = [int(n) for n in re.match(r"(\d+(?:\.\d+)*)?", version)[0].split(".") if n]
  while found and not found[-1]:
    found.pop()
  return tuple(found)


def within(version: str, bounds: str) -> bool:
  """`within("0.10.2", ">=0.10,<0.12")`; no bounds are never broken."""
  have = number(version)
  for sign, text in re.findall(r"(>=|<=|==|!=|~=|<|>)\s*([\w.]+)", bounds):
    want = number(text)
    if sign == "~=":
      good = have >= want and have[: text.count(".")] == want[: text.count(".")]
    elif sign in ("==", "!="):
      good = (have == want) == (sign == "==")
    elif sign[0] == ">":
      good = have > want or (sign == ">=" and have == want)
    else:
      good = have < want or (sign == "<=" and have == want)
    if not good:
      return False
  return True


def requirements(package: str) -> dict[str, str]:
  """What an installed package needs without its extras: name -> bounds."""
  found = {}
  for text in importlib.metadata.requires(package) or ():
    need, _, marker = text.partition(";")
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[.*\])?\s*\(?([^()]*)\)?\s*", need)
    if match and not marker:
      found[match[1]] = match[2].strip()
  return found


def installed(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def versions(machine: object = None) -> Found:
  del machine
  python, have = platform.python_version(), {}
  try:
    needs = [("beit_jax", *need) for need in requirements("beit_jax").items()]
    bounds = importlib.metadata.metadata("beit_jax").get("Requires-Python") or ""
  except importlib.metadata.PackageNotFoundError:
    needs, bounds = [("beit_jax", name, "") for name in ("jax", "jaxlib", "flax", "numpy")], ""
    yield WARN, "beit_jax is not installed here, so its bounds on versions are not known", "pip install -e ."
  if not within(python, bounds):
    yield FAIL, f"python {python}, beit_jax needs {bounds}", "make an environment with such a Python"
  if installed("jax"):
    needs.append(("jax", "jaxlib", requirements("jax").get("jaxlib", "")))
  for by, name, bounds in needs:
    have[name] = installed(name) or "missing"
    if have[name] == "missing" or not within(have[name], bounds):
      yield FAIL, f"{name} {have[name]}, {by} needs {bounds or 'it'}", f"pip install '{name}{bounds}'"
  for name in PLUGINS:
    if installed(name) not in (None, have.get("jaxlib")):
      what = f"{name} {installed(name)} beside jaxlib {have.get('jaxlib')}"
      yield WARN, what, "pip install -e '.[cuda]', which installs both alike"
  yield OK, ", ".join([f"python {python}", *(f"{name} {version}" for name, version in have.items())]), ""
