"""Texts that belong together come together: losses of pairs of embeddings."""

import keras
from keras import ops

from keras_t5gemma.modeling.heads import l2_normalize
from keras_t5gemma.utils.checks import number, whole_number

FAR = -1e30


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class InfoNCE(keras.losses.Loss):
    """Which of the batch's positives is an anchor's own (arXiv 1807.03748)?

    The cross-entropy of cosines divided by the temperature, where all other positives
    of the batch are wrong; and the other way round, which of the anchors is a
    positive's own; the mean of both.

    Args:
        temperature: of the cosines.
        symmetric: take the second direction too.
        dimensions: lengths that embeddings shall be of use at when they are cut
            (Matryoshka, arXiv 2205.13147): the loss is the mean over them. `None` is
            the whole length alone.

    `y_pred` is `(B, 2, D)`, anchors and positives; `y_true` is not used. Rows of zeros
    fill a batch up and are no negatives.
    """

    def __init__(
        self, temperature=0.05, symmetric=True, dimensions=None, name="info_nce"
    ):
        super().__init__(name, reduction="mean_with_sample_weight", dtype="float32")
        number(temperature, "temperature", above=0)
        self.temperature = temperature
        self.symmetric = symmetric
        self.dimensions = dimensions

    def call(self, y_true, y_pred):
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

    def get_config(self):
        return {
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "dimensions": self.dimensions,
            "name": self.name,
        }


def cosines(pairs):
    """Cosines `(B, B)` of anchors and positives, and which rows are there, `(B,)`."""
    pairs = ops.cast(pairs, "float32")
    present = ops.any(pairs[:, 1] != 0, axis=-1)
    pairs = l2_normalize(pairs)
    return ops.matmul(pairs[:, 0], ops.transpose(pairs[:, 1])), present


@keras.saving.register_keras_serializable(package="keras_t5gemma")
def in_batch_accuracy(y_true, y_pred):
    """1 where an anchor's own positive is the nearest of the batch, float32 `(B,)`."""
    near, present = cosines(y_pred)
    near = ops.where(present, near, FAR)
    return ops.cast(ops.argmax(near, axis=1) == ops.arange(ops.shape(near)[0]), float)
