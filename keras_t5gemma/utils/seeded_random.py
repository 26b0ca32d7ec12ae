"""Vectorized random numbers from many seeds."""

from typing import Any

import numpy as np

from keras_t5gemma.utils.ragged import Ragged


def draws(seeds: Any, counts: Any, stream: int) -> np.ndarray:
    """Uniform float32 numbers in [0, 1) from each of many seeds, concatenated.

    Uses SplitMix64 (doi 10.1145/2714064.2660195), which computes any number of a
    sequence independently; a NumPy generator for every seed would be much slower.

    Args:
        seeds: ints `(seeds,)`.
        counts: how many numbers each seed gives, int or `(seeds,)`.
        stream: number of an independent sequence of the same seeds.
    """
    seeds = np.asarray(seeds, "uint64")
    wanted = Ragged(np.broadcast_to(counts, len(seeds)), None)
    row = wanted.row_numbers()
    index = (np.arange(len(row)) - wanted.starts[row]).astype("uint64")
    start = _mix(_mix(seeds) + np.uint64(stream))
    bits = _mix(start[row] + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype("float32") / np.float32(2**24)


def _mix(bits):
    """SplitMix64's mixing function: each input bit flips about half of the output."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
