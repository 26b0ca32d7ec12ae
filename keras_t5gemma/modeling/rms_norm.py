"""Gemma's RMSNorm, whose backward pass on TensorFlow keeps its argument only.

Automatic differentiation also keeps the normalized argument, in float32; JAX's compiler
computes it again.
"""

import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_t5gemma.utils.types import Tensor


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """`x / rms(x) * (1 + scale)`, computed in float32.

    Args:
        x: `(..., D)`, floating point.
        scale: `(D,)`.
        epsilon: added to the mean square.

    Returns:
        `(..., D)`, in the dtype of `x`.
    """
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # A tensor, not a variable, which `custom_gradient` would ask for by name.
        scale = tf.convert_to_tensor(ops.convert_to_tensor(scale))
        return _tensorflow_function(epsilon)(x, scale)
    return _plain(x, scale, epsilon)[0]


def _plain(x, scale, epsilon):
    """The result, and the reciprocal of the root of the mean square."""
    y = ops.cast(x, "float32")
    root = ops.rsqrt(ops.mean(ops.square(y), -1, keepdims=True) + epsilon)
    y = y * root
    y = y * (1.0 + ops.cast(scale, "float32"))
    return ops.cast(y, x.dtype), root


def _gradients(x, scale, root, upstream):
    """Gradients of `x` and `scale`."""
    slope = ops.cast(upstream, "float32")
    normalized = ops.cast(x, "float32") * root
    by_scale = ops.sum(slope * normalized, tuple(range(len(x.shape) - 1)))
    slope = slope * (1.0 + ops.cast(scale, "float32"))
    mean = ops.mean(slope * normalized, -1, keepdims=True)
    by_x = root * (slope - normalized * mean)
    return ops.cast(by_x, x.dtype), ops.cast(by_scale, scale.dtype)


@functools.cache
def _tensorflow_function(epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    import tensorflow as tf

    @tf.custom_gradient
    def function(x, scale):
        y, root = _plain(x, scale, epsilon)
        return y, functools.partial(_gradients, x, scale, root)

    return function
