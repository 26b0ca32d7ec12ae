"""Contrastive loss and accuracy of pairs of embeddings."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.modeling.heads import l2_normalize
from keras_t5gemma.utils.checks import flag, number, whole_number
from keras_t5gemma.utils.texts import to_list
from keras_t5gemma.utils.types import Tensor

FAR = -1e30


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class InfoNCE(keras.losses.Loss):
    """InfoNCE loss with in-batch negatives (arXiv 1807.03748).

    The cross-entropy of an anchor's own positive among all positives of the batch, on
    cosines divided by the temperature; if symmetric, the mean of this and of the
    cross-entropy of a positive's own anchor among all anchors.

    Args:
        temperature: divides the cosines.
        symmetric: average both directions.
        dimensions: Matryoshka lengths (arXiv 2205.13147): the loss is the mean over
            embeddings cut to each of them. `None` is the full length alone.
        name: of the loss.

    `y_pred` is `(B, 2, D)`, anchors and positives; `y_true` is not used. Rows of zeros
    are padding and not used as negatives.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        symmetric: bool = True,
        dimensions: list[int] | None = None,
        name: str = "info_nce",
    ) -> None:
        super().__init__(name, reduction="mean_with_sample_weight", dtype="float32")
        number(temperature, "temperature", above=0)
        self.temperature = temperature
        self.symmetric = flag(symmetric, "symmetric")
        if dimensions is not None:
            dimensions = to_list(dimensions, "dimensions")
            dimensions = [whole_number(n, "dimensions", 1) for n in dimensions] or None
        self.dimensions = dimensions

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Losses `(B,)`."""
        size = y_pred.shape[-1]
        lengths = self.dimensions or [size]
        for length in lengths:
            whole_number(length, "dimensions", 1, size)
        return sum(self._losses(y_pred[..., :n]) for n in lengths) / len(lengths)

    def _losses(self, pairs):
        logits, present = cosines(pairs)
        logits = ops.where(present, logits / self.temperature, FAR)
        own = ops.diagonal(logits)
        losses = ops.logsumexp(logits, axis=1) - own
        if not self.symmetric:
            return losses
        logits = ops.where(present[:, None], logits, FAR)
        return (losses + ops.logsumexp(logits, axis=0) - own) / 2

    def get_config(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "dimensions": self.dimensions,
            "name": self.name,
        }


def cosines(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines `(B, B)` of anchors and positives, and bool `(B,)`, rows not padding."""
    pairs = ops.cast(pairs, "float32")
    present = ops.any(pairs[:, 1] != 0, axis=-1)
    pairs = l2_normalize(pairs)
    return ops.matmul(pairs[:, 0], ops.transpose(pairs[:, 1])), present


@keras.saving.register_keras_serializable(package="keras_t5gemma")
def in_batch_accuracy(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """1 where an anchor's own positive is the nearest of the batch, float32 `(B,)`."""
    near, present = cosines(y_pred)
    near = ops.where(present, near, FAR)
    return ops.cast(ops.argmax(near, axis=1) == ops.arange(ops.shape(near)[0]), float)
