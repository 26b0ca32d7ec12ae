import os
import subprocess
import sys

import pytest
from conftest import tiny_config, tiny_model

from keras_t5gemma import cli


@pytest.fixture(scope="module")
def preset(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("preset")
    tiny_model(tokenizer).save_to_preset(str(path))
    return str(path)


def run(capsys, *argv):
    status = cli.main(list(argv))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_generate_from_arguments_a_file_and_a_pipe(
    preset, capsys, tmp_path, monkeypatch
):
    options = ["--preset", preset, "--max-length", "8"]
    status, out, _ = run(capsys, "generate", "A board", *options)
    assert status == 0 and out.endswith("\n")
    file = tmp_path / "text.txt"
    file.write_text("A board\n")
    assert run(capsys, "generate", "--file", str(file), *options)[1] == out
    with open(file) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(capsys, "generate", *options)[1] == out


def test_generate_lines_keeps_order(preset, capsys, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("A board\nThe quick fox\nA board\n")
    options = ["--preset", preset, "--max-length", "8", "--lines", "--batch-size", "2"]
    _, out, _ = run(capsys, "generate", "--file", str(file), *options)
    lines = out.split("\n")
    assert len(lines) == 4 and lines[0] == lines[2]


def test_presets_are_plain_lines_in_a_pipe(capsys):
    _, out, _ = run(capsys, "presets")
    rows = [line.split("\t") for line in out.splitlines()]
    assert {len(row) for row in rows} == {4}
    assert "t5gemma_2b_2b_prefixlm_it" in [row[0] for row in rows]
    assert "\x1b" not in out


def test_info(preset, capsys):
    _, out, _ = run(capsys, "info", preset)
    rows = dict(line.split("\t") for line in out.splitlines())
    assert rows["format"] == "keras_t5gemma"
    assert rows["weights stored as"] == "float32"
    assert rows["encoder"].startswith("3 layers, width 32")
    assert rows["parameters"] == f"{tiny_config().count_params():,}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "a", "--preset", "nothing_like_it"], "no name and no folder"),
        (["generate", "a", "--file", "b"], "TEXT or --file, not both"),
        (["generate", "--file", "/does/not/exist"], "/does/not/exist"),
        (["info", "t5gemma_mini"], "Did you mean"),
    ],
)
def test_errors_are_one_line_and_status_1(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert err.startswith("keras-t5gemma: ") and message in err
    assert "Traceback" not in err


def test_a_backend_is_chosen_when_none_is_named(monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: name == "torch" or None
    )
    cli.choose_backend(None)
    assert os.environ["KERAS_BACKEND"] == "torch"
    cli.choose_backend("jax")
    assert os.environ["KERAS_BACKEND"] == "jax"
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no backend is installed"):
        cli.choose_backend(None)


def test_closed_pipe_is_quiet():
    """`keras-t5gemma presets | head -1` ends without a complaint."""
    command = f"{sys.executable} -m keras_t5gemma.cli presets | head -1"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) == 1
    assert "Broken pipe" not in result.stderr
    assert "Traceback" not in result.stderr
