"""`save_to_preset` of backbone, tasks, preprocessor and tokenizer.

The files are those of KerasHub's presets, which its `from_preset` reads too.
"""

import datetime
import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import generation_config, integrity
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.utils.checks import path
from keras_t5gemma.utils.files import read_bytes
from keras_t5gemma.utils.sizes import UNITS, parse_shard_size

FROZEN = "frozen_layers"  # In the configuration of a model that has any.
# Not of a preset: how a model was trained, and on which machine.
_LEFT_OUT = ("compile", "compile_config", "build_config", FROZEN)


class AtomicSaveToPreset:
    """Mixin of backbone and tasks: `save_to_preset`, all or nothing."""

    def save_to_preset(
        self, preset_dir: str | os.PathLike[str], max_shard_size: float | str = 10
    ) -> None:
        """Save weights, configuration and tokenizer into a folder, all or nothing.

        Args:
            preset_dir: path; an earlier checkpoint in it is replaced.
            max_shard_size: of the largest weight file: a number of GB, or a size with
                a unit, e.g. `"500MB"`.

        Raises:
            ValueError: for an invalid `max_shard_size`.
            OSError: when the disk is full; then nothing is left behind.
        """
        size = parse_shard_size(max_shard_size)
        with atomic_folder(path(preset_dir, "preset_dir")) as staging:
            if hasattr(self, "backbone"):
                _write_task(self, staging, size)
            else:
                write_backbone(self, staging, size)


def _write_task(task, folder, size):
    _write_json(task, folder / "task.json")
    if task.has_task_weights():
        task.save_task_weights(os.fspath(folder / "task.weights.h5"))
    if isinstance(task.backbone, AtomicSaveToPreset):
        write_backbone(task.backbone, folder, size)
    else:  # KerasHub counts in GiB.
        task.backbone.save_to_preset(os.fspath(folder), size / UNITS["GiB"])
    if task.preprocessor is not None:
        save_preprocessor(task.preprocessor, folder)
    if defaults := getattr(task, "generation_defaults", None):
        generation_config.save(folder, defaults, task.preprocessor)


def write_backbone(backbone: Any, folder: Path, size: int) -> None:
    """Write configuration and weights into the folder of a preset.

    Args:
        backbone: a `Backbone`.
        folder: an existing one.
        size: bytes of the largest weight file.
    """
    _write_json(backbone, folder / "config.json")
    try:
        hub = importlib.metadata.version("keras-hub")
    except importlib.metadata.PackageNotFoundError:
        hub = None
    metadata = {
        "keras_version": keras.version(),
        "keras_hub_version": hub,
        "parameter_count": backbone.count_params(),
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
    }
    text = json.dumps(metadata, indent=4)
    (folder / "metadata.json").write_text(text, encoding="utf-8")
    variables = {id(v): v for v in backbone.variables}.values()
    total = sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)
    if total > size:
        index = os.fspath(folder / "model.weights.json")
        backbone.save_weights(index, max_shard_size=size / UNITS["GiB"])
    else:
        backbone.save_weights(os.fspath(folder / "model.weights.h5"))


def save_preprocessor(preprocessor: Any, folder: str | os.PathLike[str]) -> None:
    """Write a preprocessor and its tokenizer into the folder of a preset."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_json(preprocessor, Path(folder) / preprocessor.config_file)
    save_tokenizer(preprocessor.tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer's configuration and vocabulary into the folder of a preset."""
    assets = Path(folder) / "assets" / Path(tokenizer.config_file).stem
    assets.mkdir(parents=True, exist_ok=True)
    _write_json(tokenizer, Path(folder) / tokenizer.config_file)
    tokenizer.save_assets(os.fspath(assets))
    for name in tokenizer.file_assets:
        integrity.record_vocabulary(Path(folder), read_bytes(assets / name))


def _write_json(value, path):
    config = _without(keras.saving.serialize_keras_object(value))
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")


def _without(value):
    """A serialized object without the keys `_LEFT_OUT` and not frozen, at any depth."""
    if not isinstance(value, dict):
        return value
    kept = {k: _without(v) for k, v in value.items() if k not in _LEFT_OUT}
    return {**kept, "trainable": True} if "trainable" in kept else kept
