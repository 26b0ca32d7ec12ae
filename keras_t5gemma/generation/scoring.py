"""Log-probabilities of given targets."""

import keras
from keras import ops


def make_scorer(model: keras.Model) -> keras.Model:
    """A model from inputs and `labels` `(B, T)` to their log-probabilities `(B, T)`.

    Args:
        model: a `Seq2SeqLM`, whose layers it shares.
    """
    labels = keras.Input((None,), dtype="int32", name="labels")
    logits = ops.cast(model.output, "float32")  # B T V
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    log_z = ops.logsumexp(logits, axis=-1)
    return keras.Model({**model.input, "labels": labels}, chosen - log_z)
