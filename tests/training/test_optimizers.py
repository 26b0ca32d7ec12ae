"""Updates in place against those of Keras, which a subclass keeps."""

import keras
import numpy as np
import pytest
from helpers.models import numpy, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.training.optimizers import prepare_optimizer


class Plain(keras.optimizers.AdamW):
    """An AdamW whose update is Keras's own."""


def trained(optimizer, **options):
    """Weights after four batches, from the same start."""
    keras.utils.set_random_seed(0)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor=None)
    for variable in model.trainable_variables:
        if variable.path.endswith("scale"):  # Zeros would not show their decay.
            variable.assign(np.full(variable.shape, 0.5))
    model.compile(optimizer=optimizer, **options)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 100, (8, 8)).astype("int32")
    names = ("encoder_token_ids", "encoder_padding_mask")
    names += ("decoder_token_ids", "decoder_padding_mask")
    x = {n: ids if n.endswith("ids") else np.ones_like(ids) for n in names}
    model.fit(x, np.roll(ids, -1, 1), batch_size=2, shuffle=False, verbose=0)
    return {v.path: numpy(v) for v in model.trainable_variables}


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"weight_decay": 3.0}, {}),
        ({"weight_decay": 3.0}, {"run_eagerly": True}),
        ({"weight_decay": 3.0, "gradient_accumulation_steps": 2}, {}),
        pytest.param(
            {"weight_decay": 3.0, "global_clipnorm": 0.1, "use_ema": True},
            {},
            marks=pytest.mark.one_backend,
        ),
    ],
)
def test_the_same_weights_as_with_keras(options, compiled):
    """Also of variables that weight decay leaves out."""
    found = []
    for kind in (Plain, keras.optimizers.AdamW):
        # A large epsilon, or rounding decides the sign of what is nearly zero.
        optimizer = kind(1e-2, epsilon=1e-3, **options)
        optimizer.exclude_from_weight_decay(var_names=["scale"])
        found.append(trained(optimizer, **compiled))
    expected, weights = found
    for path, value in expected.items():
        np.testing.assert_allclose(weights[path], value, atol=1e-4, err_msg=path)


def test_preparing_twice_keeps_accumulation():
    """As a second `compile` does: the rest is the mean of one batch."""
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    for _ in range(2):
        assert prepare_optimizer(optimizer, "float32") is optimizer
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer.apply([keras.ops.ones(2)], [variable])
    np.testing.assert_allclose(numpy(variable.value), [1.0, 1.0])
    optimizer.gradient_accumulation.apply_rest()
    np.testing.assert_allclose(numpy(variable.value), [0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}),
        ("adam", {"loss_scale": True}),
        ("adam", {"amsgrad": True}),
        ("adam", {"clipvalue": 1.5}),
        ("adamw", {"clipnorm": 1.0}),
        ("adamw", {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0}),
        ("adafactor", {}),
        ("sgd", {"global_clipnorm": 1.0}),
        ("rmsprop", {}),
        ("nadam", {}),
        ("lion", {}),
        ("muon", {"exclude_layers": ["table"]}),
    ],
)
def test_repeated_rows_are_summed(name, options):
    """Before they are clipped or squared, which Keras on TensorFlow does not do."""
    tokens, rows, width = [0, 0, 1, 0], 3, 4
    slopes = np.random.default_rng(0).normal(size=(len(tokens), width))
    total = np.zeros((rows, width))
    np.add.at(total, tokens, slopes)
    found = []
    options = dict(options)
    is_scaled = options.pop("loss_scale", False)
    if is_scaled and keras.config.backend() == "jax":
        pytest.skip("Keras cannot scale a loss outside of a program")
    for sparse in (False, True):
        table = keras.Variable(np.ones((rows, width), "float32"), name="table")
        optimizer = keras.optimizers.get(
            {"class_name": name, "config": {"learning_rate": 0.1, **options}}
        )
        if is_scaled:
            scale = {"initial_scale": 1.0}
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, **scale)
        optimizer = prepare_optimizer(optimizer, "float32")
        for factor in (1.0, 0.3, -2.0, 1.0):
            gradient = keras.ops.convert_to_tensor(factor * total, "float32")
            if sparse and keras.config.backend() == "tensorflow":
                import tensorflow as tf

                values = tf.constant(factor * slopes, "float32")
                gradient = tf.IndexedSlices(values, tf.constant(tokens), (rows, width))
            optimizer.apply([gradient], [table])
        found.append(numpy(table.value))
    np.testing.assert_allclose(*found, atol=1e-6)
    assert np.abs(found[0][:2] - 1).max() > 1e-2


def test_weight_decay_shrinks_what_it_is_asked_to():
    """By `1 - learning rate * weight decay` an update; the rest moves as without."""
    without = trained(keras.optimizers.AdamW(1e-3, weight_decay=0.0))
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=30.0)
    optimizer.exclude_from_weight_decay(var_names=["scale"])
    weights = trained(optimizer)
    for path, value in without.items():
        factor = 1.0 if path.endswith("scale") else (1 - 1e-3 * 30) ** 4
        assert np.abs(weights[path] - factor * value).max() < 0.02, path
    table = next(path for path in weights if path.endswith("embeddings"))
    assert np.abs(weights[table]).mean() < 0.9 * np.abs(without[table]).mean()
