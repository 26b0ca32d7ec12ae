"""Reader of decoder-only Gemma 2 sources, in KerasHub's or transformers' format."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma.checkpoints import (
    h5_file,
    huggingface,
    integrity,
    keras_hub_format,
    presets,
    published_names,
    safetensors_file,
    weight_maps,
)
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor, VariableTensor
from keras_t5gemma.config import StackConfig
from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.tokenization import chat_template, tokenizer_files
from keras_t5gemma.utils.checks import json_object
from keras_t5gemma.utils.files import named_values

_MAX_POSITIONS = 8192  # Of all Gemma 2 models; KerasHub's config does not hold it.
_TUNED_PREFIX = "gemma2_instruct_"


@dataclasses.dataclass(frozen=True)
class Gemma2:
    """An opened source of `adapt_gemma2`, with lazily loaded tensors.

    Args:
        name: name in messages and in the lineage; not a path.
        stack: `StackConfig`.
        vocabulary_size: V.
        final_soft_cap: of the vocabulary logits.
        max_positions: longest sequence in tokens.
        tensors: `{path in a tower of a Backbone: tensor}`.
        vocabulary: serialized SentencePiece model, or `None`.
        instruction_tuned: whether it is a published instruction-tuned model, or has a
            chat template of Gemma's turns.
    """

    name: str
    stack: StackConfig
    vocabulary_size: int
    final_soft_cap: float | None
    max_positions: int
    tensors: dict[str, LazyTensor]
    vocabulary: bytes | None
    instruction_tuned: bool


def open_gemma2(source: Any, argument: str = "source") -> Gemma2:
    """Open a decoder-only Gemma 2; no weight is read.

    Args:
        source: a KerasHub preset name, e.g. `"gemma2_2b_en"`, a folder in KerasHub's
            or transformers' format, an `hf://` or `kaggle://` handle, or a live
            `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        argument: name of the argument for messages.

    Raises:
        ValueError: for another model, e.g. Gemma 1 or 3, a quantized one, or files
            that do not fit, naming the file and the tensors.
        OSError: when a download fails, with instructions.
    """
    model = getattr(source, "backbone", source)
    if _is_gemma(model):
        return _open_live(model, argument)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"`{argument}` must be the name or folder of a Gemma 2, or a live "
            f"keras_hub.models.GemmaBackbone; got {type(source).__name__}."
        )
    names = _preset_names()
    accepted = "a name of KerasHub's Gemma 2 presets"
    accepted += "" if names else " (which need keras-hub)"
    location = presets.locate(source, names, accepted)
    config = presets.read_json(location)
    file = f"{location}: config.json"
    registered, model_type = config.get("registered_name"), config.get("model_type")
    copies: dict[str, str] = {}
    if registered == keras_hub_format.GEMMA:
        kind, rows = presets.KERAS_HUB, weight_maps.GEMMA2_KERAS_HUB
        with named_values(file):
            fields = json_object(config["config"], "config")
        if _is_quantized(fields):
            raise ValueError(
                f"`{argument}` {location} is quantized; adapt the float checkpoint "
                "and quantize the result."
            )
        with named_values(file):
            stack, size, cap = keras_hub_format.read_gemma2_config(fields, file)
        positions = _MAX_POSITIONS
    elif model_type == "gemma2":
        kind, rows = presets.HUGGING_FACE, weight_maps.GEMMA2_HUGGING_FACE
        copies = weight_maps.GEMMA2_HUGGING_FACE_COPIES
        with named_values(file):
            stack, size, cap = huggingface.read_gemma2_config(config, file)
        positions = config.get("max_position_embeddings", _MAX_POSITIONS)
    else:
        found = registered or model_type or "no model"
        raise ValueError(
            f"`{argument}` must be a Gemma 2; {location} holds {found!r}. Gemma 1 and "
            "Gemma 3 have other layers, and a T5Gemma needs no adaptation."
        )
    folder = presets.download(location)
    reader = h5_file if kind == presets.KERAS_HUB else safetensors_file
    tensors = weight_maps.import_tensors(
        weight_maps.expand(rows, stack.num_layers),
        {"": stack},
        weight_maps.tower_shapes(stack, size),
        reader.read_folder(folder),
        (),
        str(location),
        copies,
    )
    named = presets.Source(os.fspath(source), str(folder), kind, config)
    vocabulary = None
    if presets.has_tokenizer(folder, kind):
        vocabulary = tokenizer_files.read(named)
    is_tuned = published_names.is_published(source, _tuned_names(names))
    is_tuned = is_tuned or chat_template.template_of(named) is not None
    return Gemma2(
        _name_of(source, location),
        stack,
        size,
        cap,
        positions,
        integrity.checked(tensors, advise=False),
        vocabulary,
        is_tuned,
    )


def _is_gemma(model):
    """Whether a model is a GemmaBackbone of KerasHub, which then was imported."""
    hub = sys.modules.get("keras_hub")
    return hub is not None and isinstance(model, hub.models.GemmaBackbone)


def _preset_names():
    """`{name: handle}` of KerasHub's presets of Gemma; none where it is missing."""
    try:
        hub = require_keras_hub("A name of KerasHub's presets")
    except ModuleNotFoundError:
        return {}
    rows = hub.models.GemmaBackbone.presets.items()
    return {name: row["kaggle_handle"] for name, row in rows}


def _tuned_names(names):
    """Names and handles of the instruction-tuned Gemma 2 models that are published."""
    keras_hub_names = {n: h for n, h in names.items() if n.startswith(_TUNED_PREFIX)}
    hugging_face = [f"hf://google/gemma-2-{size}-it" for size in ("2b", "9b", "27b")]
    return [*keras_hub_names, *keras_hub_names.values(), *hugging_face]


def _is_quantized(config):
    policy = config.get("dtype") or {}
    return not isinstance(policy, str) and policy.get("class_name") != "DTypePolicy"


def _name_of(source, location):
    """The handle, or the last component of a path: a lineage holds no local paths."""
    return location if "://" in location else Path(os.path.abspath(source)).name


def _open_live(backbone, argument):
    config = backbone.get_config()
    stack, size, cap = keras_hub_format.read_gemma2_config(config, f"`{argument}`")
    entries = {
        name: VariableTensor(value, shape, dtype)
        for name, value, shape, dtype in _live_values(backbone, argument)
    }
    return Gemma2(
        backbone.name,
        stack,
        size,
        cap,
        _MAX_POSITIONS,
        weight_maps.import_tensors(
            weight_maps.expand(weight_maps.GEMMA2_KERAS_HUB, stack.num_layers),
            {"": stack},
            weight_maps.tower_shapes(stack, size),
            entries,
            (),
            f"`{argument}`",
        ),
        None,
        False,
    )


def live_layers(
    backbone: Any,
) -> dict[str, keras.layers.Layer]:
    """`{dataset path in KerasHub's weight files: layer}` of a live GemmaBackbone.

    The paths follow attributes: `layers/gemma_decoder_block_3/attention/query_dense`
    is `get_layer("decoder_block_3").attention.query_dense`.
    """
    tops = {
        "reversible_embedding": backbone.token_embedding,
        "rms_normalization": backbone.get_layer("final_normalization"),
    }
    for i in range(backbone.num_layers):
        suffix = f"_{i}" if i else ""
        block = backbone.get_layer(f"decoder_block_{i}")
        tops[f"gemma_decoder_block{suffix}"] = block
    rows = weight_maps.expand(weight_maps.GEMMA2_KERAS_HUB, backbone.num_layers)
    layers = {}
    for name, _ in rows.values():
        _, top, *attributes = name.removesuffix("/vars/0").split("/")
        layer = tops[top]
        for attribute in attributes:
            layer = getattr(layer, attribute)
        layers[name] = layer
    return layers


def _live_values(backbone: Any, argument: str) -> Iterator[tuple]:
    for name, layer in live_layers(backbone).items():
        if getattr(layer, "quantization_mode", None):
            raise ValueError(
                f"`{argument}` is quantized; adapt the float model and quantize the "
                "result."
            )
        variable = next(v for v in layer.weights if not v.name.startswith("lora_"))
        value = _reader(layer, variable)
        yield name, value, tuple(variable.shape), variable.dtype


def _reader(layer, variable):
    if getattr(layer, "lora_enabled", False):
        return lambda: getattr(layer, variable.name)  # This property merges LoRA.
    return lambda: variable.value
