"""Log-probabilities of given targets."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.prediction import predict
from keras_t5gemma.utils.checks import rows_of_batch


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


def score(
    scorer: keras.Model,
    inputs: dict[str, np.ndarray],
    labels: np.ndarray,
    weights: np.ndarray,
    batch_size: int,
) -> dict[str, list[Any]]:
    """Log-probabilities of targets, without padding.

    Args:
        scorer: from `make_scorer`.
        inputs: the inputs of the backbone.
        labels: int `(pairs, length)`.
        weights: `(pairs, length)`, 0 at padding.
        batch_size: pairs in a batch.

    Returns:
        Lists of `"log_prob"`, the sums; `"token_log_probs"` and `"token_ids"`.
    """
    rows_of_batch(batch_size)
    arrays = {**inputs, "labels": labels}
    scores = predict(scorer, arrays, mesh.round_up(batch_size))
    keep = weights > 0
    return {
        "log_prob": (scores * keep).sum(axis=1, dtype="float64").tolist(),
        "token_log_probs": [s[k] for s, k in zip(scores, keep, strict=True)],
        "token_ids": [i[k] for i, k in zip(labels, keep, strict=True)],
    }
