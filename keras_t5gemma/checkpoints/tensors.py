"""Tensors that are not read yet: a shape, a dtype, and `read()`.

Every reader gives a dict of our variable path to one of these, every writer and
loader takes such a dict. What a conversion or an adaptation does is therefore
written on tables of names, and at any time one tensor is in memory.
"""

import dataclasses
import math
import zlib
from pathlib import Path

import keras
import ml_dtypes
import numpy as np

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


@dataclasses.dataclass(frozen=True)
class FileTensor:
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
        size = math.prod(self.shape) * self.dtype.itemsize
        # JAX takes over a buffer that is aligned to 64 bytes, and copies others.
        buffer = np.empty(size + 64, "uint8")
        start = -buffer.ctypes.data % 64
        buffer = buffer[start : start + size]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(buffer), 0
            while done < size:  # One call reads 2 GB at the most.
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(
                        f"{self.file} ended while tensor {self.name!r} was read."
                    )
                done += count
        return buffer.view(self.dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a matrix of ours lies in somebody else's checkpoint.

    Our projections are `(in, out)`, heads next to each other. Theirs is ours with
    the axis `split` divided into `(heads, head size)`, and then transposed.

    Args:
        split: axis of ours, or `None`.
        permutation: of the axes after splitting, or `None`.
    """

    split: int | None = None
    permutation: tuple | None = None

    def split_shape(self, shape, head_dim):
        """Our shape with its heads apart."""
        if self.split is None:
            return tuple(shape)
        heads = (shape[self.split] // head_dim, head_dim)
        return (*shape[: self.split], *heads, *shape[self.split + 1 :])

    def their_shape(self, shape, head_dim):
        """The shape in their checkpoint of a tensor that has `shape` in ours."""
        shape = self.split_shape(shape, head_dim)
        return tuple(shape[i] for i in self.permutation) if self.permutation else shape

    def to_ours(self, array, shape):
        """Their array as ours, of `shape`; a view where possible."""
        if self.permutation:
            array = np.transpose(array, np.argsort(self.permutation))
        return array.reshape(shape)

    def to_theirs(self, array, head_dim):
        """Our array as theirs; a view where possible."""
        array = array.reshape(self.split_shape(array.shape, head_dim))
        return np.transpose(array, self.permutation) if self.permutation else array


RULES = {
    "same": Rule(),
    "transpose": Rule(permutation=(1, 0)),
    "heads_out": Rule(split=1),  # (D, N H) is their (D, N, H)
    "heads_in": Rule(split=0),  # (N H, D) is their (N, H, D)
    "heads_first": Rule(split=1, permutation=(1, 0, 2)),  # their (N, D, H)
}


@dataclasses.dataclass(frozen=True)
class FromTheirs:
    """A tensor of theirs in our layout."""

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


@dataclasses.dataclass(frozen=True)
class ToTheirs:
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


class VariableTensor:
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
        if keras.config.backend() == "torch":  # numpy has no bfloat16 of torch's.
            value = keras.ops.cast(value, "float32")
        array = keras.ops.convert_to_numpy(value)
        return np.asarray(array).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class FreshTensor:
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
class CastTensor:
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


@dataclasses.dataclass(frozen=True)
class FirstRows:
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
        source = self.source
        if isinstance(source, FromTheirs) and source.rule == RULES["same"]:
            source = source.source
        if isinstance(source, FileTensor):
            return dataclasses.replace(source, shape=self.shape).read()
        return source.read()[: self.rows]


def nbytes(tensor):
    """Size in bytes of a tensor that is not read yet."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def to_bytes(array):
    """The array's bytes in row order, as a flat uint8 view or copy."""
    return np.ascontiguousarray(array).reshape(-1).view("uint8")
