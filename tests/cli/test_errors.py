"""Errors of the command name its options, not the arguments of the functions below."""

import pytest
from helpers.models import one_block_config, tiny_model

from keras_t5gemma import environment
from keras_t5gemma.cli import main, options
from keras_t5gemma.utils.checks import renamed

pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def preset(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("preset")
    tiny_model(tokenizer, config=one_block_config()).save_to_preset(path)
    return str(path)


def error_of(capsys, *argv):
    status = main.main(list(argv))
    return status, capsys.readouterr().err.removeprefix("keras-t5gemma: ").strip()


def test_version(capsys):
    assert main.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"keras-t5gemma {environment.VERSION}, python 3.")
    assert ", keras 3." in out and out.endswith("\n")
    assert main.main(["finetune", "--version"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", ["adapt", "convert"])
def test_an_empty_path_is_refused(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    status, error = error_of(capsys, command, "source", "--output=")
    assert (status, error) == (2, "Error parsing --output: a path must not be empty.")
    assert not list(tmp_path.iterdir())


def test_files_and_folders(capsys, tmp_path, preset):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"source": "a b", "target": "c"}\n' * 4)
    run = ["--preset", preset, "--output", str(tmp_path / "run")]
    for name, value, message in (
        ("train", "", "--train must be the path of a file or folder; got ''."),
        ("train", "a.doc", "--train must end in one of"),
        ("valid", "a.doc", "--valid must end in one of"),
    ):
        given = {"train": str(data), name: value}
        arguments = [f"--{name}={value}" for name, value in given.items()]
        status, error = error_of(capsys, "finetune", *run, *arguments)
        assert status == 1 and error.startswith(message)
        if name == "train":
            status, error = error_of(capsys, "pretrain", *run, *arguments)
            assert status == 1 and error.startswith(message)
    arguments = [*run, "--train", str(data)]
    lora = ["--lora-rank", "2", "--lora-parts", "nose"]
    status, error = error_of(capsys, "finetune", *arguments, *lora)
    assert status == 1 and error.startswith("--lora-parts must")
    status, error = error_of(capsys, "convert", preset, "--output", preset)
    assert status == 1 and error.startswith(f"--output {preset} exists already; pass ")
    assert "pass --overwrite to replace" in error


def test_arguments_of_two_presets(capsys, preset, tmp_path):
    for command in (["verify", preset, "nope"], ["generate", "--draft", "nope", "A"]):
        options = ["--preset", preset] if command[0] == "generate" else []
        status, error = error_of(capsys, *command, *options)
        name = "OTHER" if command[0] == "verify" else "--draft"
        assert status == 1 and error.startswith(f"{name} must be one of"), error
    status, error = error_of(capsys, "adapt", preset, f"--output={tmp_path / 'new'}")
    assert status == 1 and "ENCODER" in error
    status, error = error_of(capsys, "convert", "--output=a")
    assert status == 2 and "command." not in error and "PRESET" in error
    status, error = error_of(capsys, "generate", "--file=")
    assert (status, error) == (2, "Error parsing --file: a path must not be empty.")


def test_an_unknown_teacher(capsys, tmp_path, preset):
    pytest.importorskip("keras_hub")
    data = tmp_path / "texts.txt"
    data.write_text("a b c d\n" * 8)
    arguments = ["--preset", preset, "--output", str(tmp_path / "run")]
    arguments += ["--train", str(data), "--teacher", "nope"]
    status, error = error_of(capsys, "pretrain", *arguments)
    assert status == 1 and error == (
        "--teacher must be a name, folder or handle of a KerasHub causal LM, e.g. "
        "'gemma2_2b_en'; got 'nope'."
    )


def test_names_in_messages():
    message = "`lora_rank` of `fit` needs `preset`."
    assert main.with_options(message, options.Finetune) == (
        "--lora-rank of `fit` needs --preset."
    )
    assert main.with_options(message, options.Info) == (
        "`lora_rank` of `fit` needs PRESET."
    )
    of_file = "`preset`: a/preprocessor.json: `seed` must be"
    assert main.with_options(of_file, options.Finetune) == (
        "--preset: a/preprocessor.json: `seed` must be"
    )
    with pytest.raises(ValueError, match="^`b` and `c`$"), renamed(a="b"):
        raise ValueError("`a` and `c`")
    with pytest.raises(UnicodeError, match="`a`"), renamed(a="b"):
        raise UnicodeError("`a`")  # It has more than a message.
