"""The chunked loss against the plain one, and what it needs."""

import keras
import numpy as np
import pytest
from helpers.losses import (
    LABELS,
    SIZE,
    STATES,
    TABLE,
    TOKENS,
    value_and_gradients,
)
from helpers.models import SENTENCES, numpy, one_block_config, tiny_model
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.modeling.layers import TokenEmbedding
from keras_t5gemma.training import chunked_cross_entropy


def plain(states, table, labels, cap=None, label_smoothing=0.0, z_loss=0.0):
    """By the definition, all logits at once."""
    logits = ops.cast(ops.matmul(states, ops.transpose(table)), "float32")
    if cap is not None:
        logits = ops.tanh(logits / cap) * cap
    normalizer = ops.logsumexp(logits, axis=1)
    chosen = ops.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    hits = ops.cast(ops.argmax(logits, axis=1), "int32") == labels
    value = (1 - label_smoothing) * (normalizer - chosen)
    value = value + label_smoothing * (normalizer - ops.mean(logits, axis=1))
    value = value + z_loss * ops.square(normalizer)
    return value, chosen - normalizer, ops.cast(hits, "float32")


@pytest.mark.parametrize("part", [2**24, TOKENS * 32, TOKENS * 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cap": 5.0},
        {"cap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2},
    ],
)
def test_values_and_gradients_are_the_plain_losses(monkeypatch, part, options):
    monkeypatch.setattr(chunked_cross_entropy, "logits_at_once", lambda _: part)
    arrays = [ops.convert_to_tensor(a) for a in (STATES, TABLE)]
    got = value_and_gradients(chunked_cross_entropy.token_losses, *arrays, **options)
    expected = value_and_gradients(plain, *arrays, **options)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert np.abs(got[3]).max() > 0.01


def test_bfloat16_to_its_precision(monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "logits_at_once", lambda _: TOKENS * 32)
    exact = [ops.convert_to_tensor(a) for a in (STATES, TABLE)]
    rounded = [ops.cast(a, "bfloat16") for a in exact]
    got = value_and_gradients(chunked_cross_entropy.token_losses, *rounded, cap=5.0)
    expected = value_and_gradients(plain, *exact, cap=5.0)
    assert np.abs(got[0] - expected[0]).max() < 0.05
    for ours, theirs in zip(got[3:], expected[3:], strict=True):
        cosine = (ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())
        assert cosine > 0.999


def test_a_frozen_table_gets_no_gradient():
    arrays = [ops.convert_to_tensor(a) for a in (STATES, TABLE)]

    def frozen(states, table, labels):
        table = ops.stop_gradient(table)
        return chunked_cross_entropy.token_losses(
            states, table, labels, learn_table=False
        )

    got = value_and_gradients(frozen, *arrays)
    expected = value_and_gradients(plain, *arrays)
    np.testing.assert_allclose(got[3], expected[3], atol=1e-5)
    assert not got[4].any()


@pytest.mark.parametrize(
    ("size", "tokens", "parts"),
    [(256_000, 512, 8), (256_000, 65_536, 1024), (480, 16, 1), (8191, 2**20, 1)],
)
def test_parts_divide_the_vocabulary(size, tokens, parts):
    assert chunked_cross_entropy.chunk_count(size, tokens, 2**24) == parts
    assert size % parts == 0


def test_the_logits_are_never_whole(monkeypatch):
    """The largest array of forward and backward pass, read from the program."""
    if keras.config.backend() != "jax":
        pytest.skip("JAX tells what a program makes.")
    import jax

    monkeypatch.setattr(chunked_cross_entropy, "logits_at_once", lambda _: TOKENS * 6)

    def total(states, table):
        return chunked_cross_entropy.token_losses(states, table, LABELS, cap=5.0)[
            0
        ].sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(STATES, TABLE))
    assert f"f32[{TOKENS},6]" in text
    assert f"f32[{TOKENS},{SIZE}]" not in text
    assert f"f32[{SIZE},{TOKENS}]" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "`label_smoothing`.*0 and below 1; got 1.0"),
        ({"label_smoothing": "0.1"}, r"`label_smoothing` must be .* got '0.1'"),
        ({"z_loss": -1e-4}, "`z_loss` must be a number at least 0; got -0.0001"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        kt.TokenCrossEntropy(**options)


@pytest.fixture
def make(tokenizer):
    """A function that makes the same small model, compiled with a loss, each time."""

    def make(loss="auto", prepare=None):
        keras.utils.set_random_seed(0)
        model = tiny_model(tokenizer, config=one_block_config())
        if prepare is not None:
            prepare(model)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
        return model

    return make


PAIRS = {"encoder_text": SENTENCES, "decoder_text": [s[:12] for s in SENTENCES]}
FULL = {"label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ({}, None),
        pytest.param(FULL, None, marks=pytest.mark.one_backend),
        ({}, lambda model: model.enable_lora(4)),
        (FULL, lambda model: model.quantize("int8")),
    ],
)
def test_fit_and_evaluate_are_those_with_logits(make, monkeypatch, options, prepare):
    class OnLogits(kt.TokenCrossEntropy):
        """Of the same numbers; the task hands it the logits."""

    monkeypatch.setattr(chunked_cross_entropy, "logits_at_once", lambda _: 2000)
    results = []
    for loss in (kt.TokenCrossEntropy(**options), OnLogits(**options)):
        model = make(loss, prepare)
        # In one batch: with more, Keras's loss is a mean of means.
        before = model.evaluate(PAIRS, batch_size=6, verbose=0, return_dict=True)
        if model.trainable_variables:
            model.fit(PAIRS, batch_size=4, shuffle=False, verbose=0)
        after = model.evaluate(PAIRS, batch_size=6, verbose=0, return_dict=True)
        results.append((before, after))
    ours, theirs = results
    for got, expected in zip(ours, theirs, strict=True):
        assert np.isclose(got["loss"], expected["loss"], atol=1e-4)
        assert np.isclose(got["accuracy"], expected["accuracy"], atol=1e-6)
    if not options:  # The loss is the mean over all tokens, in any batches.
        found = make(prepare=prepare).evaluate(PAIRS, batch_size=4, verbose=0)
        assert np.isclose(found[2], np.exp(found[0]), rtol=1e-4)
        assert np.isclose(found[0], ours[0]["loss"], rtol=1e-5)
    assert ours[0]["loss"] != ours[1]["loss"]


def test_fit_and_evaluate_make_no_logits(make, monkeypatch):
    model = make()
    model.fit(PAIRS, batch_size=4, verbose=0)
    call = TokenEmbedding.call

    def no_logits(self, inputs, reverse=False):
        assert not reverse
        return call(self, inputs)

    monkeypatch.setattr(TokenEmbedding, "call", no_logits)
    model.make_train_function(force=True)
    history = model.fit(PAIRS, batch_size=5, validation_data=PAIRS, verbose=0).history
    assert set(history) == {"tokens_per_second", "padding"} | {
        prefix + name
        for prefix in ("", "val_")
        for name in ("loss", "accuracy", "perplexity")
    }
    with pytest.raises(AssertionError):
        model.predict(PAIRS, batch_size=3, verbose=0)


def test_a_users_own_metrics_and_loss_get_logits(make):
    model = make()
    own = keras.metrics.SparseTopKCategoricalAccuracy(5, name="top_5")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for options in ({"weighted_metrics": [own]}, {"loss": loss, "metrics": [own]}):
        model.compile(optimizer="sgd", **options)
        found = model.evaluate(PAIRS, verbose=0, return_dict=True)
        assert 0 <= found["top_5"] <= 1
        assert "perplexity" not in found


def test_another_reduction_is_not_ignored(make):
    total = make(kt.TokenCrossEntropy(reduction="sum")).evaluate(PAIRS, verbose=0)[0]
    mean = make().evaluate(PAIRS, verbose=0)[0]
    weights = make().preprocessor(PAIRS)[2]
    assert np.isclose(total, mean * weights.sum(), rtol=1e-4)


def test_int4_is_evaluated_through_its_logits(make):
    model = make(prepare=lambda model: model.quantize("int4"))
    found = model.evaluate(PAIRS, batch_size=99, verbose=0, return_dict=True)
    logits = model.predict(PAIRS, batch_size=99, verbose=0)
    _, labels, weights = model.preprocessor(PAIRS)
    expected = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )(labels, logits, weights)
    assert np.isclose(found["loss"], float(numpy(expected)), atol=1e-4)


def test_loss_and_metrics_survive_saving(make, tmp_path):
    model = make(kt.TokenCrossEntropy(**FULL))
    expected = model.evaluate(PAIRS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.chunked_loss.get_config() == model.chunked_loss.get_config()
    assert np.allclose(loaded.evaluate(PAIRS, verbose=0), expected, atol=1e-5)
