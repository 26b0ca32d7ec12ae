"""Tensors that are not read yet: a shape, a dtype, `read()` and `read_slice(index)`.

Every reader gives a dict of our variable path to one of these, every writer and
loader takes such a dict. What a conversion or an adaptation does is therefore
written on tables of names, and at any time one tensor is in memory. Where devices
share a model, each slice of a tensor is read where it is held, and nothing else.
"""

import dataclasses
import math
import zlib
from pathlib import Path

import keras
import ml_dtypes
import numpy as np

from keras_t5gemma.checkpoints.byte_ranges import bounds, runs
from keras_t5gemma.checkpoints.layout_transforms import Rule
from keras_t5gemma.distribution.shared_arrays import gathered

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float32", "bfloat16", "float16")
}


def parse_dtype(name, argument="dtype"):
    """The numpy dtype of a name.

    Raises:
        ValueError: naming the argument, for a dtype that is not stored.
    """
    if name not in DTYPES:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(DTYPES)}; got {name!r}."
        )
    return DTYPES[name]


class LazyTensor:
    """What all of them have in common."""

    def read_slice(self, index):
        """What `read()[index]` is.

        Args:
            index: tuple of slices, see `bounds`.
        """
        return self.read()[tuple(index)]


@dataclasses.dataclass(frozen=True)
class FileTensor(LazyTensor):
    """Contiguous bytes of a file, safetensors or HDF5 alike.

    Args:
        file: its path.
        name: the tensor's name in the file, for messages.
        dtype: numpy dtype of the stored values.
        shape: tuple.
        offset: first byte.
    """

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple
    offset: int

    def read(self):
        """The tensor, as an array of its own."""
        return self.read_slice(())

    def read_slice(self, index):
        """A part of it, as an array of its own; no other byte is read."""
        parts = bounds(index, self.shape)
        shape = tuple(high - low for low, high in parts)
        size = math.prod(shape) * self.dtype.itemsize
        # JAX takes over a buffer that is aligned to 64 bytes, and copies others.
        buffer = np.empty(size + 64, "uint8")
        start = -buffer.ctypes.data % 64
        buffer = buffer[start : start + size]
        places, length = runs(parts, self.shape)
        length *= self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as file:
            view = memoryview(buffer)
            for place in places if size else ():
                run, view = view[:length], view[length:]
                file.seek(self.offset + place * self.dtype.itemsize)
                read_into(file, run, self.name)
        return buffer.view(self.dtype).reshape(shape)


def read_into(file, view, name):
    """Fill a view from where an open file stands; `name` is for the message."""
    done = 0
    while done < len(view):  # One call reads 2 GB at the most.
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} ended while tensor {name!r} was read.")
        done += count


@dataclasses.dataclass(frozen=True)
class FromTheirs(LazyTensor):
    """A tensor of theirs in our layout.

    Args:
        source: theirs.
        rule: a `Rule`.
        shape: ours.
    """

    source: object
    rule: Rule
    shape: tuple

    @property
    def dtype(self):
        """Of the stored values."""
        return self.source.dtype

    def read(self):
        """The tensor, in our layout."""
        return self.rule.to_ours(self.source.read(), self.shape)

    def read_slice(self, index):
        """A part of it; of theirs the same part is read, in whole heads at the most."""
        parts, split = bounds(index, self.shape), self.rule.split
        shape = [high - low for low, high in parts]
        cut, rest = [slice(*part) for part in parts], ()
        order = self.rule.permutation or tuple(range(len(self.source.shape)))
        if split is not None:
            low, high = parts[split]
            size = self.source.shape[order.index(split + 1)]
            first, last = low // size, -(-high // size)
            low, high = low - first * size, high - first * size
            inside = slice(low, high) if last - first == 1 else slice(size)
            cut[split : split + 1] = slice(first, last), inside
            if last - first > 1:
                shape[split] = (last - first) * size
                rest = (*[slice(None)] * split, slice(low, high))
        array = self.source.read_slice(tuple(cut[axis] for axis in order))
        return self.rule.to_ours(array, shape)[rest]


@dataclasses.dataclass(frozen=True)
class ToTheirs(LazyTensor):
    """A tensor of ours in their layout."""

    source: object
    rule: Rule
    head_dim: int

    @property
    def shape(self):
        """In their layout."""
        return self.rule.their_shape(self.source.shape, self.head_dim)

    @property
    def dtype(self):
        """Of the source."""
        return self.source.dtype

    def read(self):
        """The tensor, in their layout."""
        return self.rule.to_theirs(self.source.read(), self.head_dim)


class VariableTensor(LazyTensor):
    """The value of a variable of a live model.

    Args:
        value: `() -> tensor` of the backend.
        shape: tuple.
        dtype: name of the dtype.
    """

    def __init__(self, value, shape, dtype):
        self.value, self.shape, self.dtype = value, tuple(shape), DTYPES[dtype]

    def read(self):
        """The value, copied to the host."""
        value = self.value()
        if keras.config.backend() == "jax":
            value = gathered(value)
        if keras.config.backend() == "torch":  # numpy has no bfloat16 of torch's.
            value = keras.ops.cast(value, "float32")
        array = keras.ops.convert_to_numpy(value)
        return np.asarray(array).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class FreshTensor(LazyTensor):
    """Random or zero values that depend on the path and the seed alone.

    Args:
        path: the variable's, so that no two draw the same numbers.
        shape: tuple.
        dtype: numpy dtype.
        std: standard deviation of the normal distribution; 0 gives zeros.
        seed: int.
    """

    path: str
    shape: tuple
    dtype: np.dtype
    std: float
    seed: int

    def read(self):
        """The same values at every call."""
        if not self.std:
            return np.zeros(self.shape, self.dtype)
        rng = np.random.default_rng([self.seed, zlib.crc32(self.path.encode())])
        values = rng.standard_normal(self.shape, dtype="float32") * np.float32(self.std)
        return values.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class CastTensor(LazyTensor):
    """A tensor in another dtype."""

    source: object
    dtype: np.dtype

    @property
    def shape(self):
        """Of the source."""
        return self.source.shape

    def read(self):
        """The values, rounded to the dtype."""
        return self.source.read().astype(self.dtype, copy=False)

    def read_slice(self, index):
        """A part of them."""
        return self.source.read_slice(index).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class FirstRows(LazyTensor):
    """The first rows of a matrix; of a file, only they are read."""

    source: object
    rows: int

    @property
    def shape(self):
        """With at most `rows` rows."""
        shape = self.source.shape
        return (min(self.rows, shape[0]), *shape[1:])

    @property
    def dtype(self):
        """Of the source."""
        return self.source.dtype

    def read(self):
        """The rows."""
        return self.read_slice(())

    def read_slice(self, index):
        """A part of them."""
        parts = bounds(index, self.shape)
        return self.source.read_slice(tuple(slice(*part) for part in parts))


def nbytes(tensor):
    """Size in bytes of a tensor that is not read yet."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def to_bytes(array):
    """The array's bytes in row order, as a flat uint8 view or copy."""
    return np.ascontiguousarray(array).reshape(-1).view("uint8")
