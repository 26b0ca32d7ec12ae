"""Trainings that version 0.1.0 development interrupted go on."""

import csv
import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.saved_formats import EXPECTED, SOURCES, TARGETS, state, unpack

import keras_t5gemma as kt


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A copy of the files, for tests that only read them."""
    return unpack(tmp_path_factory.mktemp("formats"))


class Watch(keras.callbacks.Callback):
    """The state that a training begins with, and the batches of its epochs."""

    def on_train_begin(self, logs=None):
        self.state = state(self.model)
        self.batches = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.batches[epoch] = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches[self.epoch] += 1


def test_interrupted_training_goes_on(files, tmp_path):
    """A backup made on JAX resumes on another backend, with another dropout."""
    expected = EXPECTED["backup"]
    folder = unpack(tmp_path, "backup") / "backup"
    config = kt.Backbone.from_preset(files / "preset_float32").config
    tokenizer = kt.Tokenizer.from_preset(files / "preset_float32")
    model = kt.Seq2SeqLM(
        kt.Backbone(dataclasses.replace(config, dropout=0.1)),
        kt.Seq2SeqLMPreprocessor(tokenizer, 60, 44),
    )
    model.enable_lora(2, parts=["decoder", "mlp"])
    model.compile(keras.optimizers.AdamW(1e-2, epsilon=1e-3), rematerialize=True)
    watch = Watch()
    backup = kt.callbacks.BackupAndRestore(folder, save_freq=3)
    history = model.fit(
        SOURCES,
        TARGETS,
        batch_size=2,
        epochs=3,
        callbacks=[watch, backup],
        verbose=0,
    ).history
    assert watch.state == expected["state"]
    assert expected["place"] == [1, 1]
    assert watch.batches == {1: 4, 2: 5}
    assert int(model.optimizer.iterations) == 15
    for name, values in expected["history"].items():
        assert history[name][:1] == values
    same_backend = keras.config.backend() == "jax"
    for name, values in expected["ends"].items():
        tolerance = 1e-4 if same_backend else 0.1
        assert history[name] == pytest.approx(values, abs=tolerance)
    if same_backend:
        sums = [
            [np.sum(v), np.abs(v).sum()]
            for v in map(np.asarray, model.trainable_variables)
        ]
        assert np.allclose(sums, expected["final"], atol=1e-3)
    assert not folder.exists()


def lengths(answers, references):
    pairs = zip(answers, references, strict=True)
    return float(np.mean([len(a) / len(r) for a, r in pairs]))


@pytest.mark.one_backend
def test_interrupted_run_goes_on(tmp_path, monkeypatch):
    """The folder of `finetune`. It was on JAX; a run stays on its backend."""
    names = ("preset_float32", "train.jsonl", "valid.jsonl", "run")
    monkeypatch.chdir(unpack(tmp_path, *names))
    path = Path("run/config.json")
    text = path.read_text(encoding="utf-8")
    assert '"backend": "jax"' in text
    text = text.replace('"jax"', f'"{keras.config.backend()}"')
    path.write_text(text, encoding="utf-8")
    options = {
        "preset": "preset_float32",
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "output": "run",
        "epochs": 2,
        "batch_size": 5,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "lora_rank": 2,
        "lora_parts": ["decoder"],
        "metrics": [lengths],
        "sample_rows": 2,
        "max_length": 4,
        "verbose": 0,
    }
    with pytest.raises(
        ValueError, match="a run with other options: `epochs` is 2 there"
    ):
        kt.finetune(**{**options, "epochs": 3})
    scores = kt.finetune(**options)
    assert {"loss", "lengths"} <= set(scores["valid"])
    with open("run/log.csv", newline="", encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert lines[:2] == EXPECTED["run"]["log"]  # With the speed of that day.
    assert [row[0] for row in csv.reader(lines)] == ["epoch", "0", "1"]
    samples = Path("run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [json.loads(line).get("epoch") for line in samples]
    assert epochs == [0, 0, 1, 1, None, None, None]
    adapters = "run/preset/adapters.lora.h5"
    kt.Seq2SeqLM.from_preset("preset_float32").load_lora_weights(adapters)
    with pytest.raises(ValueError, match="is a finished run"):
        kt.finetune(**options)
