"""The links, file names, test names and commands that the documentation mentions exist."""

import importlib.util
import re
from pathlib import Path

import pytest

import beit_jax
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.md")])
SOURCES = [
  path for folder in ("beit_jax", "benchmarks", "configs", "tests") for path in (ROOT / folder).rglob("*.py")
]
# Where a file name in the documentation may be relative to, besides the page's own folder.
BASES = (ROOT, ROOT / "beit_jax", ROOT / "configs", ROOT / "launch" / "gke")


def broken_links(page: Path, text: str) -> list[str]:
  """The relative links and anchors of a page that lead nowhere."""
  broken = []
  for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(text)):
    if re.match(r"[a-z]+:", target):
      continue  # an address on the network, which a test must not depend on
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if name and not path.exists():
      broken.append(f"{target}: no such file")
    elif anchor and anchor not in anchors(text if path == page else path.read_text()):
      broken.append(f"{target}: no such heading")
  return broken


def anchors(text: str) -> set[str]:
  """The anchors that GitHub gives to the headings of a Markdown page."""
  found: set[str] = set()
  for heading in re.findall(r"^#{1,6} +(.+?) *$", _without_blocks(text), re.M):
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
    count = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
    found.add(f"{slug}-{count}" if count else slug)
  return found


def missing_files(page: Path, text: str) -> list[str]:
  """The source files named in a page that do not exist, and the tests named after `::` that their file lacks."""
  missing = []
  for name, test in re.findall(r"(?<![\w/:.<*{-])([\w][\w./-]*\.(?:py|md|sh|toml|cff))\b(?:::(\w+))?", text):
    if Path(name).stem == "FILE":
      continue  # a placeholder
    found = [base / name for base in (page.parent, *BASES) if (base / name).is_file()]
    if not found:
      missing.append(name)
    elif test and not re.search(rf"\bdef {test}\b", found[0].read_text()):
      missing.append(f"{name}::{test}")
  return missing


def missing_tests(text: str) -> list[str]:
  """The tests named in code spans that no test file defines, and the `-k` words that select nothing."""
  files = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
  names = {name for source in files.values() for name in re.findall(r"^\s*def (test_\w+)", source, re.M)}
  modules = {path.stem for path in files}
  missing = [n for n in re.findall(r"`(test_\w+)`", text) if n not in names | modules]
  for name, double, single in re.findall(r"(tests/[\w/]+\.py) -k (?:\"([^\"]+)\"|(\w+))", text):
    source = (ROOT / name).read_text() if (ROOT / name).is_file() else ""
    known = " ".join(re.findall(r"^\s*def (test_\w+)", source, re.M)) + f" {Path(name).stem}"
    words = re.findall(r"\w+", double or single)
    missing += [f"{name} -k {w}" for w in words if w not in ("and", "or", "not") and w not in known]
  return missing


def missing_commands(text: str) -> list[str]:
  """The modules of this repository that a `python -m` in a page names and that cannot be run."""
  names = re.findall(r"python3? -m ((?:beit_jax|tests)[\w.]*)", text)
  return [name for name in names if not _can_run(name.rstrip("."))]


def _can_run(name: str) -> bool:
  try:
    spec = importlib.util.find_spec(name)
  except ModuleNotFoundError:
    return False
  if spec is not None and spec.submodule_search_locations:
    spec = importlib.util.find_spec(f"{name}.__main__")
  return spec is not None


def _without_blocks(text: str) -> str:
  return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def _without_code(text: str) -> str:
  return re.sub(r"`[^`\n]*`", "", _without_blocks(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  broken = broken_links(page, page.read_text())
  assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
  missing = missing_files(page, page.read_text())
  assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page):
  missing = missing_tests(page.read_text())
  assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_exist(page):
  missing = missing_commands(page.read_text())
  assert not missing


def test_pages_named_in_the_code_exist():
  for path in SOURCES:
    names = set(re.findall(r"\bdocs/\w+\.md\b", path.read_text()))
    assert not [name for name in names if not (ROOT / name).is_file()], path


def test_every_page_is_linked_from_the_readme():
  linked = set(re.findall(r"\]\((docs/\w+\.md|[A-Z]+\.md)[#)]", (ROOT / "README.md").read_text()))
  assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"} == linked


BROKEN = """# A page

[a](b.md), [c](../README.md#no-such-heading), [d](#nor-this), [fine](../README.md), [fine](#a-page)
`beit_jax/nothing.py`, `tests/test_docs.py::test_nothing`, `test_nothing`, `tests/test_docs.py`
python -m pytest tests/test_docs.py -k "links or nothing"; python -m beit_jax.nothing; python -m beit_jax.main
"""


def test_the_checks_find_what_is_broken():
  page = ROOT / "docs" / "page.md"
  assert [line.split(":")[0] for line in broken_links(page, BROKEN)] == [
    "b.md",
    "../README.md#no-such-heading",
    "#nor-this",
  ]
  assert missing_files(page, BROKEN) == [
    "b.md",
    "beit_jax/nothing.py",
    "tests/test_docs.py::test_nothing",
  ]
  assert missing_tests(BROKEN) == ["test_nothing", "tests/test_docs.py -k nothing"]
  assert missing_commands(BROKEN) == ["beit_jax.nothing"]


def test_versions_agree():
  """The package, CITATION.cff and the newest released section of CHANGELOG.md name one version."""
  citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
  changelog = re.search(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
  assert citation == changelog == beit_jax.__version__
