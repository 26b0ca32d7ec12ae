"""Loss and metric of training on text pairs."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.utils.checks import number
from keras_t5gemma.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TokenCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the next token, averaged over tokens by their weights.

    `Seq2SeqLM.fit` and `evaluate` compute it with `token_losses`, without an array of
    all logits. Elsewhere in Keras it is the same function of logits.

    Args:
        label_smoothing: share of the target spread over the vocabulary, in `[0, 1)`.
        z_loss: weight of the squared log-normalizer, at least 0; 1e-4 is usual.
        reduction: of `keras.losses.Loss`; others than the default need the logits.
        name: of the loss.
        dtype: of `keras.losses.Loss`.

    Raises:
        ValueError: for a number out of its range.

    Examples:
        >>> loss = keras_t5gemma.TokenCrossEntropy()
        >>> round(float(loss(np.array([[1]]), np.zeros((1, 1, 2), "float32"))), 4)
        0.6931
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str | None = "mean_with_sample_weight",
        name: str = "token_cross_entropy",
        dtype: Any = None,
    ) -> None:
        number(label_smoothing, "label_smoothing", at_least=0, below=1)
        number(z_loss, "z_loss", at_least=0)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Losses `(B, T)` of labels `(B, T)`, from logits `(B, T, V)`."""
        labels = ops.cast(y_true, "int32")[..., None]
        log_z = ops.logsumexp(y_pred, axis=-1)
        chosen = ops.take_along_axis(y_pred, labels, axis=-1)[..., 0]
        losses = log_z - (1 - self.label_smoothing) * chosen
        losses = losses - self.label_smoothing * ops.mean(y_pred, axis=-1)
        return losses + self.z_loss * ops.square(log_z)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Perplexity(keras.metrics.Mean):
    """`exp` of the mean negative log-probability of all tokens so far."""

    def __init__(self, name: str = "perplexity", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def result(self) -> Tensor:
        return ops.exp(super().result())
