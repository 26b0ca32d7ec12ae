"""A training that is stopped anywhere goes on to the same bits."""

import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import TESTS
from helpers.models import SENTENCES, numpy, one_block_config

import keras_t5gemma as kt

BackupAndRestore = kt.callbacks.BackupAndRestore
SOURCES = [f"{s} {i}" for i in range(5) for s in SENTENCES]
TARGETS = [s.split()[-1] for _ in range(5) for s in SENTENCES]
EPOCHS, BATCH = 2, 4


def make_model(proto, lora=True, **settings):
    keras.utils.set_random_seed(7)
    preprocessor = kt.Seq2SeqLMPreprocessor(kt.Tokenizer(proto), 32, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config(dropout=0.1)), preprocessor)
    if lora:
        model.enable_lora(2, parts=["decoder", "mlp"])
    optimizer = keras.optimizers.AdamW(1e-2, **settings)
    model.compile(optimizer=optimizer, rematerialize=True)
    return model


def fit(model, folder=None, callbacks=(), save_freq=3, verbose=0, **kwargs):
    if folder is not None:
        callbacks = [BackupAndRestore(folder, save_freq), *callbacks]
    kwargs.setdefault("epochs", EPOCHS)
    return model.fit(
        SOURCES,
        TARGETS,
        batch_size=BATCH,
        callbacks=list(callbacks),
        validation_data=(SOURCES[:4], TARGETS[:4]),
        verbose=verbose,
        **kwargs,
    ).history


def values(model):
    return [numpy(v) for v in model.variables + model.optimizer.variables]


def numbers(history):
    """All but what `TrainingReport` measures: that is of one process."""
    report = ("tokens_per_second", "padding")
    return {k: v for k, v in history.items() if k not in report}


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.place = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen = getattr(self, "seen", 0) + 1
        if (self.epoch, self.seen) == self.place:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(proto):
    model = make_model(proto)
    history = fit(model)
    return values(model), numbers(history)


# In the first epoch, between two backups and just before its end; in the second.
def test_ends_in_the_same_bits(proto, uninterrupted, tmp_path):
    expected, history = uninterrupted
    for place in ((0, 5), (0, 5), (1, 5)):
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(proto), tmp_path, [Stop(*place)])
        assert (tmp_path / "state.h5").exists()
    model = make_model(proto)
    resumed = fit(model, tmp_path)
    assert not tmp_path.exists()
    assert numbers(resumed) == history
    for ours, value in zip(values(model), expected, strict=True):
        assert (ours == value).all()


def test_ends_in_the_same_bits_within_an_accumulation(proto, tmp_path):
    """Eight batches and three steps: stopped after four, with a backup of that batch.

    The last update has two batches.
    """
    settings = {"gradient_accumulation_steps": 3, "lora": False}
    model = make_model(proto, **settings)
    fit(model, epochs=1)
    expected = values(model)
    model = make_model(proto, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path, [Stop(0, 5)], 1, epochs=1)
    for variable in model.variables + model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable.value))  # All is in the backup.
    fit(model, tmp_path, epochs=1)
    assert int(model.optimizer.iterations) == 3
    for found, value in zip(values(model), expected, strict=True):
        assert (found == value).all()


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from helpers.models import make_proto
import test_backup as t
model = t.make_model(make_proto())
history = t.fit(model, sys.argv[1], save_freq=1, verbose=2)
t.np.savez(sys.argv[2], *t.values(model))
"""


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="ten processes; the fastest to start"
)
def test_ten_kills(uninterrupted, tmp_path):
    """Ten times SIGKILL at random moments, also while a backup is written."""
    tests = str(TESTS)
    result = tmp_path / "result.npz"
    command = [sys.executable, "-c", KILLED.format(tests=tests)]
    command += [str(tmp_path / "backup"), str(result)]
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        progress = tmp_path / "backup" / "progress.json"
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        while process.poll() is None and kills < 10:
            # From the first new backup on, within the time of a few batches.
            if progress.exists() and progress.stat().st_mtime_ns != before:
                try:
                    process.wait(rng.uniform(0, 0.15))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                break
            try:
                process.wait(0.005)
            except subprocess.TimeoutExpired:
                pass
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error[-2000:]
        if process.returncode == 0:
            break
    assert kills >= 5
    found = np.load(result)
    for name, value in zip(found.files, uninterrupted[0], strict=True):
        assert (found[name] == value).all()


@pytest.mark.one_backend
def test_full_disk_keeps_the_last_backup(proto, uninterrupted, tmp_path, monkeypatch):
    from keras_t5gemma.training import backup

    write, calls = backup._write, []

    def full(group, variables):
        calls.append(1)
        if len(calls) > 3:  # The first backup is whole, then there is no room.
            raise OSError(28, "No space left on device")
        write(group, variables)

    monkeypatch.setattr(backup, "_write", full)
    with pytest.warns(UserWarning, match="No space left.*training continues"):
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(proto), tmp_path, [Stop(0, 7)])
    monkeypatch.undo()
    (tmp_path / "notes.txt").write_text("not the backup's")
    model = make_model(proto)
    fit(model, tmp_path)
    for ours, value in zip(values(model), uninterrupted[0], strict=True):
        assert (ours == value).all()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.one_backend
def test_refuses(proto, tmp_path):
    for save_freq in (0, "batch", 1.5):
        with pytest.raises(ValueError, match="`save_freq` must be 'epoch' or a whole"):
            BackupAndRestore(tmp_path, save_freq)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(proto), tmp_path, [Stop(0, 4)])
    with pytest.raises(ValueError, match="another model.*lora"):
        fit(make_model(proto, lora=False), tmp_path)
    backup = BackupAndRestore(tmp_path)
    with pytest.raises(ValueError, match="other data"):
        make_model(proto).fit(SOURCES, TARGETS, batch_size=5, callbacks=[backup])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder.*file is a file"):
        fit(make_model(proto), tmp_path / "file")
    with pytest.raises(ValueError, match="resumable dataset.*generator"):
        batches = ((s, t) for s, t in [(SOURCES, TARGETS)])
        make_model(proto).fit(batches, callbacks=[backup], steps_per_epoch=1)
