"""Byte ranges for partial tensor reads."""

import math
from collections.abc import Sequence

import numpy as np

Bounds = list[tuple[int, int]]


def bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    """`(first, end)` of a slice on every axis.

    Args:
        index: slices without a step, one for each axis; missing ones select the
            whole of the last axes.
        shape: of the tensor that is sliced.
    """
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    parts = zip(index, shape, strict=True)
    return [(*part.indices(size)[:2],) for part, size in parts]


def byte_runs(
    parts: Bounds, shape: Sequence[int], itemsize: int
) -> tuple[list[int], int]:
    """Contiguous runs of bytes that hold a slice of an array in row-major order.

    Args:
        parts: `bounds` of the slice.
        shape: of the array.
        itemsize: bytes of an element.

    Returns:
        `(starts, length)`: the first byte of each run, ascending, and the number of
        bytes that every run has.
    """
    if not shape:
        return [0], itemsize
    cut = [high - low < size for (low, high), size in zip(parts, shape, strict=True)]
    last = max(np.flatnonzero(cut), default=0)  # The axes after it are whole.
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    low, high = parts[last]
    starts = np.array([low * strides[last]])
    for axis in range(last - 1, -1, -1):
        steps = np.arange(*parts[axis]) * strides[axis]
        starts = np.add.outer(steps, starts).ravel()
    return starts.tolist(), (high - low) * strides[last]
