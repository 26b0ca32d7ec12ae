"""Notebooks are their scripts, executed: the same cells, outputs, no errors."""

import importlib.util
import re

import nbformat
import pytest
from helpers import ROOT

pytestmark = pytest.mark.one_backend

FOLDER = ROOT / "guides"
GUIDES = sorted(path.stem for path in FOLDER.glob("*.py"))
# An absolute path, not part of a URL or of another word.
ABSOLUTE = re.compile(r"(?<![\w./:<])/(?:[\w.-]+/)+[\w.-]*|\b[A-Z]:\\\w")


def load_tool():
    path = ROOT / "tools/build_notebooks.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def tool():
    return load_tool()


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def is_run(cell):
    skipped = "skip-execution" in cell.metadata.get("tags", [])
    return cell.cell_type == "code" and not skipped


def texts(output):
    """Text of an output, not pictures."""
    yield output.get("text", "")
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield str(value)


@pytest.mark.parametrize("name", GUIDES)
def test_cells_are_those_of_the_script(name, tool):
    parts = [
        [(cell.cell_type, cell.source, cell.id, cell.metadata) for cell in book.cells]
        for book in (tool.read_script(name), read(name))
    ]
    assert parts[0] == parts[1], f"run: python tools/build_notebooks.py {name}"


@pytest.mark.parametrize("name", GUIDES)
def test_it_was_executed_without_errors(name):
    cells = [cell for cell in read(name).cells if is_run(cell)]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} >= {"stream"}
    assert "error" not in {output.output_type for output in outputs}
    assert "stderr" not in {output.get("name") for output in outputs}
    for output in outputs:
        for text in texts(output):
            assert ABSOLUTE.findall(text) == []
            assert "\x1b" not in text and "\r" not in text


@pytest.mark.parametrize("name", GUIDES)
def test_it_is_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000


@pytest.mark.parametrize("name", GUIDES)
def test_it_opens_with_purpose_time_and_installation(name):
    opening, install = read(name).cells[:2]
    assert opening.source.startswith("# ")
    assert "What this shows: " in opening.source
    assert re.search(
        r"Time on two processor cores: about (\d+ seconds|\d+ minutes?)\.",
        opening.source,
    )
    assert install.metadata.tags == ["skip-execution"]
    assert re.search(r'^%pip install .*"keras-t5gemma\[[\w,]+\]"', install.source, re.M)


def test_no_notebook_without_a_script():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == GUIDES


def test_paths_are_removed(tool, tmp_path):
    text = f"{tmp_path}/runs/a.png {tool.GUIDES}/b.py {tmp_path}\n50%\r100%\n"
    assert tool.without_paths(text, str(tmp_path)) == "runs/a.png guides/b.py .\n100%\n"
    assert ABSOLUTE.findall(text) and ABSOLUTE.findall("'/usr/lib/x'")
    assert ABSOLUTE.findall("hf://a/b and/or https://a.b/c/d </a>") == []


def test_a_warning_of_the_package_stops_the_build(tool):
    stream = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: slow")
    with pytest.raises(RuntimeError, match="slow"):
        tool.clean([stream], "folder")
