"""Keras weight files (HDF5), single or sharded, read and written tensor by tensor.

Keras stores a variable as one contiguous HDF5 dataset, bfloat16 as two opaque bytes
with an attribute. h5py only gives the offsets of the bytes, which are then read like
those of any other file.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from keras_t5gemma.checkpoints import integrity
from keras_t5gemma.checkpoints.lazy_tensors import (
    DTYPES,
    FileTensor,
    LazyTensor,
    nbytes,
    to_bytes,
)
from keras_t5gemma.checkpoints.safetensors_file import plan_shards
from keras_t5gemma.distribution import process_group
from keras_t5gemma.utils.files import check_regular, read_json_file

INDEX_FILE = "model.weights.json"
SINGLE_FILE = "model.weights.h5"
# A preset needs a depth of 8, and about 40 objects for a layer.
_MAX_DEPTH, _MAX_OBJECTS = 32, 100_000
_CHECKSUM = "crc32"  # Attribute of arrays that `add_array` writes.
_INTEGERS = ("int8", "uint8", "int32")  # Of quantized weights.


def read_folder(
    folder: str | Path,
    wanted: Collection[str] | None = None,
    quantized: bool = False,
) -> dict[str, FileTensor]:
    """Lazily loaded tensors of a preset folder, in one file or in shards.

    Args:
        folder: path of the folder.
        wanted: as in `safetensors_file.read_folder`.
        quantized: accept integers too.

    Returns:
        `{dataset path: tensor}`.

    Raises:
        ValueError: naming the file and the tensor that is missing or broken.
    """
    entries = {}
    for path in weight_files(folder, wanted):
        entries.update(read_file(path, quantized))
    return entries


def weight_files(
    folder: str | Path, wanted: Collection[str] | None = None
) -> list[Path]:
    """The weight files of a preset folder, all of them regular files in it.

    Args:
        folder: path of the folder.
        wanted: as in `read_folder`.

    Raises:
        ValueError: naming the file that is missing or elsewhere.
    """
    folder, index = Path(folder), weights_file(folder)
    check_regular(index)
    if index.name == SINGLE_FILE:
        return [index]
    try:
        weight_map = read_json_file(index)["weight_map"]
        shards = {  # A group may be spread over several shards.
            group.strip("/"): [files] if isinstance(files, str) else list(files)
            for group, files in weight_map.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a Keras weight index: {error}") from error
    groups = None if wanted is None else {name.rpartition("/")[0] for name in wanted}
    needed = {
        file
        for group, files in shards.items()
        if groups is None or group in groups
        for file in files
    }
    for file in sorted(needed):
        if Path(file).name != file:
            raise ValueError(f"{index} names the shard {file}, outside its folder.")
        if not (folder / file).exists():
            raise ValueError(f"{index} names the shard {file}, which is missing.")
        check_regular(folder / file)
    return [folder / file for file in sorted(needed)]


def weights_file(folder: str | Path) -> Path:
    """The weight file of a preset folder, or the index of its shards.

    Raises:
        ValueError: if it has neither.
    """
    for name in (SINGLE_FILE, INDEX_FILE):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise ValueError(
        f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}."
    )


def read_file(path: Path, quantized: bool = False) -> dict[str, FileTensor]:
    """Entries of one file: `{dataset path: tensor}`; see `read_folder`.

    Raises:
        ValueError: if it is truncated, or holds what Keras does not write.
    """
    with open_file(path) as file:
        datasets = _datasets(path, file)
        entries = {
            name: _entry(Path(path), name, dataset, quantized)
            for name, dataset in datasets.items()
        }
    _check_ranges(path, entries.values())
    return entries


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, in a block that does nothing but read it.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: naming the path, if it is not a regular file, or if its structure
            is damaged, truncated, or of another format.
    """
    check_regular(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{os.fspath(path)} is truncated or not an HDF5 file: {error}. Download or "
            "save it again."
        ) from error


def add_array(
    group: h5py.Group, name: str, array: np.ndarray, **attributes: Any
) -> None:
    """Write an array into a group of an HDF5 file, with its CRC-32."""
    dataset = group.create_dataset(name, data=array)
    dataset.attrs.update(attributes)
    dataset.attrs[_CHECKSUM] = integrity.digest("crc32", to_bytes(array))


def check_array(dataset: h5py.Dataset, array: np.ndarray, name: str) -> None:
    """Raise `ValueError` if the values of a dataset differ from its CRC-32.

    Args:
        dataset: that `add_array` wrote; without a checksum nothing is checked.
        array: its values, all of them.
        name: of the array, for the message.
    """
    noted = dataset.attrs.get(_CHECKSUM)
    if noted not in (None, integrity.digest("crc32", to_bytes(array))):
        raise ValueError(
            f"{dataset.file.filename} is damaged: {name!r} differs from its checksum."
        )


def _check_ranges(path, tensors):
    """No two tensors share a byte; HDF5 checks that they lie in the file."""
    end, before = 0, ""
    stored = [tensor for tensor in tensors if tensor.nbytes]
    for tensor in sorted(stored, key=lambda t: t.offset):
        if tensor.offset < end:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.offset} and "
                f"overlaps {before!r}, which ends at byte {end}."
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name


def _datasets(path, file):
    """`{dataset path: dataset}` of a file, in a walk of bounded depth and length.

    Links to other places or files are not followed.
    """
    datasets: dict[str, h5py.Dataset] = {}
    pending = [(file, "", 0)]
    seen = 0
    while pending:
        group, prefix, depth = pending.pop()
        for name in group:
            seen += 1
            if depth >= _MAX_DEPTH or seen > _MAX_OBJECTS:
                raise ValueError(
                    f"{path} has groups deeper than {_MAX_DEPTH} levels or more than "
                    f"{_MAX_OBJECTS} of them: Keras did not write it."
                )
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                datasets[prefix + name] = item
            elif isinstance(item, h5py.Group):
                pending.append((item, f"{prefix}{name}/", depth + 1))
    return datasets


def _entry(path: Path, name: str, dataset: h5py.Dataset, quantized: bool) -> FileTensor:
    dtype = dataset.dtype
    if dataset.attrs.get("dtype") == "bfloat16":
        dtype = DTYPES["bfloat16"]
    accepted = [*DTYPES, *(_INTEGERS if quantized else ())]
    if dtype.name not in accepted or dtype.byteorder == ">":
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {dtype}; accepted: {sorted(accepted)}."
        )
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.is_virtual:
        raise ValueError(
            f"{path}: tensor {name!r} is not stored as contiguous values; load the "
            "weights with Keras and save them again."
        )
    return FileTensor(path, name, dtype, dataset.shape, offset)


def write_folder(
    folder: str | Path,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: float,
    written: Callable[[list[str], np.ndarray], None],
) -> None:
    """Write `model.weights.h5`, or shards with their index, as Keras does.

    A tensor that is stored under several paths, as in an adapted model, is read once.
    With several processes all of them call it; the first one writes.

    Args:
        folder: an existing folder.
        tensors: `{dataset path: tensor}`; one is in memory at a time.
        max_shard_bytes: largest size of a file.
        written: as in `safetensors_file.write_folder`.
    """
    if process_group.process_index():
        for tensor in tensors.values():
            tensor.read()  # Takes part in gathering it.
        return
    folder = Path(folder)
    shards = plan_shards(tensors, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model_{i:05}.weights.h5" for i in range(len(shards))]
    file_of = {
        name: file for file, names in zip(files, shards, strict=True) for name in names
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(nbytes, tensors.values()))},
            "weight_map": {
                "/" + name.rpartition("/")[0]: file for name, file in file_of.items()
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=4), encoding="utf-8")
    paths: dict[LazyTensor, list[str]] = {}  # Equal tensors are one key.
    for name, tensor in tensors.items():
        paths.setdefault(tensor, []).append(name)
    with contextlib.ExitStack() as stack:
        stores = {
            file: stack.enter_context(h5py.File(folder / file, "w")) for file in files
        }
        for tensor, names in paths.items():
            array = np.ascontiguousarray(tensor.read())
            for name in names:
                _write(stores[file_of[name]], name, array)
            written(names, to_bytes(array))


def _write(store, name, array):
    if array.dtype == DTYPES["bfloat16"]:
        dataset = store.create_dataset(name, data=array.view("V2"))
        dataset.attrs["dtype"] = "bfloat16"
    else:
        store.create_dataset(name, data=array)
