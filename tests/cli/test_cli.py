import dataclasses
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import keras
import pytest
from helpers.models import tiny_config, tiny_model

from keras_t5gemma import environment
from keras_t5gemma.cli import commands, main, options
from keras_t5gemma.data import pair_dataset
from keras_t5gemma.distribution import layouts
from keras_t5gemma.evaluation.options import EvaluateOptions
from keras_t5gemma.modeling import heads
from keras_t5gemma.modeling.quantized_loading import QUANTIZED
from keras_t5gemma.planning.costs import COMPUTE_BYTES
from keras_t5gemma.recipes.options import FinetuneOptions, PretrainOptions
from keras_t5gemma.training.optimizers import OPTIMIZERS
from keras_t5gemma.utils.options import choices, field_docs


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
    for dash in ([], ["-"], ["--file", "-"]):
        with open(file) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert run(capsys, "generate", *dash, *options)[1] == out


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    kept = []
    package = SimpleNamespace(cache_compiled_programs=lambda *args: kept.append(args))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands._cache_programs(package, "none")
    commands._cache_programs(package, "auto")  # The tests have a folder on JAX.
    assert not kept
    commands._cache_programs(package, "here")
    assert [folder for folder, _ in kept] == ["here"]
    if keras.backend.backend() == "jax":
        import jax

        before = jax.config.jax_compilation_cache_dir
        try:
            jax.config.update("jax_compilation_cache_dir", None)
            commands._cache_programs(package, "auto")
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
        assert kept[-1] == (tmp_path / "keras-t5gemma" / "programs", 2**30)


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
    flags += ["--draft", preset]
    _, out, _ = run(capsys, "generate", "A board", *options, *flags)
    assert out == sampled + "\n"
    status, _, err = run(
        capsys, "generate", "A board", *options, *flags, "--speculate", "source"
    )
    assert status == 1 and "--speculate must be None with a --draft" in err
    for name in ("", "none"):
        status, _, err = run(capsys, "generate", "A", *options, "--draft", name)
        assert status == 1 and "--draft must be" in err
        assert f"got {name!r}" in err
    flags = ["--top-p", "2"]
    status, _, err = run(capsys, "generate", "A board", *options, *flags)
    assert status == 1 and "--top-p must be a number above 0 and at most 1" in err
    status, _, err = run(capsys, "generate", "A", "B", "--stream", *options)
    assert status == 1 and "--stream takes one text; got 2" in err
    for size in ("0", "-1"):
        status, out, err = run(capsys, "generate", "A", "--batch-size", size, *options)
        assert status == 1 and not out and "--batch-size must be" in err


def test_presets_with_a_closed_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main.main(["presets"]) == 0


def test_presets_are_plain_lines_in_a_pipe(capsys):
    _, out, _ = run(capsys, "presets")
    rows = [line.split("\t") for line in out.splitlines()]
    assert {len(row) for row in rows} == {6}
    assert "t5gemma_2b_2b_prefixlm_it" in [row[0] for row in rows]
    assert "\x1b" not in out


@pytest.mark.one_backend
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
        (
            ["generate", "a", "--preset", "nothing_like_it"],
            "neither a name nor a folder",
        ),
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


def test_backend_option_must_come_before_keras(capsys, monkeypatch):
    loaded = keras.config.backend()
    monkeypatch.setenv("KERAS_BACKEND", loaded)
    assert run(capsys, "--backend", loaded, "presets")[0] == 0
    other = "torch" if loaded == "jax" else "jax"
    status, _, err = run(capsys, "--backend", other, "presets")
    assert status == 1 and err.count("\n") == 1
    assert f"already loaded with the backend '{loaded}'" in err
    assert os.environ["KERAS_BACKEND"] == loaded


# As in `python -m keras_t5gemma.cli` while the package is imported.
AS_COMMAND = """
import sys
sys.orig_argv, sys.argv = [sys.executable, "-m", "keras_t5gemma.cli"], ["-m"]
"""


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_imports_neither_keras_nor_a_backend():
    commands = ["", *main.COMMANDS]
    code = f"""{AS_COMMAND}
from keras_t5gemma.cli.main import main
for command in {commands!r}:
    try:
        main([*filter(None, [command]), "--help"])
    except SystemExit as stop:
        assert not stop.code
heavy = {{"keras", "keras_hub", "jax", "torch", "tensorflow", "numpy"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    out = run_python(code)
    assert all(f"usage: keras-t5gemma {name}".strip() in out for name in commands)


@pytest.mark.one_backend
def test_the_command_registers_what_a_library_user_gets():
    code = f"""{AS_COMMAND}
import keras_t5gemma
from keras_t5gemma.cli.commands import load_package
assert "keras" not in sys.modules and not hasattr(keras_t5gemma, "Seq2SeqLM")
assert load_package().Seq2SeqLM is keras_t5gemma.Seq2SeqLM
import keras
print(*keras.saving.get_custom_objects(), sep="\\n")
"""
    registered = keras.saving.get_custom_objects()
    ours = {name for name in registered if name.startswith("keras_t5gemma>")}
    assert "keras_t5gemma>Seq2SeqLM" in ours
    assert ours <= set(run_python(code).splitlines())


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/bin/keras-t5gemma", "info"], ["python", "/bin/keras-t5gemma"], True),
        (["-m", "info"], ["python", "-X", "dev", "-m", "keras_t5gemma.cli"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["train.py", "keras-t5gemma"], ["python", "train.py"], False),
        # A child process that `multiprocessing` has given its parent's arguments.
        (["/bin/keras-t5gemma", "info"], ["python", "-c", "spawn_main()"], False),
        ([""], ["python"], False),
    ],
)
def test_the_command_line_is_recognized(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert environment.is_command_line() == expected
    assert not environment.defers_imports()  # Keras is loaded here.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("finetune --preset p", "Missing options: --train, --output"),
        ("finetune --preset p --epoch 3", "Unrecognized options: --epoch 3$"),
        ("convert preset folder -", "Unrecognized options: folder -$"),
        ("generate a --max-length many", "--max-length: .*'many'"),
        ("pretrain --objective mlm", "'mlm' for argument '--objective'.*ul2"),
        (
            "plan --preset p --memory 1 --length 3 --devices 8 --batch 3 --mesh 4",
            "--mesh: .*'4'",
        ),
        ("teach", "teach"),
        ("", "Expected one of .*generate"),
        ("finetune --config nowhere.yaml", "nowhere.yaml: .*No such file"),
        ("info --config nowhere.yaml", "info does not accept --config"),
        ("finetune --config a.yaml --config=b.yaml", "--config must be given once"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(capsys, argv, message):
    status, out, err = run(capsys, *argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("keras-t5gemma: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_config_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: p\ntrain: [a.txt, b.txt]\noutput: -o\nlearning_rate: 1e-4\n"
        "rematerialize: true\nmax_steps: null\nwarmup_steps: 3\n"
    )
    command = main.parse(["pretrain", "--config", str(file), "--epochs", "7"]).command
    assert (command.preset, command.train) == ("p", ("a.txt", "b.txt"))
    assert (command.output, command.learning_rate) == ("-o", 1e-4)
    assert (command.rematerialize, command.max_steps) == (True, None)
    assert (command.warmup_steps, command.epochs) == (3, 7)
    flags = [f"--config={file}", "--train", "c.txt", "--no-rematerialize"]
    command = main.parse(["pretrain", *flags]).command
    assert (command.train, command.rematerialize) == (("c.txt",), False)
    for content, message in (
        ("epoch: 3", "run.yaml: pretrain has no option 'epoch'"),
        ("preset: p\ntrain: t\noutput: o\nepochs: many", "--epochs.*'many'"),
        ("epochs", "must hold a mapping"),
        ("epochs: [", "run.yaml: "),
    ):
        file.write_text(content)
        status, _, err = run(capsys, "pretrain", "--config", str(file))
        assert status == 2 and err.count("\n") == 1
        assert re.search(message, err), err


def test_choices_are_those_of_the_package():
    finetune, pretrain = choices(FinetuneOptions), choices(PretrainOptions)
    assert finetune["batching"] == pair_dataset.BATCHINGS
    assert finetune["optimizer"] == pretrain["optimizer"] == tuple(OPTIMIZERS)
    assert choices(EvaluateOptions)["pooling"] == heads.POOLINGS
    plan = choices(options.Plan)
    assert set(plan["dtype"]) == set(COMPUTE_BYTES)
    assert set(plan["quantize"]) == {*QUANTIZED, None}
    assert set(choices(options.Generate)["quantize"]) == {*QUANTIZED, None}
    assert set(plan["strategy"]) == {*layouts.STRATEGIES, None}
    assert plan["optimizer"] == tuple(OPTIMIZERS)
    assert set(choices(main.Arguments)["backend"]) == {*environment.BACKENDS, None}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_has_a_docstring(name):
    kind = main.COMMANDS[name][0]
    docs = field_docs(kind)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    assert [f.name for f in dataclasses.fields(kind) if not docs.get(f.name)] == []


@pytest.mark.one_backend
def test_info_of_a_published_name_needs_no_network(capsys):
    _, out, _ = run(capsys, "info", "t5gemma_9b_2b_ul2")
    rows = dict(line.split("\t") for line in out.splitlines())
    assert rows["parameters"] == "12,292,375,296"
    assert rows["  cross-attention"] == "436,327,424"
    assert rows["fits a card of 24 GB in"] == "int8, int4"
    assert "kaggle://keras/t5-gemma/keras/t5gemma_9b_2b_ul2/1" in rows["sources"]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    pytest.importorskip("keras_hub")
    from helpers.gemma2 import SMALL, make_gemma2

    path = tmp_path_factory.mktemp("gemma2")
    make_gemma2(**SMALL).save_to_preset(str(path))
    return str(path)


@pytest.mark.one_backend
def test_adapt_convert_verify_info(gemma2, capsys, tmp_path):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    status, out, err = run(capsys, "adapt", gemma2, "--output", ours)
    assert status == 0, err
    assert "logits equal" in out and "all weights are trained from the start" in out
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
    status, out, _ = run(capsys, "verify", ours, "t5gemma_mini")
    assert status == 1 and "another shape" in out
    status, _, err = run(capsys, "verify", ours, theirs, "--tolerance", "-1")
    assert status == 1 and "--tolerance must be a number at least 0; got -1" in err
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
