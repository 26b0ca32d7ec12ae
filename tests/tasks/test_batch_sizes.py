"""A batch size below 1 is refused by everything that takes one."""

import dataclasses

import pytest
from helpers.models import one_block_config

import keras_t5gemma as kt

pytestmark = pytest.mark.one_backend
TEXTS = ["A board", "Fonts of the old kind"]


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "8"])
def test_batch_sizes(tokenizer, batch_size):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    config = dataclasses.replace(one_block_config(), decoder=None)
    embedder = kt.TextEmbedder(kt.Backbone(config), preprocessor)
    classifier = kt.TextClassifier(
        kt.Backbone(config), preprocessor, class_names=["a", "b"]
    )
    calls = [
        lambda: model.generate(TEXTS, batch_size=batch_size),
        lambda: model.score(TEXTS, TEXTS, batch_size=batch_size),
        lambda: model.predict(
            list(zip(TEXTS, TEXTS, strict=True)), batch_size=batch_size
        ),
        lambda: model.fit(TEXTS, TEXTS, batch_size=batch_size),
        lambda: model.evaluate(TEXTS, TEXTS, batch_size=batch_size),
        lambda: embedder.embed(TEXTS, batch_size=batch_size),
        lambda: embedder.hidden_states(TEXTS, batch_size=batch_size),
        lambda: embedder.fit(TEXTS, TEXTS, batch_size=batch_size),
        lambda: classifier.predict(TEXTS, batch_size=batch_size),
        lambda: classifier.classify(TEXTS, batch_size=batch_size),
        lambda: classifier.fit(TEXTS, ["a", "b"], batch_size=batch_size),
    ]
    for i, call in enumerate(calls):
        with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
            call()
            pytest.fail(f"call {i} took it")
