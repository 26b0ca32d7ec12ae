"""Lazily loaded tensors: a shape, a dtype, `read()`, `read_slice(index)`, `blocks()`.

Every reader returns a dict of our variable path to lazy tensor, every writer and
loader takes such a dict. Conversion and adaptation therefore work on tables of names,
with one tensor in memory at a time. Where devices share a model, each reads only the
slices that it holds.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import keras
import ml_dtypes
import numpy as np

from keras_t5gemma.checkpoints.byte_ranges import bounds, byte_runs
from keras_t5gemma.checkpoints.layout_transforms import LayoutTransform
from keras_t5gemma.distribution.shared_arrays import gathered
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.files import open_regular
from keras_t5gemma.utils.types import Tensor

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float32", "bfloat16", "float16")
}


_BLOCK_BYTES = 2**21  # Of a file, read at a time; quantizing takes six times that.


def parse_dtype(name: str, argument: str = "dtype") -> np.dtype:
    """NumPy dtype of a name, one of `DTYPES`.

    Raises:
        ValueError: naming the argument, for a dtype that weights are not stored in.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(DTYPES)}; got {shown(name)}."
        )
    return DTYPES[name]


def parse_policy(value: Any, argument: str = "dtype") -> keras.DTypePolicy:
    """Keras dtype policy of float weights, from a policy, its name, or its dict.

    Raises:
        ValueError: naming the argument, for anything else.
    """
    try:
        policy = keras.dtype_policies.get(value)
    except Exception:  # Keras raises many kinds for a damaged dict.
        policy = None
    is_plain = type(policy) is keras.DTypePolicy
    if not isinstance(policy, keras.DTypePolicy) or (
        is_plain and "float" not in policy.variable_dtype
    ):
        raise ValueError(
            f"`{argument}` must be a dtype policy of floats or its name, e.g. "
            f"'bfloat16' or 'mixed_bfloat16'; got {shown(value)}."
        )
    return policy


class LazyTensor:
    """Base class: a tensor whose values are read when they are needed."""

    shape: Any  # Tuple of ints.
    dtype: Any  # NumPy dtype.

    def read(self) -> np.ndarray:
        """The values."""
        raise NotImplementedError

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """`read()[index]`, reading no more than needed where possible.

        Args:
            index: tuple of slices, see `bounds`.
        """
        return self.read()[tuple(index)]

    def blocks(self) -> Iterator[np.ndarray]:
        """`read()` in consecutive parts along the first axis.

        Each is small where the file has its rows one after another; otherwise there is
        one, the whole. Take all of them: damage may be found after the last.
        """
        yield self.read()


class Check(Protocol):
    """Checks values of a tensor that were read; raises if they are damaged."""

    def __call__(self, array: np.ndarray) -> None:
        """Check the whole tensor, or a part."""

    def blocks(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same arrays, which make up the whole tensor, checked together."""


@dataclasses.dataclass(frozen=True)
class FileTensor(LazyTensor):
    """Contiguous bytes of a file, safetensors or HDF5 alike.

    Args:
        file: its path.
        name: the tensor's name in the file, for messages.
        dtype: NumPy dtype of the stored values.
        shape: tuple.
        offset: first byte.
        check: `Check` of every part that is read.
    """

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple
    offset: int
    check: Check | None = dataclasses.field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, as a new array."""
        return self.read_slice(())

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice, as a new array; no other byte is read."""
        array = self._read(index)
        if self.check is not None:
            self.check(array)
        return array

    def blocks(self) -> Iterator[np.ndarray]:
        """`read()` in parts of about 2 MiB."""
        if not self.nbytes or self.nbytes <= _BLOCK_BYTES:
            yield self.read()
            return
        rows = self.shape[0]
        step = max(1, rows * _BLOCK_BYTES // self.nbytes)
        arrays = (self._read((slice(i, i + step),)) for i in range(0, rows, step))
        yield from arrays if self.check is None else self.check.blocks(arrays)

    def _read(self, index):
        parts = bounds(index, self.shape)
        shape = tuple(high - low for low, high in parts)
        size = math.prod(shape) * self.dtype.itemsize
        buffer = aligned_empty((size,), np.dtype("uint8"))
        starts, length = byte_runs(parts, self.shape, self.dtype.itemsize)
        with open_regular(self.file, buffering=0) as file:
            view = memoryview(buffer.data)
            for first in starts if size else ():
                run, view = view[:length], view[length:]
                file.seek(self.offset + first)
                read_into(file, run, self.name)
        return buffer.view(self.dtype).reshape(shape)


def read_into(file: BinaryIO, view: memoryview, name: str) -> None:
    """Fill a view from the current position of an open file.

    Raises:
        ValueError: if the file ends before; `name` is the tensor in the message.
    """
    done = 0
    while done < len(view):  # One call reads at most 2 GB.
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{file.name} ended while tensor {name!r} was read.")
        done += count


@dataclasses.dataclass(frozen=True)
class ImportedTensor(LazyTensor):
    """A tensor of another format, in our layout.

    Args:
        source: the tensor in the layout of its file.
        transform: layout transform between the two.
        shape: in our layout.
    """

    source: LazyTensor
    transform: LayoutTransform
    shape: tuple

    @property
    def dtype(self) -> np.dtype:
        """Of the stored values."""
        return self.source.dtype

    def read(self) -> np.ndarray:
        """The values, in our layout."""
        return self.transform.from_file(self.source.read(), self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """`read()` in the parts of the file, or whole if its axes are permuted."""
        if self.transform.permutation:
            yield self.read()
            return
        for block in self.source.blocks():
            yield block.reshape(-1, *self.shape[1:])

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice; of the file the same slice is read, rounded out to whole heads."""
        parts, split = bounds(index, self.shape), self.transform.split
        shape = tuple(high - low for low, high in parts)
        cut = [slice(*part) for part in parts]
        rest: tuple[slice, ...] = ()
        order = self.transform.permutation or tuple(range(len(self.source.shape)))
        if split is not None:
            low, high = parts[split]
            size = self.source.shape[order.index(split + 1)]
            first, last = low // size, -(-high // size)
            low, high = low - first * size, high - first * size
            inside = slice(low, high) if last - first == 1 else slice(size)
            cut[split : split + 1] = slice(first, last), inside
            if last - first > 1:
                shape = (*shape[:split], (last - first) * size, *shape[split + 1 :])
                rest = (*[slice(None)] * split, slice(low, high))
        array = self.source.read_slice(tuple(cut[axis] for axis in order))
        return self.transform.from_file(array, shape)[rest]


@dataclasses.dataclass(frozen=True)
class ExportedTensor(LazyTensor):
    """A tensor in our layout, in the layout of another format.

    Args:
        source: the tensor in our layout.
        transform: layout transform between the two.
        head_dim: head size of the tower.
    """

    source: LazyTensor
    transform: LayoutTransform
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """In the layout of the file."""
        return self.transform.file_shape(self.source.shape, self.head_dim)

    @property
    def dtype(self) -> np.dtype:
        """Data type of the source tensor."""
        return self.source.dtype

    def read(self) -> np.ndarray:
        """The values, in the layout of the file."""
        return self.transform.to_file(self.source.read(), self.head_dim)


class VariableTensor(LazyTensor):
    """The value of a variable of a live model.

    Args:
        value: function that returns the tensor of the backend.
        shape: tuple.
        dtype: name of the dtype.
    """

    def __init__(self, value: Callable[[], Tensor], shape: Any, dtype: str):
        self.value, self.shape, self.dtype = value, tuple(shape), DTYPES[dtype]

    def read(self) -> np.ndarray:
        """The value, copied to the host."""
        value = self.value()
        if keras.config.backend() == "jax":
            value = gathered(value)
        if keras.config.backend() == "torch":  # It has no bfloat16 for NumPy.
            value = keras.ops.cast(value, "float32")
        array = keras.ops.convert_to_numpy(value)
        return np.asarray(array).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class FreshTensor(LazyTensor):
    """Initial values, random or zero, that depend only on the path and the seed.

    Args:
        path: of the variable, so that no two variables get the same numbers.
        shape: tuple.
        dtype: NumPy dtype.
        std: standard deviation of the normal distribution; 0 gives zeros.
        seed: int.
    """

    path: str
    shape: tuple
    dtype: np.dtype
    std: float
    seed: int

    def read(self) -> np.ndarray:
        """The values, the same at every call."""
        if not self.std:
            return np.zeros(self.shape, self.dtype)
        rng = np.random.default_rng([self.seed, zlib.crc32(self.path.encode())])
        values = rng.standard_normal(self.shape, dtype="float32") * np.float32(self.std)
        return values.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class CastTensor(LazyTensor):
    """A tensor in another dtype."""

    source: LazyTensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source tensor."""
        return self.source.shape

    def read(self) -> np.ndarray:
        """The values, rounded to the dtype."""
        return self.source.read().astype(self.dtype, copy=False)

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice, rounded to the dtype."""
        return self.source.read_slice(index).astype(self.dtype, copy=False)

    def blocks(self) -> Iterator[np.ndarray]:
        """The parts of the source tensor, rounded to the dtype."""
        for block in self.source.blocks():
            yield block.astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class FirstRows(LazyTensor):
    """The first rows of a matrix; no others are read."""

    source: LazyTensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """With at most `rows` rows."""
        shape = self.source.shape
        return (min(self.rows, shape[0]), *shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Data type of the source tensor."""
        return self.source.dtype

    def read(self) -> np.ndarray:
        """The rows."""
        return self.read_slice(())

    def read_slice(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the rows."""
        parts = bounds(index, self.shape)
        return self.source.read_slice(tuple(slice(*part) for part in parts))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array without values, aligned to 64 bytes: JAX does not copy such ones."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, "uint8")
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def read_as(tensor: LazyTensor, dtype: np.dtype) -> np.ndarray:
    """Values in another dtype; of the stored one only a block is in memory at a time.

    A tensor whose axes are permuted in its file is one block.
    """
    if tensor.dtype == dtype or not tensor.shape:
        return tensor.read().astype(dtype, copy=False)
    result = aligned_empty(tuple(tensor.shape), dtype)
    row = 0
    with np.errstate(over="ignore"):  # Infinite in float16, as every backend rounds.
        for block in tensor.blocks():
            result[row : row + len(block)] = block
            row += len(block)
    return result


def nbytes(tensor: LazyTensor) -> int:
    """Size in bytes of a lazily loaded tensor."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def to_bytes(array: np.ndarray) -> np.ndarray:
    """Bytes of an array in row-major order, as a flat uint8 view or copy."""
    return np.ascontiguousarray(array).reshape(-1).view("uint8")
