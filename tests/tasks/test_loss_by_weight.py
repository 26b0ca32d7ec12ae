"""Loss and metrics of encoder tasks do not depend on rows that fill up a batch."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, tiny_config

import keras_t5gemma as kt

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


def test_metrics_of_a_wrong_kind(classifier):
    with pytest.raises(ValueError, match="`metrics` must be a list of metrics; got 5"):
        classifier.compile(metrics=5)
