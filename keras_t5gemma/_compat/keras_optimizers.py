"""Private names of Keras: optimizers."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras


def is_plain_adam(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer is Keras's Adam or AdamW itself, not a subclass of them.

    On PyTorch Keras makes an instance of a private subclass of either.
    """
    kind = type(optimizer)
    if kind.__module__.endswith((".torch_adam", ".torch_adamw")):
        return True
    return kind in (keras.optimizers.Adam, keras.optimizers.AdamW)


def of_any_backend(config: Any) -> Any:
    """The serialized configuration of an optimizer, for every backend.

    On PyTorch Keras writes the module of its private subclasses, which others cannot
    import, or would make a PyTorch optimizer of.

    Args:
        config: of `keras.saving.serialize_keras_object`; also what contains it.

    Returns:
        A new configuration of the public classes.
    """
    if isinstance(config, list | tuple):
        return [of_any_backend(part) for part in config]
    if not isinstance(config, dict):
        return config
    found = {name: of_any_backend(part) for name, part in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.torch.optimizers."):
        found |= {"module": "keras.optimizers", "registered_name": None}
    return found


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


def change_gradients(optimizer: keras.optimizers.Optimizer, change: Callable) -> None:
    """Let a function change gradients before they are clipped and accumulated.

    Keras's `optimizer.apply` is the public place, but `replace_apply` replaces it.

    Args:
        optimizer: patched in place.
        change: from a list of gradients to another.
    """
    optimizer._backend_apply_gradients = functools.partial(
        _apply_changed, optimizer, change
    )


def _apply_changed(optimizer, change, gradients, variables):
    type(optimizer)._backend_apply_gradients(optimizer, change(gradients), variables)


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
