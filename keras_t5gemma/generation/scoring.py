"""Log-probabilities of given targets."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.prediction import predict
from keras_t5gemma.tokenization.token_ids import padded_width, pair_arrays
from keras_t5gemma.utils.buckets import SHORT, batch_bounds, bucket, power_of_two
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
    scorer: keras.Model, preprocessor: Any, pairs: dict, batch_size: int
) -> dict[str, list[Any]]:
    """Log-probabilities of targets, without padding.

    Pairs whose sources have up to `SHORT` tokens have one shape. Longer sources are in
    batches of similar length, see `batch_bounds`.

    Args:
        scorer: from `make_scorer`.
        preprocessor: a `Seq2SeqLMPreprocessor`.
        pairs: dict of `"encoder_text"` and `"decoder_text"`.
        batch_size: maximum number of pairs in a batch.

    Returns:
        Lists of `"log_prob"`, the sums; `"token_log_probs"` and `"token_ids"`.
    """
    rows_of_batch(batch_size)
    sources, targets = preprocessor.token_rows(pairs)
    lengths = np.array([len(row) for row in sources], "int64")
    order = np.argsort(-np.maximum(lengths, SHORT), kind="stable")
    limits = preprocessor.encoder_sequence_length, preprocessor.decoder_sequence_length
    multiple = preprocessor.pad_to_multiple_of
    short = [row for row in sources if len(row) <= SHORT]
    width = padded_width(short, min(SHORT, limits[0]), multiple)
    target_width = padded_width(targets, limits[1], multiple)
    found: list[Any] = [None] * len(sources)
    size = mesh.round_up(batch_size)
    for start, stop in batch_bounds(lengths[order], size, mesh.size("data")):
        rows = taken = order[start:stop]
        longest, batch_width = int(lengths[rows[0]]), width
        if longest > SHORT:
            batch_width = min(limits[0], bucket(longest))
            more = min(power_of_two(len(rows)), size) - len(rows)
            taken = np.pad(rows, (0, more), mode="edge")
        x, labels, mask = pair_arrays(
            [sources[i] for i in taken],
            [targets[i] for i in taken],
            preprocessor.tokenizer.start_token_id,
            batch_width,
            target_width,
        )
        scores = predict(scorer, {**x, "labels": labels}, size)
        for row, values, ids, keep in zip(rows, scores, labels, mask > 0, strict=False):
            found[row] = values[keep], ids[keep]
    return {
        "log_prob": [float(values.sum(dtype="float64")) for values, _ in found],
        "token_log_probs": [values for values, _ in found],
        "token_ids": [ids for _, ids in found],
    }
