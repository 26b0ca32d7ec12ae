"""Variables of a model and its optimizer, evaluated without allocating memory.

In a `StatelessScope` Keras only records shapes, so these are the variables of the real
model, whatever its size.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence

import keras
import ml_dtypes  # noqa: F401  NumPy then knows bfloat16 by name.
import numpy as np

from keras_t5gemma import _compat
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.deferred_init import build_abstract
from keras_t5gemma.modeling.quantized_loading import policies


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A variable's name and size.

    Args:
        path: as in Keras, e.g. `"encoder/block_0/mlp/up/kernel"`; optimizer state has
            the path of the weight with the same layout, or a name.
        shape: sizes of its axes.
        dtype: name of its data type.
        trainable: whether it has a gradient.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = False

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.split("/")[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole variable."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@functools.lru_cache
def model_variables(
    config: T5GemmaConfig,
    dtype: str,
    lora_rank: int | None = None,
    quantize: str | None = None,
) -> tuple[Variable, ...]:
    """All variables of a `Backbone`.

    A model with one block per tower is built, and its block is repeated: all blocks of
    a tower have the same variables.

    Args:
        config: of the model.
        dtype: name of a policy, of which only the variable dtype matters.
        lora_rank: rank of adapters on `enable_lora`'s default layers, or `None`.
        quantize: `"int8"`, `"int4"` or `None`; then only adapters are trained.
    """
    dtype = keras.dtype_policies.get(dtype).variable_dtype
    small = dataclasses.replace(
        config,
        encoder=_one_block(config.encoder),
        decoder=config.decoder and _one_block(config.decoder),
    )

    def build() -> Backbone:
        backbone = Backbone(small, dtype=dtype)
        if quantize:
            paths = [variable.path for variable in backbone.weights]
            policy = keras.dtype_policies.get(dtype)
            backbone = Backbone(small, dtype=policies(paths, policy, quantize))
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


def _one_block(stack: StackConfig) -> StackConfig:
    kinds = stack.layer_types and stack.layer_types[:1]
    return dataclasses.replace(stack, num_layers=1, layer_types=kinds)


def optimizer_variables(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Variable]
) -> list[Variable]:
    """State variables of an optimizer.

    Its `build` runs with functions that record variables instead of making them.

    Args:
        optimizer: not built.
        variables: of the model.

    Returns:
        Variables with the shape of a weight have its path; rows and columns, as in
        Adafactor, have a name. Scalars are left out.
    """
    optimizer = type(optimizer).from_config(copy.deepcopy(optimizer.get_config()))
    found: list[Variable] = []

    def note(shape, initializer="zeros", dtype=None, name=None, path=None, **kwargs):
        dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
        found.append(Variable(path or name, tuple(shape), dtype))
        return found[-1]

    def note_like(reference_variable, name=None, initializer="zeros"):
        like = reference_variable
        return note(like.shape, dtype=like.dtype, path=like.path)

    trainable = [v for v in variables if v.trainable]
    _compat.build_with(optimizer, trainable, note, note_like)
    return [v for v in found if v.shape]
