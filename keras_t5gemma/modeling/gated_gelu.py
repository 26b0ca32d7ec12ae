"""`gelu(gate) * up` whose backward pass keeps its two arguments only.

Automatic differentiation also keeps the tanh, the GELU and what leads to them: two or
more arrays `(B, T, F)`, the largest of a block on long sources.
"""

import functools
import math
from collections.abc import Callable

import keras
from keras import ops

from keras_t5gemma.utils.types import Tensor

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, with the tanh form of GELU (arXiv 1606.08415).

    Args:
        gate: `(..., F)`, floating point.
        up: `(..., F)`, of the same dtype.

    Returns:
        `(..., F)`, of the same dtype.
    """
    return _implementation(keras.config.backend())(gate, up)


def _plain(gate, up):
    return ops.gelu(gate, approximate=True) * up


def _gradients(gate, up, upstream):
    """Gradients of both arguments."""
    square = gate * gate
    tanh = ops.tanh(_SLOPE * gate * (1 + _CUBIC * square))
    share = 0.5 * (1 + tanh)  # `gelu(gate) / gate`
    inner = _SLOPE * (1 + 3 * _CUBIC * square)
    slope = share + 0.5 * gate * (1 - tanh * tanh) * inner
    return upstream * up * slope, upstream * (gate * share)


@functools.cache
def _implementation(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    if backend == "jax":
        import jax

        function = jax.custom_vjp(_plain)
        function.defvjp(
            lambda gate, up: (_plain(gate, up), (gate, up)),
            lambda kept, upstream: _gradients(kept[0], kept[1], upstream),
        )
        return function
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def with_gradient(gate, up):
            return _plain(gate, up), functools.partial(_gradients, gate, up)

        return with_gradient
    if backend == "torch":
        return _torch_function()
    return _plain


def _torch_function():
    import torch

    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")

    class GatedGELU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return gelu(gate).mul_(up)

        @staticmethod
        def backward(ctx, *upstream):
            gate, up = ctx.saved_tensors
            by_up = gelu(gate).mul_(upstream[0])
            slope = torch.ops.aten.gelu_backward(
                up * upstream[0], gate, approximate="tanh"
            )
            return slope, by_up

    def function(gate, up):
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            return GatedGELU.apply(gate, up)
        return _plain(gate, up)

    return function
