"""Arrays that several devices share, and their values on the host."""

import keras

from keras_t5gemma.utils.types import Tensor


def is_shared(variable: keras.Variable) -> bool:
    """Whether a variable is on several devices, sharded or replicated."""
    value = variable.value
    return keras.config.backend() == "jax" and len(value.sharding.device_set) > 1


def gathered(value: Tensor) -> Tensor:
    """A JAX array that the host can read, from one that devices may share.

    If other processes hold parts of it, all of them must call this.
    """
    if not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    if len(value.sharding.device_set) > 1:
        # JAX caches the host's copy in the array: with this temporary it is freed.
        return value.copy()
    return value
