"""Arrays that several devices hold together: are they, and as one on the host."""

import keras


def is_shared(variable):
    """Whether several devices hold a variable, split or each all of it."""
    value = variable.value
    return keras.config.backend() == "jax" and len(value.sharding.device_set) > 1


def gathered(value):
    """An array of JAX's that devices share, as one that the host can read.

    Where other processes hold parts of it, all of them call this.
    """
    if not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    if len(value.sharding.device_set) > 1:
        # The host's copy stays with the array it was made of: with this one it goes.
        return value.copy()
    return value
