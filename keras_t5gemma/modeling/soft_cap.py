"""Soft cap of logits, in the form that is fastest on the backend."""

import keras
from keras import ops

from keras_t5gemma.utils.backends import on_cpu
from keras_t5gemma.utils.types import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Soft cap `cap * tanh(x / cap)`, within +-`cap`; `None` leaves `x` as it is.

    Args:
        x: logits.
        cap: positive.

    Returns:
        Same shape and dtype as `x`.
    """
    if cap is None:
        return x
    if keras.config.backend() == "torch" and _has_slow_tanh(x):
        return _by_exponential(x, cap)
    return ops.tanh(x / cap) * cap


def _has_slow_tanh(x):
    """Whether PyTorch's tanh takes twice the time of what it consists of."""
    import torch

    # The dtype of Keras's symbols is a string. `requires_grad` is False within
    # `torch.func.vmap` of a tensor that needs a gradient.
    return x.dtype == torch.float32 and on_cpu(x) and not torch.is_grad_enabled()


def _by_exponential(x, cap):
    """`tanh(x) = m / (m + 2)` with `m = exp(2 x) - 1`, as precise as `tanh`."""
    m = (x * (2 / cap)).clamp_max_(80.0).expm1_()  # Or m becomes infinite.
    return m.div_(m + 2.0).mul_(cap)
