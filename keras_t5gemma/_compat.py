"""Functions that touch private names of libraries, one each, and nothing else.

Every function was checked with Keras 3.15.0 and 3.15.1, KerasHub 0.32, JAX 0.6 to
0.10, PyTorch 2.13 and TensorFlow 2.20 to 2.21. `tests/test_compat.py` has one test a
function: where a release renames what it needs, that test fails and says what to do.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

_PENDING = "uninitialized_variables"


# Variables


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


# Layers, seeds, data


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


# Training


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


# Optimizers


def is_plain_adam(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer is Keras's Adam or AdamW itself, not a subclass of them.

    On PyTorch Keras makes an instance of a private subclass of either.
    """
    kind = type(optimizer)
    if kind.__module__.endswith((".torch_adam", ".torch_adamw")):
        return True
    return kind in (keras.optimizers.Adam, keras.optimizers.AdamW)


def replace_update(optimizer: keras.optimizers.Optimizer, update: Callable) -> None:
    """Replace the update rule of an optimizer, on PyTorch and TensorFlow.

    Args:
        optimizer: patched in place.
        update: on PyTorch `(gradients, variables, learning_rate)`, all of them at
            once, where Keras has no public hook; on TensorFlow `(gradient, variable,
            learning_rate)`, in place of the public `update_step`.
    """
    if keras.config.backend() == "torch":
        optimizer._backend_update_step = update
    else:
        optimizer.update_step = update


def replace_weight_decay(
    optimizer: keras.optimizers.Optimizer, decay: Callable
) -> None:
    """Replace what Keras does for `weight_decay` before an update.

    Args:
        optimizer: patched in place.
        decay: `(variables)`.
    """
    optimizer._apply_weight_decay = decay


def apply_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> None:
    """Keras's own weight decay, also after `replace_weight_decay`."""
    type(optimizer)._apply_weight_decay(optimizer, variables)


def uses_weight_decay(optimizer: keras.optimizers.Optimizer, variable: Any) -> bool:
    """Whether an optimizer decays a variable; see `exclude_from_weight_decay`."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)


def adam_moments(
    optimizer: keras.optimizers.Adam, variables: Iterable[keras.Variable]
) -> tuple[list[keras.Variable], list[keras.Variable]]:
    """First and second moments that an Adam keeps for variables, in their order.

    `optimizer.variables` holds them too, but tells them apart by name only.
    """
    places = [optimizer._get_variable_index(variable) for variable in variables]
    first = [optimizer._momentums[place] for place in places]
    return first, [optimizer._velocities[place] for place in places]


def moving_averages(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The moving averages of an optimizer with `use_ema=True`; else none."""
    averages = getattr(optimizer, "_model_variables_moving_average", ())
    return [variable for variable in averages if variable is not None]


def replace_accumulation(
    optimizer: keras.optimizers.Optimizer, accumulate: Callable
) -> None:
    """Give an optimizer another gradient accumulation; a schedule counts its updates.

    Keras hands its learning-rate schedule the number of batches.

    Args:
        optimizer: with `gradient_accumulation_steps`; patched in place.
        accumulate: `(gradients, variables)`, called for every batch.
    """

    def learning_rate():
        schedule = optimizer._learning_rate
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return schedule(optimizer.iterations)
        return type(optimizer)._get_current_learning_rate(optimizer)

    optimizer._backend_apply_gradients = accumulate
    optimizer._get_current_learning_rate = learning_rate


def batch_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """The number of batches so far; `optimizer.iterations` is that of updates."""
    return optimizer._iterations


def optimized_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """The variables that an optimizer was built with; there is no public list."""
    return list(optimizer._trainable_variables)


def gradient_accumulators(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """The variables in which an optimizer accumulates gradients, in this order."""
    places = [optimizer._get_variable_index(variable) for variable in variables]
    return [optimizer._accumulated_gradients[place] for place in places]


class _WithoutAccumulation:
    """Proxy of an optimizer with gradient accumulation disabled."""

    gradient_accumulation_steps = None

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def update_once(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    variables: Sequence[keras.Variable],
) -> None:
    """Update at once, in spite of `gradient_accumulation_steps`.

    Keras's clipping, weight decay, update and moving averages. `optimizer.apply` is the
    public way, but accumulates.
    """
    alone = _WithoutAccumulation(optimizer)
    type(optimizer)._backend_apply_gradients(alone, gradients, variables)


def replace_apply(
    optimizer: keras.optimizers.Optimizer, apply: Callable | None
) -> None:
    """Put a function in the place of `optimizer.apply`, or the class's back.

    Args:
        optimizer: patched in place.
        apply: `(gradients, trainable_variables=None)`; `None` ends the replacement.
    """
    if apply is None:
        del optimizer.apply
    else:
        optimizer.apply = apply


def build_with(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[Any],
    add_variable: Callable,
    add_variable_from_reference: Callable,
) -> None:
    """`optimizer.build` with functions that note a variable in place of making it.

    Args:
        optimizer: patched in place, and of no further use.
        variables: objects with `shape`, `dtype` and `path`.
        add_variable: called in place of the method of that name.
        add_variable_from_reference: likewise.
    """
    optimizer.add_variable = add_variable
    optimizer.add_variable_from_reference = add_variable_from_reference
    optimizer._var_key = id  # TensorFlow's asks for the value.
    optimizer.build(variables)


# PyTorch


def tensor_version(tensor: Any) -> Any:
    """How often a PyTorch tensor was written in place; there is no public counter.

    A tensor made inside `torch.inference_mode` does not count: a new object, which
    equals no other.
    """
    return object() if tensor.is_inference() else tensor._version


def fused_adam(
    variables: list,
    gradients: list,
    first: list,
    second: list,
    step: int,
    **options: Any,
) -> None:
    """PyTorch's fused Adam step, in place, on lists of tensors.

    `torch.optim.Adam(fused=True)` is the public way, but keeps moments itself.

    Args:
        variables: tensors to update.
        gradients: one each.
        first: first moments.
        second: second moments.
        step: number of this step, from 1.
        **options: `lr`, `beta1`, `beta2`, `eps`.
    """
    import torch

    steps = torch.tensor(float(step), device=variables[0].device)
    torch._fused_adam_(
        variables,
        gradients,
        first,
        second,
        [],
        [steps] * len(variables),
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        **options,
    )


def has_per_channel_int8() -> bool:
    """Whether this PyTorch has what `per_channel_int8` needs."""
    import torch

    return hasattr(torch, "_make_per_channel_quantized_tensor")


def per_channel_int8(rows: Any, scales: Any) -> Any:
    """A quantized PyTorch tensor of int8 rows and a float64 scale a row.

    The public `torch.quantize_per_channel` starts from a float copy of the rows.
    """
    import torch

    zeros = torch.zeros(len(rows), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(rows, scales, zeros, 0)


def torch_has_int8_products() -> bool:
    """Whether `torch_int8_product` exists and runs on the processor's instructions.

    Elsewhere it is a plain loop. There is no public way to ask for VNNI instructions.
    """
    import torch

    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return hasattr(torch, "_int_mm") and bool(has_vnni())


def torch_int8_product(left: Any, right: Any) -> Any:
    """int32 product of two int8 matrices on PyTorch; public ones return int8.

    Args:
        left: `(R, in)`.
        right: `(in, out)`.
    """
    import torch

    return torch._int_mm(left, right)


@functools.cache
def torch_has_onednn_products() -> bool:
    """Whether `torch_onednn_product` exists, on a processor with AVX-512."""
    import torch

    has = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def torch_onednn_product(x: Any, rows: Any) -> Any:
    """`x @ rows.T` of float32 by oneDNN, without a gradient.

    `torch.nn.functional.linear`, which is public, calls MKL.

    Args:
        x: `(..., in)`.
        rows: `(out, in)`.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, rows, None, "none", [], "")


def torch_is_tracing() -> bool:
    """Whether PyTorch compiles, exports, traces or transforms a function now.

    By `torch.func` or `torch.autograd.forward_ad`; for both there is no public way to
    ask.
    """
    import torch

    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
