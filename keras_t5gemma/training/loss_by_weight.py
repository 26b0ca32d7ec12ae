"""Loss and metrics of an epoch as means over rows by their weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_t5gemma.training.accumulation import divisor_of_mean
from keras_t5gemma.utils.checks import keras_object, shown
from keras_t5gemma.utils.types import Tensor

BY_WEIGHT = "mean_with_sample_weight"  # Of `keras.losses.Loss`: the reduction.


class LossByWeight(keras.metrics.Mean):
    """Mean of the losses of batches, each by the weights of its rows.

    Keras counts a batch by its number of rows. The last batch of a dataset of texts is
    filled up with rows of weight 0, so that its shape is not compiled again.
    """

    def __init__(self) -> None:
        super().__init__("loss")
        self._weight: Any = None

    @contextlib.contextmanager
    def of_batch(self, loss: Any, data: Any) -> Iterator[None]:
        """Count what is added by what the mean over the batch is divided by.

        Args:
            loss: of the model; one that is no mean is counted as Keras does.
            data: of the step: `(x, y, sample_weight)`.
        """
        _, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        self._weight = divisor_of_mean(loss, y, weights)
        try:
            yield
        finally:
            self._weight = None

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        """Add the mean loss of a batch; `sample_weight` is Keras's, its rows."""
        weight = sample_weight if self._weight is None else self._weight
        return super().update_state(values, sample_weight=weight)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class FunctionLoss(keras.losses.Loss):
    """Mean of a function over rows or tokens by their weights.

    Args:
        function: from labels and outputs to losses, as of `keras.losses`.
        name: of the loss; by default that of the function.
    """

    def __init__(self, function: Callable, name: str | None = None) -> None:
        name = name or getattr(function, "__name__", "loss")
        super().__init__(name, reduction=BY_WEIGHT)
        self.function = function

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """What the function returns, of labels with the rank of the outputs.

        As in Keras, a last axis of one is added or taken away.
        """
        ranks = len(y_true.shape), len(y_pred.shape)
        if ranks[0] == ranks[1] - 1 and y_pred.shape[-1] == 1:
            y_true = keras.ops.expand_dims(y_true, -1)
        elif ranks[0] == ranks[1] + 1 and y_true.shape[-1] == 1:
            y_true = keras.ops.squeeze(y_true, -1)
        return self.function(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        function = keras.saving.serialize_keras_object(self.function)
        return {"name": self.name, "function": function}

    @classmethod
    def from_config(cls, config: dict) -> "FunctionLoss":
        function = keras.saving.deserialize_keras_object(config["function"])
        return cls(function, config["name"])


def mean_by_weight(loss: Any) -> Any:
    """The `loss` of `compile`, whose mean over a batch is one by weights.

    The default of Keras divides by the number of rows, with those of weight 0 that fill
    up a batch and with padding: loss and gradient would depend on how full it is.

    Args:
        loss: a Keras loss, a function, the name of one, a list or a dict of these, or
            `None`. Losses are copied, not changed.

    Returns:
        The same, with `FunctionLoss` for functions and names. Sums are left as they
        are, and so is `"crossentropy"`, which Keras chooses by the labels' shape.

    Raises:
        ValueError: for anything else.
    """
    keras_object(loss, "loss")
    return keras.tree.map_structure(_by_weight, loss)


def _by_weight(loss):
    if isinstance(loss, str):
        if loss.lower() in ("crossentropy", "ce"):
            return loss
        loss = keras.losses.get(loss)
    if isinstance(loss, type):  # Keras makes one of a class.
        loss = loss()
    if not isinstance(loss, keras.losses.Loss):
        return FunctionLoss(loss) if callable(loss) else loss
    if loss.reduction not in ("sum_over_batch_size", "mean"):
        return loss
    copied = object.__new__(type(loss))  # `copy` would save and load it.
    vars(copied).update(vars(loss), reduction=BY_WEIGHT)
    return copied


def with_metrics(weighted: list | None, metrics: Any) -> list:
    """The `weighted_metrics` of `compile`, with its `metrics` of other names.

    Args:
        weighted: metrics or their names; `None` is none.
        metrics: the same, in a list or a tuple.

    Raises:
        ValueError: for `metrics` of another type.
    """
    if not isinstance(metrics, list | tuple):
        raise ValueError(f"`metrics` must be a list of metrics; got {shown(metrics)}.")
    weighted = list(weighted or [])
    names = {getattr(metric, "name", metric) for metric in weighted}
    return weighted + [m for m in metrics if getattr(m, "name", m) not in names]
