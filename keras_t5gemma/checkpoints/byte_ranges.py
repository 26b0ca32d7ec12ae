"""Parts of tensors: where they lie, and how to read no more than them."""

import functools
import math

import numpy as np


def bounds(index, shape):
    """The first and the last position (not included) of a slice, axis by axis.

    Args:
        index: tuple of slices without a step, one an axis; fewer leave the last
            axes whole.
        shape: of the tensor that is sliced.
    """
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def runs(parts, shape):
    """Where a slice lies in an array in row order: `(places, length)` of its runs.

    Args:
        parts: `bounds` of the slice.
        shape: of the array.

    Returns:
        The first value of each run, growing, and how many values each has.
    """
    cut = [high - low < size for (low, high), size in zip(parts, shape, strict=True)]
    last = max(np.flatnonzero(cut), default=0)  # The axes behind it are whole.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    steps = [np.arange(*parts[axis]) * strides[axis] for axis in range(last)]
    places = functools.reduce(np.add.outer, steps, np.int64(0))
    if not shape:
        return [0], 1
    low, high = parts[last]
    places = np.ravel(places) + low * strides[last]
    return places.tolist(), (high - low) * strides[last]
