"""Products of float matrices, on PyTorch by the faster of its two libraries.

PyTorch multiplies float32 matrices on CPUs by MKL, which uses AVX2 on AMD processors.
oneDNN, which PyTorch also contains, uses AVX-512 on all that have it.
"""

import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.utils.types import Tensor

# From which on it is faster, in spite of the time of its call.
MANY_ROWS, _MANY_PRODUCTS = 8, 2**20


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`.

    Args:
        x: `(..., in)`, floating point.
        weight: `(in, out)`, or a variable of it.

    Returns:
        `(..., out)`.
    """
    if keras.config.backend() == "torch":
        weight = ops.convert_to_tensor(weight)
        if is_faster(x, weight):
            return _torch_function()(x, weight)
    return ops.matmul(x, weight)


def has_onednn() -> bool:
    """Whether large float32 products on a CPU are oneDNN's, on PyTorch."""
    import torch

    enabled = bool(torch.backends.mkldnn.enabled)
    return enabled and _compat.torch_has_onednn_products()


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a product on PyTorch: float32 on a CPU, large enough.

    Not while PyTorch compiles or transforms the function, which it does to its own
    products only.

    Args:
        x: `(..., in)`.
        weight: `(in, out)`.
    """
    import torch

    return (
        not _compat.torch_is_tracing()
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.layout == weight.layout == torch.strided
        and weight.ndim == 2
        and x.numel() >= MANY_ROWS * weight.shape[0]
        and x.numel() * weight.shape[1] >= _MANY_PRODUCTS
        and has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _torch_function() -> Callable[[Tensor, Tensor], Tensor]:
    import torch

    def product(x, weight):
        return _compat.torch_onednn_product(x, weight.t())

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            by_x, by_weight = ctx.needs_input_grad
            ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
            return product(x, weight)

        @staticmethod
        def backward(ctx, *upstream):
            (slope,) = upstream
            x, weight = ctx.saved_tensors
            by_x = None if weight is None else matmul(slope, weight.t())
            by_weight = None if x is None else matmul(x.t(), slope)
            return by_x, by_weight

    def function(x, weight):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            rows = Product.apply(x.reshape(-1, x.shape[-1]), weight)
            # Not a view made by the function: it may be changed in place.
            return rows.view(*x.shape[:-1], -1)
        return product(x, weight)

    return function
