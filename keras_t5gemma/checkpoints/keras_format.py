"""Presets of keras_t5gemma in Keras's format, written from lazily loaded tensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import h5_file, integrity, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import CastTensor, LazyTensor, to_bytes
from keras_t5gemma.config import T5GemmaConfig


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


def write_checksums(folder: Path, config: T5GemmaConfig) -> None:
    """Record checksums of the float weight files that Keras wrote into a folder."""
    paths = {name: path for path, name in dataset_names(config).items()}
    digests = {
        paths[name]: integrity.digest("crc32", to_bytes(tensor.read()))
        for name, tensor in h5_file.read_folder(folder).items()
        if name in paths
    }
    save_checksums(folder, digests)


def save_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write CRC-32 checksums by our variable paths; an empty dict clears them."""
    fields = {"algorithm": "crc32", "tensors": dict(digests)}
    _write_json(folder / integrity.CHECKSUM_FILE, fields)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
