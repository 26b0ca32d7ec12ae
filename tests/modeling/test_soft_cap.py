"""The soft cap against NumPy in double precision, and its gradient."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.modeling.soft_cap import soft_cap


def no_gradients():
    """As in generation on PyTorch; nothing elsewhere."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cap", [50.0, 30.0])
def test_values(cap, dtype):
    """From far below the cap to far above it."""
    x = np.concatenate([[0.0], 10.0 ** np.linspace(-6, 3, 60)]).astype(dtype)
    x = np.concatenate([-x[::-1], x])
    expected = cap * np.tanh(x.astype("float64") / cap)
    with no_gradients():
        y = soft_cap(ops.convert_to_tensor(x), cap)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    y = ops.convert_to_numpy(y).astype("float64")
    error = np.abs(y - expected)
    relative, absolute = (4e-7, 1e-12) if dtype == "float32" else (2e-3, 5e-6)
    assert (error <= relative * np.abs(expected) + absolute).all()
    assert np.abs(y).max() <= cap
    assert soft_cap(x, None) is x


def test_gradient_on_pytorch():
    """`1 - tanh(x / cap) ** 2`, and the argument is left as it was."""
    if keras.backend.backend() != "torch":
        pytest.skip("other backends differentiate tanh")
    import torch

    x = torch.linspace(-200, 200, 41, requires_grad=True)
    copy = x.detach().clone()
    soft_cap(x, 50.0).sum().backward()
    expected = 1 - np.tanh(copy.double().numpy() / 50) ** 2
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=2e-7)
    with torch.no_grad():
        soft_cap(x, 50.0)
    assert torch.equal(x.detach(), copy)
    y = torch.func.vmap(lambda row: soft_cap(row, 50.0))(x[None])
    x.grad = None
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=2e-7)
    with torch.no_grad():
        infinite = soft_cap(torch.tensor([1e30, -1e30]), 50.0)
    assert infinite.tolist() == [50.0, -50.0]


def test_symbols():
    """Of a functional model."""
    assert soft_cap(keras.Input((16,)), 30.0).shape == (None, 16)
