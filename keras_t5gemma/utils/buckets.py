"""Rounding of lengths, rows and chunks, so that few programs are compiled.

A compiled program serves one set of array shapes. Rounding lengths up to a few steps,
and cutting the vocabulary into equal chunks, keeps the number of shapes small.
"""

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

Lengths = TypeVar("Lengths", int, np.ndarray)

# Logits that are computed at a time: those that a CPU's cache holds (4 MiB of float32),
# or that keep an accelerator busy.
LOGITS_ON_CPU, LOGITS_ON_ACCELERATOR = 2**20, 2**24

# Tokens up to which `batch_size` alone bounds a batch. Longer texts have separate
# batches, of at most `batch_size` times this number of tokens.
SHORT = 512


def ceil_div(length: Lengths, size: int) -> Lengths:
    """How many pieces of a size a length needs."""
    return -(-length // size)


def round_up(length: Lengths, multiple: int) -> Lengths:
    """A length, or an array of them, rounded up to a multiple."""
    return ceil_div(length, multiple) * multiple


def power_of_two(count: int) -> int:
    """A count rounded up to a power of two; 0 stays 0."""
    return 1 << (int(count) - 1).bit_length() if count else 0


def bucket(length: int, halves_from: int = 64) -> int:
    """A length rounded up to a step of a ladder: powers of two from 16, and halfway.

    >>> [bucket(n) for n in (1, 17, 65, 97, 129, 257, 385)]
    [16, 32, 96, 128, 192, 384, 512]
    >>> [bucket(n, halves_from=16) for n in (1, 17, 25, 33, 49, 65)]
    [16, 24, 32, 48, 64, 96]

    Args:
        length: int, at least 0.
        halves_from: the power of two from which on the ladder has a step halfway to
            the next one. More steps pad less and compile more programs.
    """
    step = max(16, power_of_two(length))
    half = step * 3 // 4
    return half if half >= length and step >= 2 * halves_from else step


def rows_of_length(length: int, batch_size: int, multiple: int = 1) -> int:
    """Maximum number of rows of a length in a batch that is bounded in tokens too.

    >>> [rows_of_length(n, batch_size=32) for n in (512, 513, 2048, 8192)]
    [32, 16, 8, 2]

    Args:
        length: tokens of the longest row.
        batch_size: maximum number of rows, reached up to a length of `SHORT`.
        multiple: round the rows of longer texts up to a multiple.
    """
    if length <= SHORT:
        return batch_size
    rows = max(1, batch_size * SHORT // bucket(length))
    return min(batch_size, round_up(1 << (rows.bit_length() - 1), multiple))


def batch_bounds(
    lengths: np.ndarray, batch_size: int, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Cut rows into batches that are bounded in rows and in tokens.

    Rows up to `SHORT` tokens never share a batch with longer ones, and of those only
    rows above half of its width do.

    >>> list(batch_bounds(np.array([5000, 4500, 700, 30, 20, 10]), batch_size=32))
    [(0, 2), (2, 3), (3, 6)]

    Args:
        lengths: int `(rows,)`; those above `SHORT` come first, in descending order.
        batch_size: maximum number of rows in a batch.
        multiple: see `rows_of_length`.

    Yields:
        `(start, stop)`.
    """
    start = 0
    while start < len(lengths):
        longest = int(lengths[start])
        stop = min(len(lengths), start + rows_of_length(longest, batch_size, multiple))
        if longest > SHORT:
            alike = lengths[start:stop] > max(SHORT, bucket(longest) // 2)
            stop = start + int(np.count_nonzero(alike))
        yield start, stop
        start = stop


def equal_chunks(size: int, wanted: int) -> int:
    """Into how many equal chunks to cut `size`, at most `wanted`, a power of two."""
    return math.gcd(size, wanted)


def vocabulary_chunks(size: int, tokens: int, at_once: int, pieces: int = 1) -> int:
    """Into how many equal chunks to cut the vocabulary for the logits of some tokens.

    Args:
        size: rows of the logit table on one device.
        tokens: number of tokens on one device.
        at_once: maximum number of logits of a chunk, where the size can be divided.
        pieces: over how many devices the width of the table is split. A chunk of such
            a table is gathered; more chunks than pieces never gather all of it.
    """
    wanted = power_of_two(max(1, ceil_div(tokens * size, at_once)))
    return equal_chunks(size, max(wanted, power_of_two(pieces)))
