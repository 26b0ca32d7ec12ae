"""Attention masks: pure boolean functions, True where a key may be seen.

Drawn for W = 2, rows are queries, columns keys:

    causal        sliding causal    sliding two-sided
    1 0 0 0       1 0 0 0           1 1 0 0
    1 1 0 0       1 1 0 0           1 1 1 0
    1 1 1 0       0 1 1 0           0 1 1 1
    1 1 1 1       0 0 1 1           0 0 1 1
"""

from keras import ops


def padding_mask(mask):
    """Key mask of a batch: `(B, S)` of 0 / 1 -> boolean `(B, 1, S)`."""
    return ops.expand_dims(ops.cast(mask, "bool"), axis=1)


def causal_mask(query_positions, key_positions, window=None):
    """What a decoder query may see: itself and earlier keys.

    Args:
        query_positions: int `(T,)`.
        key_positions: int `(S,)`; a negative one is nobody's.
        window: `None`, or W to keep only `query - key < W`.

    Returns:
        Boolean `(T, S)`.
    """
    distance = query_positions[:, None] - key_positions[None, :]  # T S
    mask = ops.logical_and(distance >= 0, key_positions[None, :] >= 0)
    if window is not None:
        mask = ops.logical_and(mask, distance < window)
    return mask


def two_sided_mask(positions, window):
    """What a local encoder query may see: `|query - key| < window`.

    Args:
        positions: int `(T,)`.
        window: W, in tokens.

    Returns:
        Boolean `(T, T)`.
    """
    return ops.abs(positions[:, None] - positions[None, :]) < window
