"""What differs between the backends below the level of Keras."""

import contextlib
from collections.abc import Callable

import keras

from keras_t5gemma.utils.types import Tensor


def on_cpu(x: Tensor | keras.Variable) -> bool:
    """Whether a tensor, concrete or traced, or a variable is computed on a CPU."""
    if keras.config.backend() == "torch":
        # Elsewhere a variable may have no value: `fit` takes it on JAX.
        x = x.value if isinstance(x, keras.Variable) else x
        return x.device.type == "cpu"
    if keras.config.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_logical_devices("GPU")


def replica_count(model: keras.Model | None = None) -> int:
    """Number of replicas of a `tf.distribute` strategy; 1 without one.

    Args:
        model: whose strategy; `None` is the current one.
    """
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    strategy = getattr(model, "distribute_strategy", None)
    return (strategy or tf.distribute.get_strategy()).num_replicas_in_sync


def compiled(function: Callable) -> Callable:
    """Compile with XLA on TensorFlow, whose other CPU kernels take twice as long.

    Keras asks for XLA itself on JAX, and on TensorFlow only with a GPU.

    Args:
        function: of tensors. On TensorFlow no gradient passes through it: whoever
            differentiates it defines its gradient.
    """
    if keras.config.backend() != "tensorflow":
        return function
    import tensorflow as tf

    program = tf.function(function, jit_compile=True, autograph=False)

    # An eager tape would record it, and XLA cannot compile the records of a loop.
    def call(*tensors):
        return program(*map(tf.stop_gradient, tensors))

    return call


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep only the arguments for the backward pass on TensorFlow; else unchanged.

    `keras.remat` has no second derivative there. Within a program of XLA nothing is
    saved: its compiler decides what to keep.

    Args:
        function: of float tensors, which gives the same result when called again; it
            reads no variables.
    """
    if keras.config.backend() != "tensorflow":
        return function
    import tensorflow as tf

    @tf.custom_gradient
    def call(*tensors):
        def gradients(upstream):
            with tf.control_dependencies([upstream]):  # Not before it is needed.
                again = [tf.identity(x) for x in tensors]
            with tf.GradientTape() as tape:
                tape.watch(again)
                result = function(*again)
            return tape.gradient(result, again, upstream)

        return function(*tensors), gradients

    return call


def no_gradients() -> contextlib.AbstractContextManager:
    """`torch.no_grad()` on PyTorch, else a null context."""
    if keras.config.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
