"""A full disk and missing permissions: the earlier files stay, nothing is left over."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import resource

import keras
import pytest
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import one_block_config, tiny_model
from helpers.teacher import make_teacher

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import atomic
from keras_t5gemma.conversion.adapt import adapt_to_folder
from keras_t5gemma.conversion.average import average_presets
from keras_t5gemma.conversion.convert import convert
from keras_t5gemma.evaluation.harness import Runs
from keras_t5gemma.recipes.run_directory import RunDirectory

pytestmark = pytest.mark.one_backend
TEXTS = ["a b c d e f", "the quick brown fox"]


@contextlib.contextmanager
def small_files(monkeypatch):
    """No file can grow beyond some bytes, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_at_the_end(monkeypatch):
    """The last write does not fit."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", fsync)
        yield


@contextlib.contextmanager
def no_permission(monkeypatch):
    """Nothing can be created or renamed; root ignores the modes of folders."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace"):
            patch.setattr(atomic.os, name, refuse)
        yield


FAULTS = [small_files, full_at_the_end, no_permission]


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def writers(tokenizer, tmp_path_factory):
    """`{name: function of a path}`, which writes a folder, or a file in it."""
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_model(tokenizer, config=one_block_config())
    encoder = kt.Backbone(dataclasses.replace(model.backbone.config, decoder=None))
    classifier = kt.TextClassifier(encoder, model.preprocessor, ["a", "b"])
    model.save_to_preset(folder / "preset")
    make_gemma2(**SMALL).save_to_preset(str(folder / "gemma"))
    objective = kt.objectives.PrefixLM()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16, objective=objective)
    teacher = make_teacher()
    adapters = kt.Backbone(one_block_config())
    adapters.enable_lora(2)
    source = folder / "preset"

    def save_best(path):
        callback = kt.callbacks.SaveBest(path)
        callback.set_model(model)
        callback.best = None
        callback.on_train_begin()
        callback.on_epoch_end(0, {"val_loss": 1.0})

    def make_preset(path):
        RunDirectory(path).make_preset(model)

    def begin_run(path):
        config = {"options": {"a": 1}, "keras_t5gemma": "0"}
        RunDirectory(path).begin("finetune", config, clear=False)

    def evaluate(path):
        runs = Runs(path / "runs", {})  # It refuses the notes of others.
        runs["task/model/0"] = {"measures": {"accuracy": 1.0}}

    def teach(path):
        options = {"top_k": 4, "verbose": 0}
        kt.write_teacher_scores(path, teacher, preprocessor, TEXTS, **options)

    return {
        "Backbone.save_to_preset": model.backbone.save_to_preset,
        "Seq2SeqLM.save_to_preset": model.save_to_preset,
        "TextClassifier.save_to_preset": classifier.save_to_preset,
        "save_to_huggingface": model.save_to_huggingface,
        "save_lora_weights": lambda f: adapters.save_lora_weights(f / "a.lora.h5"),
        "convert": lambda f: convert(source, f, overwrite=True),
        "convert to transformers": lambda f: convert(
            source, f, to="transformers", overwrite=True
        ),
        "average_presets": lambda f: average_presets([source] * 2, f, overwrite=True),
        "adapt_to_folder": lambda f: adapt_to_folder(
            folder / "gemma", folder=f, overwrite=True, check=False, verbose=False
        ),
        "write_teacher_scores": teach,
        "SaveBest": save_best,
        "RunDirectory.make_preset": make_preset,
        "RunDirectory.begin": begin_run,
        "Runs": evaluate,
    }


NAMES = [
    *("Backbone.save_to_preset", "Seq2SeqLM.save_to_preset"),
    *("TextClassifier.save_to_preset", "save_to_huggingface", "save_lora_weights"),
    *("convert", "convert to transformers", "average_presets", "adapt_to_folder"),
    *("write_teacher_scores", "SaveBest", "RunDirectory.make_preset"),
    *("RunDirectory.begin", "Runs"),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_earlier_files_stay(writers, monkeypatch, tmp_path, name, fault):
    write = writers[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        before = content(folder)
        with fault(monkeypatch), pytest.raises(OSError):
            write(folder)
        assert content(folder) == before
        found = {path.name for path in folder.rglob("*")}
        assert not any(atomic.SAVING in n or n == atomic.SAVED for n in found)
        write(folder)
        assert len(content(folder)) > len(before) or before.keys() > {"notes.txt"}


def test_every_writer_is_tested(writers):
    assert set(writers) == set(NAMES)


@pytest.mark.parametrize("fault", FAULTS)
def test_backups_warn_and_training_continues(tokenizer, monkeypatch, tmp_path, fault):
    model = tiny_model(tokenizer, config=one_block_config())
    model.compile("sgd")
    folder, found = tmp_path / "backup", []
    stack = contextlib.ExitStack()

    class Fault(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                found.append(content(folder))
                stack.enter_context(fault(monkeypatch))

        def on_epoch_end(self, epoch, logs=None):
            stack.close()
            found.append(content(folder))

    texts = [*TEXTS, "x"]
    backup = kt.callbacks.BackupAndRestore(folder, save_freq=1)
    options = {"batch_size": 1, "verbose": 0, "callbacks": [Fault(), backup]}
    with stack, pytest.warns(UserWarning, match="The previous one stays"):
        model.fit(texts, texts, **options)
    assert found[0] == found[1] and "state.h5" in found[0]
    assert not folder.exists()
