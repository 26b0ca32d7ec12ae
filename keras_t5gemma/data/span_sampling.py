"""Random spans of texts for the objectives, vectorized over the rows of a batch."""

import numpy as np
from numpy.typing import ArrayLike

from keras_t5gemma.utils.ragged import Ragged


def compose(
    totals: np.ndarray, parts: np.ndarray, draws: Ragged, skip: ArrayLike = 0
) -> Ragged:
    """Random compositions: totals as sums of positive parts, all equally likely.

    Args:
        totals: int `(rows,)`.
        parts: int `(rows,)`, number of parts, at least 1, at most the total.
        draws: a `Ragged` of uniform numbers, of which each row uses `total - 1`.
        skip: int, or `(rows,)`: how many numbers of a row of `draws` to skip.

    Returns:
        A `Ragged` of `parts` numbers a row.
    """
    places = Ragged(totals - 1, None)  # Where a row could be cut.
    row = places.row_numbers()
    inside = np.arange(len(row)) - places.starts[row]
    keys = draws.values[(draws.starts + skip)[row] + inside]
    order = np.argsort(row + keys.astype("float64"))
    cut = np.zeros(len(row), bool)
    cut[order[inside < (parts - 1)[row]]] = True  # The lowest numbers of each row.
    ends = np.zeros(parts.sum(), "int64")
    last = np.cumsum(parts) - 1
    is_last = np.zeros(len(ends), bool)
    is_last[last] = True
    ends[last] = totals
    ends[~is_last] = inside[cut] + 1
    before = np.concatenate([[0], ends[:-1]])
    before[last - parts + 1] = 0
    return Ragged(parts, ends - before)


def gaps(
    left: np.ndarray,
    spans: np.ndarray,
    draws: Ragged,
    skip: ArrayLike,
    at_end: np.ndarray,
) -> Ragged:
    """Tokens before, between and after the spans; first and last may be 0.

    Args:
        left: int `(rows,)`, tokens outside the spans.
        spans: int `(rows,)`, number of spans.
        draws: as in `compose`.
        skip: as in `compose`.
        at_end: bool `(rows,)`, rows whose only span is at the end.

    Returns:
        A `Ragged` of `spans + 1` numbers per row.
    """
    gap = compose(left + 2, spans + 1, draws, skip)
    first, last = gap.starts, gap.ends - 1
    gap.values[first] -= 1
    gap.values[last] -= 1
    gap.values[first[at_end]] = left[at_end]
    gap.values[last[at_end]] = 0
    return gap


def lay_out(gap: Ragged, span: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Interleave gaps and spans.

    Returns:
        Whether each token is in a span, bool, and the first token of each span, int.
    """
    sizes = np.zeros(len(gap.values) + len(span.values), "int64")
    is_span = np.zeros(len(sizes), bool)
    is_span[2 * np.arange(len(span.values)) + 1 + span.row_numbers()] = True
    sizes[is_span], sizes[~is_span] = span.values, gap.values
    return np.repeat(is_span, sizes), (np.cumsum(sizes) - sizes)[is_span]
