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

_MANY_ROWS = 8  # From which on it is not slower.


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


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a product on PyTorch: float32 on a CPU, of many rows.

    Not while PyTorch compiles or transforms the function, which it does to its own
    products only.

    Args:
        x: `(..., in)`.
        weight: `(in, out)`.
    """
    import torch

    return (
        type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= _MANY_ROWS * weight.shape[0]
        and _compat.torch_has_onednn_products()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _compat.torch_is_tracing()
    )


@functools.cache
def _torch_function() -> Callable[[Tensor, Tensor], Tensor]:
    import torch

    def product(x, weight):
        return _compat.torch_onednn_product(x, weight.t())

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return product(x, weight)

        @staticmethod
        def backward(ctx, *upstream):
            (slope,) = upstream
            x, weight = ctx.saved_tensors
            by_x = by_weight = None
            if ctx.needs_input_grad[0]:
                by_x = matmul(slope, weight.t())
            if ctx.needs_input_grad[1]:
                by_weight = matmul(
                    x.reshape(-1, x.shape[-1]).t(), slope.reshape(-1, slope.shape[-1])
                )
            return by_x, by_weight

    def function(x, weight):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return Product.apply(x, weight)
        return product(x, weight)

    return function
