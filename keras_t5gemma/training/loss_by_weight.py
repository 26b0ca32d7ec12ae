"""Loss and metrics of an epoch as means over rows by their weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_t5gemma.training.accumulation import divisor_of_mean
from keras_t5gemma.utils.checks import shown


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
