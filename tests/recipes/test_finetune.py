import csv
import inspect
import json
import shutil

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, enlarge, numpy

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.cli import main
from keras_t5gemma.recipes import finetune as module
from keras_t5gemma.recipes import run_directory, training_setup
from keras_t5gemma.recipes.finetune import finetune

# Its parts have tests on every backend.
pytestmark = pytest.mark.one_backend
ROWS = [
    {"text": f"{s} {i}", "summary": s.split()[-1]} for i in range(2) for s in SENTENCES
]
FIELDS = {"source": "text", "target": "summary"}
# Two epochs of three steps.
OPTIONS = FIELDS | {
    "batch_size": 4,
    "epochs": 2,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "metrics": ["rouge", "exact_match"],
    "sample_rows": 3,
    "max_length": 6,
    "verbose": 0,
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A preset, and pairs to learn, to validate and to test on."""
    folder = tmp_path_factory.mktemp("files")
    # One block a tower: every run below builds a few models.
    stack = kt.StackConfig(1, 16, 32, 2, 1, 8)
    backbone = enlarge(kt.Backbone(kt.T5GemmaConfig(stack, stack, 480)))
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    kt.Seq2SeqLM(backbone, preprocessor).save_to_preset(str(folder / "base"))
    return {
        "preset": str(folder / "base"),
        "train": write_rows(folder / "train.jsonl", ROWS),
        "valid": write_rows(folder / "valid.jsonl", ROWS[:5]),
        "test": write_rows(folder / "test.jsonl", ROWS[5:8]),
    }


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run that nothing disturbs, by the command."""
    folder = tmp_path_factory.mktemp("runs") / "a" / "run"
    argv = ["finetune", "--output", str(folder)]
    for name, value in (files | OPTIONS).items():
        value = value if isinstance(value, list) else [value]
        argv += ["--" + name.replace("_", "-"), *map(str, value)]
    assert main.main(argv) == 0
    return run_directory.RunDirectory(folder)


def read_log(folder):
    with open(folder.log, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v != "NA"} for row in rows]


def tensors(preset):
    return {k: t.read() for k, t in open_checkpoint(preset).tensors().items()}


def assert_same(preset, other):
    a, b = tensors(preset), tensors(other)
    assert set(a) == set(b)
    assert [path for path in a if (a[path] != b[path]).any()] == []


def test_the_folder_of_a_run(run, files):
    names = {path.name for path in run.path.iterdir()} - {"curves.png"}
    assert names == {
        "config.json",
        "run.yaml",
        "log.csv",
        "samples.jsonl",
        "best",
        "preset",
        "scores.json",
    }
    config = json.loads(run.config.read_text())
    assert config["options"]["batch_size"] == 4
    assert config["options"]["optimizer"] == "adamw"
    assert config["options"]["schedule"] == "constant"
    assert set(config["options"]) == set(inspect.signature(finetune).parameters)
    assert config["data"]["valid"]["rows"] == 5
    assert config["backend"] == keras.config.backend()

    log = read_log(run)
    assert [row["epoch"] for row in log] == [0, 1]
    assert {"loss", "val_loss", "val_rougeL", "val_exact_match"} <= set(log[0])
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [row.get("epoch") for row in samples] == [0] * 3 + [1] * 3 + [None] * 8
    assert [row["source"] for row in samples[-3:]] == [r["text"] for r in ROWS[5:8]]

    scores = json.loads(run.scores.read_text())
    best = min(log, key=lambda row: row["val_loss"])
    assert scores["valid"]["loss"]["mean"] == pytest.approx(best["val_loss"], abs=1e-4)
    assert scores["valid"]["rougeL"]["standard_error"] is not None
    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(files["preset"])
    base = kt.Seq2SeqLM.from_preset(files["preset"], preprocessor=preprocessor)
    answers = base.generate([row["text"] for row in ROWS[:5]], 6)
    before = kt.score_texts(answers, [row["summary"] for row in ROWS[:5]], ["rouge"])
    before = before["rougeL"]["mean"]
    assert scores["valid"]["rougeL"]["before"] == pytest.approx(before)
    assert scores["valid"]["loss"]["before"] > scores["valid"]["loss"]["mean"]
    hits = [row["answer"].strip() == row["reference"] for row in samples[-3:]]
    assert scores["test"]["exact_match"]["mean"] == pytest.approx(100 * np.mean(hits))
    model = kt.Seq2SeqLM.from_preset(run.preset)
    assert model.generate(ROWS[5]["text"], 6) == samples[-3]["answer"]
    assert_same(run.preset, run.best)

    card = (run.preset / "README.md").read_text()
    assert "| batch_size | 4 |" in card and "| test rougeL |" in card
    assert "| measure | value | standard error | base |" in card
    assert config["data"]["train"]["sha256"] in card
    assert str(run.path.parent) not in card and files["train"] not in card


def test_a_stopped_run_goes_on(run, files, tmp_path, monkeypatch):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(batch)
            if len(steps) == 4:
                raise KeyboardInterrupt

    steps = []
    make = module._callbacks
    arguments = files | OPTIONS | {"output": tmp_path / "run", "save_freq": 2}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_callbacks", lambda *args: [*make(*args), Stop()])
        with pytest.raises(KeyboardInterrupt):
            finetune(**arguments)
    folder = run_directory.RunDirectory(tmp_path / "run")
    assert (folder.backup / "progress.json").exists() and not folder.is_trained()

    with pytest.raises(ValueError, match="`learning_rate` is 0.001 there, 0.1 here"):
        finetune(**arguments | {"learning_rate": 0.1})
    fewer = write_rows(tmp_path / "fewer.jsonl", ROWS[:-1])
    with pytest.raises(ValueError, match="with other options: `train` is '"):
        finetune(**arguments | {"train": fewer})

    def fail(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:  # After the last step.
        patch.setattr(run_directory.RunDirectory, "make_preset", fail)
        patch.setattr(module, "_callbacks", lambda *args: [*make(*args), Stop()])
        with pytest.raises(OSError, match="the disk is full"):
            finetune(**arguments)
    assert len(steps) == 4 + 4  # The last backup was made after the second.
    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", fail)
        with pytest.raises(OSError, match="the disk is full"):
            finetune(**arguments)
    assert folder.is_trained() and not folder.scores.exists()
    assert not folder.backup.exists()
    monkeypatch.setattr(module, "_train", fail)  # It is not trained again.
    assert main.main(["finetune", "--config", str(folder.options)]) == 0
    scores = json.loads(folder.scores.read_text())

    assert_same(folder.preset, run.preset)
    assert scores == json.loads(run.scores.read_text())
    speed = {"tokens_per_second", "padding"}  # Of the steps since the stop.
    for row, expected in zip(read_log(folder), read_log(run), strict=True):
        assert {k: v for k, v in row.items() if k not in speed} == {
            k: v for k, v in expected.items() if k not in speed
        }
    assert folder.samples.read_text() == run.samples.read_text()
    with pytest.raises(ValueError, match="finished run; pass `overwrite`"):
        finetune(**arguments)
    assert main.main(["finetune", "--config", str(folder.options)]) == 1


def test_overwriting(run, tmp_path):
    folder = run_directory.RunDirectory(tmp_path)
    config = json.loads(run.config.read_text())
    assert not folder.must_be_cleared(config, False)
    folder.begin("finetune", config, False)
    other = {**config, "options": config["options"] | {"epochs": 7}}
    assert not folder.must_be_cleared(other, False)  # Nothing was trained.
    folder.log.write_text("epoch,loss\n")
    with pytest.raises(ValueError, match="`epochs` is 2 there, 7 here"):
        folder.must_be_cleared(other, False)
    assert folder.must_be_cleared(other, True)
    assert not folder.must_be_cleared(config, True)  # It goes on.
    free = {"save_freq": 1, "verbose": 2, "output": "there"}
    free = {**config, "options": config["options"] | free}
    assert not folder.must_be_cleared(free, False)
    (folder.best / "assets").mkdir(parents=True)
    mine = folder.path / "notes.txt"
    mine.write_text("of the user")
    folder.begin("finetune", other, True)
    assert set(folder.path.iterdir()) == {folder.config, folder.options, mine}
    assert json.loads(folder.config.read_text()) == other
    folder.config.write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="is not a run directory"):
        folder.must_be_cleared(config, True)


def logits(model):
    x, _, _ = model.preprocessor(
        {"encoder_text": [ROWS[0]["text"]], "decoder_text": ["a board"]}
    )
    return numpy(model(x))


def test_adapters_averaged_packed_accumulated(run, files, tmp_path, monkeypatch):
    """What is measured, what is kept and what was trained are one model."""
    base = tensors(files["preset"])
    saved = []
    save = kt.Seq2SeqLM.save_to_preset

    def save_and_note(self, folder):
        save(self, folder)
        saved.append(logits(self))

    monkeypatch.setattr(kt.Seq2SeqLM, "save_to_preset", save_and_note)
    options = {
        "lora_rank": 2,
        "lora_parts": ["decoder"],
        "batching": "packed",
        "batch_size": 1,
        "steps_per_epoch": 3,
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "ema_momentum": 0.5,
        "learning_rate": 0.1,
        "schedule": "cosine",
        "label_smoothing": 0.1,
        "metrics": "bleu",
        "monitor": "val_perplexity",
        "overwrite": True,
    }
    arguments = files | OPTIONS | options
    del arguments["test"]
    folder = run_directory.RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, folder.path)
    scores = finetune(**arguments, output=folder.path)
    log = read_log(folder)
    assert [row["epoch"] for row in log] == [0, 1]
    best = min(row["val_perplexity"] for row in log)
    assert scores["valid"]["perplexity"]["mean"] == pytest.approx(best, rel=1e-4)
    assert set(scores) == {"valid"} and "bleu" in scores["valid"]

    merged = kt.Seq2SeqLM.from_preset(folder.preset)
    assert np.abs(logits(merged) - saved[-1]).max() < 1e-4
    changed = {k for k, v in tensors(folder.preset).items() if (v != base[k]).any()}
    assert changed and all("decoder" in k and "self_attention" in k for k in changed)
    assert all((base[k] == v).all() for k, v in tensors(files["preset"]).items())
    model = kt.Seq2SeqLM.from_preset(files["preset"])
    assert np.abs(logits(model) - saved[-1]).max() > 1e-2
    model.load_lora_weights(str(folder.preset / "adapters.lora.h5"))
    assert np.abs(logits(model) - saved[-1]).max() < 1e-4


def test_adapters_on_an_int8_base(files, tmp_path):
    options = make_options(preset=files["preset"], lora_rank=2, quantize="int8")
    model = module._load(options)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    folder = run_directory.RunDirectory(tmp_path)
    folder.make_preset(model)
    expected = logits(model)
    # A merged kernel is rounded to int8 once more.
    merged = logits(kt.Seq2SeqLM.from_preset(folder.preset))
    base = kt.Seq2SeqLM.from_preset(files["preset"])
    base.quantize("int8")
    step = np.abs(logits(base) - expected).max()
    assert np.abs(merged - expected).max() < 0.1 * step
    base.load_lora_weights(str(folder.preset / "adapters.lora.h5"))
    assert np.abs(logits(base) - expected).max() < 1e-4


def test_frozen_towers(files):
    for side in ("encoder", "decoder"):
        model = module._load(make_options(preset=files["preset"], freeze=side))
        assert model.trainable_variables
        assert not any(f"{side}/" in v.path for v in model.trainable_variables)


def make_options(**options):
    parameters = inspect.signature(finetune).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    return type("Options", (), defaults | options)


def test_learning_rates():
    def rates(steps, **options):
        options = make_options(learning_rate=0.5, **options)
        rate = training_setup.make_optimizer(options, steps)._learning_rate
        return [float(rate(step)) for step in range(5)]

    assert float(
        training_setup.make_optimizer(make_options(), 9).learning_rate
    ) == pytest.approx(1e-4)
    expected = [0.5 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(5)]
    assert rates(4, schedule="cosine") == pytest.approx(expected, abs=1e-6)
    accumulated = {"gradient_accumulation_steps": 2, "schedule": "cosine"}
    for steps in (7, 8):  # The last of the four updates may have one batch.
        assert rates(steps, **accumulated) == pytest.approx(expected, abs=1e-6)
    assert rates(9, warmup_steps=2) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="below the 4 updates.*got 4"):
        rates(8, warmup_steps=4, gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon"])
def test_optimizers(name):
    options = make_options(optimizer=name, weight_decay=0.25, global_clipnorm=0)
    optimizer = training_setup.make_optimizer(options, 9)
    assert (type(optimizer).__name__.lower(), optimizer.weight_decay) == (name, 0.25)
    assert optimizer.global_clipnorm is None
    assert (
        training_setup.make_optimizer(make_options(optimizer=name), 9).global_clipnorm
        == 1
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, 4)),  # 25 pairs, 8 a step.
        ({"max_steps": 2}, (1, 2)),
        ({"max_steps": 9}, (3, 3)),
        ({"max_steps": 99}, (3, 4)),
        ({"steps_per_epoch": 2, "max_steps": 3}, (2, 1)),
        ({"batching": "fixed", "batch_size": 25}, (3, 1)),
    ],
)
def test_epochs_and_steps(options, expected):
    options = make_options(**{"batch_size": 8} | options)
    assert module._plan(options, None, {"encoder_text": ["a"] * 25}) == expected


BAD = [
    ({"batch_size": 0}, "`batch_size` must be a whole number from 1.*got 0"),
    ({"epochs": 1.5}, "`epochs` .*got 1.5"),
    ({"learning_rate": float("nan")}, "`learning_rate` must be a number.*got nan"),
    ({"ema_momentum": 2}, "`ema_momentum` .*at most 1.0; got 2"),
    (
        {"label_smoothing": 1.0},
        "`label_smoothing` must be.*at least 0 and below 1; got 1.0",
    ),
    ({"optimizer": "adam"}, "`optimizer` must be one of .*adamw.*got 'adam'"),
    ({"batching": "padded"}, "`batching` must be one of .*packed.*got 'padded'"),
    ({"save_freq": 0}, "`save_freq` must be 'epoch' or a whole number from 1; got 0"),
    ({"metrics": ["rogue"]}, "among rouge.*got 'rogue'"),
    ({"monitor": "val_bleu"}, "`monitor` must be one of .*val_rougeL.*got 'val_bleu'"),
    ({"quantize": "int8"}, "`quantize` needs `lora_rank`"),
    ({"lora_rank": 2, "freeze": "encoder"}, "`freeze` is for training without"),
    ({"lora_rank": 2, "lora_parts": ["head"]}, "`lora_parts` must be .*'head'"),
    ({"steps_per_epoch": 9}, "`steps_per_epoch` must be at most 3.*got 9"),
    ({"warmup_steps": 6}, "`warmup_steps` must be below the 6 updates.*got 6"),
    ({"dtype": "int8"}, "`preset` must have float weights.*`dtype` 'int8'"),
    ({"valid": None, "max_length": 1}, "`max_length` must be a whole number from 2"),
    ({"output": ""}, "`output` must"),
    ({"dtype": "bfloat16"}, "AdamW.*never moves bfloat16 weights"),
    ({"source": "txt"}, "line 1: no field 'txt'; there are .*text"),
    ({"train": "pairs.txt"}, "must end in one of"),
    ({"valid": "EMPTY"}, "empty.jsonl has no rows"),
    ({"preset": "nothing_like_it"}, "neither a name nor a folder"),
    ({"output": "FILE"}, "empty.jsonl is a file"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_before_anything_is_written(
    files, tmp_path, options, message
):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    options = {k: empty if v in ("EMPTY", "FILE") else v for k, v in options.items()}
    arguments = files | OPTIONS | {"output": tmp_path / "run"} | options
    with pytest.raises(ValueError, match=message):
        finetune(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_errors_of_the_command_are_one_line(files, tmp_path, capsys):
    argv = ["finetune", "--preset", files["preset"], "--output", str(tmp_path / "run")]
    status = main.main([*argv, "--train", str(tmp_path / "none.jsonl")])
    err = capsys.readouterr().err
    assert status == 1 and "none.jsonl" in err and err.count("\n") == 1
