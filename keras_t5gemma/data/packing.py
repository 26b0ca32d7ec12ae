"""How pairs of unequal lengths fill batches of few shapes. Lengths in, numbers out."""

import numpy as np

_GRID = 32  # Candidate widths a side; twice as many pad no less on real data.
_OPEN = 256  # Rows that packing looks back at; all of them would save no more than 1 %.


def choose_widths(sources, targets, limits, count, multiple=8):
    """The width pairs that pad the least, each wide enough for the one before.

    Every pair of texts is padded to the first width pair that it fits. The widths are
    multiples of `multiple` among the lengths that occur; of those the choice is exact,
    by dynamic programming over chains of width pairs.

    Args:
        sources: int `(n,)`, encoder tokens of each pair.
        targets: int `(n,)`, decoder tokens of each pair.
        limits: the largest encoder and decoder width; no length is above.
        count: at most how many width pairs.
        multiple: what widths are rounded up to.

    Returns:
        A list of `(encoder width, decoder width)`, growing.
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
    chain = {last}
    for before in reversed(came_from):
        last = int(before[last])
        chain.add(last)
    chain = sorted(chain)
    new = np.diff(fits[chain], prepend=0) > 0  # A link that serves no pair is none.
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


def round_up(lengths, multiple, limit):
    """Lengths as widths: multiples, at least one of them, at most the limit."""
    up = -(-np.maximum(lengths, 1) // multiple) * multiple
    return np.minimum(up, limit)


def levels(sources, targets, widths):
    """The first of growing `widths` that each pair fits, int `(n,)`."""
    level = np.zeros(len(sources), "int64")
    for encoder, decoder in widths[:-1]:
        level += (sources > encoder) | (targets > decoder)
    return level


def first_fit(sources, targets, capacity):
    """Put pairs into rows, each into the first with room on both sides.

    Args:
        sources: int `(n,)`, encoder tokens of each pair.
        targets: int `(n,)`, decoder tokens of each pair.
        capacity: the encoder and decoder width of a row.

    Returns:
        int `(n,)`, the row of each pair; rows are numbered from 0 without a gap.
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


def batches_by_level(order, level, batch_size, count):
    """Full batches of rows of one level; what is left over goes one level up.

    Args:
        order: int `(n,)`, row numbers.
        level: int `(n,)`, the level of each row, by row number.
        batch_size: rows a batch.
        count: how many levels there are.

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


def in_batches(rows, batch_size):
    """Row numbers in the order given, the last batch filled with -1."""
    filled = np.full(-(-len(rows) // batch_size) * batch_size, -1, "int64")
    filled[: len(rows)] = rows
    return filled.reshape(-1, batch_size)
