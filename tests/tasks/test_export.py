"""`export`: files of other runtimes give what the model gives, at every length."""

import keras
import numpy as np
import pytest
from helpers.models import tiny_model

import keras_t5gemma as kt

TORCH = keras.config.backend() == "torch"
# Beyond the windows of 8; and where attention works in blocks.
LENGTHS = [(2, 2), (5, 3), (40, 2), (1100, 9)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory, tokenizer):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("export") / "preset"
    tiny_model(tokenizer).save_to_preset(folder)
    return folder


def lora(preset):
    model = kt.Seq2SeqLM.from_preset(preset)
    model.backbone.enable_lora(2)
    for weight in model.backbone.trainable_variables:
        weight.assign(keras.random.normal(weight.shape, stddev=0.1, seed=1))
    return model


def int8(preset):
    model = kt.TextEmbedder.from_preset(preset)
    model.quantize("int8")
    return model


MODELS = {
    "Seq2SeqLM": kt.Seq2SeqLM.from_preset,
    "Backbone": kt.Backbone.from_preset,
    "TextEmbedder": lambda p: kt.TextEmbedder.from_preset(p, lexical_dim=16),
    "TextClassifier": lambda p: kt.TextClassifier.from_preset(
        p, class_names=["a", "b"]
    ),
    "lora": lora,
    "int8": int8,
}


def batch(model, lengths, rows=2):
    """Random ids by the names of the model's inputs; the second row is padded."""
    rng = np.random.default_rng(0)
    arrays = {}
    for side, length in zip(("encoder", "decoder"), lengths, strict=True):
        mask = np.ones((rows, length), "int32")
        mask[1, 3:] = 0
        arrays[f"{side}_token_ids"] = rng.integers(9, 200, mask.shape, "int32") * mask
        arrays[f"{side}_padding_mask"] = mask
    return {x.name: arrays[x.name] for x in model.inputs}


def exported(model, folder):
    """What `export` wrote, as a function of arrays."""
    if TORCH:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        model.export(folder / "model.onnx", format="onnx", verbose=False)
        session = runtime.InferenceSession(folder / "model.onnx")
        return lambda arrays: session.run(None, arrays)
    import tensorflow as tf

    model.export(folder / "model", verbose=False)
    loaded = tf.saved_model.load(folder / "model")
    return lambda arrays: keras.tree.flatten(loaded.serve(arrays))


# PyTorch refuses int8; the other kinds are of the same layers and cost compilation.
KINDS = set(MODELS) - {"int8"} if TORCH else {"Seq2SeqLM", "TextEmbedder", "int8"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_gives_what_the_model_gives(preset, tmp_path, kind):
    model = MODELS[kind](preset)
    function = exported(model, tmp_path)
    for lengths in LENGTHS:
        arrays = batch(model, lengths)
        expected = keras.tree.flatten(model(arrays))
        for actual, value in zip(function(arrays), expected, strict=True):
            value = keras.ops.convert_to_numpy(value)
            np.testing.assert_allclose(np.asarray(actual), value, atol=1e-4)


@pytest.mark.skipif(not TORCH, reason="PyTorch's formats")
@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_pytorch_needs_float32(preset, tmp_path, change):
    mode = change.pop("quantize", None)
    model = kt.TextEmbedder.from_preset(preset, **change)
    if mode:
        model.quantize(mode)
    with pytest.raises(ValueError, match="in float32 .* (bfloat16|int8)"):
        model.export(tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def test_formats(preset, tmp_path):
    model = kt.TextEmbedder.from_preset(preset)
    with pytest.raises(ValueError, match="`format` must be one of .*'onnx'.* got 'pt'"):
        model.export(tmp_path / "model", format="pt")
    if TORCH:
        with pytest.raises(ValueError, match="must be 'onnx' or 'torch' on PyTorch"):
            model.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())
