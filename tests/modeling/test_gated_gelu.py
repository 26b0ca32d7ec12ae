"""The gated GELU and its gradients against automatic differentiation."""

import keras
import numpy as np
import pytest
from helpers.attention import values_and_gradients
from keras import ops

from keras_t5gemma.modeling.gated_gelu import gated_gelu


def plain(gate, up):
    return ops.gelu(gate, approximate=True) * up


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 4e-2)])
def test_values_and_gradients(dtype, error):
    """Over all of its range, where the tanh is 1 too."""
    gate = np.linspace(-20, 20, 3 * 40).reshape(3, 40).astype("float32")
    up, upstream = np.random.default_rng(0).normal(size=(2, 3, 40)).astype("float32")
    arrays = [ops.cast(x, dtype) for x in (gate, up)]
    exact, found = values_and_gradients([plain, gated_gelu], arrays, upstream)
    for x, y in zip(exact, found, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y, x, atol=error * abs(x).max())


@pytest.mark.skipif(keras.config.backend() != "torch", reason="PyTorch's hooks")
def test_two_arrays_are_kept():
    import torch

    kept = []
    gate, up = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        gated_gelu(gate, up)
    assert len(kept) == 2
