"""Documents name files, functions and sections that exist."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_t5gemma"
DOCUMENTS = ("docs/architecture.md", "docs/facts.md", "CONTRIBUTING.md")
# `file.py` or `file.py::name.name`, relative to the package or to the repository.
REFERENCE = re.compile(r"`([\w/]+\.py)(?:::([\w.]+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")


def names_in(tree, prefix=""):
    """Dotted names of the classes, functions and variables of a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name
            yield from names_in(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield prefix + target.id


def wrong_references(text):
    for file, name in REFERENCE.findall(text):
        found = [p for p in (PACKAGE / file, ROOT / file) if p.exists()]
        if not found:
            yield file
        elif name and name not in names_in(ast.parse(found[0].read_text("utf-8"))):
            yield f"{file}::{name}"


def anchors(text):
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_references_exist(document):
    text = (ROOT / document).read_text("utf-8")
    assert list(wrong_references(text)) == []


def test_a_wrong_reference_is_found():
    text = "`config.py`, `config.py::STACKS`, `config.py::NONE`, `nothing.py`"
    assert list(wrong_references(text)) == ["config.py::NONE", "nothing.py"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target, anchor in LINK.findall(path.read_text("utf-8")):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            assert anchor[1:] in anchors(file.read_text("utf-8")), anchor


def test_cited_sections_of_the_facts_exist():
    text = (ROOT / "docs/facts.md").read_text("utf-8")
    sections = set(re.findall(r"^## (\d+)\.", text, re.M))
    cited = {}
    for folder in (PACKAGE, ROOT / "tests"):
        for path in folder.rglob("*.py"):
            source = re.sub(r"\n\s*#?\s*", " ", path.read_text("utf-8"))
            for number in re.findall(r"docs/facts\.md, section (\d+)", source):
                cited.setdefault(number, []).append(path.name)
    assert cited, "nothing cites docs/facts.md"
    assert set(cited) <= sections, cited


def test_table_has_the_layers_that_lint_checks():
    lines = (ROOT / ".importlinter").read_text("utf-8").split("layers =\n")[1]
    layers = re.findall(r"^    (\w+)$", lines.split("\n\n")[0], re.M)
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    table = text.split("| package | what is in it |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == [*layers, "utils"]
