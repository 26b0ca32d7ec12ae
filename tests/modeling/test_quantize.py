import keras
import numpy as np
import pytest
from helpers.models import (
    enlarge,
    forward,
    max_difference,
    numpy,
    one_block_config,
    random_inputs,
    tiny_config,
    tiny_model,
)
from helpers.oracles import plain_log_probs

import keras_t5gemma as kt
from keras_t5gemma.distribution import process_group
from keras_t5gemma.modeling import quantized_loading


def adapter_change(quantization):
    """What one SGD step does to the LoRA adapters of a model, as one vector."""
    keras.utils.set_random_seed(0)
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(one_block_config()), 4.0))
    if quantization:
        model.quantize(quantization)
    model.enable_lora(4)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.05, variable.shape))
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = [numpy(v).copy() for v in model.trainable_variables]
    x = random_inputs()
    y = np.random.default_rng(1).integers(4, 480, (2, 14))
    model.fit(x, y, sample_weight=np.ones((2, 14)), verbose=0)
    after = [numpy(v) for v in model.trainable_variables]
    return np.concatenate([(b - a).ravel() for a, b in zip(before, after, strict=True)])


def test_gradients_through_an_int8_model_point_the_right_way():
    """Trap: through Keras's default int8 head their cosine is about 0."""
    exact, quantized = adapter_change(None), adapter_change("int8")
    norms = np.linalg.norm(exact) * np.linalg.norm(quantized)
    assert exact @ quantized / norms > 0.97


def test_int8_stays_close_and_survives_saving(tokenizer, tmp_path):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(tiny_config()), 4.0), preprocessor)
    x = random_inputs()
    exact = numpy(forward(model, x))
    model.quantize("int8")
    assert model.backbone.decoder.blocks[0].mlp.up.quantization_mode == "int8"
    assert model.backbone.encoder.token_embedding.quantization_mode == "int8"
    quantized = numpy(forward(model, x))
    assert 0 < max_difference(quantized, exact) < 0.1 * np.abs(exact).max()
    assert model.generate("The quick fox", max_length=8)
    model.save_to_preset(str(tmp_path))
    loaded = kt.Seq2SeqLM.from_preset(tmp_path)
    assert max_difference(forward(loaded, x), quantized) < 1e-5


def test_int8_by_dtype(tokenizer, tmp_path):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(one_block_config()), 4.0), preprocessor)
    model.save_to_preset(tmp_path / "float")
    model.quantize("int8")
    x = random_inputs()
    expected = numpy(forward(model, x))
    model.save_to_preset(tmp_path / "int8")
    for folder in ("float", "int8"):
        found = kt.Seq2SeqLM.from_preset(tmp_path / folder, dtype="int8")
        assert max_difference(forward(found, x), expected) < 1e-5
        embedder = kt.TextEmbedder.from_preset(tmp_path / folder, dtype="int8")
        assert embedder.backbone.encoder.blocks[0].mlp.up.kernel.dtype == "int8"
    with pytest.raises(ValueError, match="`dtype` is 'int4', but .* are int8"):
        kt.Backbone.from_preset(tmp_path / "int8", dtype="int4")
    for kind in (kt.Seq2SeqLM, kt.TextEmbedder):
        with pytest.raises(ValueError, match="`dtype` must be None.* got 'bfloat16'"):
            kind.from_preset(tmp_path / "int8", dtype="bfloat16")
    # Random weights have no mode.
    found = kt.Backbone.from_preset(tmp_path / "int8", False, dtype="bfloat16")
    assert found.encoder.blocks[0].mlp.up.kernel.dtype == "bfloat16"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_kernels_quantized_in_blocks_of_columns(mode, tmp_path, monkeypatch):
    model = enlarge(kt.Backbone(one_block_config()), 4.0)
    model.save_to_preset(tmp_path)
    sizes = []

    def quantize(layer, array, policy):
        sizes.append(array.shape)
        return of_one(layer, array, policy)

    of_one = quantized_loading._quantize
    monkeypatch.setattr(quantized_loading, "_quantize", quantize)
    monkeypatch.setattr(quantized_loading, "_BLOCK_VALUES", 100)
    found = kt.Backbone.from_preset(tmp_path, dtype=mode)
    kernels = [shape for shape in sizes if shape[0] < 480]
    assert max(rows * columns for rows, columns in kernels) <= 100
    model.quantize(mode)
    for one, other in zip(model.weights, found.weights, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other), one.path)


def test_several_processes_save_float_weights_only(tmp_path, monkeypatch):
    exact, quantized = (kt.Backbone(one_block_config()) for _ in range(2))
    quantized.quantize("int8")
    monkeypatch.setattr(process_group, "process_count", lambda: 2)
    exact.save_weights(tmp_path / "a.weights.h5")
    assert (tmp_path / "a.weights.h5").exists()
    with pytest.raises(ValueError, match="cannot save a quantized model"):
        quantized.save_weights(tmp_path / "b.weights.h5")
    with pytest.raises(ValueError, match="`quantize` needs whole weights"):
        exact.quantize("int8")
    assert not (tmp_path / "b.weights.h5").exists()


def test_int8_generation_follows_the_int8_forward_pass(tokenizer):
    """One token at a time, on whichever fast path there is, one row and several."""
    model = tiny_model(tokenizer)
    texts = ["The quick brown fox", "A board", "Fonts of the old kind"]
    exact = model.generate(texts, 12, stop_token_ids=None, return_scores=True)
    model.quantize("int8")
    for batch_size in (1, 3):
        out = model.generate(
            texts,
            12,
            stop_token_ids=None,
            batch_size=batch_size,
            return_scores=True,
        )
        for i, text in enumerate(texts):
            ids = out["token_ids"][i].tolist()
            rows = [[2, *ids[:n]] for n in range(len(ids))]
            expected = plain_log_probs(model, text, rows, 12, 12)
            expected = expected[np.arange(len(ids)), ids]
            got = out["token_log_probs"][i]
            # Activations are rounded, to 7 or 8 bits; see `int8_products`.
            rounded = keras.config.backend() != "tensorflow"
            assert np.abs(got - expected).max() < (0.5 if rounded else 1e-3)
            assert np.abs(got - expected).mean() < (0.1 if rounded else 1e-4)
            first = exact["token_log_probs"][i][0]
            assert ids[0] != exact["token_ids"][i][0] or abs(got[0] - first) > 0


@pytest.mark.one_backend
def test_quantize_collects_no_garbage_layer_by_layer(monkeypatch):
    """Keras does: 60 s for S-S."""
    import gc

    frozen = []
    monkeypatch.setattr(
        gc, "collect", lambda *args: frozen.append(gc.get_freeze_count())
    )
    kt.Backbone(one_block_config()).quantize("int8")
    assert frozen
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0


@pytest.mark.one_backend
def test_filters_match_names_of_layers():
    """A part of the model by a function; what matches nothing is named."""
    backbone = kt.Backbone(one_block_config())
    for filters in ("encoder", ["mlp", "block_0"], []):
        with pytest.raises(ValueError, match="`filters` must match .* down, gate, key"):
            backbone.quantize("int8", filters=filters)
    for filters in ("(query", ["query", 3]):
        with pytest.raises(ValueError, match="`filters` must be regular expressions"):
            backbone.quantize("int8", filters=filters)
    with pytest.raises(ValueError, match="`filters` must be a regular.*got 5"):
        backbone.quantize("int8", filters=5)
    backbone.quantize("int8", filters=["gate|up"])
    encoder, decoder = backbone.encoder.blocks[0], backbone.decoder.blocks[0]
    assert encoder.mlp.gate.quantization_mode == "int8"
    assert encoder.mlp.down.quantization_mode is None

    def is_decoders_down(layer):
        return layer.name == "down" and "decoder" in layer.path

    backbone.quantize("int8", filters=is_decoders_down)
    assert decoder.mlp.down.quantization_mode == "int8"
    assert encoder.mlp.down.quantization_mode is None


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_states_keep_the_compute_dtype(dtype, mode):
    """Keras's scales of embeddings are float32; states must not become so."""
    backbone = kt.Backbone(one_block_config(), dtype=dtype)
    kt.Seq2SeqLM(backbone).quantize(mode)
    states = backbone(random_inputs())
    assert {keras.backend.standardize_dtype(v.dtype) for v in states.values()} == {
        "bfloat16"
    }


def test_quantizing_twice_is_refused_before_anything_changes(model):
    model.quantize("int8", filters="gate")
    before = {v.path: v.dtype for v in model.backbone.variables}
    message = "'encoder/block_0/mlp/gate' is int8 already, like 5 of the 45 chosen"
    with pytest.raises(ValueError, match=message):
        model.quantize("int4")
    with pytest.raises(ValueError, match="like 5 of the 10"):
        model.quantize("int8", filters=["gate", "up"])
    assert {v.path: v.dtype for v in model.backbone.variables} == before
    model.quantize("int8", filters="up")
