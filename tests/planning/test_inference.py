"""What `info` says of memory, against real models."""

import math

import numpy as np
import pytest
from helpers.models import tiny_config

import keras_t5gemma as kt
from keras_t5gemma.planning.inference import inference_memory


@pytest.mark.one_backend
def test_weights_and_caches_are_those_of_models():
    config = tiny_config()
    found = inference_memory(config, source=20, target=12)
    for name, dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
        backbone = kt.Backbone(config, dtype=dtype)
        assert found[name].weights == sum(size_of(v) for v in backbone.weights)
    for mode in ("int8", "int4"):
        backbone = kt.Backbone(config, dtype="bfloat16")
        backbone.quantize(mode)
        assert found[mode].weights == sum(size_of(v) for v in backbone.weights)
    assert found["float32"].caches == 2 * found["bfloat16"].caches > 0


def size_of(variable):
    size = 2 if variable.dtype == "bfloat16" else np.dtype(variable.dtype).itemsize
    return size * math.prod(variable.shape)


@pytest.mark.one_backend
def test_what_fits_a_card_of_24_gb():
    def fits(encoder, decoder):
        config = kt.T5GemmaConfig.pair(encoder, decoder)
        found = inference_memory(config, 8192, 1024)
        return [name for name, memory in found.items() if memory.fits()]

    assert fits("2b", "2b") == ["bfloat16", "int8", "int4"]
    assert fits("9b", "2b") == ["int8", "int4"]
    assert fits("9b", "9b") == ["int4"]
