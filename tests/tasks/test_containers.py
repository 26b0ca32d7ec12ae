"""Texts in the containers of other libraries, in every method that takes texts."""

import dataclasses
import types

import numpy as np
import pytest
from helpers.models import one_block_config

import keras_t5gemma as kt
from keras_t5gemma.data.text_batches import map_batch
from keras_t5gemma.data.text_columns import as_columns, as_documents, pairs_of
from keras_t5gemma.planning.planner import read_length
from keras_t5gemma.utils.texts import as_texts

pytestmark = pytest.mark.one_backend
TEXTS = ["A board game", "Fonts of the old kind", "cards"]
TARGETS = ["game", "library", "game"]
PAIRS = {"encoder_text": TEXTS, "decoder_text": TARGETS}


def columns(texts):
    """The texts in each kind of column that is installed."""
    yield tuple(texts)
    yield np.array(texts)
    pyarrow = pytest.importorskip("pyarrow")
    yield pyarrow.array(texts)
    yield pyarrow.chunked_array([texts[:1], texts[1:]])
    for library in ("pandas", "polars"):
        try:
            yield __import__(library).Series(texts)
        except ImportError:
            continue


def tables(data):
    yield pytest.importorskip("pyarrow").table(data)
    for library in ("pandas", "polars"):
        try:
            yield __import__(library).DataFrame(data)
        except ImportError:
            continue


def test_a_tensor_of_one_string_is_no_list_of_its_bytes():
    tensor = types.SimpleNamespace(shape=(), numpy=lambda: b"A board game")
    with pytest.raises(ValueError, match="`x` must be a string or a .*got bytes b'A b"):
        as_texts(tensor, "x")


def test_columns_and_tables_are_pairs():
    for sources, targets in zip(columns(TEXTS), columns(TARGETS), strict=True):
        assert as_columns(sources, targets) == PAIRS
        assert as_columns((sources, targets)) == PAIRS
        assert as_columns({"encoder_text": sources, "decoder_text": targets}) == PAIRS
        assert as_documents(sources) == {"text": TEXTS}
        assert pairs_of(sources, targets, ("a", "b")) == {"a": TEXTS, "b": TARGETS}
        with pytest.raises(ValueError, match="`y` must be the list of targets"):
            as_columns(sources)
    for table in tables({"id": [1, 2, 3], **PAIRS}):
        assert as_columns(table) == PAIRS
        assert pairs_of(table, None, tuple(PAIRS)) == PAIRS
        with pytest.raises(ValueError, match=r"`x` must have the columns .*'a'"):
            pairs_of(table, None, ("a", "b"))
    for table in tables({"text": TEXTS, "id": [1, 2, 3]}):
        assert as_documents(table) == {"text": TEXTS}
        with pytest.raises(ValueError, match=r"`x` must have the columns .*'id'"):
            as_columns(table)


def test_two_lists_in_a_tuple_are_columns_and_a_list_of_two_is_pairs():
    rows = {"encoder_text": ["a", "c"], "decoder_text": ["b", "d"]}
    sides = {"encoder_text": ["a", "b"], "decoder_text": ["c", "d"]}
    for read in (as_columns, lambda x: pairs_of(x, None, tuple(PAIRS))):
        assert read((["a", "b"], ["c", "d"])) == sides
        assert read([["a", "b"], ["c", "d"]]) == rows
        assert read([("a", "b"), ("c", "d")]) == rows
        assert read((("a", "b"), ("c", "d"), ("e", "f")))["decoder_text"] == [*"bdf"]
        with pytest.raises(ValueError, match="`x` must not be a tuple of two tuples"):
            read((("a", "b"), ("c", "d")))


def test_models_take_columns(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    tower = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    embedder = kt.TextEmbedder(tower, preprocessor)
    answers = model.generate(TEXTS, max_length=4)
    scores = model.score(TEXTS, TARGETS)["log_prob"]
    vectors = embedder.embed(TEXTS)
    for texts, targets in zip(columns(TEXTS), columns(TARGETS), strict=True):
        assert model.generate(texts, max_length=4) == answers
        inputs = {"encoder_text": texts}
        assert model.generate(inputs, max_length=4) == answers
        assert model.score(texts, targets)["log_prob"] == scores
        assert np.array_equal(embedder.embed(texts), vectors)
    for nothing in columns([]):
        assert model.generate(nothing) == []
        assert model.generate({"encoder_text": nothing}) == []
        assert model.score(nothing, nothing)["log_prob"] == []
        assert embedder.embed(nothing).shape == (0, 16)
    for table in tables(PAIRS):
        message = r"`inputs` must be one column.*\['encoder_text', 'decoder_text'\]"
        with pytest.raises(ValueError, match=message):
            model.generate(table)
    with pytest.raises(ValueError, match=r"`encoder_text\[1\]` must be a string.*None"):
        model.generate(["a", None])
    with pytest.raises(ValueError, match=r"`texts\[1\]` must be.*None. Drop or fill"):
        embedder.embed(["a", None])
    with pytest.raises(ValueError, match="equally many rows; got 0 and 1"):
        model.score([], ["a"])


def test_nothing_gives_nothing(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    tower = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    embedder = kt.TextEmbedder(tower, preprocessor)
    assert embedder.embed([]).dtype == np.float32
    assert embedder.embed([], dimensions=5).shape == (0, 5)
    states, padding = embedder.hidden_states([])
    assert states.shape == (0, 0, 16) and padding.shape == (0, 0)
    states, padding = embedder.hidden_states([], pad_to=7, as_numpy=True)
    assert states.shape == (0, 7, 16) and states.dtype == np.float32
    assert padding.shape == (0, 7) and padding.dtype == bool
    assert embedder.predict([]).shape == (0, 16)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    for nothing in ([[]], [[], []], [{"encoder_text": [], "decoder_text": []}]):
        assert model.predict(*nothing).shape == (0, 8, 480)
    with pytest.raises(ValueError, match="`x`"):
        model.fit([])
    numbers, cosines = kt.nearest(np.zeros((0, 4)), np.ones((3, 4)), k=2)
    assert numbers.shape == cosines.shape == (0, 2)


def test_single_batches_take_what_fit_takes(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    arrays = preprocessor(PAIRS)
    expected = model.test_on_batch(*arrays)
    for batch in ((PAIRS,), (TEXTS, TARGETS), ((TEXTS, TARGETS),)):
        assert np.allclose(model.test_on_batch(*batch), expected)
    logits = model.predict_on_batch(arrays[0])
    assert np.allclose(logits, model.predict_on_batch(PAIRS))
    assert np.allclose(model.train_on_batch(*arrays)[0], expected[0])
    assert model.test_on_batch(*arrays)[0] < expected[0]
    with pytest.raises(ValueError, match="`x` must be a batch of texts or of arrays"):
        model.train_on_batch(5)
    tower = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    classifier = kt.TextClassifier(tower, preprocessor, class_names=["game", "library"])
    expected = classifier.test_on_batch(TEXTS, TARGETS)
    assert np.allclose(expected[0], classifier.evaluate(TEXTS, TARGETS, verbose=0)[0])
    assert np.allclose(classifier.train_on_batch(TEXTS, TARGETS)[0], expected[0])


def test_a_table_is_a_batch(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    _, expected, _ = preprocessor(PAIRS)
    for table in tables({**PAIRS, "id": [1, 2, 3]}):
        assert np.array_equal(map_batch(preprocessor, table)[1], expected)


def test_numpy_integers_are_lengths():
    assert read_length(np.int64(512)) == read_length(512) == (512, 512)
