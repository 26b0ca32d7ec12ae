"""What generation on PyTorch takes from a source, against the layers."""

import keras
import numpy as np
import pytest
from helpers.models import enlarge, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.modeling.inference import inference

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's reading"
)


class Overridden(kt.Backbone):
    """It reads in its own way."""

    def encode(self, *args, **kwargs):
        return super().encode(*args, **kwargs) + 1


def reading(backbone):
    """`(states, cross, cross through the layers)`."""
    import torch

    from keras_t5gemma.generation import torch_source

    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 480, (3, 12)))
    mask = torch.ones(3, 12, dtype=torch.int32)
    with torch.inference_mode(), inference():
        states, cross = torch_source.read(backbone, ids, mask)
        assert torch.equal(states, backbone.encode(ids, mask))
        return states, cross, backbone.make_cache(states, mask, 4)["cross"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", [kt.Backbone, Overridden])
def test_keys_and_values_are_those_of_the_layers(kind, dtype):
    backbone = enlarge(kind(tiny_config(), dtype=dtype.replace("int8", "float32")))
    if dtype == "int8":
        backbone.quantize("int8")
    _, found, layers = reading(backbone)
    if found is None:
        assert dtype == "int8"
        pytest.skip("needs VNNI")
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    assert len(found) == backbone.config.decoder.num_layers
    for pair, expected in zip(found, layers, strict=True):
        for a, b in zip(pair, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert float((a - b).abs().max()) < tolerance * float(b.abs().max())


@pytest.mark.parametrize("change", ["lora", "float64", "mixed", "hook"])
def test_what_the_layers_compute(change):
    mixed = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    mixed["decoder/.*cross_attention.*"] = keras.DTypePolicy("bfloat16")
    dtypes = {"float64": "float64", "mixed": mixed}
    backbone = enlarge(kt.Backbone(tiny_config(), dtype=dtypes.get(change, "float32")))
    if change == "lora":
        backbone.enable_lora(2)
    if change == "hook":
        layer = backbone.decoder.blocks[1].cross_attention.value
        layer.register_forward_hook(lambda *_: None)
    assert reading(backbone)[1] is None
