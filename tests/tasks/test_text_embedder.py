"""Vectors of texts: what they are, that they can be trained, and what is refused."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import (
    enlarge,
    max_difference,
    numpy,
    one_block_config,
    tiny_config,
)

import keras_t5gemma as kt
from keras_t5gemma.data.encoder_dataset import by_length
from keras_t5gemma.modeling.heads import POOLINGS, HybridVector, pool
from keras_t5gemma.training.contrastive import in_batch_accuracy
from keras_t5gemma.utils.ragged import Ragged

TEXTS = [
    "a game of chess",
    "reads files",
    "a library to read and to write files in a format that nobody knows ",
    "x",
    "tool for pictures, sounds and films",
]
PAIRS = {
    "anchor": ["chess for two players", "reads JSON files", "shows pictures", "a font"],
    "positive": ["a board game", "file format library", "image viewer", "letters"],
}


def make_embedder(tokenizer, make_config=one_block_config, **kwargs):
    keras.utils.set_random_seed(0)
    backbone = kt.Backbone(dataclasses.replace(make_config(), decoder=None))
    enlarge(backbone)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 96, 8)
    return kt.TextEmbedder(backbone, preprocessor, **kwargs)


@pytest.fixture
def embedder(tokenizer):
    """Of three blocks, to tell its layers apart."""
    return make_embedder(tokenizer, tiny_config)


def weights_of(model):
    return [numpy(weight).copy() for weight in model.weights]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_by_hand(pooling):
    states = np.random.default_rng(0).normal(size=(3, 4, 2)).astype("float32")
    padding = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    row = {
        "mean": states[0, :3].mean(0),
        "last": states[0, 2],
        "first": states[0, 0],
        "weighted": (states[0, 0] + 2 * states[0, 1] + 3 * states[0, 2]) / 6,
    }[pooling]
    pooled = numpy(pool(keras.ops.convert_to_tensor(states), padding, pooling))
    assert max_difference(pooled, np.stack([row, states[1, 0], [0, 0]])) < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_does_not_depend_on_the_other_texts(tokenizer, pooling):
    embedder = make_embedder(tokenizer, pooling=pooling)
    vectors = embedder.embed(TEXTS, batch_size=2)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32
    assert max_difference(np.linalg.norm(vectors, axis=1), np.ones(5)) < 1e-5
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert max_difference(embedder.embed([text])[0], vector) < 1e-5
    assert max_difference(vectors[0], vectors[1]) > 0.01


def test_vectors_are_pooled_states(embedder):
    vectors = embedder.embed(TEXTS)
    states, padding = embedder.hidden_states(TEXTS, batch_size=2, as_numpy=True)
    assert states.shape == (*padding.shape, 32)
    assert padding.sum(1).max() == padding.shape[1]
    means = states.sum(1) / padding.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert max_difference(vectors, means) < 1e-5


@pytest.mark.parametrize("bins", [5, 64])
def test_hybrid_vectors_by_hand(bins):
    rng = np.random.default_rng(0)
    pooled, states = rng.normal(size=(3, 4)), rng.normal(size=(3, 6, 4))
    ids = rng.integers(0, 20, (3, 6))
    padding = np.arange(6) < np.array([[6], [3], [1]])
    layer = HybridVector(bins)
    arrays = [x.astype("float32") for x in (pooled, states)]
    arrays += [x.astype("int32") for x in (ids, padding)]
    layer(*map(keras.ops.convert_to_tensor, arrays))
    kernel, share = (rng.normal(size=w.shape) for w in layer.weights)
    layer.set_weights([kernel, share])
    found = numpy(layer(*map(keras.ops.convert_to_tensor, arrays)))
    for row in range(3):
        sums = np.zeros(bins)
        for i in range(padding[row].sum()):
            token = ids[row, i]
            weight = np.log1p(np.exp(states[row, i] @ kernel))
            sums[token % bins] += weight * (-1) ** (token // bins)
        lexical = np.sign(sums) * np.log1p(np.abs(sums))
        parts = [x / np.linalg.norm(x) for x in (pooled[row], lexical)]
        part = 1 / (1 + np.exp(-share))
        expected = [np.sqrt(part) * parts[0], np.sqrt(1 - part) * parts[1]]
        assert max_difference(found[row], np.concatenate(expected)) < 1e-5


def test_hybrid_vectors_learn_and_come_back(tokenizer, tmp_path):
    embedder = make_embedder(tokenizer, projection_dim=8, lexical_dim=16)
    vectors = embedder.embed(TEXTS, batch_size=2)
    assert vectors.shape == (5, 24)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert max_difference(embedder.embed([text])[0], vector) < 1e-5
    embedder.compile(keras.optimizers.Adam(3e-3), loss=kt.InfoNCE(0.1))
    history = embedder.fit(PAIRS, batch_size=4, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert all(numpy(w).any() for w in embedder.get_layer("hybrid").weights)
    embedder.save_to_preset(tmp_path)
    again = kt.TextEmbedder.from_preset(tmp_path)
    assert np.array_equal(again.embed(TEXTS), embedder.embed(TEXTS))
    new = kt.TextEmbedder.from_preset(tmp_path, lexical_dim=None)
    assert new.embed(TEXTS).shape == (5, 16)


def test_a_loss_by_hand():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(4, 2, 6)).astype("float32")
    pairs[3] = 0  # It fills the batch up.

    def plain(pairs, both):
        unit = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
        logits = unit[:, 0] @ unit[:, 1].T / 0.1
        total = 0
        for x in (logits, logits.T)[: 1 + both]:
            total += np.log(np.exp(x).sum(1)) - np.diag(x)
        return total / (1 + both)

    tensor = keras.ops.convert_to_tensor(pairs)
    for both in (True, False):
        loss = kt.InfoNCE(0.1, symmetric=both)
        found = numpy(loss.call(None, tensor))[:3]
        assert max_difference(found, plain(pairs[:3], both)) < 1e-5
    loss = kt.InfoNCE(0.1, dimensions=[2, 6])
    found = numpy(loss.call(None, tensor))[:3]
    expected = (plain(pairs[:3, :, :2], True) + plain(pairs[:3], True)) / 2
    assert max_difference(found, expected) < 1e-5
    hits = numpy(in_batch_accuracy(None, tensor))[:3]
    unit = pairs[:3] / np.linalg.norm(pairs[:3], axis=-1, keepdims=True)
    nearest = (unit[:, 0] @ unit[:, 1].T).argmax(1)
    assert np.array_equal(hits, nearest == np.arange(3))


def test_pairs_come_together(tokenizer):
    embedder = make_embedder(tokenizer)
    embedder.compile(keras.optimizers.Adam(3e-3), loss=kt.InfoNCE(0.1))
    history = embedder.fit(PAIRS, batch_size=4, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert embedder.evaluate(PAIRS, return_dict=True, verbose=0)["accuracy"] == 1
    anchors, positives = (embedder.embed(PAIRS[side]) for side in PAIRS)
    numbers, cosines = kt.nearest(anchors, positives, k=2)
    assert numbers[:, 0].tolist() == [0, 1, 2, 3]
    assert np.all(cosines[:, 0] > cosines[:, 1])
    near = kt.cosine_similarity(anchors, positives)
    assert max_difference(np.diag(near), cosines[:, 0]) < 1e-6


@pytest.mark.one_backend
def test_data_in_other_forms_is_the_same_data(tokenizer):
    rows = list(zip(*PAIRS.values(), strict=True))
    results = []
    for args in ((PAIRS,), (rows,), tuple(PAIRS.values())):
        embedder = make_embedder(tokenizer)
        embedder.compile(keras.optimizers.SGD(0.1))
        data = {"batch_size": 3, "shuffle": False, "validation_split": 0.25}
        history = embedder.fit(*args, verbose=0, **data).history
        assert "val_loss" in history
        results.append(weights_of(embedder))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


def test_gradient_cache_changes_nothing(tokenizer):
    results = []
    for rows in (None, 2, 1):
        embedder = make_embedder(tokenizer, projection_dim=8)
        embedder.compile(keras.optimizers.SGD(0.05), gradient_cache_rows=rows)
        embedder.fit(PAIRS, batch_size=4, epochs=2, shuffle=False, verbose=0)
        results.append(weights_of(embedder))
    start = weights_of(make_embedder(tokenizer, projection_dim=8))
    moved = max(map(max_difference, results[0], start))
    for other in results[1:]:
        assert max(map(max_difference, results[0], other)) < 1e-4 * moved
    assert moved > 1e-3


def test_gradient_cache_of_a_single_batch(tokenizer, monkeypatch):
    """`train_on_batch` comes without a batch size: 6 rows are 2 parts of 3."""
    seen = []

    def remat(run):
        def of_part(ids, padding):
            seen.append(ids.shape[0])
            return run(ids, padding)

        return of_part

    monkeypatch.setattr(keras, "remat", remat)
    embedder = make_embedder(tokenizer)
    embedder.compile(keras.optimizers.SGD(0.05), gradient_cache_rows=4)
    embedder.train_on_batch(TEXTS[:3] * 2, TEXTS[2:] * 2)
    assert set(seen) == {3}


def test_rows_that_fill_a_batch_change_nothing(tokenizer):
    results = []
    for size in (4, 6):
        embedder = make_embedder(tokenizer)
        embedder.compile(keras.optimizers.SGD(0.05))
        embedder.fit(PAIRS, batch_size=size, shuffle=False, verbose=0)
        results.append(weights_of(embedder))
    assert max(map(max_difference, *results)) < 1e-6


def test_it_comes_back_from_its_preset(tokenizer, tmp_path):
    embedder = make_embedder(
        tokenizer, pooling="weighted", projection_dim=8, normalize=False
    )
    vectors = embedder.embed(TEXTS)
    embedder.save_to_preset(tmp_path)
    again = kt.TextEmbedder.from_preset(tmp_path)
    assert (again.pooling, again.normalize) == ("weighted", False)
    assert np.array_equal(again.embed(TEXTS), vectors)
    cut = again.embed(TEXTS, dimensions=3)
    assert np.array_equal(cut, vectors[:, :3])
    other = kt.TextEmbedder.from_preset(tmp_path, pooling="mean", projection_dim=None)
    assert other.embed(TEXTS).shape == (5, 16)
    wider = kt.TextEmbedder.from_preset(tmp_path, projection_dim=12)
    assert wider.embed(TEXTS).shape == (5, 12)


@pytest.mark.one_backend
def test_of_the_embedded_pair():
    embedder = kt.TextEmbedder.from_preset("t5gemma_mini")
    assert embedder.backbone.decoder is None
    texts = ["a library to read and write JSON files", "a game of cards"]
    vectors = embedder.embed([*texts, "library for reading and writing JSON"])
    near = kt.cosine_similarity(vectors[2:], vectors[:2])[0]
    assert near[0] > near[1] + 0.1
    cut = embedder.embed(texts, dimensions=8)
    assert max_difference(np.linalg.norm(cut, axis=1), np.ones(2)) < 1e-5


@pytest.mark.one_backend
def test_adapters_and_projection_learn(tokenizer):
    embedder = make_embedder(tokenizer, projection_dim=8)
    embedder.enable_lora(2)
    before = {w.path: numpy(w).copy() for w in embedder.weights}
    embedder.compile(keras.optimizers.Adam(1e-2))
    embedder.fit(PAIRS, batch_size=4, epochs=2, verbose=0)
    moved = {w.path for w in embedder.weights if (numpy(w) != before[w.path]).any()}
    assert "projection/kernel" in moved and len(moved) > 3
    assert all("lora" in path or "projection" in path for path in moved)


def test_adapters_are_saved_and_weights_quantized(tokenizer, tmp_path):
    embedder = make_embedder(tokenizer)
    embedder.enable_lora(2)
    for weight in embedder.trainable_variables:
        weight.assign(keras.random.normal(weight.shape, stddev=0.1, seed=1))
    vectors = embedder.embed(TEXTS)
    embedder.save_lora_weights(tmp_path / "adapters.lora.h5")
    again = make_embedder(tokenizer)
    plain = again.embed(TEXTS)
    assert max_difference(plain, vectors) > 1e-2
    again.enable_lora(2)
    again.load_lora_weights(tmp_path / "adapters.lora.h5")
    assert max_difference(again.embed(TEXTS), vectors) < 1e-6
    rounded = make_embedder(tokenizer)
    rounded.quantize("int8")
    assert 0 < max_difference(rounded.embed(TEXTS), plain) < 0.1


def shapes(lengths, batch_size):
    rows = Ragged(np.asarray(lengths), np.zeros(np.sum(lengths), "int32"))
    batches = by_length(rows, batch_size, limit=512)
    return [x["encoder_token_ids"].shape for _, x in batches]


def test_few_shapes():
    lengths = np.minimum(np.arange(1, 600), 512)
    widths = [width for _, width in shapes(lengths, 1)][::-1]
    assert all(w >= n for n, w in zip(range(1, 513), widths, strict=False))
    if keras.config.backend() == "torch":  # It compiles nothing.
        assert max(w - n for n, w in zip(range(1, 513), widths, strict=False)) == 7
        return
    assert sorted(set(widths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def test_few_texts_are_not_filled_up():
    """A query is one row; of many texts all batches have the same number of rows."""
    eager = keras.config.backend() == "torch"
    assert shapes([10], 32) == [(1, 16)]
    assert shapes([20] * 5, 32) == [(5 if eager else 8, 24)]
    assert shapes([20] * 35, 32) == [(32, 24), (3 if eager else 32, 24)]


@pytest.mark.one_backend
def test_refusals(embedder, model, tokenizer):
    with pytest.raises(ValueError, match="encoder alone.*encoder_only=True"):
        kt.TextEmbedder(model.backbone)
    with pytest.raises(ValueError, match="`pooling` must be one of.*'max'"):
        make_embedder(tokenizer, pooling="max")
    for wrong in (0, "many"):
        with pytest.raises(ValueError, match="`lexical_dim` must be a whole number"):
            make_embedder(tokenizer, lexical_dim=wrong)
    with pytest.raises(ValueError, match="`normalize` must be True.*got False"):
        make_embedder(tokenizer, lexical_dim=8, normalize=False)
    with pytest.raises(ValueError, match="`texts` must be a list of texts"):
        embedder.embed("a text")
    with pytest.raises(ValueError, match="at least one"):
        embedder.fit([], [])
    with pytest.raises(ValueError, match="2 of 4 texts.*the first is number 1"):
        embedder.embed(["a", "", "b", ""])
    with pytest.warns(UserWarning, match="1 of 2 encoder texts were longer than 96"):
        embedder.embed(["a", "word " * 100])
    with pytest.raises(ValueError, match="`dimensions` must be.*from 1 to 32; got 33"):
        embedder.embed(["a"], dimensions=33)
    with pytest.raises(ValueError, match="dict with keys.*'anchor', 'positive'"):
        embedder.fit({"anchor": ["a"], "negative": ["b"]})
    with pytest.raises(
        ValueError, match="same number of rows.*'anchor': 1, 'positive': 2"
    ):
        embedder.fit({"anchor": ["a"], "positive": ["b", "c"]})
    with pytest.raises(ValueError, match="`temperature` must be a number above 0"):
        kt.InfoNCE(0)
    dropped = make_embedder(tokenizer, lambda: one_block_config(dropout=0.1))
    with pytest.raises(ValueError, match="`gradient_cache_rows` needs.*without drop"):
        dropped.compile(gradient_cache_rows=5)
    embedder.compile(gradient_cache_rows=5)
    with pytest.raises(ValueError, match="must divide `batch_size` 32; got 5"):
        embedder.fit(PAIRS)
    embedder.compile(loss=kt.InfoNCE(dimensions=[64]))
    with pytest.raises(ValueError, match="`dimensions` must be.*from 1 to 32"):
        embedder.fit(PAIRS, batch_size=4)
    with pytest.raises(ValueError, match="`k` must be a whole number from 1 to 3"):
        kt.nearest(np.ones((2, 4)), np.ones((3, 4)), k=4)
