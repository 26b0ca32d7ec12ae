"""Ragged arrays: rows of unequal length in one array."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Ragged:
    """Rows of ints of unequal length, concatenated in `values`.

    Args:
        lengths: int `(rows,)`.
        values: ints `(sum of the lengths,)`.
    """

    def __init__(self, lengths: np.ndarray, values: Any):
        self.lengths = lengths
        self.values = values
        self.ends = np.cumsum(lengths)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """From lists of ids, as int32."""
        lengths = np.array([len(row) for row in rows], "int64")
        values = itertools.chain.from_iterable(rows)
        return cls(lengths, np.fromiter(values, "int32", lengths.sum()))

    @classmethod
    def concatenate(cls, parts: Iterable["Ragged"]) -> "Ragged":
        """The rows of several ragged arrays."""
        parts = list(parts)
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(lengths, np.concatenate([part.values for part in parts]))

    @property
    def starts(self) -> np.ndarray:
        """Index of the first value of each row, int `(rows,)`."""
        return self.ends - self.lengths

    def row_numbers(self) -> np.ndarray:
        """Row of every value, int `(values,)`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: Any) -> "Ragged":
        """Some of the rows, by index, mask or slice."""
        lengths, starts = self.lengths[rows], self.starts[rows]
        part = Ragged(lengths, None)
        inside = np.arange(lengths.sum()) - np.repeat(part.starts, lengths)
        part.values = self.values[np.repeat(starts, lengths) + inside]
        return part

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.values[self.ends[i] - self.lengths[i] : self.ends[i]]
