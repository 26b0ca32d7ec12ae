"""The loss and the metric of training on text pairs."""

import keras
from keras import ops

from keras_t5gemma.utils.checks import number


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TokenCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the next token, the mean over the tokens that have weight.

    `Seq2SeqLM.fit` and `evaluate` compute it by `token_losses`, without the logits;
    on logits, anywhere else in Keras, it is the same function.

    Args:
        label_smoothing: share of the target spread over the vocabulary, in `[0, 1)`.
        z_loss: weight of the squared log-normalizer, at least 0; 1e-4 is usual.
        reduction: of `keras.losses.Loss`; another than the default needs the logits.
        name: of the loss.
        dtype: of `keras.losses.Loss`.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(
        self,
        label_smoothing=0.0,
        z_loss=0.0,
        reduction="mean_with_sample_weight",
        name="token_cross_entropy",
        dtype=None,
    ):
        number(label_smoothing, "label_smoothing", at_least=0, below=1)
        number(z_loss, "z_loss", at_least=0)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def call(self, y_true, y_pred):
        """Losses `(B, T)` of labels `(B, T)`, from logits `(B, T, V)`."""
        labels = ops.cast(y_true, "int32")[..., None]
        normalizer = ops.logsumexp(y_pred, axis=-1)
        chosen = ops.take_along_axis(y_pred, labels, axis=-1)[..., 0]
        losses = normalizer - (1 - self.label_smoothing) * chosen
        losses = losses - self.label_smoothing * ops.mean(y_pred, axis=-1)
        return losses + self.z_loss * ops.square(normalizer)

    def get_config(self):
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Perplexity(keras.metrics.Mean):
    """`exp` of the mean negative log-probability of all tokens so far."""

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def result(self):
        return ops.exp(super().result())
