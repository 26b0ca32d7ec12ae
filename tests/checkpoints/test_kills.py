"""SIGKILL, SIGTERM, SIGINT while something is written, and folders that vanish.

`KERAS_T5GEMMA_KILLS` is the number of kills of each writer, e.g. 30 for a long run.
"""

import contextlib
import functools
import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time

import keras
import pytest
from helpers.models import one_block_config, tiny_model
from helpers.teacher import make_teacher

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import atomic
from keras_t5gemma.checkpoints.folder_lock import LOCK
from keras_t5gemma.conversion.convert import convert

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "torch", reason="its processes fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
KILLS = int(os.environ.get("KERAS_T5GEMMA_KILLS", 6))
TEXTS = ["a b c d e f", "the quick brown fox", "lazy dogs", "x y z"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """A forked process has none of its parent's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fork(work):
    """Process id of a child that does some work and ends."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        # A shell starts what runs in the background with this signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return child


def content(folder):
    """Checksums of its files; metadata.json has the time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in ("metadata.json", LOCK)
        and atomic.SAVING not in path.relative_to(folder).parts
    }


@pytest.fixture(scope="module")
def writers(tokenizer, tmp_path_factory):
    """`{name: (writer of the earlier folder, of the later one)}`."""
    folder = tmp_path_factory.mktemp("sources")
    first, second = (tiny_model(tokenizer) for _ in range(2))
    for variable in second.backbone.weights:
        variable.assign(variable + 1)
    first.save_to_preset(folder / "first")
    second.save_to_preset(folder / "second")
    small = {"max_shard_size": 1e-4}
    objective = kt.objectives.PrefixLM()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16, objective=objective)
    teacher = make_teacher()
    arguments = (teacher, preprocessor, TEXTS)
    source, other = folder / "first", folder / "second"
    return {
        "save_to_preset": (
            lambda f: first.save_to_preset(f, **small),
            lambda f: second.save_to_preset(f),
        ),
        "save_to_huggingface": (
            lambda f: first.save_to_huggingface(f, **small),
            lambda f: second.save_to_huggingface(f),
        ),
        "convert": (
            lambda f: convert(source, f, overwrite=True, **small),
            lambda f: convert(other, f, to="transformers", overwrite=True),
        ),
        "write_teacher_scores": (
            lambda f: kt.write_teacher_scores(f, *arguments, top_k=4, verbose=0),
            lambda f: kt.write_teacher_scores(f, *arguments, top_k=8, verbose=0),
        ),
    }


@pytest.mark.parametrize(
    "name", ["save_to_preset", "save_to_huggingface", "convert", "write_teacher_scores"]
)
def test_killed_at_random_moments(writers, tmp_path, name):
    write_old, write_new = writers[name]
    write_old(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    start = time.perf_counter()
    write_new(tmp_path / "new")
    duration = time.perf_counter() - start
    new = content(tmp_path / "new")
    rng = random.Random(0)
    folder = tmp_path / "out"
    for attempt in range(KILLS):
        shutil.rmtree(folder, ignore_errors=True)
        if attempt % 2:
            shutil.copytree(tmp_path / "old", folder)
        old = content(folder)
        child = fork(functools.partial(write_new, folder))
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        atomic.finish_interrupted_save(folder)
        assert content(folder) in (old, new)
    write_new(folder)
    assert content(folder) == new
    assert not {atomic.SAVING, atomic.SAVED, LOCK} & set(os.listdir(folder))


class Signal(keras.callbacks.Callback):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), self.number)


def test_signals_in_fit(tokenizer, tmp_path):
    folder = tmp_path / "backup"

    def fit(*callbacks):
        keras.utils.set_random_seed(0)
        model = tiny_model(tokenizer, config=one_block_config())
        model.compile(keras.optimizers.SGD(0.1))
        backup = kt.callbacks.BackupAndRestore(folder, save_freq=1)
        history = model.fit(
            TEXTS, TEXTS, batch_size=1, verbose=0, callbacks=[*callbacks, backup]
        ).history
        return history["loss"], [v.numpy().tolist() for v in model.weights[-2:]]

    expected = fit()
    for number in (signal.SIGINT, signal.SIGTERM):
        child = fork(functools.partial(fit, Signal(number)))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (number == signal.SIGTERM)
        found = {path.name for path in folder.iterdir()} - {LOCK}
        assert found == {".saved_files.json", "progress.json", "state.h5"}
        assert (folder / LOCK).exists() == (number == signal.SIGTERM)
        assert fit() == expected
        assert not folder.exists()


def raise_exit(*_):
    sys.exit(143)


@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
        (signal.SIGTERM, raise_exit, SystemExit),
    ],
)
def test_signals_in_generate(tokenizer, number, handler, error):
    model = tiny_model(tokenizer)
    expected = model.generate(TEXTS, 8)
    before = signal.signal(number, handler)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    try:
        with pytest.raises(error):
            timer.start()
            while True:
                model.generate(TEXTS, 8)
    finally:
        timer.join()
        signal.signal(number, before)
    assert model.generate(TEXTS, 8) == expected


def test_folders_that_vanish(writers, tmp_path, monkeypatch):
    write_old, write_new = writers["save_to_preset"]
    folder = tmp_path / "preset"
    with pytest.raises(FileNotFoundError):
        with atomic.atomic_folder(folder) as staging:
            shutil.rmtree(folder)
            (staging / "config.json").write_text("{}")
    assert not folder.exists()
    write_old(folder)
    old = content(folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work").rmdir()
    with pytest.raises(FileNotFoundError):
        write_new("preset")
    with pytest.raises(FileNotFoundError):
        convert(folder, "preset")
    assert content(folder) == old
    write_new(folder)
    assert content(folder) != old
    assert not {atomic.SAVING, atomic.SAVED, LOCK} & set(os.listdir(folder))
