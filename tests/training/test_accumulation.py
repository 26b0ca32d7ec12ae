"""Accumulated gradients update like one large batch."""

import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config, random_inputs
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.training.accumulation import callbacks
from keras_t5gemma.training.optimizers import prepare_optimizer

COUNTS = [5, 1, 2, 7, 3]  # Tokens of batches: two updates with three steps.
STEPS = 3
OPTIMIZERS = [
    ("SGD", {"clipnorm": 0.1}),
    ("SGD", {"global_clipnorm": 0.1, "weight_decay": 0.1, "momentum": 0.9}),
    ("AdamW", {"use_ema": True, "ema_momentum": 0.5, "clipvalue": 0.1}),
    ("Adam", {"use_ema": True, "ema_overwrite_frequency": 2}),
    ("Adafactor", {"weight_decay": 0.1}),
    ("Lion", {}),
    ("Muon", {}),
]


def updated(name, arguments, steps):
    """Variables and averages after the batches, or after large ones (`steps=None`)."""
    rng = np.random.default_rng(0)
    shapes = (4, 3), (3,)
    variables = [keras.Variable(rng.normal(size=s).astype("float32")) for s in shapes]
    tokens = [
        [rng.normal(size=(count, *s)).astype("float32") for s in shapes]
        for count in COUNTS
    ]
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 3)
    optimizer = getattr(keras.optimizers, name)(
        schedule, gradient_accumulation_steps=steps, **arguments
    )
    optimizer = prepare_optimizer(optimizer, "float32")
    if steps is None:
        cut = [tokens[:STEPS], tokens[STEPS:]]
        tokens = [map(np.concatenate, zip(*part, strict=True)) for part in cut]
    for batch in tokens:
        batch = list(batch)
        if steps is not None:
            weight = ops.convert_to_tensor(len(batch[0]), "float32")
            optimizer.gradient_accumulation.batch_weight = weight
        means = [ops.convert_to_tensor(array.mean(axis=0)) for array in batch]
        optimizer.apply(means, variables)
    for callback in callbacks(optimizer):
        callback.accumulation.apply_rest()
        callback.accumulation.apply_rest()  # Nothing is left.
    assert int(optimizer.iterations) == 2
    averages = getattr(optimizer, "_model_variables_moving_average", [])
    return [numpy(v) for v in [*variables, *averages]]


@pytest.mark.parametrize(("name", "arguments"), OPTIMIZERS)
def test_any_optimizer_updates_like_the_large_batch(name, arguments):
    """Traps: clipping each batch, and a schedule or an average that counts batches."""
    expected = updated(name, arguments, None)
    found = updated(name, arguments, STEPS)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < 1e-6


def ragged_batches():
    x = random_inputs(batch=5)
    weights = np.zeros(x["decoder_token_ids"].shape, "float32")
    for row, length in enumerate((14, 2, 9, 1, 5)):
        weights[row, :length] = 1
    return x, x["decoder_token_ids"], weights


def trained_lm(batch_size, steps, loss="auto", lora=False, dtype="float32", **fit):
    keras.utils.set_random_seed(3)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config(), dtype=dtype))
    enlarge(model.backbone, 3.0)
    if lora:
        model.enable_lora(2)
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
    model.compile(optimizer=optimizer, loss=loss)
    before = [numpy(v) for v in model.trainable_variables]
    x, y, weights = ragged_batches()
    history = model.fit(
        x, y, sample_weight=weights, batch_size=batch_size, shuffle=False, verbose=0
    ).history
    after = [numpy(v) for v in model.trainable_variables]
    assert int(model.optimizer.iterations) == 1
    return history, before, after


@pytest.mark.parametrize("lora", [False, True])
def test_more_steps_than_batches(lora):
    """Three ragged batches and eight steps: one update, by the mean over tokens."""
    history, before, expected = trained_lm(5, None, lora=lora)
    shown, _, found = trained_lm(2, 8, lora=lora)
    assert shown["loss"] == pytest.approx(history["loss"], abs=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(before, expected, strict=True)) > 0.1
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < 1e-6
