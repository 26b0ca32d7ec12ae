"""Weights of losses, rows and classes."""

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, one_block_config, tiny_model

import keras_t5gemma as kt

SOURCES = [f"{s} {i}" for i in range(4) for s in SENTENCES]
TARGETS = [s.split()[-1] for _ in range(4) for s in SENTENCES]


@pytest.fixture
def fresh(tokenizer):
    """Untrained, small weights, an optimizer that moves a tiny model."""
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 32, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    return model


def test_loss_weights_weigh_the_default_loss(tokenizer):
    """Keras applies them; with them the loss has logits."""
    found = {}
    for weights in (None, 0.5, [0.5], 0.0):
        keras.utils.set_random_seed(0)
        model = tiny_model(tokenizer, config=one_block_config())
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(1.0), loss_weights=weights)
        loss = model.evaluate(SOURCES[:4], TARGETS[:4], verbose=0, return_dict=True)
        model.fit(SOURCES[:4], TARGETS[:4], verbose=0)
        pairs = zip(model.get_weights(), before, strict=True)
        change = np.concatenate([(a - b).ravel() for a, b in pairs])
        found[str(weights)] = loss["loss"], change
    loss, change = found["None"]
    for name, share in (("0.5", 0.5), ("[0.5]", 0.5), ("0.0", 0.0)):
        assert found[name][0] == pytest.approx(share * loss, rel=1e-5), name
        np.testing.assert_allclose(found[name][1], share * change, atol=1e-5)


def test_batches_of_texts_may_hold_weights(fresh):
    """As in memory: of lists, and of one dict."""
    weights = np.linspace(0.5, 2.0, 8, dtype="float32")
    x, y = SOURCES[:8], TARGETS[:8]
    options = {"verbose": 0, "return_dict": True}
    expected = fresh.evaluate(x, y, sample_weight=weights, batch_size=8, **options)
    plain = fresh.evaluate(x, y, batch_size=8, **options)
    assert abs(expected["loss"] - plain["loss"]) > 1e-4
    pairs = {"encoder_text": x, "decoder_text": y}
    for batch in ((x, y, weights), (pairs, None, weights)):
        found = fresh.evaluate([batch], **options)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="`sample_weight`.*must"):
        fresh.evaluate([(x, y, ["a"] * 8)], **options)


def test_weights_of_classes_are_refused_for_a_batch_too(fresh):
    with pytest.raises(ValueError, match="`class_weight` must be None: only a TextCl"):
        fresh.train_on_batch(SOURCES[:2], TARGETS[:2], class_weight={1: 2.0})
    arrays = fresh.preprocess_samples(SOURCES[:2], TARGETS[:2])
    with pytest.raises(ValueError, match="`class_weight` must be None: only a TextCl"):
        fresh.train_on_batch(*arrays, class_weight={1: 2.0})
