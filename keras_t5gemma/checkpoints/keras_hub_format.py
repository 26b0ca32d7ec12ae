"""KerasHub's presets: the configurations of its T5Gemma and Gemma 2 backbones."""

from keras_t5gemma.config import StackConfig, T5GemmaConfig

T5GEMMA, GEMMA = "keras_hub>T5GemmaBackbone", "keras_hub>GemmaBackbone"


def read_config(config, source):
    """A `T5GemmaConfig` from the `config` of KerasHub's T5GemmaBackbone.

    Args:
        config: dict, as its `get_config()` gives it.
        source: what to call it in messages.

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
            *(_read_stack(config, side) for side in ("encoder", "decoder")),
            vocabulary_size=config["vocabulary_size"],
            final_soft_cap=config["final_logit_softcapping"],
            dropout=config["dropout_rate"],
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source} has a field of a wrong type: {error}.") from error


def _read_stack(config, side):
    return StackConfig(
        num_layers=config[f"{side}_num_layers"],
        hidden_dim=config[f"{side}_hidden_dim"],
        intermediate_dim=config[f"{side}_intermediate_dim"],
        num_query_heads=config[f"{side}_num_attention_heads"],
        num_key_value_heads=config[f"{side}_num_key_value_heads"],
        head_dim=config[f"{side}_head_dim"],
        sliding_window=config["sliding_window"] or 4096,
        layer_types=config[f"{side}_layer_types"],
        query_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=config["attn_logit_softcapping"],
        rope_base=config["rope_max_wavelength"],
        rms_norm_epsilon=config["rms_norm_eps"],
    )


def read_gemma2_config(config, source):
    """Tower, vocabulary and final soft cap of KerasHub's GemmaBackbone.

    Args:
        config: dict, as its `get_config()` gives it.
        source: what to call it in messages.

    Returns:
        `(StackConfig, vocabulary_size, final_soft_cap)`.

    Raises:
        ValueError: for Gemma 1, which has no norms after its sub-layers.
    """
    try:
        if not (config["use_post_ffw_norm"] and config["use_post_attention_norm"]):
            raise ValueError(
                f"{source} is Gemma 1: it has no norms after its sub-layers. Only "
                "Gemma 2 can be adapted."
            )
        heads = config["num_query_heads"]
        by_head = config["query_head_dim_normalize"]
        windows = config["use_sliding_window_attention"]
        return (
            StackConfig(
                num_layers=config["num_layers"],
                hidden_dim=config["hidden_dim"],
                # Theirs counts the gate and the up projection together.
                intermediate_dim=config["intermediate_dim"] // 2,
                num_query_heads=heads,
                num_key_value_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                sliding_window=config["sliding_window_size"],
                layer_types=None
                if windows
                else ["full_attention"] * config["num_layers"],
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
