"""Loss and metrics of encoder tasks do not depend on rows that fill up a batch."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, numpy, tiny_config, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.training.loss_by_weight import mean_by_weight

TEXTS = [*SENTENCES, *SENTENCES][:6]


@pytest.fixture
def classifier(tokenizer):
    keras.utils.set_random_seed(0)
    backbone = kt.Backbone(dataclasses.replace(tiny_config(), decoder=None))
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 16)
    model = kt.TextClassifier(backbone, preprocessor, num_classes=3)
    kernel = model.get_layer("classes").kernel
    kernel.assign(2 * np.random.default_rng(0).normal(size=kernel.shape))
    return model


@pytest.mark.parametrize("weights", [None, np.arange(6.0)])
def test_loss_and_metrics_are_means_over_rows(classifier, weights):
    labels = [0, 1, 2, 0, 1, 1]
    classifier.compile(keras.optimizers.SGD(0.0), metrics=["accuracy"])
    shares = classifier.predict(TEXTS)[range(6), labels]
    right = classifier.predict(TEXTS).argmax(-1) == labels
    loss = np.average(-np.log(shares), weights=weights)
    accuracy = np.average(right, weights=weights)
    options = {"sample_weight": weights, "verbose": 0}
    for size in (1, 4, 5, 32):
        logs = classifier.evaluate(
            TEXTS, labels, batch_size=size, return_dict=True, **options
        )
        assert set(logs) == {"loss", "accuracy"}
        np.testing.assert_allclose(logs["loss"], loss, rtol=2e-3)
        np.testing.assert_allclose(logs["accuracy"], accuracy, rtol=1e-5)
    history = classifier.fit(TEXTS, labels, batch_size=4, shuffle=False, **options)
    np.testing.assert_allclose(history.history["loss"], loss, rtol=2e-3)


def own_loss(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, True)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, [CROSS_ENTROPY], own_loss])
def test_losses_of_a_user_are_too(classifier, loss):
    """Keras's default divides by rows that fill up a batch."""
    labels = [0, 1, 2, 0, 1, 1]
    start, steps = [numpy(v).copy() for v in classifier.weights], []
    expected = -np.log(classifier.predict(TEXTS)[range(6), labels]).mean()
    for size in (6, 32):
        for variable, value in zip(classifier.weights, start, strict=True):
            variable.assign(value)
        classifier.compile(keras.optimizers.SGD(0.1), loss)
        found = classifier.evaluate(TEXTS, labels, batch_size=size, verbose=0)[0]
        np.testing.assert_allclose(found, expected, rtol=2e-3)
        classifier.fit(TEXTS, labels, batch_size=size, verbose=0)
        kernel = numpy(classifier.get_layer("classes").kernel)
        steps.append(kernel - start[-2])
    assert np.abs(steps[0]).max() > 1e-3
    np.testing.assert_allclose(steps[0], steps[1], atol=1e-5)
    assert CROSS_ENTROPY.reduction == "sum_over_batch_size"  # The user's is unchanged.


@pytest.mark.one_backend
@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error])
def test_functions_and_names_are_saved(tokenizer, tmp_path, loss):
    backbone = kt.Backbone(dataclasses.replace(tiny_config(), decoder=None))
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 16)
    model = kt.TextClassifier(backbone, preprocessor, kind="regression")
    model.compile(keras.optimizers.SGD(0.0), loss)
    numbers = np.arange(6.0)
    expected = np.mean((model.predict(TEXTS) - numbers) ** 2)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        found = each.evaluate(TEXTS, numbers, batch_size=32, verbose=0)[0]
        np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert mean_by_weight("crossentropy") == "crossentropy"
    made = mean_by_weight(keras.losses.MeanSquaredError)  # Of a class.
    assert made.reduction == "mean_with_sample_weight"
    # Labels without the last axis of the outputs, as Keras reads them.
    squares = mean_by_weight(lambda a, b: keras.ops.square(a - b))
    arrays = np.array([1.0, 2.0]), np.array([[1.0], [4.0]])
    for labels in (arrays[0], arrays[0][:, None]):
        assert float(squares(labels, arrays[1])) == 2.0
    total = keras.losses.MeanSquaredError(reduction="sum")
    assert mean_by_weight(total) is total


@pytest.mark.one_backend
def test_of_pairs_over_the_target_tokens(tokenizer):
    model, pairs = tiny_model(tokenizer), [(text, text[:12]) for text in TEXTS]
    found = []
    for loss in (kt.TokenCrossEntropy(), CROSS_ENTROPY):
        model.compile(keras.optimizers.SGD(0.0), loss)
        found.append(model.evaluate(pairs, batch_size=6, verbose=0)[0])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_metrics_of_a_wrong_kind(classifier):
    with pytest.raises(ValueError, match="`metrics` must be a list of metrics; got 5"):
        classifier.compile(metrics=5)
