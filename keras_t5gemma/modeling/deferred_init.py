"""Build a model whose variables get their first value from a file.

Keras fills variables when layers are built. Inside a `StatelessScope` it only
notes shape and initializer, and fills them later; this module puts a reader in
the initializer's place, so that nothing is initialized at random first.

Under a `keras.distribution` on JAX a variable is read slice by slice, straight to the
devices that hold them: a process reads what its own devices hold, and never has the
whole of a variable that is split.
"""

import math

import keras
import ml_dtypes
import numpy as np

from keras_t5gemma import _compat
from keras_t5gemma.checkpoints.byte_ranges import bounds
from keras_t5gemma.checkpoints.lazy_tensors import DTYPES


def build_and_fill(build, read):
    """Build a model without values, then fill its weights from a reader.

    Args:
        build: `() -> model`.
        read: `model -> {path: unread tensor}` for all of `model.weights`; raises
            before anything is read when the two do not fit.

    Returns:
        The model. When anything raises, nothing of it is left behind.
    """
    with _compat.pending_variables() as pending:
        with keras.StatelessScope(initialize_variables=False):
            model = build()
        tensors = read(model)
        # The largest first: while one is converted it is held twice, and then
        # least else is loaded.
        for variable in sorted(pending, key=lambda v: -math.prod(v.shape)):
            tensor = tensors.get(variable.path)
            sharding = None if tensor is None else variable_sharding(variable)
            if sharding is not None:
                value = read_onto_devices(tensor, sharding, DTYPES[variable.dtype])
                _compat.set_variable_value(variable, value)
                continue
            reader = None if tensor is None else _Reader(tensor.read)
            _compat.initialize_variable(variable, reader)
    return model


def variable_sharding(variable):
    """How the devices share a variable: JAX's `Sharding`, or `None` for one device."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return None
    layout = _compat.variable_layout(variable)
    return getattr(layout, "backend_layout", layout)


def read_onto_devices(tensor, sharding, dtype):
    """An array of JAX's, each slice read where it is held.

    Devices of this process that hold the same slice get it from one reading.

    Args:
        tensor: an unread tensor.
        sharding: a `jax.sharding.Sharding`.
        dtype: numpy dtype of the result.
    """
    import jax

    shape = tuple(tensor.shape)
    held = {}  # Devices of this process by the slice that they hold.
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        held.setdefault(tuple(bounds(index, shape)), []).append(device)
    pieces = []
    for parts, devices in held.items():
        array = tensor.read_slice(tuple(slice(*part) for part in parts))
        array = array.astype(dtype, copy=False)
        pieces += [jax.device_put(array, device) for device in devices]
    jax.block_until_ready(pieces)  # Until then the host's arrays are held too.
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def build_abstract(build):
    """Build what has variables, and never give them values: `build()`'s result.

    Keras would fill them at the next model that it builds, whoever's that is.
    """
    with _compat.pending_variables(), keras.StatelessScope(initialize_variables=False):
        return build()


class _Reader:
    """An initializer that reads."""

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
