"""The README is true: its tree is the tree, its Python runs."""

import re

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def files_in_tree():
    tree = README.split("## Files")[1].split("```")[1]
    paths, parents = set(), []
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        if not name.endswith("/"):
            paths.add("".join(parents))
    return paths


def test_tree_lists_every_module_once_and_nothing_else():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("keras_t5gemma", "tools", "benchmarks", "experiments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md")
        and path.name != "__init__.py"
        and "presets" not in path.parent.parts[-2:]
    }
    assert files_in_tree() == found


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[-1][:30])
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_commands_are_the_ones_that_ci_runs():
    assert "pip install nox && nox" in README
    ci = (ROOT / ".ci/run").read_text()
    assert "nox" in ci.splitlines()[-1]
