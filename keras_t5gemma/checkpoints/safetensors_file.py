"""Tensors of a safetensors file or folder, one at a time.

The safetensors library maps the whole file and copies what it hands out, which
holds every tensor twice in resident memory. Here the header is checked against
the file and each tensor is read straight into the array that is returned.
"""

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape, first byte."""

    file: Path
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
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            if file.readinto(memoryview(buffer)) != size:
                raise ValueError(f"{self.file} ended while a tensor was read.")
        return buffer.view(self.dtype).reshape(self.shape)


def read_folder(folder):
    """Entries of a checkpoint folder, one file or sharded with an index.

    Args:
        folder: path of the folder.

    Returns:
        dict of tensor name to `TensorEntry`.

    Raises:
        ValueError: naming the file, and the tensor, that is missing or broken.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error}") from error
        entries = {}
        for name in sorted(set(weight_map.values())):
            if not (folder / name).exists():
                raise ValueError(f"{index} names the shard {name}, which is missing.")
            entries.update(read_header(folder / name))
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            raise ValueError(f"{index} lists tensors that no shard holds: {lost}.")
        return entries
    if not (folder / SINGLE_FILE).exists():
        raise ValueError(
            f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}."
        )
    return read_header(folder / SINGLE_FILE)


def read_header(path):
    """Entries of one file; every offset is checked against the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header does not "
                f"fit in {size} bytes."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}; accepted: "
                f"{sorted(DTYPES)}."
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte "
                f"{8 + length + end}, the file at {size}. Download it again."
            )
        if end - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: tensor {name!r} is {end - first} bytes, its shape {shape} "
                f"and dtype {dtype} need {math.prod(shape) * dtype.itemsize}."
            )
        entries[name] = TensorEntry(Path(path), dtype, shape, 8 + length + first)
    return entries
