"""Adapters: where they are, what they train, what becomes of them."""

import keras
import numpy as np
import pytest
from helpers.models import (
    enlarge,
    max_difference,
    numpy,
    one_block_config,
    random_inputs,
    tiny_config,
)

import keras_t5gemma as kt

ATTENTION = {"query", "value"}
MLP = {"gate", "up", "down"}


def make_model(factor=12.0, make_config=tiny_config):
    model = kt.Seq2SeqLM(kt.Backbone(make_config()))
    enlarge(model.backbone, factor)
    return model


def train(model, learning_rate=1e-2):
    x = random_inputs()
    model.compile(optimizer=keras.optimizers.AdamW(learning_rate))
    weights = np.ones(x["decoder_token_ids"].shape, "float32")
    keras.Model.fit(
        model, x, x["decoder_token_ids"], sample_weight=weights, epochs=2, verbose=0
    )


def base(model):
    return {v.path: numpy(v) for v in model.variables if "lora" not in v.path}


@pytest.mark.parametrize(
    ("parts", "count", "names"),
    [
        # The tiny pair has three encoder and two decoder blocks.
        (["encoder"], 3 * 2, ATTENTION),
        (["decoder"], 2 * 2, ATTENTION),
        (["cross_attention"], 2 * 2, ATTENTION),
        (["mlp"], 5 * 3, MLP),
        (["decoder", "cross_attention", "mlp"], 4 + 4 + 15, ATTENTION | MLP),
        (["embeddings"], 2, {"token_embedding"}),
        (None, 6 + 4 + 4, ATTENTION),
    ],
)
def test_a_part_is_what_it_says(parts, count, names):
    model = make_model()
    model.enable_lora(2, parts=parts)
    assert len(model.trainable_variables) == 2 * count  # A and B.
    folders = [v.path.split("/") for v in model.trainable_variables]
    assert {f[-2] for f in folders} == names
    assert all(f[-1].startswith("lora_") for f in folders)
    if parts in (["encoder"], ["decoder"]):
        assert all(parts[0] in f and "self_attention" in f for f in folders)
    if parts == ["cross_attention"]:
        assert all("cross_attention" in f for f in folders)


def test_names_within_a_part():
    model = make_model()
    model.enable_lora(2, ["output"], parts=["decoder", "encoder"])
    assert len(model.trainable_variables) == 2 * 5


def test_adapters_save_load_and_merge(tmp_path):
    x = random_inputs()
    model = make_model()
    before = base(model)
    model.enable_lora(4, parts=["decoder", "mlp", "embeddings"])
    assert max_difference(model(x), make_model()(x)) == 0
    train(model)
    expected = numpy(model(x))
    assert np.abs(expected - numpy(make_model()(x))).max() > 0.1
    assert all((base(model)[path] == value).all() for path, value in before.items())

    model.save_lora_weights(tmp_path / "a.lora.h5")
    again = make_model()
    again.load_lora_weights(tmp_path / "a.lora.h5")
    assert np.abs(numpy(again(x)) - expected).max() == 0
    assert len(again.trainable_variables) == len(model.trainable_variables)
    train(again)  # Trap: after Keras's own loading both factors are zero for good.
    assert np.abs(numpy(again(x)) - expected).max() > 1e-2

    model.save_to_preset(tmp_path / "merged")
    merged = kt.Seq2SeqLM.from_preset(tmp_path / "merged", preprocessor=None)
    assert not any("lora" in v.path for v in merged.variables)
    assert np.abs(numpy(merged(x)) - expected).max() < 1e-4
    assert np.abs(numpy(model(x)) - expected).max() == 0  # Saving changed nothing.


PARTS = ["encoder", "decoder", "cross_attention", "mlp"]


def start(quantize):
    """A model to learn adapters on, compiled; and the adapters' first values."""
    # int8 rounds gently where soft caps are flat.
    model = make_model(4.0, one_block_config)
    if quantize:
        model.quantize(quantize)
    model.enable_lora(4, parts=PARTS)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    rng = np.random.default_rng(0)
    adapters = [rng.normal(0, 0.05, v.shape) for v in model.trainable_variables]
    set_adapters(model, adapters)
    return model, adapters


def set_adapters(model, values):
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value.astype("float32"))


def data():
    x = random_inputs()
    y = x["decoder_token_ids"]
    return {"x": x, "y": y, "sample_weight": np.ones(y.shape, "float32"), "verbose": 0}


def gradient(quantize):
    model, adapters = start(quantize)
    keras.Model.fit(model, **data())
    pairs = zip(adapters, model.trainable_variables, strict=True)
    return [value - numpy(variable) for value, variable in pairs]


def test_adapters_learn_after_load_weights(tmp_path):
    """Keras loads merged weights, and makes both factors zero, without a gradient."""
    model = make_model(make_config=one_block_config)
    model.enable_lora(2, parts=["decoder", "embeddings"])
    train(model)
    x = random_inputs()
    expected = numpy(model(x))
    model.save_weights(tmp_path / "best.weights.h5")
    model.load_weights(tmp_path / "best.weights.h5")
    assert max_difference(model(x), expected) < 1e-3 * np.abs(expected).max()
    before = {v.path: numpy(v).copy() for v in model.trainable_variables}
    kept = base(model)
    train(model)
    for variable in model.trainable_variables:
        assert np.abs(numpy(variable) - before[variable.path]).max() > 1e-3
    for path, value in base(model).items():
        np.testing.assert_array_equal(value, kept[path])


def test_adapters_on_int8_have_the_gradient_of_float32():
    """Trap: through Keras's int8 logits it points nowhere."""
    exact, quantized = (
        np.concatenate([g.ravel() for g in gradient(quantize)])
        for quantize in (None, "int8")
    )
    cosine = exact @ quantized / np.linalg.norm(exact) / np.linalg.norm(quantized)
    assert cosine > 0.99


def test_adapters_on_int4_have_the_gradient_of_their_loss():
    """Four bits make another function of a model; its slope is what they learn by."""
    slopes = gradient("int4")
    norm = np.sqrt(sum((slope**2).sum() for slope in slopes))
    model, adapters = start("int4")
    losses = []
    for step in (1e-2, -1e-2):
        pairs = zip(adapters, slopes, strict=True)
        set_adapters(model, [value + step / norm * slope for value, slope in pairs])
        scores = keras.Model.evaluate(model, **data(), return_dict=True)
        losses.append(scores["loss"])
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.enable_lora(0), "`rank`.*whole number from 1 to .*; got 0"),
        (lambda m, p: m.enable_lora(4, ["querry"]), "one of.*query.*querry"),
        (lambda m, p: m.enable_lora(4, parts=["tower"]), "one of.*mlp.*tower"),
        (lambda m, p: m.enable_lora(4, parts="mlp"), "list of.*got 'mlp'"),
        (lambda m, p: m.enable_lora(4, ["gate"], ["encoder"]), "No layer"),
        (lambda m, p: m.save_lora_weights(p / "x.lora.h5"), "enable_lora"),
    ],
)
def test_refuses(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(make_model(), tmp_path)


def test_refuses_adapters_of_another_place(tmp_path):
    model = make_model()
    model.enable_lora(2, parts=["encoder"])
    with pytest.raises(ValueError, match="end in '.lora.h5'.*x.h5"):
        model.save_lora_weights(tmp_path / "x.h5")
    model.save_lora_weights(tmp_path / "x.lora.h5")
    (tmp_path / "text.lora.h5").write_text("adapters")
    with pytest.raises(
        ValueError, match="text.lora.h5 is truncated or not an HDF5 file"
    ):
        model.load_lora_weights(tmp_path / "text.lora.h5")
    other = make_model()
    other.enable_lora(2, parts=["decoder"])
    with pytest.raises(ValueError, match="the file has 6 of rank"):
        other.load_lora_weights(tmp_path / "x.lora.h5")
