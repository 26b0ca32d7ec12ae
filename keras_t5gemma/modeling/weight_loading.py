"""Weights of a backbone: read from a checkpoint, and read back from a live model.

The class is passed in as `build`, so that `Backbone.from_preset` can use this module.
"""

import dataclasses
import math
import os
from pathlib import Path

from keras_t5gemma._compat import track_parameters
from keras_t5gemma.checkpoints import h5_file, keras_format, presets, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import VariableTensor
from keras_t5gemma.distribution.shared_arrays import is_shared
from keras_t5gemma.modeling.deferred_init import build_and_fill
from keras_t5gemma.modeling.layer_iteration import iter_layers


def load_backbone(build, checkpoint, encoder_only=False, **kwargs):
    """A `Backbone`, each tensor read once into its variable.

    Args:
        build: `(config, **kwargs) -> Backbone`, the class itself or a subclass.
        checkpoint: a `Checkpoint`.
        encoder_only: build and read the encoder alone.
        **kwargs: further arguments of `Backbone`: `dtype`, `name`, `trainable`.

    Raises:
        ValueError: naming the file and the tensors that do not fit; then nothing
            is returned.
    """
    config = checkpoint.config
    if encoder_only:
        config = dataclasses.replace(config, decoder=None)
    tensors = checkpoint.tensors(encoder_only)
    return fill(build, config, tensors, lineage=checkpoint.lineage, **kwargs)


def load_quantized_encoder(build, checkpoint, **kwargs):
    """The encoder of a preset of ours that was saved quantized, as it is.

    Keras reads what the model has out of the file, and nothing else.

    Args:
        build: `(config, **kwargs) -> Backbone`.
        checkpoint: a `Checkpoint`.
        **kwargs: further arguments of `Backbone`: `dtype`, `name`, `trainable`.
    """
    config = dataclasses.replace(checkpoint.config, decoder=None)
    backbone = build(config, lineage=checkpoint.lineage, **kwargs)
    folder = Path(presets.download(checkpoint.location))
    names = ("model.weights.h5", "model.weights.json")  # Whole, or in shards.
    backbone.load_weights(next(folder / n for n in names if (folder / n).exists()))
    return backbone


def fill(build, config, tensors, **kwargs):
    """A `Backbone` of a config whose variables are read from lazily loaded tensors."""

    def read(backbone):
        unmapped = sorted({v.path for v in backbone.weights} ^ set(tensors))
        if unmapped:
            raise ValueError(f"The weight map does not fit the model: {unmapped}.")
        return tensors

    backbone = build_and_fill(lambda: build(config, **kwargs), read)
    track_parameters(backbone)
    return backbone


def model_tensors(backbone):
    """`{our variable path: unread tensor}` of a live model, LoRA merged.

    Raises:
        ValueError: for a quantized model.
    """
    tensors = {}
    for layer in iter_layers(backbone):
        if getattr(layer, "quantization_mode", None):
            raise ValueError(
                "A quantized model cannot be exported: its float weights are gone. "
                "Export it before `quantize`."
            )
        merged = getattr(layer, "lora_enabled", False)
        for variable in layer.variables:
            own = variable.path == f"{layer.path}/{variable.name}"
            if not own or variable.name.startswith("lora_"):
                continue
            value = _merged(layer, variable.name) if merged else _value(variable)
            tensors[variable.path] = VariableTensor(
                value, variable.shape, variable.dtype
            )
    return {path: tensors[path] for path in weight_maps.model_shapes(backbone.config)}


def _value(variable):
    return lambda: variable.value


def _merged(layer, name):
    return lambda: getattr(layer, name)  # Keras's property adds the adapter.


def gather_weights(backbone, filepath, max_shard_size=None):
    """Write the weight files of a preset from a live model that devices share.

    Keras would keep a copy of every weight on the host, and cannot write what other
    processes hold. Here one weight is gathered at a time, by all processes together.

    Args:
        backbone: a `Backbone`.
        filepath: as KerasHub gives it to `save_weights`.
        max_shard_size: GB of the largest file.

    Returns:
        Whether that is done: not for one device, other files, or quantized weights.
    """
    folder, name = os.path.split(filepath)
    layers = iter_layers(backbone)
    if (
        not is_shared(backbone.weights[0])
        or name not in (h5_file.SINGLE_FILE, h5_file.INDEX_FILE)
        or any(getattr(layer, "quantization_mode", None) for layer in layers)
    ):
        return False
    names = keras_format.dataset_names(backbone.config)
    entries = {names[p]: tensor for p, tensor in model_tensors(backbone).items()}
    size = max_shard_size * 1e9 if max_shard_size else math.inf
    h5_file.write_folder(folder, entries, size, lambda names, data: None)
    return True
