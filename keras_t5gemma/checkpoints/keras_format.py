"""Presets of keras_t5gemma in Keras's format, written from lazily loaded tensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import h5_file, integrity, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import (
    CastTensor,
    FileTensor,
    LazyTensor,
    to_bytes,
)
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.utils.files import read_json_file


def write(
    folder: Path,
    config: T5GemmaConfig,
    tensors: Mapping[str, LazyTensor],
    dtype: np.dtype,
    lineage: dict[str, Any] | None = None,
    preprocessor: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write weights, checksums, tokenizer and, last, config.json.

    Args:
        folder: an existing folder, e.g. from `atomic_folder`.
        config: `T5GemmaConfig`.
        tensors: `{our variable path: tensor}`; one is in memory at a time.
        dtype: NumPy dtype of the written weights.
        lineage: dict, or `None`.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None`.
        max_shard_bytes: size of the largest weight file.
        progress: called with the number of bytes of each tensor that was written.
    """
    names = dataset_names(config)
    paths = {name: path for path, name in names.items()}
    digests: dict[str, str] = {}
    fast: dict[str, str] = {}

    def written(names, data):
        for algorithm, table in (("sha256", digests), ("crc32", fast)):
            digest = integrity.digest(algorithm, data)
            table.update((paths[name], digest) for name in names)
        if progress is not None:
            progress(data.nbytes * len(names))

    entries = {names[path]: CastTensor(t, dtype) for path, t in tensors.items()}
    h5_file.write_folder(folder, entries, max_shard_bytes, written)
    checksums = {"algorithm": "sha256", "tensors": digests, "crc32": fast}
    _write_json(folder / integrity.CHECKSUM_FILE, checksums)
    if preprocessor is not None:
        preprocessor.save_to_preset(str(folder))
    _write_json(folder / "config.json", serialize(config, dtype.name, lineage))


def dataset_names(config: T5GemmaConfig) -> dict[str, str]:
    """`{our variable path: dataset path in a Keras weight file}`."""
    names: dict[str, str] = {}
    for side, rows in weight_maps.KERAS.items():
        stack = getattr(config, side)
        if stack is not None:
            expanded = weight_maps.expand(rows, stack.num_layers)
            names |= {path: name for path, (name, _) in expanded.items()}
    return names


def serialize(
    config: T5GemmaConfig, dtype: str, lineage: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Result of `keras.saving.serialize_keras_object` for a `Backbone`, without one."""
    policy = keras.dtype_policies.DTypePolicy(dtype)
    return {
        "module": "keras_t5gemma.modeling.backbone",
        "class_name": "Backbone",
        "config": {
            "name": "backbone",
            "trainable": True,
            "dtype": keras.saving.serialize_keras_object(policy),
            "config": config.to_dict(),
            "lineage": lineage,
        },
        "registered_name": "keras_t5gemma>Backbone",
    }


def write_checksums(folder: Path, config: T5GemmaConfig | None) -> None:
    """Record checksums of the weight files that Keras wrote into a folder.

    Args:
        folder: path of the preset.
        config: of the model; `None` if its weights are quantized.
    """
    tensors = h5_file.read_folder(folder, quantized=config is None)
    digests = _digests(tensors)
    if config is not None:
        paths = {name: path for path, name in dataset_names(config).items()}
        digests = {paths[n]: digest for n, digest in digests.items() if n in paths}
    save_checksums(folder, digests)


def write_task_checksums(path: Path) -> None:
    """Record checksums of the weights of a task, in the folder of their file."""
    digests = _digests(h5_file.read_file(path, quantized=True))
    backbone = integrity.read_checksums(path.parent)
    fields = {"algorithm": "crc32", integrity.TENSORS: {}}
    if backbone is not None:
        fields = read_json_file(path.parent / integrity.CHECKSUM_FILE)
    fields[integrity.TASK] = digests
    _write_json(path.parent / integrity.CHECKSUM_FILE, fields)


def save_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write CRC-32 checksums of a backbone's tensors, and keep those of its task."""
    fields = {"algorithm": "crc32", integrity.TENSORS: dict(digests)}
    task = integrity.read_checksums(folder, part=integrity.TASK)
    if task is not None:
        fields[integrity.TASK] = task.tensors
    _write_json(folder / integrity.CHECKSUM_FILE, fields)


def _digests(tensors):
    """`{path: CRC-32}` of tensors that are read one by one."""
    return {
        name: integrity.digest("crc32", to_bytes(tensor.read()))
        for name, tensor in tensors.items()
    }


def check_task(path: Path, verify_checksums: bool, allow_non_finite: bool) -> None:
    """Check the weights of a task before Keras loads them; see `check_tensors`."""
    tensors = h5_file.read_file(path, quantized=True)
    checksums = None
    if verify_checksums:
        checksums = integrity.read_checksums(path.parent, part=integrity.TASK)
    check_tensors(tensors, checksums, allow_non_finite)


def check_tensors(
    tensors: Mapping[str, FileTensor],
    checksums: integrity.Checksums | None,
    allow_non_finite: bool,
) -> None:
    """Read tensors one by one that Keras will load; see `integrity.checked`."""
    for tensor in integrity.checked(tensors, checksums, allow_non_finite).values():
        tensor.read()


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
