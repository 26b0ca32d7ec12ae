import os
import subprocess
import sys

import pytest
from helpers.models import tiny_config, tiny_model

from keras_t5gemma import environment
from keras_t5gemma.cli import main


@pytest.fixture(scope="module")
def preset(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("preset")
    tiny_model(tokenizer).save_to_preset(str(path))
    return str(path)


def run(capsys, *argv):
    status = main.main(list(argv))
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.one_backend
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


@pytest.mark.one_backend
def test_generate_lines_keeps_order(preset, capsys, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("A board\nThe quick fox\nA board\n")
    options = ["--preset", preset, "--max-length", "8", "--lines", "--batch-size", "2"]
    _, out, _ = run(capsys, "generate", "--file", str(file), *options)
    lines = out.split("\n")
    assert len(lines) == 4 and lines[0] == lines[2]


@pytest.mark.one_backend
def test_generate_takes_the_options_of_python(preset, capsys):
    import keras_t5gemma

    model = keras_t5gemma.Seq2SeqLM.from_preset(preset)
    options = ["--preset", preset, "--max-length", "8"]
    best = model.generate("A board", 8, num_beams=3, num_return_sequences=2)
    flags = ["--num-beams", "3", "--num-return-sequences", "2"]
    _, out, _ = run(capsys, "generate", "A board", *options, *flags)
    assert out == "".join(text + "\n" for text in best)
    sampled = model.generate("A board", 8, temperature=2.0, seed=3)
    flags = ["--temperature", "2.0", "--seed", "3"]
    _, out, _ = run(capsys, "generate", "A board", *options, *flags)
    assert out == sampled + "\n"
    _, out, _ = run(capsys, "generate", "A board", *options, *flags, "--stream")
    assert out == sampled + "\n"
    flags = ["--top-p", "2"]
    status, _, err = run(capsys, "generate", "A board", *options, *flags)
    assert status == 1 and "`top_p` must be above 0 and at most 1.0; got 2.0" in err
    status, _, err = run(capsys, "generate", "A", "B", "--stream", *options)
    assert status == 1 and "--stream takes one text; got 2" in err


def test_presets_are_plain_lines_in_a_pipe(capsys):
    _, out, _ = run(capsys, "presets")
    rows = [line.split("\t") for line in out.splitlines()]
    assert {len(row) for row in rows} == {6}
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
        (["info", "t5gemma_minis"], "Did you mean"),
    ],
)
def test_errors_are_one_line_and_status_1(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert err.startswith("keras-t5gemma: ") and message in err
    assert "Traceback" not in err


def test_a_backend_is_chosen_when_keras_would_take_a_missing_one(monkeypatch, tmp_path):
    installed = {"torch"}
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name: name in installed or None
    )
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    environment.choose_backend()
    assert os.environ["KERAS_BACKEND"] == "jax"  # The user's word.
    monkeypatch.delenv("KERAS_BACKEND")
    environment.choose_backend()
    assert os.environ["KERAS_BACKEND"] == "torch"
    monkeypatch.delenv("KERAS_BACKEND")
    installed.update(("jax", "tensorflow"))
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    environment.choose_backend()
    assert "KERAS_BACKEND" not in os.environ  # Keras's own choice is installed.
    installed.clear()
    with pytest.raises(ModuleNotFoundError, match="needs a backend: install"):
        environment.choose_backend()


def test_backend_option_starts_again_with_it(monkeypatch):
    calls = []
    monkeypatch.setattr(main.os, "execv", lambda *args: calls.append(args))
    monkeypatch.setattr(main, "_loaded_backend", lambda: "jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    main.main(["--backend", "jax", "presets"])
    assert not calls
    main.main(["--backend", "torch", "presets"])
    assert os.environ["KERAS_BACKEND"] == "torch"
    assert calls[0][1][1:] == ["-m", "keras_t5gemma.cli.main", "--backend", "torch"] + [
        "presets"
    ]


def test_info_of_a_published_name_needs_no_network(capsys):
    _, out, _ = run(capsys, "info", "t5gemma_9b_2b_ul2")
    rows = dict(line.split("\t") for line in out.splitlines())
    assert rows["parameters"] == "12,292,375,296"
    assert rows["  cross-attention"] == "436,327,424"
    assert "kaggle://keras/t5-gemma/keras/t5gemma_9b_2b_ul2/1" in rows["sources"]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    from helpers.gemma2 import SMALL, make_gemma2

    path = tmp_path_factory.mktemp("gemma2")
    make_gemma2(**SMALL).save_to_preset(str(path))
    return str(path)


def test_adapt_convert_verify_info(gemma2, capsys, tmp_path):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    status, out, err = run(capsys, "adapt", gemma2, "--output", ours)
    assert status == 0, err
    assert "logits equal" in out and "all of it is trained from the start" in out
    assert "keras-t5gemma pretrain --preset" in out
    assert run(capsys, "verify", ours)[1].startswith(f"{ours}: all ")
    status, out, err = run(
        capsys, "convert", ours, "--output", theirs, "--to", "transformers"
    )
    assert status == 0, err
    status, out, _ = run(capsys, "verify", ours, theirs)
    assert status == 0
    assert "0 of them differ" in out and "same at 1e-05" in out
    rows = dict(line.split("\t") for line in run(capsys, "info", ours)[1].splitlines())
    assert rows["lineage: cross_attention"] == "copy"
    assert rows["format"] == "keras_t5gemma"

    other = str(tmp_path / "other")
    run(capsys, "adapt", gemma2, "--output", other, "--cross-attention", "random")
    status, out, _ = run(capsys, "verify", ours, other)
    assert status == 1 and "differ at 1e-05" in out
    status, _, err = run(capsys, "adapt", gemma2, "--output", ours)
    assert status == 1 and "--overwrite" in err
    status, _, err = run(capsys, "verify", theirs)
    assert status == 1 and "has no checksums.json" in err
    status, _, err = run(capsys, "convert", ours, "--output", "x", "--to", "onnx")
    assert status == 1 and "'onnx'" in err


def test_closed_pipe_is_quiet():
    """`keras-t5gemma presets | head -1` ends without a complaint."""
    command = f"{sys.executable} -m keras_t5gemma.cli presets | head -1"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) == 1
    assert "Broken pipe" not in result.stderr
    assert "Traceback" not in result.stderr
