"""Quantization of weights while they are read, layer by layer.

A layer without its other layers is quantized by Keras, an embedding in blocks of rows
and a kernel in blocks of columns, whose scales do not depend on each other. So the
float weights of a model are never in memory together, and the result is that of
`Backbone.quantize`.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np

from keras_t5gemma.checkpoints.lazy_tensors import (
    DTYPES,
    LazyTensor,
    aligned_empty,
    read_as,
)
from keras_t5gemma.modeling.deferred_init import build_and_fill
from keras_t5gemma.modeling.layer_iteration import (
    is_projection_or_embedding,
    iter_layers,
)

# Names in dtype policies of the default settings of `Backbone.quantize`.
QUANTIZED = {"int8": "int8", "int4": "int4/128"}
# Of a kernel, quantized at a time; takes about 28 bytes for each.
_BLOCK_VALUES = 2**22
_FLOAT_WEIGHTS = ("kernel", "embeddings")  # Of the layers that are quantized.


def policies(
    paths: Iterable[str], policy: keras.DTypePolicy, mode: str
) -> keras.dtype_policies.DTypePolicyMap:
    """Dtype policies that `Backbone.quantize(mode)` gives to its layers.

    Args:
        paths: of the variables of the float model.
        policy: of the float model.
        mode: one of `QUANTIZED`.
    """
    result = keras.dtype_policies.DTypePolicyMap(default_policy=policy)
    quantized = keras.dtype_policies.get(f"{QUANTIZED[mode]}_from_{policy.name}")
    for path in paths:
        layer, name = path.rsplit("/", 1)
        if name in _FLOAT_WEIGHTS:
            result[layer] = quantized
    return result


def quantized_tensors(
    model: keras.Model,
    tensors: Mapping[str, LazyTensor],
    policy: keras.DTypePolicy,
) -> dict[str, LazyTensor]:
    """Lazily quantized tensors by path for a model with quantized layers.

    Args:
        model: a `Backbone` that was built with `policies`.
        tensors: of the float model, by its paths.
        policy: of the float model.
    """
    result = dict(tensors)
    for layer in filter(is_projection_or_embedding, iter_layers(model)):
        name = _FLOAT_WEIGHTS[isinstance(layer, keras.layers.Embedding)]
        values = _QuantizedLayer(layer, result.pop(f"{layer.path}/{name}"), policy)
        for variable in layer.weights:
            if variable.path not in result:
                result[variable.path] = _Part(values, variable)
    gc.freeze()  # The new model too, see `without_garbage_collection`.
    return result


class _QuantizedLayer:
    """Values of the variables of a quantized layer, computed for the first."""

    def __init__(self, layer, source, policy):
        self.layer, self.source, self.policy = layer, source, policy
        self.values = None

    def take(self, name):
        """A value, which is not kept."""
        if self.values is None:
            self.values = self._compute()
        return self.values.pop(name)

    def _compute(self):
        layer = self.layer
        is_embedding = isinstance(layer, keras.layers.Embedding)
        dtype = DTYPES[self.policy.variable_dtype]
        values = {
            variable.name: aligned_empty(
                tuple(variable.shape), np.dtype(variable.dtype)
            )
            for variable in layer.weights
        }
        places = dict.fromkeys(values, 0)  # Where the next block goes.
        for block in self._blocks(dtype):
            for name, value in _quantize(layer, block, self.policy).items():
                if name == "g_idx":  # Groups of input features, alike in all blocks.
                    values[name][...] = value
                    continue
                axis = 0 if is_embedding else -1
                first = places[name]
                places[name] += value.shape[axis]
                part = slice(first, places[name])
                values[name][part if is_embedding else (..., part)] = value
        return values

    def _blocks(self, dtype):
        """The float weight in parts that are quantized independently."""
        if isinstance(self.layer, keras.layers.Embedding):
            for block in self.source.blocks():
                yield block.astype(dtype, copy=False)
            return
        whole = read_as(self.source, dtype)
        # Columns, an even number: int4 has two of them in a byte.
        step = 2 * max(1, _BLOCK_VALUES // (2 * len(whole)))
        for first in range(0, whole.shape[1], step):
            yield np.ascontiguousarray(whole[:, first : first + step])


class _Part(LazyTensor):
    """One variable of a quantized layer; it can be read once."""

    def __init__(self, values, variable):
        self.values, self.name = values, variable.name
        self.shape, self.dtype = tuple(variable.shape), np.dtype(variable.dtype)

    def read(self):
        return self.values.take(self.name)


def _quantize(layer, array, policy):
    """`{variable: values}` that Keras makes of a float weight of a layer."""
    is_embedding = isinstance(layer, keras.layers.Embedding)

    def build():  # Not from `get_config`, which imports TensorFlow.
        if is_embedding:
            single = type(layer)(*array.shape, dtype=policy)
        else:
            single = type(layer)(array.shape[1], use_bias=False, dtype=policy)
        single.build((None, len(array)))
        return single

    single = build_and_fill(build, lambda s: {s.weights[0].path: _Array(array)})
    single.quantize(layer.quantization_mode, config=_config(layer.quantization_mode))
    return {v.name: keras.ops.convert_to_numpy(v.value) for v in single.weights}


def _config(mode):
    """What `Backbone.quantize(mode)` gives to its layers."""
    if mode == "int8":
        return keras.quantizers.Int8QuantizationConfig()
    return keras.quantizers.Int4QuantizationConfig()


class _Array(LazyTensor):
    """An array as a lazily loaded tensor."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self):
        return self.array


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Shorten the `gc.collect` of Keras after every quantized layer, 0.1 to 0.4 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
