"""Decoder-only Gemma 2: KerasHub's presets and live models, transformers' folders."""

import dataclasses
import os
from pathlib import Path

import keras_hub

from keras_t5gemma.checkpoints import (
    h5_file,
    huggingface,
    keras_hub_format,
    presets,
    safetensors_file,
    weight_maps,
)
from keras_t5gemma.checkpoints.lazy_tensors import VariableTensor
from keras_t5gemma.config import StackConfig


@dataclasses.dataclass(frozen=True)
class Gemma2:
    """A source of `adapt_gemma2`, opened: its tensors are found, not read.

    Args:
        name: what it is called in messages and in the lineage; no path.
        stack: `StackConfig`.
        vocabulary_size: V.
        final_soft_cap: of the vocabulary logits.
        max_positions: longest sequence in tokens.
        tensors: `{path in a tower of ours: unread tensor}`.
        tokenizer_file: path of the SentencePiece model, or `None`.
        instruction_tuned: whether its name says so.
    """

    name: str
    stack: StackConfig
    vocabulary_size: int
    final_soft_cap: float | None
    max_positions: int
    tensors: dict
    tokenizer_file: str | None
    instruction_tuned: bool


def open_gemma2(source, argument="source"):
    """Open a Gemma 2.

    Args:
        source: a KerasHub preset name such as `"gemma2_2b_en"`, a folder of
            KerasHub's or transformers', an `hf://` or `kaggle://` handle, or a live
            `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        argument: what it is called in messages.

    Raises:
        ValueError: for another model (Gemma 1 and 3 among them), a quantized one, or
            files that do not fit, naming the file and the tensors.
        OSError: when a download fails, with what to do.
    """
    model = getattr(source, "backbone", source)
    if isinstance(model, keras_hub.models.GemmaBackbone):
        return _open_live(model, argument)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"`{argument}` must be the name or folder of a Gemma 2, or a live "
            f"keras_hub.models.GemmaBackbone; got {type(source).__name__}."
        )
    names = {
        name: row["kaggle_handle"]
        for name, row in keras_hub.models.GemmaBackbone.presets.items()
    }
    location = presets.locate(source, names, "a name of KerasHub's Gemma 2 presets")
    config = presets.read_json(location)
    where = f"{location}: config.json"
    registered, model_type = config.get("registered_name"), config.get("model_type")
    if registered == keras_hub_format.GEMMA:
        kind = presets.KERAS_HUB
        rows = weight_maps.GEMMA2_KERAS_HUB
        policy = config["config"].get("dtype") or {}
        if not isinstance(policy, str) and policy.get("class_name") != "DTypePolicy":
            raise ValueError(
                f"`{argument}` {location} is quantized; adapt the float checkpoint "
                "and quantize the result."
            )
        stack, size, cap = keras_hub_format.read_gemma2_config(config["config"], where)
        positions = 8192  # Gemma 2's; KerasHub's config does not say.
        dropped = ()
    elif model_type == "gemma2":
        kind = presets.HUGGING_FACE
        rows = weight_maps.GEMMA2_HUGGING_FACE
        try:
            stack = huggingface.read_stack(config, where)
            size = config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"{where} lacks the field {error}.") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{where} has a field of a wrong type: {error}.") from (
                error
            )
        cap = config.get("final_logit_softcapping", 30.0)
        positions = config.get("max_position_embeddings", 8192)
        dropped = weight_maps.GEMMA2_HUGGING_FACE_DROPPED
    else:
        found = registered or model_type or "no model at all"
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
        dropped,
        str(location),
    )
    try:
        tokenizer_file = presets.tokenizer_file(str(folder), kind)
    except ValueError:
        tokenizer_file = None
    return Gemma2(
        _name_of(source, location),
        stack,
        size,
        cap,
        positions,
        tensors,
        tokenizer_file,
        presets.is_instruction_tuned(source),
    )


def _name_of(source, location):
    """The handle, or the last part of a path: a lineage names no machine's folders."""
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
        8192,
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


def live_layers(backbone):
    """`{name in KerasHub's weight files: layer}` of a live GemmaBackbone.

    The names follow attributes: `layers/gemma_decoder_block_3/attention/query_dense`
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


def _live_values(backbone, argument):
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
        return lambda: getattr(layer, variable.name)  # Keras's property: merged.
    return lambda: variable.value
