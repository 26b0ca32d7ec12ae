"""Safetensors files, single or sharded, read and written tensor by tensor.

The safetensors library maps the whole file and returns copies, so that every tensor is
in resident memory twice, and to write it needs all tensors in memory at once. Here the
header is checked against the file, and each tensor is read directly into the array that
is returned.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints.lazy_tensors import (
    DTYPES,
    FileTensor,
    LazyTensor,
    nbytes,
    to_bytes,
)
from keras_t5gemma.distribution import process_group
from keras_t5gemma.utils.files import open_regular, parse_json, read_json_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_CODES = {
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
}
_HEADER_LIMIT = 100_000_000  # As in the specification of the format.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def read_folder(
    folder: str | Path, wanted: Container[str] | None = None
) -> dict[str, FileTensor]:
    """Lazily loaded tensors of a checkpoint folder, in one file or in shards.

    Args:
        folder: path of the folder.
        wanted: names of the tensors that are needed; shards that hold none of them
            are not opened. `None` opens all.

    Returns:
        `{tensor name: tensor}`.

    Raises:
        ValueError: naming the file and the tensor that is missing or broken.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    if index.exists():
        listed = read_json_file(index).get("weight_map")
        is_listed = isinstance(listed, dict) and SINGLE_FILE in listed.values()
        if (folder / SINGLE_FILE).exists() and not is_listed:
            raise ValueError(
                f"{folder} has two sets of weights, {SINGLE_FILE} and the shards of "
                f"{INDEX_FILE}: remove one."
            )
        return _read_sharded(folder, index, wanted)
    if not (folder / SINGLE_FILE).exists():
        pickles = sorted(p.name for kind in _PICKLES for p in folder.glob(kind))
        hint = ""
        if pickles:
            hint = (
                f" It holds {', '.join(pickles)}: pickles can run code and are never "
                "opened; save the model as safetensors."
            )
        raise ValueError(
            f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}"
        )
    return read_header(folder / SINGLE_FILE)


def _read_sharded(folder, index, wanted):
    try:
        weight_map = read_json_file(index)["weight_map"]
        shards = {name: Path(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error}") from error
    needed = {file for name, file in shards.items() if wanted is None or name in wanted}
    entries = {}
    for file in sorted(needed):
        if file.name != str(file):
            raise ValueError(f"{index} names the shard {file}, outside its folder.")
        if not (folder / file).exists():
            raise ValueError(f"{index} names the shard {file}, which is missing.")
        held = read_header(folder / file)
        unlisted = sorted(set(held) - set(shards))
        if unlisted:
            raise ValueError(f"{index} does not list {unlisted} of shard {file}.")
        entries.update(held)
    lost = sorted(n for n, f in shards.items() if f in needed and n not in entries)
    if lost:
        raise ValueError(f"{index} lists tensors that are in no shard: {lost}.")
    return entries


def read_header(path: Path) -> dict[str, FileTensor]:
    """Lazily loaded tensors of one file, whose offsets are checked against its size.

    Raises:
        ValueError: if the file is truncated or not a safetensors file.
    """
    size = os.path.getsize(path)
    with open_regular(path) as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > _HEADER_LIMIT:
            kind = (
                " It starts like a pickle or a PyTorch archive, which are never opened."
                if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")
                else ""
            )
            raise ValueError(
                f"{path} is truncated or not a safetensors file: its header does not "
                f"fit in {size} bytes.{kind}"
            )
        try:
            header = parse_json(file.read(length), f"The safetensors header of {path}")
            header.pop("__metadata__", None)
            entries = {
                name: _entry(Path(path), name, field, 8 + length, size)
                for name, field in header.items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} has an invalid safetensors header: "
                f"{type(error).__name__} {error}"
            ) from error
    _check_coverage(path, entries.values(), 8 + length, size)
    return entries


def _check_coverage(path, tensors, first, size):
    """The tensors share no byte and leave none out, as the format demands."""
    end, before = first, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            fault = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise ValueError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.offset} and "
                f"{fault} {before}, which ends at byte {end}."
            )
        end, before = tensor.offset + tensor.nbytes, repr(tensor.name)
    if end != size:
        raise ValueError(
            f"{path} has {size - end} bytes after its last tensor, which belong to "
            "none. It is damaged or was not written as safetensors."
        )


def _entry(
    path: Path, name: str, field: dict[str, Any], base: int, size: int
) -> FileTensor:
    if field["dtype"] not in _CODES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {field['dtype']}; accepted: "
            f"{sorted(_CODES)}."
        )
    dtype, shape = _CODES[field["dtype"]], tuple(field["shape"])
    first, end = field["data_offsets"]
    for number in (*shape, first, end):
        if type(number) is not int or number < 0:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {list(shape)} and offsets "
                f"{[first, end]}; all must be whole numbers from 0."
            )
    if base + end > size:
        raise ValueError(
            f"{path} is truncated: tensor {name!r} ends at byte {base + end}, the "
            f"file at {size}. Download it again."
        )
    if end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: tensor {name!r} is {end - first} bytes, its shape {shape} "
            f"and dtype {dtype} need {math.prod(shape) * dtype.itemsize}."
        )
    return FileTensor(path, name, dtype, shape, base + first)


def plan_shards(
    tensors: Mapping[str, LazyTensor], max_shard_bytes: float
) -> list[list[str]]:
    """Names of the tensors in each shard, in order.

    A tensor that is larger than `max_shard_bytes` gets a separate shard.
    """
    shards: list[list[str]] = []
    room = 0.0
    for name, tensor in tensors.items():
        size = nbytes(tensor)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_folder(
    folder: str | Path,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: float,
    written: Callable[[list[str], np.ndarray], None],
) -> None:
    """Write `model.safetensors`, or shards with their index.

    With several processes all of them call it; the first one writes.

    Args:
        folder: an existing folder.
        tensors: `{name: tensor}`; one is in memory at a time.
        max_shard_bytes: largest size of a file.
        written: called as `written(names, bytes)` with the flat uint8 array of each
            tensor and the names it was written under.
    """
    if process_group.process_index():
        for tensor in tensors.values():
            tensor.read()  # Takes part in gathering it.
        return
    shards = plan_shards(tensors, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [
            f"model-{i:05}-of-{len(shards):05}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(map(nbytes, tensors.values()))},
            "weight_map": {
                name: file
                for file, names in zip(files, shards, strict=True)
                for name in names
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        (Path(folder) / INDEX_FILE).write_text(text, encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        part = {name: tensors[name] for name in names}
        write_file(Path(folder) / file, part, written)


def write_file(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    written: Callable[[list[str], np.ndarray], None],
) -> None:
    """Write one file; see `write_folder`."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + nbytes(tensor)
        header[name] = {
            "dtype": codes[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, tensor in tensors.items():
            data = to_bytes(tensor.read())
            file.write(data.data)
            written([name], data)
