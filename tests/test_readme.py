"""The README is true: its folders exist, its Python runs, its links lead somewhere."""

import re

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_tree_lists_every_folder_of_the_package():
    tree = README.split("```\nkeras_t5gemma/")[1].split("```")[0]
    listed = set(re.findall(r"^  (\w+)/", tree, re.M))
    package = ROOT / "keras_t5gemma"
    folders = {p.name for p in package.iterdir() if p.is_dir()} - {"__pycache__"}
    assert listed == folders


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_stays_short():
    assert len(README.splitlines()) < 220


@pytest.mark.one_backend
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[-1][:30])
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_commands_are_the_ones_that_ci_runs():
    assert "pip install nox && nox" in README
    ci = (ROOT / ".ci/run").read_text()
    assert "nox" in ci.splitlines()[-1]
