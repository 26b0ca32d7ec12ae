"""A model with more ids than its tokenizer never generates the additional ones."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers.models import enlarge, one_block_config

import keras_t5gemma as kt

KNOWN, PADDED = 480, 512


@pytest.fixture(scope="module")
def model(tokenizer):
    assert tokenizer.vocabulary_size() == KNOWN
    keras.utils.set_random_seed(0)
    config = one_block_config()
    stack = config.encoder
    backbone = kt.Backbone(kt.T5GemmaConfig(stack, stack, PADDED), dtype="float32")
    enlarge(backbone)
    table = backbone.decoder.token_embedding.embeddings
    values = np.array(keras.ops.convert_to_numpy(table))
    values[KNOWN:] *= 20  # Left alone, the model would choose these.
    table.assign(values)
    return kt.Seq2SeqLM(backbone, kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16))


def ids(model, **options):
    arrays = model.preprocessor.generate_preprocess(["A board", "Fonts of the"], 8)
    out = model.generate(arrays, max_length=8, stop_token_ids=None, **options)
    return np.asarray(out["decoder_token_ids"])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"temperature": 1.5, "seed": 0}], ids=str
)
def test_no_unknown_id(model, options):
    assert ids(model, **options).max() < KNOWN


def test_the_model_would_choose_them(model, monkeypatch):
    monkeypatch.setattr(
        "keras_t5gemma.generation.generator.known_tokens", lambda _: None
    )
    assert ids(model).max() >= KNOWN


def test_kerashub_samplers_and_streams(model):
    class Own(keras_hub.samplers.GreedySampler):
        """A sampler that options cannot express."""

    text = "A board"
    greedy = model.generate(text, max_length=8)
    assert "".join(model.stream(text, max_length=8)) == greedy
    model.compile(sampler=Own())
    assert model.generate(text, max_length=8) == greedy
    model.compile(sampler="greedy")


def test_unknown_ids_cannot_be_forced(model):
    with pytest.raises(ValueError, match="`forced_token_ids`.*480"):
        ids(model, forced_token_ids=[KNOWN + 3])
