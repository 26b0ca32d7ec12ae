"""Bucketing and packing: how pairs of unequal length fill batches of few shapes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from keras_t5gemma.utils import buckets

_GRID = 32  # Candidate widths per side; 64 did not reduce padding on real data.
_OPEN = 256  # Rows that packing tries to fill; trying all would save at most 1 %.


def choose_widths(
    sources: np.ndarray,
    targets: np.ndarray,
    limits: Sequence[int],
    count: int,
    multiple: int = 8,
) -> list[tuple[int, int]]:
    """Bucket widths that need the least padding.

    Every pair of texts is padded to the first width pair that it fits. Candidates are
    the lengths that occur, rounded up to `multiple`; among them the choice is optimal,
    by dynamic programming over increasing chains of width pairs.

    Args:
        sources: int `(n,)`, encoder tokens of each pair.
        targets: int `(n,)`, decoder tokens of each pair.
        limits: maximum encoder and decoder width; no length exceeds them.
        count: maximum number of width pairs.
        multiple: widths are multiples of this.

    Returns:
        A list of `(encoder width, decoder width)`, increasing.
    """
    lengths = (sources, targets)
    sides = [
        _candidates(side, limit, multiple)
        for side, limit in zip(lengths, limits, strict=True)
    ]
    # How many pairs fit each of the candidate width pairs.
    fits = np.zeros([len(side) for side in sides], "int64")
    places = tuple(map(np.searchsorted, sides, lengths))
    np.add.at(fits, places, 1)
    fits = fits.cumsum(0).cumsum(1).ravel()
    encoder, decoder = (grid.ravel() for grid in np.meshgrid(*sides, indexing="ij"))
    width = encoder + decoder
    follows = (encoder[:, None] <= encoder) & (decoder[:, None] <= decoder)

    # cost[b]: positions of all pairs that fit b, when b is the last of the chain.
    cost = fits * width
    more = np.where(follows, (fits - fits[:, None]) * width, np.inf)
    came_from = []
    for _ in range(count - 1):
        total = cost[:, None] + more
        came_from.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    last = len(width) - 1
    links = {last}
    for before in reversed(came_from):
        last = int(before[last])
        links.add(last)
    chain = sorted(links)
    new = np.diff(fits[chain], prepend=0) > 0  # Drop widths that no pair needs.
    return [
        (int(encoder[i]), int(decoder[i]))
        for i, serves in zip(chain, new, strict=True)
        if serves
    ]


def _candidates(lengths, limit, multiple):
    widths = np.unique(round_up(lengths, multiple, limit))
    if len(widths) > _GRID:
        quantiles = np.quantile(lengths, np.linspace(0, 1, _GRID), method="higher")
        widths = np.unique(round_up(quantiles, multiple, limit))
    return widths


def round_up(lengths: ArrayLike, multiple: int, limit: int) -> np.ndarray:
    """Widths for lengths: rounded up to a multiple, at most the limit."""
    up = buckets.round_up(np.maximum(lengths, 1), multiple)
    return np.minimum(up, limit)


def levels(
    sources: np.ndarray, targets: np.ndarray, widths: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Index of the first of increasing `widths` that each pair fits, int `(n,)`."""
    level = np.zeros(len(sources), "int64")
    for encoder, decoder in widths[:-1]:
        level += (sources > encoder) | (targets > decoder)
    return level


def first_fit(
    sources: np.ndarray, targets: np.ndarray, capacity: Sequence[int]
) -> np.ndarray:
    """Pack pairs into rows, each into the first row with room on both sides.

    Args:
        sources: int `(n,)`, encoder tokens of each pair.
        targets: int `(n,)`, decoder tokens of each pair.
        capacity: encoder and decoder width of a row.

    Returns:
        int `(n,)`, the row of each pair; rows are numbered from 0 without gaps.
    """
    room = np.tile(np.array(capacity, "int64"), (len(sources), 1))
    rows, count = np.zeros(len(sources), "int64"), 0
    for i, pair in enumerate(np.stack([sources, targets], axis=1)):
        start = max(0, count - _OPEN)
        fits = (room[start : count + 1] >= pair).all(axis=1)  # The last is fresh.
        rows[i] = start + fits.argmax()
        room[rows[i]] -= pair
        count = max(count, rows[i] + 1)
    return rows


def batches_by_level(
    order: np.ndarray, level: np.ndarray, batch_size: int, count: int
) -> np.ndarray:
    """Full batches of rows of one level; remaining rows move one level up.

    Args:
        order: int `(n,)`, row numbers.
        level: int `(n,)`, the level of each row, by row number.
        batch_size: rows per batch.
        count: number of levels.

    Returns:
        int `(batches, batch_size)`, row numbers; the last batch is filled with -1.
    """
    full, left = [], order[:0]
    for i in range(count):
        rows = np.concatenate([left, order[level[order] == i]])
        cut = len(rows) // batch_size * batch_size
        full.append(rows[:cut].reshape(-1, batch_size))
        left = rows[cut:]
    return np.concatenate([*full, in_batches(left, batch_size)])


def in_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Row numbers in their order, int `(batches, batch_size)`, filled up with -1."""
    filled = np.full(buckets.round_up(len(rows), batch_size), -1, "int64")
    filled[: len(rows)] = rows
    return filled.reshape(-1, batch_size)
