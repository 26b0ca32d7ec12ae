"""Build a model whose variables get their first value from a file.

Keras fills variables when layers are built. Inside a `StatelessScope` it only
notes shape and initialiser, and fills them later; this module puts a reader in
the initialiser's place, so that nothing is initialised at random first. It uses
Keras's private `_deferred_initialize` and list of unfilled variables (the same
since Keras 3.0), here and nowhere else.
"""

import math

import keras
import ml_dtypes
import numpy as np
from keras.src.backend.common import global_state

_PENDING = "uninitialized_variables"


def build_and_fill(build, read):
    """Build a model without values, then fill its weights from a reader.

    Args:
        build: `() -> model`.
        read: `model -> {path: () -> array}` for all of `model.weights`; raises
            before anything is read when the two do not fit.

    Returns:
        The model. When anything raises, nothing of it is left behind.
    """
    already = global_state.get_global_attribute(_PENDING) or []
    try:
        global_state.set_global_attribute(_PENDING, [])
        with keras.StatelessScope(initialize_variables=False):
            model = build()
        readers = read(model)
        pending = global_state.get_global_attribute(_PENDING)
        # The largest first: while one is converted it is held twice, and then
        # least else is loaded.
        for variable in sorted(pending, key=lambda v: -math.prod(v.shape)):
            reader = readers.get(variable.path)
            if reader is not None:
                variable._initializer = _Reader(reader)
            variable._deferred_initialize()
    finally:
        global_state.set_global_attribute(_PENDING, already)
    return model


def build_abstract(build):
    """Build what has variables, and never give them values: `build()`'s result.

    Keras would fill them at the next model that it builds, whoever's that is.
    """
    already = global_state.get_global_attribute(_PENDING) or []
    try:
        global_state.set_global_attribute(_PENDING, [])
        with keras.StatelessScope(initialize_variables=False):
            return build()
    finally:
        global_state.set_global_attribute(_PENDING, already)


class _Reader:
    """An initialiser that reads."""

    def __init__(self, read):
        self.read = read

    def __call__(self, shape, dtype=None):
        return keras.ops.convert_to_tensor(without_copy(self.read()), dtype=dtype)


def without_copy(array):
    """The array as the backend takes it over, where Keras would copy it."""
    backend = keras.config.backend()
    if backend == "jax":
        return array
    array = np.ascontiguousarray(array)
    if backend == "tensorflow" and (array.ctypes.data % 64 or not array.size):
        return array  # Its kernels crash on buffers that are aligned to less.
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16  # NumPy knows it as bytes only.
    array = array.view("uint16") if is_bfloat16 else array
    if backend == "tensorflow":
        import tensorflow as tf

        tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        return tf.bitcast(tensor, tf.bfloat16) if is_bfloat16 else tensor
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
