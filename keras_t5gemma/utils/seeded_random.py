"""Random numbers of many seeds at once."""

import numpy as np

from keras_t5gemma.utils.ragged import Ragged


def draws(seeds, counts, stream):
    """Uniform float32 in [0, 1), so many of each seed, one after the other.

    By SplitMix64 (doi 10.1145/2714064.2660195), where any number of a sequence can be
    had at once: a generator of NumPy's for every row takes longer than all the rest.
    """
    seeds = np.asarray(seeds, "uint64")
    wanted = Ragged(np.broadcast_to(counts, len(seeds)), None)
    row = wanted.row_numbers()
    index = (np.arange(len(row)) - wanted.starts[row]).astype("uint64")
    start = _mix(_mix(seeds) + np.uint64(stream))
    bits = _mix(start[row] + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype("float32") / np.float32(2**24)


def _mix(bits):
    """Every bit of uint64 `bits` changes about half of those of the result."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
