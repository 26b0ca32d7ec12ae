"""KerasHub's presets: configurations of its T5Gemma and Gemma 2 backbones."""

from typing import Any

from keras_t5gemma.config import FULL, MAX_LAYERS, StackConfig, T5GemmaConfig
from keras_t5gemma.utils.checks import number, whole_number

T5GEMMA, GEMMA = "keras_hub>T5GemmaBackbone", "keras_hub>GemmaBackbone"


def read_config(config: dict[str, Any], source: str) -> T5GemmaConfig:
    """A `T5GemmaConfig` from the configuration of KerasHub's T5GemmaBackbone.

    Args:
        config: result of its `get_config()`.
        source: its name in messages.

    Raises:
        ValueError: for a missing field, or a variant that T5Gemma does not have.
    """
    try:
        _require(
            config,
            source,
            hidden_activation="gelu_approximate",
            attention_bias=False,
            tie_word_embeddings=True,
            cross_attention_hidden_size=config["encoder_hidden_dim"],
        )
        return T5GemmaConfig(
            _read_stack(config, "encoder"),
            _read_stack(config, "decoder"),
            vocabulary_size=config["vocabulary_size"],
            final_soft_cap=config["final_logit_softcapping"],
            dropout=config["dropout_rate"],
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source} has a field of a wrong type: {error}.") from error


def _read_stack(config: dict[str, Any], side: str) -> StackConfig:
    return StackConfig(
        num_layers=config[f"{side}_num_layers"],
        hidden_dim=config[f"{side}_hidden_dim"],
        intermediate_dim=config[f"{side}_intermediate_dim"],
        num_query_heads=config[f"{side}_num_attention_heads"],
        num_key_value_heads=config[f"{side}_num_key_value_heads"],
        head_dim=config[f"{side}_head_dim"],
        sliding_window=config["sliding_window"] or 4096,
        layer_types=config[f"{side}_layer_types"],
        query_scale=number(
            config["query_pre_attn_scalar"], "query_pre_attn_scalar", above=0
        )
        ** -0.5,
        attention_soft_cap=config["attn_logit_softcapping"],
        rope_base=config["rope_max_wavelength"],
        rms_norm_epsilon=config["rms_norm_eps"],
    )


def read_gemma2_config(
    config: dict[str, Any], source: str
) -> tuple[StackConfig, int, float | None]:
    """Tower, vocabulary size and final soft cap of KerasHub's GemmaBackbone.

    Args:
        config: result of its `get_config()`.
        source: its name in messages.

    Returns:
        `(StackConfig, vocabulary_size, final_soft_cap)`.

    Raises:
        ValueError: for Gemma 1, which has no norms after its sub-layers.
    """
    try:
        if not (config["use_post_ffw_norm"] and config["use_post_attention_norm"]):
            raise ValueError(
                f"{source} is Gemma 1, which has no norms after its sub-layers. Only "
                "Gemma 2 can be adapted."
            )
        heads = config["num_query_heads"]
        by_head = config["query_head_dim_normalize"]
        layer_types: Any = None
        if not config["use_sliding_window_attention"]:
            count = whole_number(config["num_layers"], "num_layers", 1, MAX_LAYERS)
            layer_types = (FULL,) * count
        return (
            StackConfig(
                num_layers=config["num_layers"],
                hidden_dim=config["hidden_dim"],
                # KerasHub counts the gate and the up projection together.
                intermediate_dim=config["intermediate_dim"] // 2,
                num_query_heads=heads,
                num_key_value_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                sliding_window=config["sliding_window_size"],
                layer_types=layer_types,
                query_scale=(
                    config["head_dim"] if by_head else config["hidden_dim"] // heads
                )
                ** -0.5,
                attention_soft_cap=config["attention_logit_soft_cap"],
                rms_norm_epsilon=config["layer_norm_epsilon"],
            ),
            config["vocabulary_size"],
            config["final_logit_soft_cap"],
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source} has a field of a wrong type: {error}.") from error


def _require(config, source, **needed):
    for field, value in needed.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"{source} has {field} {config[field]!r}; only {value!r} is T5Gemma."
            )
