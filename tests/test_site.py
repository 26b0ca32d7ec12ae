"""The documentation site: its pages, names and links, without building it."""

import dataclasses
import re
import sys

import pytest
from helpers import ROOT

import keras_t5gemma as kt
from keras_t5gemma.cli import main

sys.path.insert(0, str(ROOT / "docs/builder"))
import places  # noqa: E402
import reference  # noqa: E402
import tables  # noqa: E402

pytestmark = pytest.mark.one_backend
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
API = reference.api_pages()
GENERATED = {*places.COPIED.values(), *places.guide_pages(), *API, "cli.md"}


def listed():
    return [name for _, _, names in reference.PAGES.values() for name in names]


def test_reference_has_every_public_name_once():
    assert sorted(listed()) == sorted(reference.public_names())
    exported = {name for name in vars(kt) if not name.startswith("_")}
    assert set(listed()) <= exported
    # The rest are folders and modules of the package, and what it imports from typing.
    rest = exported - set(listed()) - {"TYPE_CHECKING"}
    package = ROOT / "keras_t5gemma"
    assert {n for n in rest if not list(package.glob(f"{n}*"))} == set()


@pytest.mark.parametrize("name", ["objectives", "callbacks"])
def test_reference_has_every_public_name_of_a_module(name):
    text = "\n".join(API.values())
    members = reference.members(name)
    assert len(members) >= 5
    for member in members:
        assert getattr(getattr(kt, name), member)
        assert f"::: keras_t5gemma.{name}.{member}\n" in text


def test_command_line_page_has_every_option():
    page = reference.cli_page()
    for command, (kind, _) in main.COMMANDS.items():
        section = page.split(f"\n## {command}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(kind):
            flag = f"--{field.name.replace('_', '-')}"
            assert f"`{flag}" in section or f"`{field.name.upper()}`" in section
    assert "· `cosine`" not in page and "`constant`, `cosine`" in page


def test_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = text.split("\nnav:\n")[1].split("\nhooks:")[0]
    found = re.findall(r"(\S+\.md)$|(guides/|api/)$", nav, re.M)
    pages = {page for page, _ in found} - {""}
    folders = {folder for _, folder in found} - {""}
    made = {page for page in GENERATED if page.endswith(".md")}
    single = {page for page in made if not page.startswith(("guides/", "api/"))}
    assert pages == {*PAGES, *single}
    assert folders == {"guides/", "api/"}


def test_list_of_guides_has_every_guide():
    assert sorted(places.guides()) == sorted(p.stem for p in ROOT.glob("guides/*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_or_files(page):
    text = (DOCS / page).read_text("utf-8")
    for target, _ in places.LINK.findall(text):
        path = (DOCS / target).resolve()
        assert target in GENERATED or path.exists(), target
    for name in re.findall(r"\]\[keras_t5gemma\.(\w+)[\w.]*\]", text):
        assert name in listed(), name


def test_tables_of_the_pages_are_made():
    used = [
        [part.strip() for part in call.split(";")]
        for page in PAGES
        for call in re.findall(
            r"^<!-- table: (.*?) -->$", (DOCS / page).read_text("utf-8"), re.M
        )
    ]
    assert {name for name, *_ in used} == set(tables.TABLES)
    for name, *arguments in used:
        if name in ("measured", "readme"):  # The planner has tests of its own.
            made = tables.TABLES[name](*arguments)
            assert len(made.splitlines()) > 5
            assert not made.rstrip().endswith(":")  # Nothing follows.
    with pytest.raises(ValueError, match="none"):
        tables.measured("a training step", "none")


def test_memory_table_takes_what_the_planner_allows():
    words, batch, options = tables.best_training("s-s", 8e9, tables.FULL)
    assert (words, options) == next(iter(tables.FULL.items()))
    limit = tables.SHARE * 8e9
    assert tables.training("s-s", batch, **options).total <= limit
    assert tables.training("s-s", 2 * batch, **options).total > limit
    choices = {"bfloat16": tables.LORA["bfloat16"]}
    assert tables.best_training("xl-xl", 6e9, choices) is None
