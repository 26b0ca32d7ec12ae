"""Gradient accumulation: the exact mean over the tokens or rows of several batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.utils.backends import no_gradients, replica_count
from keras_t5gemma.utils.types import Tensor

_MEANS = ("mean_with_sample_weight", "sum_over_batch_size", "mean")
_TINY = 1e-30


class GradientAccumulation:
    """Accumulates the gradients of an optimizer with `gradient_accumulation_steps`.

    Keras divides the sum of the batches' gradients by their number: the mean of means,
    in which a token of a batch with few tokens counts more. Here each gradient counts
    by the divisor of its batch's mean loss, so that the update is that of one large
    batch. Moving averages and learning-rate schedules count updates, not batches.

    Args:
        optimizer: with `gradient_accumulation_steps`; patched in place.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer
        self.total = optimizer.add_variable((), dtype="float32", name="total_weight")
        self.batch_weight: Tensor | None = None  # `None` counts each batch alike.
        self._variables: Sequence[keras.Variable] | None = None
        _compat.replace_accumulation(optimizer, self.accumulate)

    def accumulate(
        self, gradients: Sequence[Tensor], variables: Sequence[keras.Variable]
    ) -> None:
        """Add the gradients of a batch; the last batch of an update updates."""
        self._variables = variables
        for sum_, gradient in zip(self._sums(), gradients, strict=True):
            if self.batch_weight is not None:
                gradient = ops.multiply(gradient, self.batch_weight)
            sum_.assign(ops.add(sum_, gradient))
        self.total.assign_add(1.0 if self.batch_weight is None else self.batch_weight)
        steps = self.optimizer.gradient_accumulation_steps
        is_last = (_compat.batch_counter(self.optimizer) + 1) % steps == 0
        _run_if(is_last, self._update, [*variables, *self.optimizer.variables])

    def apply_rest(self) -> None:
        """Update with what is accumulated so far, if anything is."""
        counter = _compat.batch_counter(self.optimizer)
        steps = self.optimizer.gradient_accumulation_steps
        rest = int(ops.convert_to_numpy(counter)) % steps
        if rest:
            with no_gradients():
                self._update()
            counter.assign_add(steps - rest)

    def _sums(self):
        if self._variables is None:  # A resumed training without any batch left.
            self._variables = _compat.optimized_variables(self.optimizer)
        return _compat.gradient_accumulators(self.optimizer, self._variables)

    def _update(self):
        sums = self._sums()
        for sum_ in sums:  # In place: gradients may be as large as the weights.
            sum_.assign(ops.divide(sum_, ops.maximum(self.total, _TINY)))
        means = [ops.convert_to_tensor(sum_) for sum_ in sums]
        _compat.update_once(self.optimizer, means, self._variables)
        for variable in (*sums, self.total):
            variable.assign(ops.zeros_like(variable.value))


class ApplyRest(keras.callbacks.Callback):
    """Update with the batches that are left at the end of `fit`.

    `fit` calls it before and after the other callbacks: validation and checkpoints of
    the last epoch see the updated weights, and so does a `fit` that a callback stops.
    An exception leaves the gradients where they are.
    """

    def __init__(self, accumulation: GradientAccumulation) -> None:
        super().__init__()
        self.accumulation = accumulation

    def on_epoch_begin(self, epoch, logs=None):
        self._is_last = epoch + 1 == self.params["epochs"]

    def on_test_begin(self, logs=None):
        self._apply(self._is_last)

    def on_epoch_end(self, epoch, logs=None):
        self._apply(self._is_last or self.model.stop_training)

    def _apply(self, is_end):
        # On JAX `self.model` brings the state into the variables.
        if is_end and self.model is not None:
            self.accumulation.apply_rest()


def accumulate_exactly(optimizer: keras.optimizers.Optimizer) -> None:
    """Use `GradientAccumulation` if an optimizer accumulates gradients."""
    inner = inner_optimizer(optimizer)
    if inner.gradient_accumulation_steps and _accumulation(optimizer) is None:
        inner.gradient_accumulation = GradientAccumulation(inner)


def callbacks(model: keras.Model) -> list[ApplyRest]:
    """The callback that ends a `fit` of a model; none without accumulation.

    Raises:
        ValueError: for accumulation with a strategy of several replicas.
    """
    accumulation = _accumulation(model.optimizer)
    if accumulation is None:
        return []
    if (count := replica_count(model)) > 1:
        raise ValueError(
            "`gradient_accumulation_steps` must be None with a strategy of "
            f"{count} replicas; got {model.optimizer.gradient_accumulation_steps}."
        )
    return [ApplyRest(accumulation)]


@contextlib.contextmanager
def weighted_batch(model: keras.Model, data: Any) -> Iterator[None]:
    """Let the gradients of a training step count by the weights of its batch.

    Args:
        model: a compiled model; without accumulation nothing happens.
        data: of the step: `(x, y, sample_weight)`.
    """
    accumulation = _accumulation(model.optimizer)
    if accumulation is None:
        yield
        return
    _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    accumulation.batch_weight = divisor_of_mean(model.loss, y, sample_weight)
    try:
        yield
    finally:
        accumulation.batch_weight = None


def divisor_of_mean(loss: Any, y: Any, sample_weight: Any) -> Any:
    """What the mean loss of a batch is divided by; `None` if the loss is not a mean."""
    loss = keras.tree.flatten(loss)[0]
    reduction = getattr(loss, "reduction", _MEANS[1])  # Keras's for functions, names.
    if reduction not in _MEANS or y is None:
        return None
    if reduction != _MEANS[0] or sample_weight is None:
        return _size(y)
    # A weight of a row counts for each of its tokens.
    each = _size(y) / _size(sample_weight)
    return ops.sum(ops.cast(sample_weight, "float32")) * each


def _size(array):
    shape = ops.convert_to_tensor(ops.shape(array), dtype="int32")
    return ops.cast(ops.prod(shape), "float32")


def inner_optimizer(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """The optimizer that updates the weights: mixed float16 wraps it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _accumulation(optimizer):
    return getattr(inner_optimizer(optimizer), "gradient_accumulation", None)


def _run_if(
    condition: Tensor, function: Callable, variables: Sequence[keras.Variable]
) -> None:
    """Call a function that assigns to variables where a condition holds."""
    if keras.config.backend() != "jax":
        ops.cond(condition, function, lambda: None)
        return
    before = [variable.value for variable in variables]

    def after():
        mapping = zip(variables, before, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            function()
        return [scope.get_current_value(variable) for variable in variables]

    values = ops.cond(condition, after, lambda: before)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
