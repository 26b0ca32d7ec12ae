"""The variables of a model and of its optimizer, without the memory they take.

Keras only notes shapes in a `StatelessScope`, so that these are the variables of the
real model, whatever its size.
"""

import copy
import dataclasses
import functools
import math

import keras
import ml_dtypes  # noqa: F401  NumPy then knows bfloat16 by name.
import numpy as np

from keras_t5gemma.modeling.backbone import Backbone, is_projection_or_embedding
from keras_t5gemma.modeling.deferred_init import build_abstract

# What `Backbone.quantize` makes of its default settings.
QUANTIZED = {"int8": "int8", "int4": "int4/128"}


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A variable's name and size.

    Args:
        path: as Keras's, e.g. `"encoder/block_0/mlp/up/kernel"`; an optimizer's state
            has the path of the weight that it is laid out like, or a name.
        shape: tuple.
        dtype: its name.
        trainable: whether it gets a gradient.
    """

    path: str
    shape: tuple
    dtype: str
    trainable: bool = False

    @property
    def name(self):
        """Last part of the path."""
        return self.path.split("/")[-1]

    @property
    def nbytes(self):
        """Of the whole variable."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@functools.lru_cache
def model_variables(config, dtype, lora_rank=None, quantize=None):
    """All variables of a `Backbone`.

    A model of one block a tower is built, and its blocks are counted as often as the
    config has them: they are all the same.

    Args:
        config: a `T5GemmaConfig`.
        dtype: a policy's name; that of its variables matters alone.
        lora_rank: of adapters on `enable_lora`'s default layers, or `None`.
        quantize: `"int8"`, `"int4"` or `None`; then nothing but adapters learns.

    Returns:
        A tuple of `Variable`.
    """
    dtype = keras.dtype_policies.get(dtype).variable_dtype
    small = dataclasses.replace(
        config, encoder=_one_block(config.encoder), decoder=_one_block(config.decoder)
    )

    def build():
        backbone = Backbone(small, dtype=dtype)
        if quantize:
            backbone = Backbone(small, dtype=_quantized(backbone, dtype, quantize))
        if lora_rank:
            backbone.enable_lora(lora_rank)
        elif quantize:
            backbone.trainable = False
        return backbone

    backbone = build_abstract(build)
    found = []
    for v in backbone.weights:
        stack = getattr(config, v.path.split("/")[0])
        blocks = range(stack.num_layers if "/block_0/" in v.path else 1)
        paths = [v.path.replace("/block_0/", f"/block_{i}/") for i in blocks]
        shape, trainable = tuple(v.shape), bool(v.trainable)
        found += [Variable(path, shape, v.dtype, trainable) for path in paths]
    return tuple(found)


def _one_block(stack):
    if stack is None:
        return None
    return dataclasses.replace(stack, num_layers=1, layer_types=stack.layer_types[:1])


def _quantized(backbone, dtype, mode):
    """The policies that `backbone.quantize(mode)` would give to its layers."""
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy=keras.dtype_policies.get(dtype)
    )
    for layer in backbone._flatten_layers(include_self=False):
        if is_projection_or_embedding(layer):
            name = f"{QUANTIZED[mode]}_from_{dtype}"
            policies[layer.path] = keras.dtype_policies.get(name)
    return policies


def optimizer_variables(optimizer, variables):
    """What an optimizer keeps for variables, by its own account.

    Its `build` runs, and asks for variables that are noted and not made.

    Args:
        optimizer: a `keras.optimizers.Optimizer`, not built.
        variables: `Variable`s.

    Returns:
        A list of `Variable`. Those of a weight's shape have its path; rows and
        columns, as of Adafactor, have a name. Scalars are left out.
    """
    optimizer = type(optimizer).from_config(copy.deepcopy(optimizer.get_config()))
    found = []

    def note(shape, initializer="zeros", dtype=None, name=None, path=None, **kwargs):
        dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
        found.append(Variable(path or name, tuple(shape), dtype))
        return found[-1]

    def note_like(reference_variable, name=None, initializer="zeros"):
        like = reference_variable
        return note(like.shape, dtype=like.dtype, path=like.path)

    optimizer.add_variable = note
    optimizer.add_variable_from_reference = note_like
    optimizer._var_key = id  # TensorFlow's asks for the value.
    optimizer.build([v for v in variables if v.trainable])
    return [v for v in found if v.shape]
