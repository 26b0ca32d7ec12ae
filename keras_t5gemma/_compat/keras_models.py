"""Private names of Keras and KerasHub: variables, layers, seeds, data, training."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

_PENDING = "uninitialized_variables"


@contextlib.contextmanager
def pending_variables() -> Iterator[list[keras.Variable]]:
    """Collect the variables that a `keras.StatelessScope` leaves without a value.

    Keras keeps them in a global list, and fills them with the next model that is
    built. Inside the context that list is this one; afterwards it is as it was.
    """
    from keras.src.backend.common import global_state

    before = global_state.get_global_attribute(_PENDING) or []
    pending: list[keras.Variable] = []
    global_state.set_global_attribute(_PENDING, pending)
    try:
        yield pending
    finally:
        global_state.set_global_attribute(_PENDING, before)


def initialize_variable(
    variable: keras.Variable, initializer: Callable | None = None
) -> None:
    """Fill one of `pending_variables`, by default with its own initializer.

    `variable.assign` cannot be used: on PyTorch and TensorFlow it writes into a value
    that does not exist yet.
    """
    if initializer is not None:
        variable._initializer = initializer
    variable._deferred_initialize()


def set_variable_value(variable: keras.Variable, value: Any) -> None:
    """Fill one of `pending_variables` with a JAX array, without a copy or resharding.

    `variable.assign` would ask for the whole array on each process.
    """
    variable._value = value
    variable._initializer = None


def assigned_layout(variable: Any) -> Any:
    """The layout that a variable was made with, or `None`: what Keras asks for first.

    A public `Variable.layout` does not exist in Keras 3.15.
    """
    return getattr(variable, "_layout", None)


def variable_layout(variable: keras.Variable) -> Any:
    """The layout of a variable, on JAX, from `keras.distribution` if it has none yet.

    It is what `get_variable_layout` of the distribution gave: a `TensorLayout` or a
    `jax.sharding.Sharding`.
    """
    variable._initialize_layout()
    return variable._layout


def track_parameters(model: keras.Model) -> None:
    """Let PyTorch see the parameters of a KerasHub model.

    KerasHub assigns attributes before the torch module exists, which hides the
    parameters from `parameters()`, DDP and exporters until they are tracked again.
    Variables that wait for their values are tracked when they have them. On other
    backends nothing happens.
    """
    if keras.config.backend() != "torch":
        return
    if all(variable._value is not None for variable in model.variables):
        model._track_variables()


@contextlib.contextmanager
def variables_as_stored() -> Iterator[None]:
    """Read variables in their own dtype, as in a layer with `autocast=False`.

    Keras enters the scope of the compute dtype for such a layer too if it is the first
    one that is called.
    """
    from keras.src.backend import AutocastScope

    with AutocastScope(None):
        yield


def set_loss_tracker(model: keras.Model, tracker: keras.metrics.Metric) -> None:
    """Let a compiled model report its loss by another metric than Keras's mean."""
    # Not by `setattr`, which would list it among the metrics twice.
    object.__setattr__(model, "_loss_tracker", tracker)


def set_dtype_policy(layer: keras.layers.Layer, policy: keras.DTypePolicy) -> None:
    """Replace a `DTypePolicyMap` that a layer holds by the layer's own policy.

    Keras cannot save a quantized layer that holds the map. The public setter of
    `dtype_policy` writes into the map instead, or quantizes.
    """
    layer._dtype_policy = policy


def mark_as_seeded(generator: keras.random.SeedGenerator) -> None:
    """Mark a generator that does not call `SeedGenerator.__init__` as seeded.

    On PyTorch `keras.random.dropout` ignores a generator without an initial seed.
    """
    generator._initial_seed = 0


def random_seed() -> int | None:
    """The seed given to `keras.utils.set_random_seed`, or `None`; no public getter."""
    from keras.src.utils import rng_utils

    return rng_utils.get_random_seed()


def dataset_adapter(dataset: keras.utils.PyDataset, signature: Any) -> Any:
    """Keras's adapter of a `PyDataset` on TensorFlow, with a given signature.

    Args:
        dataset: passed on to the adapter.
        signature: of `tf.TensorSpec`, in the structure of a batch. Keras would derive
            it from the first two batches; no argument of `fit` sets it.
    """
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

    adapter = PyDatasetAdapter(dataset)
    adapter._output_signature = signature
    return adapter


@contextlib.contextmanager
def kept_arrays(model: keras.Model, lent: bool = True) -> Iterator[None]:
    """Leave a JAX model with its arrays when a loop of Keras over its data is stopped.

    Keras takes the arrays from the variables before the first batch, and gives them
    back after the last one. On other backends nothing happens.

    Args:
        model: a compiled model, patched inside the context.
        lent: for `evaluate` and `predict`, whose functions must not donate the arrays:
            the variables keep them. `False` is for `fit`: Keras's `finally` finds them
            also when nothing was trained yet.
    """
    if keras.config.backend() != "jax":
        yield
        return
    name = "_get_jax_state"
    outer = model.__dict__.get(name)  # Of `fit`, for its validation.

    def get_state(**wanted):
        purge = wanted.pop("purge_model_variables", False) and not lent
        get = type(model)._get_jax_state
        state = get(model, **wanted, purge_model_variables=purge)
        model._jax_state = dict(zip(filter(wanted.get, wanted), state, strict=True))
        return state

    object.__setattr__(model, name, get_state)
    try:
        yield
    finally:
        object.__delattr__(model, name)
        if outer is not None:
            object.__setattr__(model, name, outer)
        else:
            model._jax_state = None


def make_jax_train_function(
    model: keras.Model, step: Callable, compiler_options: dict[str, Any]
) -> None:
    """Keras's `make_train_function`, with options of XLA.

    Args:
        model: a compiled model that is not run eagerly.
        step: its `train_step`.
        compiler_options: of `jax.jit`.
    """
    import jax

    out = None
    if keras.distribution.distribution() is not None:
        out = (None, model._get_state_sharding_spec())
    compiled = jax.jit(
        step, donate_argnums=0, out_shardings=out, compiler_options=compiler_options
    )
    model.train_function = model._make_function(compiled)
