"""`convert(dtype="int8")`: what `from_preset(dtype="int8")` has, as a preset."""

import numpy as np
import pytest
from helpers.models import forward, numpy, random_inputs

import keras_t5gemma as kt


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_converted_preset_is_the_quantized_model(model, tmp_path, mode):
    model.generation_defaults = {"max_length": 9}
    model.save_to_preset(tmp_path / "float")
    kt.convert(tmp_path / "float", tmp_path / mode, dtype=mode)
    expected = kt.Seq2SeqLM.from_preset(tmp_path / "float", dtype=mode)
    found = kt.Seq2SeqLM.from_preset(tmp_path / mode)
    inputs = random_inputs()
    logits = [numpy(forward(x, inputs)) for x in (found, expected)]
    np.testing.assert_array_equal(*logits)
    assert found.preprocessor.tokenizer("a") == expected.preprocessor.tokenizer("a")
    assert found.generation_defaults["max_length"] == 9
    sizes = [
        (tmp_path / x / "model.weights.h5").stat().st_size for x in ("float", mode)
    ]
    stored = [sum(numpy(v).nbytes for v in b.weights) for b in (model, found)]
    assert sizes[0] - sizes[1] > 0.7 * (stored[0] - stored[1]) > 0


@pytest.mark.one_backend
def test_an_encoder_and_errors(model, tmp_path):
    config = kt.T5GemmaConfig(model.backbone.config.encoder, None, 480)
    kt.Backbone(config).save_to_preset(tmp_path / "float")
    kt.convert(tmp_path / "float", tmp_path / "int8", dtype="int8")
    assert kt.Backbone.from_preset(tmp_path / "int8").config.decoder is None
    with pytest.raises(ValueError, match="`dtype` 'int8' is for presets of this pack"):
        kt.convert(tmp_path / "float", tmp_path / "x", to="transformers", dtype="int8")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="`dtype` must be .*bfloat16.*int8.*'int16'"):
        kt.convert(tmp_path / "float", tmp_path / "x", dtype="int16")
