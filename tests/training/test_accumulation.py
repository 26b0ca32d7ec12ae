"""Accumulated gradients update like one large batch."""

import dataclasses
import types

import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config, random_inputs
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.training.accumulation import callbacks, weighted_batch
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
    for callback in callbacks(types.SimpleNamespace(optimizer=optimizer)):
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


LOSS = keras.losses.SparseCategoricalCrossentropy
MEAN = LOSS(reduction="mean_with_sample_weight")
WEIGHTS = np.array([[1, 1, 0], [1, 0, 0]], "float32")


@pytest.mark.parametrize(
    ("loss", "sample_weight", "expected"),
    [
        (MEAN, WEIGHTS, 3),
        (MEAN, np.array([0.5, 2], "float32"), 2.5 * 3),  # Of rows of three tokens.
        (MEAN, None, 6),
        ("sparse_categorical_crossentropy", WEIGHTS, 6),
        ([LOSS()], WEIGHTS, 6),
        (LOSS(reduction="sum"), WEIGHTS, None),
    ],
)
def test_what_a_batch_counts(loss, sample_weight, expected):
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    optimizer = prepare_optimizer(optimizer, "float32")
    model = types.SimpleNamespace(optimizer=optimizer, loss=loss)
    accumulation = optimizer.gradient_accumulation
    with weighted_batch(model, (None, np.zeros((2, 3), "int32"), sample_weight)):
        found = accumulation.batch_weight
        assert found is expected is None or float(found) == expected
    assert accumulation.batch_weight is None


def test_without_accumulation_keras_is_left_alone():
    optimizer = prepare_optimizer(keras.optimizers.SGD(), "float32")
    assert "gradient_accumulation" not in vars(optimizer)
    # There it is replaced to sum the gradients of repeated tokens.
    on_tensorflow = keras.config.backend() == "tensorflow"
    assert ("_backend_apply_gradients" in vars(optimizer)) == on_tensorflow
    assert callbacks(types.SimpleNamespace(optimizer=optimizer)) == []
    with weighted_batch(types.SimpleNamespace(optimizer=optimizer), None):
        pass


def ragged_batches():
    x = random_inputs(batch=5)
    weights = np.zeros(x["decoder_token_ids"].shape, "float32")
    for row, length in enumerate((14, 2, 9, 1, 5)):
        weights[row, :length] = 1
    return x, x["decoder_token_ids"], weights


def trained_lm(batch_size, steps, lora=False, dtype="float32", **fit_arguments):
    """The model's history, and its weights before and after `fit`."""
    keras.utils.set_random_seed(3)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config(), dtype=dtype))
    enlarge(model.backbone, 3.0)
    if lora:
        model.enable_lora(2)
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
    model.compile(optimizer=optimizer)
    before = [numpy(v) for v in model.trainable_variables]
    x, y, weights = ragged_batches()
    arguments = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, sample_weight=weights, **arguments, **fit_arguments)
    return model, history.history, before, [numpy(v) for v in model.trainable_variables]


def difference(one, other):
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "lora", [False, pytest.param(True, marks=pytest.mark.one_backend)]
)
def test_more_steps_than_batches(lora):
    """Three ragged batches and eight steps: one update, by the mean over tokens."""
    _, history, before, expected = trained_lm(5, None, lora)
    model, shown, _, found = trained_lm(2, 8, lora)
    assert int(model.optimizer.iterations) == 1
    assert shown["loss"] == pytest.approx(history["loss"], abs=1e-5)
    assert difference(before, expected) > 0.1
    assert difference(found, expected) < 1e-6


@pytest.mark.one_backend
def test_mixed_float16():
    _, _, before, expected = trained_lm(5, None, dtype="mixed_float16")
    model, _, _, found = trained_lm(2, 8, dtype="mixed_float16")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert int(model.optimizer.iterations) == 1
    assert difference(before, expected) > 0.1
    assert difference(found, expected) < 1e-2


class Watch(keras.callbacks.Callback):
    """Notes the updates that validation and the other callbacks see, and may stop."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.seen, self.stop_after = [], stop_after

    def on_test_begin(self, logs=None):
        self.seen.append(int(self.model.optimizer.iterations))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(int(self.model.optimizer.iterations))
        self.model.stop_training = epoch == self.stop_after


@pytest.mark.parametrize(
    ("stop_after", "expected"),
    [
        (None, [0, 0, 1, 1, 2, 2]),
        pytest.param(1, [0, 0, 1, 1], marks=pytest.mark.one_backend),
    ],
)
def test_the_rest_is_applied_before_the_last_validation(stop_after, expected):
    """Nine batches in three epochs, five steps: an update after five and after nine."""
    x, y, weights = ragged_batches()
    watch = Watch(stop_after)
    model, _, _, _ = trained_lm(
        2, 5, epochs=3, callbacks=[watch], validation_data=(x, y, weights)
    )
    assert watch.seen == expected
    assert int(model.optimizer.iterations) == 2


@pytest.mark.one_backend
def test_classifier():
    """The mean over rows, by their weights."""
    x = {k: v for k, v in random_inputs(batch=4).items() if k.startswith("encoder")}
    y = np.array([0, 1, 1, 0])
    weights = np.array([3, 0.5, 1, 0.25], "float32")

    def trained(size, steps):
        keras.utils.set_random_seed(3)
        config = dataclasses.replace(one_block_config(), decoder=None)
        model = kt.TextClassifier(kt.Backbone(config), None, num_classes=2)
        enlarge(model, 3.0)
        optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
        model.compile(optimizer)
        before = [numpy(v) for v in model.trainable_variables]
        for rows in (slice(i, i + size) for i in range(0, 4, size)):
            batch = {name: array[rows] for name, array in x.items()}
            model.train_on_batch(batch, y[rows], weights[rows])
        return before, [numpy(v) for v in model.trainable_variables]

    before, expected = trained(4, None)
    _, found = trained(2, 2)
    assert difference(before, expected) > 0.1
    assert difference(found, expected) < 1e-6
