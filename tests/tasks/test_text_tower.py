"""An encoder as a layer in front of another model: frozen, trained, saved with it."""

import keras
import numpy as np
import pytest
from helpers.models import enlarge, max_difference, numpy, one_block_config

import keras_t5gemma as kt

TEXTS = ["a game of chess", "", "reads files", "tool for pictures and films"]


def make_tower(tokenizer, mode=None, dropout=0.0, **kwargs):
    config = kt.T5GemmaConfig(one_block_config().encoder, None, 480, dropout=dropout)
    backbone = enlarge(kt.Backbone(config), factor=4.0)
    if mode:
        backbone.quantize(mode)
    return kt.TextTower(backbone, kt.Seq2SeqLMPreprocessor(tokenizer, 96, 8), **kwargs)


def make_generator(tower):
    """A model of a user: the mean of the states, and a layer that is trained."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    mask = keras.Input((None,), dtype="bool", name="mask")
    states = tower(ids, mask)
    if isinstance(states, list):
        states = keras.layers.Concatenate()(states)
    pooled = keras.layers.GlobalMaxPooling1D()(states)
    model = keras.Model([ids, mask], keras.layers.Dense(3, name="head")(pooled))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def moved(before, weights):
    return [
        w.path for b, w in zip(before, weights, strict=True) if (numpy(w) != b).any()
    ]


@pytest.mark.parametrize("layers", [-1, [0, -1]])
def test_states_are_those_of_hidden_states(tokenizer, layers):
    tower = make_tower(tokenizer, layers=layers)
    embedder = kt.TextEmbedder(tower.backbone, tower.preprocessor)
    ids, mask = tower.tokenize(TEXTS, pad_to=20)
    assert ids.dtype == np.int32 and mask.dtype == bool and not mask[1].any()
    found = tower(ids, mask)
    expected, expected_mask = embedder.hidden_states(TEXTS, layers, pad_to=20)
    assert np.array_equal(mask, numpy(expected_mask))
    for a, b in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        assert a.shape == (4, 20, 16)
        assert max_difference(a, b) < 1e-5
    assert tower.tokenize(TEXTS)[0].shape[1] == mask.sum(1).max()
    spec = tower(*(keras.Input((None,), dtype="int32") for _ in range(2)))
    assert all(s.shape == (None, None, 16) for s in keras.tree.flatten(spec))


@pytest.mark.parametrize("trainable", [False, True])
def test_jitted_with_a_generator_and_saved_with_it(tokenizer, tmp_path, trainable):
    tower = make_tower(tokenizer, layers=[0, -1], trainable=trainable)
    model = make_generator(tower)
    inputs = list(tower.tokenize(TEXTS, pad_to=32))
    before = [numpy(w).copy() for w in model.weights]
    model.fit(inputs, np.ones((4, 3)), epochs=2, verbose=0)
    changed = moved(before, model.weights)
    assert sum("head" in path for path in changed) == 2
    assert (len(changed) == len(before)) if trainable else (len(changed) == 2)
    assert len(tower.trainable_weights) == trainable * len(tower.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    (again,) = [x for x in loaded.layers if isinstance(x, kt.TextTower)]
    assert again.trainable is trainable and again.get_config() == tower.get_config()
    other = again.tokenize(TEXTS, pad_to=32)
    assert np.array_equal(other[0], inputs[0])
    found, expected = (m.predict(inputs, verbose=0) for m in (loaded, model))
    assert max_difference(found, expected) < 1e-6


@pytest.mark.one_backend
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_towers_are_saved(tokenizer, tmp_path, mode):
    model = make_generator(make_tower(tokenizer, mode))
    inputs = list(model.layers[2].tokenize(TEXTS))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    found, expected = (m.predict(inputs, verbose=0) for m in (loaded, model))
    assert np.abs(expected).max() > 0.01
    assert max_difference(found, expected) < 1e-6


@pytest.mark.one_backend
def test_adapters_learn(tokenizer, tmp_path):
    tower = make_tower(tokenizer, trainable=True)
    tower.backbone.enable_lora(2)
    model = make_generator(tower)
    before = [numpy(w).copy() for w in model.weights]
    inputs = list(tower.tokenize(TEXTS))
    model.fit(inputs, np.ones((4, 3)), epochs=2, verbose=0)
    changed = moved(before, model.weights)
    assert sum("lora" in path for path in changed) == 4
    assert all("lora" in path or "head" in path for path in changed)
    with pytest.warns(UserWarning, match="`TextTower` merges the adapters into"):
        model.save(tmp_path / "model.keras")


@pytest.mark.one_backend
def test_a_frozen_tower_has_no_dropout(tokenizer):
    for trainable in (False, True):
        tower = make_tower(tokenizer, dropout=0.5, trainable=trainable)
        inputs = tower.tokenize(TEXTS)
        difference = max_difference(tower(*inputs, training=True), tower(*inputs))
        assert (difference > 0.1) == trainable


@pytest.mark.one_backend
def test_of_a_preset():
    tower = kt.TextTower.from_preset("t5gemma_mini", layers=[0, -1], dtype="bfloat16")
    assert tower.backbone.decoder is None and not tower.trainable_weights
    states = tower(*tower.tokenize(["a game of chess"], pad_to=16))
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in states]
    assert dtypes == ["bfloat16"] * 2
    wide = kt.TextTower(tower.backbone, layers=-1, dtype="float32")
    ids, mask = tower.tokenize(["a game of chess"], pad_to=16)
    assert max_difference(wide(ids, mask), states[1]) == 0
    with pytest.raises(ValueError, match="TextTower needs a `preprocessor`"):
        wide.tokenize(["a"])


@pytest.mark.one_backend
def test_refusals(tokenizer, model):
    for wrong in (model.backbone, None, "t5gemma_mini"):
        with pytest.raises(ValueError, match="`backbone` must be an encoder alone"):
            kt.TextTower(wrong)
    with pytest.raises(ValueError, match="`layers` must be.* from -2 to 1; got 2"):
        make_tower(tokenizer, layers=2)
    with pytest.raises(ValueError, match="`final_norm` must be one of None"):
        make_tower(tokenizer, final_norm="last")
    with pytest.raises(ValueError, match="`trainable` must be True or False; got 1"):
        make_tower(tokenizer, trainable=1)
    with pytest.raises(ValueError, match="`preprocessor` of TextTower must be a"):
        kt.TextTower(make_tower(tokenizer).backbone, tokenizer)
    tower = make_tower(tokenizer)
    with pytest.raises(ValueError, match="`pad_to` must be at most 96.*got 97"):
        tower.tokenize(TEXTS, pad_to=97)
