"""Reading sources on PyTorch without Keras layers, against the layers."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import enlarge, tiny_config, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.modeling.int8_products import rounded_activations

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's encoder"
)


def both_readings(backbone, ids, mask):
    """`(states, cache)` through the layers, and of the fast path."""
    import torch

    from keras_t5gemma.generation import torch_encoder

    with torch.inference_mode(), rounded_activations():
        states = backbone.encode(ids, mask)
        plain = states, backbone.make_cache(states, mask, 4)["cross"]
        return plain, torch_encoder.read(backbone, ids, mask)


def batch(length=12):
    import torch

    mask = torch.ones(3, length, dtype=torch.int32)
    mask[1, 4:] = 0
    mask[2, :] = 0  # Nothing but padding.
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 480, (3, length)))
    return ids, mask


@pytest.mark.parametrize("tokens", [1, 24, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_equals_the_layers(dtype, tokens, monkeypatch):
    """Grouped heads, local and global layers, padding; in parts of 1, 2, all rows."""
    from keras_t5gemma.generation import torch_encoder

    monkeypatch.setattr(torch_encoder, "_tokens_at_once", lambda stack: tokens)
    backbone = enlarge(kt.Backbone(tiny_config(), dtype=dtype))
    assert backbone.config.encoder.sliding_window < 9
    tolerance = 2e-5 if dtype == "float32" else 0.1
    for ids, mask in (batch(), tuple(x[:1] for x in batch())):
        (states, cross), (fast, fast_cross) = both_readings(backbone, ids, mask)
        assert fast.dtype == states.dtype
        scale = float(states.abs().max())
        assert float((fast - states).abs().max()) < tolerance * scale
        assert len(fast_cross) == backbone.config.decoder.num_layers
        for ours, theirs in zip(fast_cross, cross, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape
                difference = float((a - b).abs().max())
                assert difference < tolerance * float(b.abs().max())


@pytest.mark.parametrize("cap", [50.0, 1e8, None])
def test_int8_rounds_as_the_layers_do(cap):
    """Nearer to the layers in int8 than these are to float32."""
    from keras_t5gemma import _compat

    if not _compat.torch_has_int8_products():
        pytest.skip("needs VNNI")
    stacks = tiny_config()
    config = dataclasses.replace(
        stacks, encoder=dataclasses.replace(stacks.encoder, attention_soft_cap=cap)
    )
    backbone = enlarge(kt.Backbone(config))
    ids, mask = batch()
    (exact, _), _ = both_readings(backbone, ids, mask)
    backbone.quantize("int8")
    (states, cross), (fast, fast_cross) = both_readings(backbone, ids, mask)
    assert fast_cross is not None

    def distance(a, b):
        return float((a - b).square().mean().sqrt())

    assert distance(fast, states) < 0.3 * distance(exact, states)
    assert distance(fast_cross[0][0], cross[0][0]) < 0.05


class Overridden(kt.Backbone):
    """It reads in its own way."""

    def encode(self, *args, **kwargs):
        return super().encode(*args, **kwargs) + 1


def test_what_goes_through_the_layers():
    """LoRA, float64, layers of several dtypes, subclasses, and sources in blocks."""
    import torch

    from keras_t5gemma.generation import torch_encoder

    ids, mask = batch()
    mixed = keras.dtype_policies.DTypePolicyMap(default_policy="bfloat16")
    mixed[".*mlp.*"] = keras.DTypePolicy("float32")
    dtypes = {"float64": "float64", "mixed": mixed}
    for change in ("lora", "float64", "mixed", "override", "long"):
        kind = Overridden if change == "override" else kt.Backbone
        backbone = kind(tiny_config(), dtype=dtypes.get(change, "float32"))
        backbone = enlarge(backbone)
        if change == "lora":
            backbone.enable_lora(2)
        if change == "long":
            ids, mask = (x.repeat(1, 64)[:1] for x in (ids, mask))
        with torch.inference_mode():
            states, cross = torch_encoder.read(backbone, ids, mask)
            assert cross is None, change
            assert torch.equal(states, backbone.encode(ids, mask)), change


def test_generation_reads_with_it(tokenizer, monkeypatch):
    """Plain, speculative, and by a draft; new weights are read at once."""
    from keras_t5gemma.generation import torch_encoder

    model = tiny_model(tokenizer)
    reads = []
    read = torch_encoder.read
    monkeypatch.setattr(
        torch_encoder, "read", lambda *args: reads.append(read(*args)) or reads[-1]
    )
    model._generator().engines.clear()
    for options in ({}, {"speculate": "source"}):
        count = len(reads)
        model.generate("a quick fox", max_length=6, **options)
        assert len(reads) > count
        assert reads[-1][1] is not None
    before = reads[-1][0]
    enlarge(model.backbone, 2.0)
    model.generate("a quick fox", max_length=6)
    assert float((reads[-1][0] - before).abs().max()) > 1e-3
