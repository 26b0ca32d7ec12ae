"""A call that is stopped anywhere leaves the model as it was, on every backend."""

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, numpy, one_block_config

import keras_t5gemma as kt

PAIRS = {"encoder_text": SENTENCES, "decoder_text": ["a", "b", "c"] * 2}
STOPS = [KeyboardInterrupt, SystemExit, ZeroDivisionError]


class Stop(keras.callbacks.Callback):
    """Raises in one hook, at one batch."""

    def __init__(self, hook, batch, error=KeyboardInterrupt):
        super().__init__()
        setattr(self, hook, self.stop)
        self.batch, self.error = batch, error

    def stop(self, batch, logs=None):
        if batch == self.batch:
            raise self.error


@pytest.fixture(scope="module")
def models(tokenizer):
    """A task of each kind, and a backbone, of one block."""
    keras.utils.set_random_seed(0)
    config = one_block_config()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8)
    encoder = kt.Backbone(kt.T5GemmaConfig(config.encoder, None, 480))
    return {
        "lm": kt.Seq2SeqLM(kt.Backbone(config), preprocessor),
        "embedder": kt.TextEmbedder(encoder, preprocessor),
        "classifier": kt.TextClassifier(encoder, preprocessor, num_classes=2),
    }


def evaluate(model, callback):
    if isinstance(model, kt.TextClassifier):
        data = {"x": SENTENCES, "y": [0, 1] * 3}
    elif isinstance(model, kt.TextEmbedder):
        data = {"x": {"anchor": SENTENCES, "positive": SENTENCES}}
    else:
        data = {"x": PAIRS}
    model.evaluate(**data, batch_size=2, callbacks=[callback], verbose=0)


def assert_kept(model, before):
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(variable.value), value)


@pytest.mark.parametrize("kind", ["lm", "embedder", "classifier"])
def test_weights_are_not_copied(models, kind):
    """Neither trained ones nor those of int8; a copy would take time and memory."""
    model = models[kind]
    frozen = model.backbone.encoder.blocks[0].mlp
    frozen.trainable = False
    before = [variable.value for variable in model.weights]
    evaluate(model, keras.callbacks.Callback())
    ids = np.ones((2, 8), "int32")
    arrays = {name: ids for name in model.input}
    model.predict_on_batch(arrays)
    frozen.trainable = True
    for variable, value in zip(model.weights, before, strict=True):
        assert variable.value is value, variable.path


@pytest.mark.parametrize("kind", ["lm", "embedder", "classifier"])
def test_evaluate_can_be_stopped_at_any_batch(models, kind, tmp_path):
    model = models[kind]
    before = [numpy(v.value) for v in model.weights]
    for batch, error in enumerate(STOPS):
        for edge in ("begin", "end"):
            with pytest.raises(error):
                evaluate(model, Stop(f"on_test_batch_{edge}", batch, error))
            assert_kept(model, before)
    model.save_weights(tmp_path / "model.weights.h5")
    if kind == "lm":
        assert isinstance(model.generate("a fox", max_length=4), str)
    evaluate(model, keras.callbacks.Callback())
    assert_kept(model, before)


def test_predict_can_be_stopped_at_any_batch(models):
    model = models["lm"]
    before = [numpy(v.value) for v in model.weights]
    expected = model.predict(PAIRS, batch_size=2, verbose=0)
    for batch, error in enumerate(STOPS):
        for edge in ("begin", "end"):
            stop = Stop(f"on_predict_batch_{edge}", batch, error)
            with pytest.raises(error):
                model.predict(PAIRS, batch_size=2, callbacks=[stop], verbose=0)
            assert_kept(model, before)
    found = model.predict(PAIRS, batch_size=2, verbose=0)
    np.testing.assert_array_equal(found, expected)


def test_predict_of_a_backbone_can_be_stopped(models):
    x, _, _ = models["lm"].preprocessor(PAIRS)
    encoder = models["embedder"].backbone
    x = {name: x[name] for name in encoder.input}
    before = [numpy(v.value) for v in encoder.weights]
    for edge in ("begin", "end"):
        stop = Stop(f"on_predict_batch_{edge}", 1)
        with pytest.raises(KeyboardInterrupt):
            encoder.predict(x, batch_size=2, callbacks=[stop], verbose=0)
        assert_kept(encoder, before)
    models["embedder"].embed(SENTENCES)


def test_data_that_raises_leaves_the_weights(models):
    model = models["lm"]
    before = [numpy(v.value) for v in model.weights]

    def broken():
        yield PAIRS
        raise ZeroDivisionError

    for call in (model.evaluate, model.predict):
        with pytest.raises(Exception, match="|ZeroDivisionError"):
            call(broken(), verbose=0)
        assert_kept(model, before)


@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Keras has no such steps on PyTorch."
)
def test_several_steps_per_execution_give_the_same_results(models):
    model = models["lm"]
    expected = model.predict(PAIRS, batch_size=2, verbose=0)
    loss = model.evaluate(PAIRS, batch_size=2, verbose=0)
    model.compile(steps_per_execution=2)  # Of three batches.
    try:
        found = model.predict(PAIRS, batch_size=2, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        again = model.evaluate(PAIRS, batch_size=2, verbose=0)
        np.testing.assert_allclose(again, loss, rtol=1e-6)
    finally:
        model.compile()


def test_fit_can_be_stopped_in_the_first_batch_and_in_validation(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    before = [numpy(v.value) for v in model.weights]

    def broken(*args):
        raise KeyboardInterrupt

    data = {"x": PAIRS, "batch_size": 2, "verbose": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            model.fit(**data)
    assert_kept(model, before)
    model.train_function = None
    stop = Stop("on_test_batch_end", 1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(**data, validation_data=PAIRS, callbacks=[stop])
    assert all(np.isfinite(numpy(v.value)).all() for v in model.weights)
    model.fit(**data)
