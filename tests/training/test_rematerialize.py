"""Steps that need less memory take the same way."""

import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config, random_inputs
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.training.optimizers import update_in_place


def train(optimizer, dropout=0.0, fits=1, dtype="float32", **compile_arguments):
    """Loss of each step and the weights after it all."""
    keras.utils.set_random_seed(3)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config(dropout=dropout), dtype=dtype))
    enlarge(model.backbone, 3.0)
    model.compile(optimizer=optimizer, **compile_arguments)
    x = random_inputs()
    y = x["decoder_token_ids"]
    weights = np.ones(y.shape, "float32")
    losses = []
    for _ in range(fits):
        losses += model.fit(
            x, y, sample_weight=weights, batch_size=2, epochs=2, verbose=0
        ).history["loss"]
    return np.array(losses), [numpy(v) for v in model.trainable_variables]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rematerialized_is_equal(dropout):
    """Trap: with dropout the second computation must draw what the first one drew."""
    losses, weights = train(keras.optimizers.SGD(1.0), dropout)
    again, found = train(keras.optimizers.SGD(1.0), dropout, rematerialize=True)
    assert losses[1] < losses[0]
    assert np.abs(losses - again).max() < 1e-5
    for ours, theirs in zip(found, weights, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


def test_dropout_changes_from_step_to_step():
    """Without learning, only other draws can make another loss."""
    losses, _ = train(keras.optimizers.SGD(0.0), 0.2)
    assert abs(losses[0] - losses[1]) > 1e-4
    losses, _ = train(keras.optimizers.SGD(0.0))
    assert abs(losses[0] - losses[1]) < 1e-5  # Rounding alone.


def test_rematerialization_is_saved_with_compile():
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.compile(rematerialize=True)
    again = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    again.compile_from_config(model.get_compile_config())
    assert again.backbone.encoder.rematerialize
    assert again.backbone.decoder.rematerialize


@pytest.mark.skipif(keras.config.backend() == "jax", reason="XLA fuses Keras's own")
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_kernel_is_keras_adam(name):
    """Gradients as small as epsilon, where it matters what that is added to."""

    def run(fused):
        optimizer = getattr(keras.optimizers, name)(1e-2, weight_decay=0.1)
        if fused:
            update_in_place(optimizer)
            assert {"_backend_update_step", "update_step"} & set(vars(optimizer))
        rng = np.random.default_rng(0)
        values = rng.normal(size=(3, 50)).astype("float32")
        variables = [keras.Variable(value) for value in values]
        for _ in range(5):
            gradients = (1e-7 * rng.normal(size=(3, 50))).astype("float32")
            gradients = [ops.convert_to_tensor(gradient) for gradient in gradients]
            optimizer.apply(gradients, variables)
        return np.stack([v.numpy() for v in variables]) - values

    expected, found = run(False), run(True)
    assert np.abs(expected).max() > 1e-2
    assert np.abs(found - expected).max() < 1e-6


def test_only_kerass_own_adam_is_replaced():
    class Mine(keras.optimizers.Adam):
        pass

    for optimizer in (Mine(), keras.optimizers.Adam(amsgrad=True)):
        update_in_place(optimizer)
        assert not {"_backend_update_step", "update_step"} & set(vars(optimizer))


def test_a_second_fit_with_moving_averages():
    """Trap: on JAX Keras gives the same array away twice."""
    losses, _ = train(keras.optimizers.AdamW(1e-2, use_ema=True), fits=2)
    assert losses[-1] < losses[0]


def test_frozen_tower_stays():
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    enlarge(model.backbone, 3.0)
    model.backbone.encoder.trainable = False
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = {v.path: numpy(v).copy() for v in model.weights}
    x = random_inputs()
    weights = np.ones(x["decoder_token_ids"].shape, "float32")
    model.fit(x, x["decoder_token_ids"], sample_weight=weights, verbose=0)
    changed = {v.path for v in model.weights if (numpy(v) != before[v.path]).any()}
    assert changed and not any("encoder/" in path[:8] for path in changed)
    assert any(path.startswith("decoder/") for path in changed)
