import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.data.encoder_dataset import by_length
from keras_t5gemma.modeling import int8_products
from keras_t5gemma.modeling.inference import inference
from keras_t5gemma.modeling.int8_products import int8_product

on_tensorflow = keras.config.backend() == "tensorflow"


@pytest.mark.skipif(on_tensorflow, reason="TensorFlow multiplies in floats")
@pytest.mark.parametrize(("axis", "size"), [(0, 48), (1, 48), (1, 47)])
def test_product_keeps_eight_bits_of_each_row(axis, size):
    """Rows of sizes from 1e-3 to 1e3, and zeros; one row, few and many."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (64, size), "int8")
    scale = ops.convert_to_tensor(rng.uniform(50, 100, size), "float32")
    laid = weight if axis == 0 else np.ascontiguousarray(weight.T)
    for rows in (1, 3, 20):
        x = rng.normal(0, 1, (rows, 64)) * 10.0 ** rng.integers(-3, 4, (rows, 1))
        x[-1] *= rows < 20
        x = x.astype("float32")
        step = np.maximum(np.abs(x).max(1, keepdims=True), 1e-30) / 127
        expected = (np.round(x / step) * step).astype("float64") @ (
            weight / numpy(scale)
        )
        tensors = ops.convert_to_tensor(x[:, None]), ops.convert_to_tensor(laid)
        got = int8_product(*tensors, scale, axis)
        assert got.shape == (rows, 1, size)
        # A number halfway between two integers may be rounded to either.
        error = np.abs(numpy(got)[:, 0] - expected) / step
        assert error.max() < 2.6
        assert error.mean() < 0.1


def test_only_inference_rounds(monkeypatch):
    """Outside the context, layers multiply with dequantized weights."""
    backbone = enlarge(kt.Backbone(one_block_config()), 4.0)
    backbone.quantize("int8")
    layer = backbone.encoder.blocks[0].mlp.up
    x = np.random.default_rng(0).normal(size=(2, 3, layer.kernel.shape[0]))
    x = ops.convert_to_tensor(x, "float32")
    weights = numpy(layer.kernel).astype("float32") / numpy(layer.kernel_scale)
    exact = numpy(x) @ weights

    def error(gradient=False):
        inputs = x.clone().requires_grad_() if gradient else x
        return np.abs(numpy(layer(inputs)) - exact).max() / np.abs(exact).max()

    monkeypatch.setattr(int8_products, "_has_kernels", lambda: True)
    assert error() < 1e-4
    if not on_tensorflow:
        with inference():
            assert 1e-4 < error() < 0.03
            if keras.config.backend() == "torch":
                assert error(gradient=True) < 1e-4
    monkeypatch.setattr(int8_products, "_has_kernels", lambda: False)
    with inference():
        assert error() < 1e-4


@pytest.mark.skipif(on_tensorflow, reason="TensorFlow multiplies in floats")
def test_tasks_of_an_encoder_round(tokenizer, monkeypatch):
    """Vectors, predictions, classes and hidden states, all in the same way."""
    config = dataclasses.replace(one_block_config(), decoder=None)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16)
    texts = ["a quick fox", "dog"]

    def results(rounds):
        monkeypatch.setattr(int8_products, "_has_kernels", lambda: rounds)
        backbone = enlarge(kt.Backbone(config), 4.0)
        backbone.quantize("int8")
        embedder = kt.TextEmbedder(backbone, preprocessor, normalize=False)
        states, mask = embedder.hidden_states(texts, as_numpy=True)
        yield embedder.embed(texts)
        yield embedder.predict_on_batch(texts)
        yield states.sum(1) / numpy(mask).sum(1, keepdims=True)
        ids, limit = embedder._read({"texts": texts}, "texts")
        (_, arrays), *_ = by_length(ids, 2, limit)
        yield embedder.predict(arrays, verbose=0)[:2]

    exact, rounded = (list(results(rounds)) for rounds in (False, True))
    for a, b in zip(exact, rounded, strict=True):
        np.testing.assert_allclose(a, exact[0], rtol=1e-4, atol=1e-4)
        assert 1e-4 < np.abs(a - b).max() / np.abs(a).max() < 0.05
        assert np.abs(b - rounded[0]).max() < 0.3 * np.abs(a - b).max()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="a property of XLA")
def test_xla_never_widens_the_weights():
    """They would take four times their bytes in memory, and the time to write these."""
    import jax

    if not int8_products.xla_has_kernels():
        pytest.skip("this XLA has no kernels of int8")
    for rows, axis in ((1, 0), (1, 1), (8, 1)):
        shape = (256, 512) if axis == 0 else (512, 256)
        shapes = (rows, 256), shape, (512,)
        arguments = map(jax.ShapeDtypeStruct, shapes, ("float32", "int8", "float32"))
        program = jax.jit(lambda *a, axis=axis: int8_product(*a, axis=axis))
        text = program.lower(*arguments).compile().as_text()
        assert "ynn_fusion" in text
        sizes = f"[{shape[0]},{shape[1]}]"
        assert f"s8{sizes}" in text
        assert f"s32{sizes}" not in text
        assert f"f32{sizes}" not in text
