"""The state of a training in files: each process writes what its devices hold.

A file has a group for every variable, with its path and shape, and in it the slices
that the process holds first, each with the place where it starts. All files together
hold every value once; any mesh can read them.
"""

import dataclasses

import keras
import numpy as np

from keras_t5gemma.checkpoints.byte_ranges import bounds
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.shared_arrays import is_shared
from keras_t5gemma.modeling.deferred_init import read_onto_devices


def names():
    """Of the files of all processes, in their order."""
    count = process_group.process_count()
    if count == 1:
        return ["state.h5"]
    return [f"state-{i:05}-of-{count:05}.h5" for i in range(count)]


def write(group, variables):
    """Write what this process holds of variables into a group of an HDF5 file."""
    for i, variable in enumerate(variables):
        item = group.create_group(str(i))
        item.attrs["path"] = _path(variable)
        item.attrs["shape"] = np.array(variable.shape, "int64")
        for number, (start, value) in enumerate(_held(variable)):
            array = np.asarray(keras.ops.convert_to_numpy(value))
            if array.dtype.name == "bfloat16":  # HDF5 has none; this is exact.
                array = array.astype("float32")
            dataset = item.create_dataset(str(number), data=array)
            dataset.attrs["start"] = np.array(start, "int64")


def _held(variable):
    """`(start, value)` of every slice that is this process's to write."""
    if not is_shared(variable):
        # Other processes have it too, where there are any.
        if process_group.process_index() == 0:
            yield (0,) * len(variable.shape), variable.value
        return
    for shard in variable.value.addressable_shards:
        if shard.replica_id == 0:
            parts = bounds(shard.index, variable.shape)
            # The host's copy stays with the array it was made of.
            yield [low for low, _ in parts], shard.data.copy()


@dataclasses.dataclass(frozen=True)
class _Slices(LazyTensor):
    """A variable in the files, not read yet.

    Args:
        shape: tuple.
        pieces: `[(start, dataset)]`.
    """

    shape: tuple
    pieces: list

    def read(self):
        """All of it."""
        return self.read_slice(())

    def read_slice(self, index):
        """A part of it, from the slices that have some of it."""
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
                result[tuple(here)] = dataset[tuple(there)]
        return result


def restore(folder, files, name, variables):
    """Give variables the values in the files, each device what it holds.

    Args:
        folder: for messages.
        files: open HDF5 files, those of all processes that wrote.
        name: of the group.
        variables: as many as were written.

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
            "Remove the folder to start anew."
        )
    for variable, (_, tensor) in zip(variables, saved, strict=True):
        if is_shared(variable):
            value = variable.value
            variable.assign(read_onto_devices(tensor, value.sharding, value.dtype))
        else:
            variable.assign(tensor.read())


def read_values(files, name):
    """The values of a group, whole, in the order they were written."""
    return [tensor.read() for _, tensor in _read(files, name)]


def _read(files, name):
    """`(path, unread tensor)` of every variable, in the order they were written."""
    tensors = []
    for key in sorted(files[0][name], key=int):
        items = [file[name][key] for file in files]
        pieces = [
            (tuple(map(int, dataset.attrs["start"])), dataset)
            for item in items
            for dataset in item.values()
        ]
        shape = tuple(map(int, items[0].attrs["shape"]))
        tensors.append((items[0].attrs["path"], _Slices(shape, pieces)))
    return tensors


def _path(variable):
    """Without its first part: Keras numbers the optimizers of a process."""
    return variable.path.partition("/")[2]
