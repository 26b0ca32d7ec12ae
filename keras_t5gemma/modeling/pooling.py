"""One vector of the states of a text. B batch, T length, D width."""

from keras import ops

POOLINGS = ("mean", "last", "first", "weighted")


def pool(states, padding, pooling):
    """Float32 `(B, D)` of states `(B, T, D)`, whatever they were padded with.

    Args:
        states: `(B, T, D)`, in any float dtype.
        padding: `(B, T)`, 0 for padding, which is on the right. A row of padding alone
            gives zeros.
        pooling: `"mean"` of the tokens; `"last"` real token, as the paper's
            classifiers; `"first"`; or `"weighted"`, the mean where token i of n
            weighs i (arXiv 2202.08904).
    """
    keep = ops.cast(padding > 0, "float32")  # B T
    if pooling in ("last", "first"):
        number = ops.cumsum(keep, axis=1)
        last = ops.sum(keep, axis=1, keepdims=True)
        chosen = last if pooling == "last" else ops.ones_like(last)
        weights = keep * ops.cast(ops.equal(number, chosen), "float32")
    else:
        weights = keep if pooling == "mean" else ops.cumsum(keep, axis=1) * keep
        weights /= ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1.0)
    return ops.einsum("bt,btd->bd", weights, ops.cast(states, "float32"))


def unit_length(vectors):
    """Vectors of length 1; zeros stay zeros, with a gradient that is a number."""
    squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squares, 1e-24))
