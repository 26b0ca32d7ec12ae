"""Deferred initialization: build a model whose first weights come from a file.

Keras initializes variables when layers are built. Inside a `StatelessScope` it only
records shape and initializer, and initializes later; this module replaces the
initializer by a reader, so that nothing is initialized at random first.

Under a `keras.distribution` on JAX a variable is read slice by slice, directly onto the
devices that hold the slices: a process reads what its own devices hold, and never has a
whole variable that is split.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from keras_t5gemma import _compat
from keras_t5gemma.checkpoints.byte_ranges import bounds
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor, read_as
from keras_t5gemma.utils.types import Tensor


def build_and_fill(
    build: Callable[[], Any], read: Callable[[Any], Mapping[str, LazyTensor]]
) -> Any:
    """Build a model without values, then load its weights.

    Args:
        build: function that returns the model.
        read: function of the model that returns lazily loaded tensors by path, one for
            each of `model.weights`; raises if they do not fit, before any is read.

    Returns:
        The model. If anything raises, no pending variable stays in Keras's list.
    """
    with _compat.pending_variables() as pending:
        with keras.StatelessScope(initialize_variables=False):
            model = build()
        tensors = read(model)
        # The largest first: a tensor that its file has in another layout is in memory
        # twice while it is converted, which costs least before the others are loaded.
        for variable in sorted(pending, key=lambda v: -math.prod(v.shape)):
            tensor = tensors.get(variable.path)
            if tensor is None:
                _compat.initialize_variable(variable)
                continue
            sharding = variable_sharding(variable)
            dtype = np.dtype(variable.dtype)  # ml_dtypes has named bfloat16.
            if sharding is None:
                _compat.initialize_variable(variable, _Reader(tensor, dtype))
                continue
            value = read_onto_devices(tensor, sharding, dtype)
            _compat.set_variable_value(variable, value)
    return model


def variable_sharding(variable: keras.Variable) -> Any:
    """The `jax.sharding.Sharding` of a variable, or `None` on a single device."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return None
    layout = _compat.variable_layout(variable)
    return getattr(layout, "backend_layout", layout)


def read_onto_devices(tensor: LazyTensor, sharding: Any, dtype: np.dtype) -> Tensor:
    """A sharded JAX array, of which each process reads the slices of its devices.

    Args:
        tensor: a lazily loaded tensor. A slice that several devices hold is read once.
        sharding: a `jax.sharding.Sharding`.
        dtype: NumPy dtype of the result.
    """
    import jax

    shape = tuple(tensor.shape)
    held: dict[tuple, list] = {}  # Devices of this process by the slice they hold.
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        held.setdefault(tuple(bounds(index, shape)), []).append(device)
    pieces = []
    for parts, devices in held.items():
        array = tensor.read_slice(tuple(slice(*part) for part in parts))
        array = array.astype(dtype, copy=False)
        pieces += [jax.device_put(array, device) for device in devices]
    jax.block_until_ready(pieces)  # Until then the host's arrays stay in memory.
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def build_abstract(build: Callable[[], Any]) -> Any:
    """The result of `build()`, whose variables never get values.

    Without this Keras would initialize them together with the next model it builds.
    """
    with _compat.pending_variables(), keras.StatelessScope(initialize_variables=False):
        return build()


class _Reader:
    """An initializer that reads the values."""

    def __init__(self, tensor, dtype):
        self.tensor, self.dtype = tensor, dtype

    def __call__(self, shape, dtype=None):
        array = without_copy(read_as(self.tensor, self.dtype))
        return keras.ops.convert_to_tensor(array, dtype=dtype)


def without_copy(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, where Keras would copy it."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.numpy.asarray(array, array.dtype)  # Copies if no dtype is given.
    array = np.ascontiguousarray(array)
    if backend == "tensorflow" and (array.ctypes.data % 64 or not array.size):
        return array  # Its kernels crash on buffers that are not aligned to 64 bytes.
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16  # For DLPack these are raw bytes.
    array = array.view("uint16") if is_bfloat16 else array
    if backend == "tensorflow":
        import tensorflow as tf

        tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        return tf.bitcast(tensor, tf.bfloat16) if is_bfloat16 else tensor
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
