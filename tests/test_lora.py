"""Adapters: where they are, what they train, what becomes of them."""

import keras
import numpy as np
import pytest
from conftest import enlarge, max_difference, numpy, random_inputs, tiny_config

import keras_t5gemma as kt

ATTENTION = {"query", "value"}
MLP = {"gate", "up", "down"}


def make_model(factor=12.0):
    model = kt.Seq2SeqLM(kt.Backbone(tiny_config()))
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


def test_adapters_on_int8_have_the_gradient_of_float32():
    """Trap: through Keras's int8 logits it points nowhere."""

    def step(quantize):
        model = make_model(4.0)  # int8 rounds gently where soft caps are flat.
        if quantize:
            model.quantize("int8")
        model.enable_lora(4, parts=["encoder", "decoder", "cross_attention", "mlp"])
        rng = np.random.default_rng(0)
        start = {}
        for v in model.trainable_variables:
            start[v.path] = rng.normal(0, 0.05, v.shape).astype("float32")
            v.assign(start[v.path])
        x = random_inputs()
        weights = np.ones(x["decoder_token_ids"].shape, "float32")
        model.compile(optimizer=keras.optimizers.SGD(1.0))
        y = x["decoder_token_ids"]
        keras.Model.fit(model, x, y, sample_weight=weights, verbose=0)
        return np.concatenate(
            [(numpy(v) - start[v.path]).ravel() for v in model.trainable_variables]
        )

    exact, quantised = step(False), step(True)
    cosine = exact @ quantised / np.linalg.norm(exact) / np.linalg.norm(quantised)
    assert cosine > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.enable_lora(0), "`rank`.*>= 1; got 0"),
        (lambda m, p: m.enable_lora(4, ["querry"]), "among.*query.*querry"),
        (lambda m, p: m.enable_lora(4, parts=["tower"]), "among.*mlp.*tower"),
        (lambda m, p: m.enable_lora(4, parts="mlp"), "list among.*got 'mlp'"),
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
    with pytest.raises(ValueError, match="text.lora.h5' is no file of"):
        model.load_lora_weights(tmp_path / "text.lora.h5")
    other = make_model()
    other.enable_lora(2, parts=["decoder"])
    with pytest.raises(ValueError, match="the file has 6 of rank"):
        other.load_lora_weights(tmp_path / "x.lora.h5")
