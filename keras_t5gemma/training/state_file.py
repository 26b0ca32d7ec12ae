"""Sharded training state in HDF5 files: each process writes its devices' shards.

A file has a group for every variable, with its path and shape, and in it the shards
that this process is the first to hold, each with its start. All files together have
every value once; they can be read on any mesh.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import h5py
import keras
import numpy as np

from keras_t5gemma.checkpoints import h5_file
from keras_t5gemma.checkpoints.byte_ranges import bounds
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.shared_arrays import is_shared
from keras_t5gemma.modeling.deferred_init import read_onto_devices


def names() -> list[str]:
    """File names of all processes, in their order."""
    count = process_group.process_count()
    if count == 1:
        return ["state.h5"]
    return [f"state-{i:05}-of-{count:05}.h5" for i in range(count)]


def write(group: h5py.Group, variables: Iterable[keras.Variable]) -> None:
    """Write this process's shards of variables into a group of an HDF5 file."""
    for i, variable in enumerate(variables):
        item = group.create_group(str(i))
        item.attrs["path"] = _path(variable)
        item.attrs["shape"] = np.array(variable.shape, "int64")
        for number, (start, value) in enumerate(_held(variable)):
            array = np.asarray(keras.ops.convert_to_numpy(value))
            if array.dtype.name == "bfloat16":  # HDF5 has none; this is exact.
                array = array.astype("float32")
            h5_file.add_array(item, str(number), array, start=np.array(start, "int64"))


def _held(variable):
    """`(start, value)` of every shard that this process writes."""
    if not is_shared(variable):
        # Every process has a copy.
        if process_group.process_index() == 0:
            yield (0,) * len(variable.shape), variable.value
        return
    for shard in variable.value.addressable_shards:
        if shard.replica_id == 0:
            parts = bounds(shard.index, variable.shape)
            # A copy, because JAX caches the host's array with the shard.
            yield [low for low, _ in parts], shard.data.copy()


@dataclasses.dataclass(frozen=True)
class _Slices(LazyTensor):
    """A variable in the files, lazily loaded.

    Args:
        shape: tuple.
        pieces: `[(start, dataset)]`, one per shard.
        name: of the variable. Shards that are read whole are verified.
    """

    name: str
    shape: tuple
    pieces: list

    def read(self):
        """Read all of it."""
        return self.read_slice(())

    def read_slice(self, index):
        """Read a part of it, from the shards that overlap it."""
        wanted = bounds(index, self.shape)
        result = None
        for start, dataset in self.pieces:
            if result is None:
                result = np.empty([high - low for low, high in wanted], dataset.dtype)
            ends = np.add(start, dataset.shape)
            there, here = [], []
            for (low, high), first, end in zip(wanted, start, ends, strict=True):
                begin, stop = max(low, first), max(low, first, min(high, end))
                there.append(slice(begin - first, stop - first))
                here.append(slice(begin - low, stop - low))
            if result[tuple(here)].size:
                part = dataset[tuple(there)]
                if part.shape == dataset.shape:
                    h5_file.check_array(dataset, part, self.name)
                result[tuple(here)] = part
        return result


def restore(
    folder: Any,
    files: Sequence[h5py.File],
    name: str,
    variables: Sequence[keras.Variable],
) -> None:
    """Assign the values in the files to variables; each device reads its shards.

    Args:
        folder: for messages.
        files: the open HDF5 files of all processes.
        name: of the group.
        variables: the variables that were written, in the same order.

    Raises:
        ValueError: for the variables of another model.
    """
    saved = _read(files, name)
    there = [(path, tensor.shape) for path, tensor in saved]
    here = [(_path(v), tuple(v.shape)) for v in variables]
    if there != here:
        other = [p for p, _ in set(there) ^ set(here)][:3]
        raise ValueError(
            f"{folder} is the backup of another model or optimizer: {other} differ. "
            "Remove the folder to start over."
        )
    for variable, (_, tensor) in zip(variables, saved, strict=True):
        if is_shared(variable):
            value = variable.value
            variable.assign(read_onto_devices(tensor, value.sharding, value.dtype))
        else:
            variable.assign(tensor.read())


def read_values(files: Sequence[h5py.File], name: str) -> list[np.ndarray]:
    """The whole values of a group, in the order in which they were written."""
    return [tensor.read() for _, tensor in _read(files, name)]


def _read(files, name):
    """`(path, lazy tensor)` of every variable, in the order of writing."""
    tensors = []
    for key in sorted(files[0][name], key=int):
        items = [file[name][key] for file in files]
        pieces = [
            (tuple(map(int, dataset.attrs["start"])), dataset)
            for item in items
            for dataset in item.values()
        ]
        shape = tuple(map(int, items[0].attrs["shape"]))
        path = items[0].attrs["path"]
        tensors.append((path, _Slices(path, shape, pieces)))
    return tensors


def _path(variable):
    """Path without its first part: Keras numbers the optimizers of a process."""
    return variable.path.partition("/")[2]
