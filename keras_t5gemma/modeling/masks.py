"""Attention masks: pure boolean functions, True where a query attends to a key.

Drawn for W = 2, rows are queries, columns keys:

    causal        sliding causal    sliding two-sided
    1 0 0 0       1 0 0 0           1 1 0 0
    1 1 0 0       1 1 0 0           1 1 1 0
    1 1 1 0       0 1 1 0           0 1 1 1
    1 1 1 1       0 0 1 1           0 0 1 1
"""

import dataclasses

from keras import ops

from keras_t5gemma.utils.checks import whole_number
from keras_t5gemma.utils.types import Tensor


def padding_mask(mask: Tensor) -> Tensor:
    """Key mask of a batch: `(B, S)` of 0 / 1 -> boolean `(B, 1, S)`."""
    return ops.expand_dims(ops.cast(mask, "bool"), axis=1)


def segment_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Mask of keys in the query's segment: padding is never attended to.

    With padding masks of 0 and 1 every token sees every token. Rows of packed pairs
    hold segment ids: 0 is padding, k = 1, 2, ... the k-th pair of the row.

        queries 1 1 2 0, keys 1 2 2 0:   1 0 0 0
                                         1 0 0 0
                                         0 1 1 0
                                         0 0 0 0

    Args:
        queries: padding mask or segment ids `(B, T)`.
        keys: padding mask or segment ids `(B, S)`.

    Returns:
        Boolean `(B, T, S)`.
    """
    queries, keys = (ops.cast(mask, "int32") for mask in (queries, keys))
    same = queries[:, :, None] == keys[:, None, :]  # B T S
    return ops.logical_and(same, keys[:, None, :] > 0)


def causal_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """Causal mask: a decoder query attends to itself and earlier keys.

    Args:
        query_positions: int `(T,)`, or `(B, T)`.
        key_positions: int `(S,)`, or `(B, S)`; negative positions mark empty slots.
        window: `None`, or W to keep only `query - key < W`.

    Returns:
        Boolean `(T, S)`, or `(B, T, S)`.
    """
    keys = key_positions[..., None, :]
    distance = query_positions[..., None] - keys  # T S
    mask = ops.logical_and(distance >= 0, keys >= 0)
    if window is not None:
        mask = ops.logical_and(mask, distance < window)
    return mask


def two_sided_mask(positions: Tensor, window: int) -> Tensor:
    """Sliding-window mask of an encoder: `|query - key| < window`.

    Args:
        positions: int `(T,)`.
        window: W, in tokens.

    Returns:
        Boolean `(T, T)`.
    """
    return ops.abs(positions[:, None] - positions[None, :]) < window


@dataclasses.dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query attends to, without an array of queries x keys.

    Queries and keys are at positions 0, 1, 2, ... of their sequences. A query attends
    to the keys of its segment, see `segment_mask`, that pass the causal mask and the
    window. Segments may come in any order, and in several pieces, which attend to each
    other: every implementation computes the same function. In ascending order, as
    packing writes them, blocks that hold other segments are skipped.

    Args:
        queries: padding mask or segment ids `(B, T)`, 0 for padding.
        keys: padding mask or segment ids `(B, S)`.
        causal: whether a query attends to itself and earlier keys only.
        window: `None`, or W: `0 <= query - key < W` with `causal`, else
            `|query - key| < W`.

    Raises:
        ValueError: for a window below 1.
    """

    queries: Tensor
    keys: Tensor
    causal: bool = False
    window: int | None = None

    def __post_init__(self):
        if self.window is not None:
            whole_number(self.window, "window", 1)
        for name in ("queries", "keys"):
            object.__setattr__(self, name, ops.cast(getattr(self, name), "int32"))

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Largest `query - key` and `key - query` that are seen; `None`: no bound."""
        behind = None if self.window is None else self.window - 1
        return behind, 0 if self.causal else behind

    def mask(self) -> Tensor:
        """The boolean mask `(B, T, S)`, for short sequences."""
        mask = segment_mask(self.queries, self.keys)
        queries, keys = (ops.arange(ops.shape(x)[1]) for x in (self.queries, self.keys))
        if self.causal:
            mask = ops.logical_and(mask, causal_mask(queries, keys, self.window))
        elif self.window is not None:
            mask = ops.logical_and(mask, two_sided_mask(queries, self.window))
        return mask
