"""Hugging Face T5Gemma folders: config.json, safetensors, tokenizer.model."""

import json
from pathlib import Path

from keras_t5gemma.checkpoints import safetensors_file, weight_maps
from keras_t5gemma.checkpoints.deferred import build_and_fill
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.modeling.backbone import Backbone, track_parameters

TOKENIZER_FILE = "tokenizer.model"


def read_config(config, source="config.json"):
    """A `T5GemmaConfig` from transformers' dict, versions 4.53 to 5.x.

    Args:
        config: the parsed config.json.
        source: what to call it in messages.

    Raises:
        ValueError: for another model type, a missing field, or a variant of the
            network that T5Gemma does not have.
    """
    if config.get("model_type") != "t5gemma":
        raise ValueError(
            f"{source} has model_type {config.get('model_type')!r}; needed: 't5gemma'."
        )
    try:
        encoder, decoder = (config[side] for side in ("encoder", "decoder"))
        return T5GemmaConfig(
            encoder=_read_stack(encoder, source),
            decoder=_read_stack(decoder, source),
            vocabulary_size=decoder["vocab_size"],
            final_soft_cap=decoder.get("final_logit_softcapping", 30.0),
            dropout=decoder.get("dropout_rate", config.get("dropout_rate", 0.0)),
            max_positions=decoder.get("max_position_embeddings", 8192),
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error


def _read_stack(stack, source):
    for field, needed in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("tie_word_embeddings", True),
    ):
        if stack.get(field, needed) != needed:
            raise ValueError(
                f"{source} has {field} {stack[field]!r}; only {needed!r} is T5Gemma."
            )
    rope = stack.get("rope_parameters") or {}
    return StackConfig(
        num_layers=stack["num_hidden_layers"],
        hidden_dim=stack["hidden_size"],
        intermediate_dim=stack["intermediate_size"],
        num_query_heads=stack["num_attention_heads"],
        num_key_value_heads=stack["num_key_value_heads"],
        head_dim=stack["head_dim"],
        sliding_window=stack.get("sliding_window") or 4096,
        layer_types=stack.get("layer_types"),
        query_scale=stack.get("query_pre_attn_scalar", stack["head_dim"]) ** -0.5,
        attention_soft_cap=stack.get("attn_logit_softcapping", 50.0),
        rope_base=float(rope.get("rope_theta", stack.get("rope_theta", 10_000.0))),
        rms_norm_epsilon=stack.get("rms_norm_eps", 1e-6),
    )


def load_backbone(folder, load_weights=True, dtype=None, **kwargs):
    """A `Backbone` from a folder, each tensor read once into its variable.

    Args:
        folder: path with config.json and safetensors, whole or sharded, in
            float32, bfloat16 or float16.
        load_weights: `False` leaves the weights random.
        dtype: dtype policy of the backbone.
        **kwargs: further arguments of `Backbone`.

    Raises:
        ValueError: naming the file and the tensors that do not fit; then nothing
            is returned.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    if not load_weights:
        return Backbone(config, dtype=dtype, **kwargs)
    entries = safetensors_file.read_folder(folder)
    rows = weight_maps.expand(weight_maps.HUGGING_FACE, config)

    def read(backbone):
        variables = {v.path: v for v in backbone.weights}
        dropped = weight_maps.HUGGING_FACE_DROPPED
        weight_maps.check_coverage(rows, dropped, variables, entries, str(folder))
        return {
            ours: _tensor_reader(entries[theirs], weight_maps.RULES[rule])
            for ours, (theirs, rule) in rows.items()
        }

    backbone = build_and_fill(lambda: Backbone(config, dtype=dtype, **kwargs), read)
    track_parameters(backbone)
    return backbone


def _tensor_reader(entry, rule):
    return lambda: rule(entry.read())
