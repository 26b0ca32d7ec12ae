"""Weights of a backbone: loaded from a checkpoint, and read from a live model.

The class is passed in as `build`, so that `Backbone.from_preset` can use this module.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import keras

from keras_t5gemma._compat import track_parameters
from keras_t5gemma.checkpoints import (
    h5_file,
    integrity,
    keras_format,
    weight_maps,
)
from keras_t5gemma.checkpoints.checkpoint import Checkpoint
from keras_t5gemma.checkpoints.lazy_tensors import (
    LazyTensor,
    VariableTensor,
    parse_policy,
)
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.shared_arrays import is_shared
from keras_t5gemma.modeling.deferred_init import build_and_fill
from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.modeling.quantized_loading import (
    policies,
    quantized_tensors,
    without_garbage_collection,
)
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.sizes import UNITS

Model: TypeAlias = Any  # A `Backbone`, which is defined above this module.


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Leave `torch.inference_mode`, whose tensors cannot be changed or trained later.

    On other backends nothing happens.
    """
    if keras.config.backend() != "torch":
        yield
        return
    import torch

    with torch.inference_mode(False):
        yield


def load_backbone(
    build: Callable[..., Model],
    checkpoint: Checkpoint,
    encoder_only: bool = False,
    verify_checksums: bool = True,
    allow_non_finite: bool = False,
    mode: str | None = None,
    **kwargs: Any,
) -> Model:
    """A `Backbone` of a float checkpoint, each tensor read once into its variable.

    Args:
        build: `(config, **kwargs) -> Backbone`, the class itself or a subclass.
        checkpoint: a `Checkpoint`.
        encoder_only: build and read the encoder alone.
        verify_checksums: compare what is read with the preset's checksums.
        allow_non_finite: warn about NaN and infinite weights instead of raising.
        mode: `"int8"` or `"int4"` to quantize; then without `dtype`.
        **kwargs: further arguments of `Backbone`: `dtype`, `name`, `trainable`.

    Raises:
        ValueError: naming the file and the tensors that do not fit or are damaged.
    """
    config = checkpoint.config
    if encoder_only:
        config = dataclasses.replace(config, decoder=None)
    tensors = checkpoint.checked_tensors(
        encoder_only, verify_checksums, allow_non_finite, advise=True
    )
    kwargs["lineage"] = checkpoint.lineage
    if mode is None or keras.distribution.distribution() is not None:
        backbone = fill(build, config, tensors, **kwargs)
        if mode is not None:  # Where devices share weights, of the shared ones.
            backbone.quantize(mode)
        return backbone
    policy = keras.config.dtype_policy()
    kwargs["dtype"] = policies(tensors, policy, mode)
    with without_garbage_collection():
        return fill(build, config, tensors, policy, **kwargs)


def load_quantized(
    build: Callable[..., Model],
    checkpoint: Checkpoint,
    load_weights: bool = True,
    encoder_only: bool = False,
    verify_checksums: bool = True,
    allow_non_finite: bool = False,
    mode: str | None = None,
    **kwargs: Any,
) -> Model:
    """A `Backbone` of a preset that was saved quantized, as it was saved.

    Keras reads the variables that the model has, and no others.

    Args:
        build: `(config, **kwargs) -> Backbone`.
        checkpoint: a `Checkpoint` of `presets.KERAS`.
        load_weights: `False` leaves the weights random.
        encoder_only: build and read the encoder alone.
        verify_checksums: compare the files with the preset's checksums first.
        allow_non_finite: warn about NaN and infinite weights instead of raising.
        mode: `"int8"` or `"int4"` that the weights must have.
        **kwargs: further arguments of `Backbone`: `dtype`, `name`, `trainable`.

    Raises:
        ValueError: if a weight file is missing or damaged, or of another mode, or for
            a `dtype` of float weights.
    """
    quantized = [_is_quantized(p) for p in (checkpoint.saved_policy(), kwargs["dtype"])]
    if load_weights and quantized == [True, False]:
        raise ValueError(
            f"`dtype` must be None, or the mode of the weights: those of "
            f"{checkpoint.location} are quantized, and are loaded as they were saved; "
            f"got {shown(kwargs['dtype'])}."
        )
    config = checkpoint.config
    if encoder_only:
        config = dataclasses.replace(config, decoder=None)
    backbone = build(config, lineage=checkpoint.lineage, **kwargs)
    modes = {getattr(part, "quantization_mode", None) for part in iter_layers(backbone)}
    stored = ", ".join(sorted(filter(None, modes)))
    if mode not in (None, stored):
        location = checkpoint.location
        raise ValueError(
            f"`dtype` is {mode!r}, but the weights of {location} are {stored}."
        )
    if load_weights:
        keras_format.check_tensors(
            checkpoint.quantized_tensors(encoder_only),
            checkpoint.checksums() if verify_checksums else None,
            allow_non_finite,
        )
        backbone.load_weights(h5_file.weights_file(checkpoint.source.download()))
    return backbone


def _is_quantized(dtype):
    """Whether a dtype policy, or one in a map of them, is of quantized weights."""
    policy = parse_policy(dtype)
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    parts = [policy, *policy.values()] if is_map else [policy]
    return any(part.quantization_mode for part in parts)


def fill(
    build: Callable[..., Model],
    config: T5GemmaConfig,
    tensors: Mapping[str, LazyTensor],
    policy: keras.DTypePolicy | None = None,
    **kwargs: Any,
) -> Model:
    """A `Backbone` whose variables are read from lazily loaded tensors.

    Args:
        build: `(config, **kwargs) -> Backbone`.
        config: `T5GemmaConfig`.
        tensors: `{variable path: tensor}`, one for each variable of the float model.
        policy: of the float model, to quantize it while it is read; `dtype` then has
            the `policies` of its layers.
        **kwargs: further arguments of `Backbone`.

    Raises:
        ValueError: naming the variables without a tensor, and tensors without one.
    """

    def read(backbone):
        found = tensors
        if policy is not None:
            found = quantized_tensors(backbone, tensors, policy)
        unmapped = sorted({v.path for v in backbone.weights} ^ set(found))
        if unmapped:
            raise ValueError(f"The weight map does not fit the model: {unmapped}.")
        return found

    backbone = build_and_fill(lambda: build(config, **kwargs), read)
    track_parameters(backbone)
    return backbone


def model_tensors(backbone: Model) -> dict[str, LazyTensor]:
    """Lazily read tensors of a live model by variable path, LoRA merged.

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


def gather_weights(
    backbone: Model,
    filepath: str | os.PathLike[str],
    max_shard_size: float | None = None,
) -> bool:
    """Write the weight files of a preset from a live model that devices share.

    Keras would keep a copy of every weight on the host, and cannot write what other
    processes hold. Here all processes gather one weight at a time.

    Args:
        backbone: a `Backbone`.
        filepath: as KerasHub passes it to `save_weights`.
        max_shard_size: of the largest file, in Keras's unit (GiB).

    Returns:
        Whether the files were written: not for one device, other files, or quantized
        weights, which are left to Keras.

    Raises:
        ValueError: for a quantized model with several processes.
    """
    if process_group.process_count() > 1 and is_quantized(backbone):
        raise ValueError(
            "Several processes cannot save a quantized model. Its weights are those of "
            "the preset; `save_lora_weights` saves trained adapters."
        )
    folder, name = os.path.split(filepath)
    if (
        not is_shared(backbone.weights[0])
        or name not in (h5_file.SINGLE_FILE, h5_file.INDEX_FILE)
        or is_quantized(backbone)
    ):
        return False
    names = keras_format.dataset_names(backbone.config)
    entries = {names[p]: tensor for p, tensor in model_tensors(backbone).items()}
    size = max_shard_size * UNITS["GiB"] if max_shard_size else math.inf
    digests: dict[str, str] = {}
    paths = {dataset: path for path, dataset in names.items()}

    def written(datasets, data):
        digest = integrity.digest("crc32", data)
        digests.update((paths[dataset], digest) for dataset in datasets)

    h5_file.write_folder(folder, entries, size, written)
    if not process_group.process_index():
        keras_format.save_checksums(Path(folder), digests)
    return True


def record_checksums(backbone: Model, filepath: str | os.PathLike[str]) -> None:
    """Write the checksums of weight files of a preset that Keras has written."""
    folder, name = os.path.split(filepath)
    if name not in (h5_file.SINGLE_FILE, h5_file.INDEX_FILE):
        return
    config = None if is_quantized(backbone) else backbone.config
    keras_format.write_checksums(Path(folder), config)


def is_quantized(backbone: Model) -> bool:
    """Whether any layer has quantized weights."""
    layers = iter_layers(backbone)
    return any(getattr(layer, "quantization_mode", None) for layer in layers)
