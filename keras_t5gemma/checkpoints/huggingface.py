"""transformers' T5Gemma format: configuration in both directions, and export."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints import (
    generation_config,
    safetensors_file,
    weight_maps,
)
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.lazy_tensors import CastTensor, LazyTensor
from keras_t5gemma.checkpoints.presets import HUGGING_FACE_TOKENIZER, TOKENIZER_JSON
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.utils.checks import json_object, number


def read_config(config: dict[str, Any], source: str = "config.json") -> T5GemmaConfig:
    """A `T5GemmaConfig` from transformers' config.json, versions 4.53 to 5.x.

    Args:
        config: the parsed config.json.
        source: its name in messages.

    Raises:
        ValueError: for another model type, a missing field, or a variant of the
            network that T5Gemma does not have.
    """
    is_flat = config.get("model_type") == "t5_gemma_module"
    if is_flat and not config.get("is_decoder"):
        # One tower, whose config is not in a field; saved from `T5GemmaEncoder`.
        config = {"model_type": "t5gemma", "is_encoder_decoder": False} | {
            "encoder": config
        }
    if config.get("model_type") != "t5gemma":
        raise ValueError(
            f"{source} has model_type {config.get('model_type')!r}; needed: 't5gemma'."
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{source} has a quantization_config; only float weights are implemented."
        )
    try:
        # transformers' config of an encoder alone has a decoder too, which is ignored.
        alone = config.get("is_encoder_decoder") is False
        encoder, last = (
            json_object(config[name], name)
            for name in ("encoder", "encoder" if alone else "decoder")
        )
        return T5GemmaConfig(
            encoder=read_stack(encoder, source),
            decoder=None if alone else read_stack(last, source),
            vocabulary_size=last["vocab_size"],
            final_soft_cap=last.get("final_logit_softcapping", 30.0),
            dropout=last.get("dropout_rate", config.get("dropout_rate", 0.0)),
            max_positions=last.get("max_position_embeddings", 8192),
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source} has a field of a wrong type: {error}.") from error


# Variants of the network; what does not change the result is not listed.
_NEEDED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_ROPE_FIELDS = {"rope_theta", "rope_type", "type"}


def _check_rope(stack, field, source):
    """Refuse rotary embeddings other than the default ones."""
    rope = json_object(stack.get(field) or {}, field)
    kind = rope.get("rope_type", rope.get("type", "default"))
    changed = {k: v for k, v in rope.items() if k not in _ROPE_FIELDS}
    changed = {k: v for k, v in changed.items() if v not in (None, 1, 1.0)}
    if kind != "default" or changed:
        raise ValueError(
            f"{source} has {field} {rope!r}; only rope_type 'default' with a "
            "rope_theta is implemented."
        )


def read_stack(stack: dict[str, Any], source: str) -> StackConfig:
    """A `StackConfig` from transformers' dict of one tower, or of a Gemma 2.

    Raises:
        ValueError: for a variant of the network that Gemma 2 does not have.
        KeyError: for a missing field.
    """
    for field, needed in _NEEDED.items():
        if stack.get(field) not in (None, needed):
            raise ValueError(
                f"{source} has {field} {stack[field]!r}; only {needed!r} is T5Gemma."
            )
    for field in ("rope_scaling", "rope_parameters"):
        _check_rope(stack, field, source)
    rope = stack.get("rope_parameters") or {}
    layer_types: Any = stack.get("layer_types")
    scalar = stack.get("query_pre_attn_scalar", stack["head_dim"])
    base = rope.get("rope_theta", stack.get("rope_theta", 10_000.0))
    return StackConfig(
        num_layers=stack["num_hidden_layers"],
        hidden_dim=stack["hidden_size"],
        intermediate_dim=stack["intermediate_size"],
        num_query_heads=stack["num_attention_heads"],
        num_key_value_heads=stack["num_key_value_heads"],
        head_dim=stack["head_dim"],
        sliding_window=stack.get("sliding_window") or 4096,
        layer_types=layer_types,
        query_scale=number(scalar, "query_pre_attn_scalar", above=0) ** -0.5,
        attention_soft_cap=stack.get("attn_logit_softcapping", 50.0),
        rope_base=number(base, "rope_theta", above=0),
        rms_norm_epsilon=stack.get("rms_norm_eps", 1e-6),
    )


def read_gemma2_config(
    config: dict[str, Any], source: str
) -> tuple[StackConfig, int, float | None]:
    """Tower, vocabulary size and final soft cap of transformers' Gemma2Model.

    Args:
        config: the parsed config.json.
        source: its name in messages.

    Raises:
        ValueError: for a missing field, or a variant that Gemma 2 does not have.
    """
    try:
        stack, size = read_stack(config, source), config["vocab_size"]
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source} has a field of a wrong type: {error}.") from error
    return stack, size, config.get("final_logit_softcapping", 30.0)


def write_config(config: T5GemmaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of transformers, as a dict, from a `T5GemmaConfig`.

    Args:
        config: the model's; without a decoder the result is a `T5GemmaEncoderModel`'s.
        dtype: name of the dtype of the weights.

    Raises:
        ValueError: for a config that transformers' T5Gemma cannot express.
    """
    alone = config.decoder is None
    name = "T5GemmaEncoderModel" if alone else "T5GemmaForConditionalGeneration"
    shared = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return {
        "architectures": [name],
        "model_type": "t5gemma",
        **shared,
        "is_encoder_decoder": not alone,
        "dropout_rate": config.dropout,
        "attention_dropout": config.dropout,
        "classifier_dropout_rate": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "vocab_size": config.vocabulary_size,
        "encoder": {**_write_stack(config, "encoder"), **shared},
        "decoder": {
            # transformers requires it even for an encoder alone.
            **_write_stack(config, "encoder" if alone else "decoder"),
            **shared,
            "is_decoder": True,
            "cross_attention_hidden_size": config.encoder.hidden_dim,
        },
    }


def _write_stack(config: T5GemmaConfig, side: str) -> dict[str, Any]:
    stack = getattr(config, side)
    scalar = round(stack.query_scale**-2)
    if abs(scalar**-0.5 - stack.query_scale) > 1e-9:
        raise ValueError(
            f"`{side}.query_scale` must be 1 / sqrt(n) for a whole number n, which "
            f"transformers stores; got {stack.query_scale}."
        )
    if stack.hidden_dim % stack.num_query_heads:
        raise ValueError(
            f"`{side}.hidden_dim` must be a multiple of `num_query_heads` for "
            f"transformers; got {stack.hidden_dim} and {stack.num_query_heads}."
        )
    return {
        "model_type": "t5_gemma_module",
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.hidden_dim,
        "intermediate_size": stack.intermediate_dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_query_heads,
        "num_key_value_heads": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": stack.rms_norm_epsilon,
        "use_cache": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_base},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "dropout_rate": config.dropout,
        "query_pre_attn_scalar": scalar,
        "sliding_window": stack.sliding_window,
        "layer_types": list(stack.layer_types),
        "final_logit_softcapping": config.final_soft_cap,
        "attn_logit_softcapping": stack.attention_soft_cap,
        "is_decoder": side == "decoder",
    }


def save(
    folder: str | os.PathLike[str],
    config: T5GemmaConfig,
    tensors: Mapping[str, LazyTensor],
    dtype: np.dtype,
    preprocessor: Any = None,
    generation_defaults: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write a folder that transformers loads: atomic, one tensor in memory at a time.

    Args:
        folder: path.
        config: `T5GemmaConfig`.
        tensors: `{our variable path: tensor}`.
        dtype: NumPy dtype of the written weights.
        preprocessor: a `Seq2SeqLMPreprocessor`, whose tokenizer, template and stop ids
            are written; or `None` to leave the tokenizer's files out.
        generation_defaults: keywords of `Seq2SeqLM.generate`, for
            generation_config.json.
        max_shard_bytes: size of the largest weight file.
        progress: called with the number of bytes of each tensor that was written.

    Raises:
        ValueError: for a config that transformers cannot express.
        OSError: when the disk is full; then nothing is left behind.
    """
    parsed = write_config(config, dtype.name)
    alone = config.decoder is None
    table = weight_maps.HUGGING_FACE_ENCODER if alone else weight_maps.HUGGING_FACE
    exported = weight_maps.export_tensors(table, config, tensors)
    entries = {name: CastTensor(tensor, dtype) for name, tensor in exported.items()}

    def written(names, data):
        if progress is not None:
            progress(data.nbytes)

    with atomic_folder(folder) as staging:
        safetensors_file.write_folder(staging, entries, max_shard_bytes, written)
        if preprocessor is not None:
            _save_tokenizer(staging, preprocessor)
        if not alone:
            generation_config.save(staging, generation_defaults or {}, preprocessor)
        _write_json(staging / "config.json", parsed)


def _save_tokenizer(folder, preprocessor):
    tokenizer, template = preprocessor.tokenizer, preprocessor.chat_template()
    (folder / HUGGING_FACE_TOKENIZER).write_bytes(tokenizer.proto)
    text = tokenizer.tokenizer_json()
    (folder / TOKENIZER_JSON).write_text(text, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            # The encoder input has no bos and eos.
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
            "padding_side": "right",
            **({} if template is None else {"chat_template": template}),
        },
    )


def _write_json(path, value):
    path = Path(path)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
