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


def segment_mask(queries, keys):
    """Who may see whom by the padding masks alone: the same segment, never padding.

    With masks of 0 and 1 every token sees every token. Rows of packed pairs number
    their pairs: 0 is padding, k = 1, 2, ... the k-th pair of the row.

        queries 1 1 2 0, keys 1 2 2 0:   1 0 0 0
                                         1 0 0 0
                                         0 1 1 0
                                         0 0 0 0

    Args:
        queries: `(B, T)`.
        keys: `(B, S)`.

    Returns:
        Boolean `(B, T, S)`.
    """
    queries, keys = (ops.cast(mask, "int32") for mask in (queries, keys))
    same = queries[:, :, None] == keys[:, None, :]  # B T S
    return ops.logical_and(same, keys[:, None, :] > 0)


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
