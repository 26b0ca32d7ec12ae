"""Tiny T5Gemma models of KerasHub."""

import keras_hub
import numpy as np

WINDOW = 8


def make_kerashub(dtype="float32"):
    """A random T5Gemma of KerasHub's with unequal towers."""
    backbone = keras_hub.models.T5GemmaBackbone(
        vocabulary_size=480,
        encoder_hidden_dim=32,
        encoder_intermediate_dim=64,
        encoder_num_layers=3,
        encoder_num_attention_heads=4,
        encoder_num_key_value_heads=2,
        encoder_head_dim=8,
        encoder_layer_types=[
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        decoder_hidden_dim=24,
        decoder_intermediate_dim=48,
        decoder_num_layers=2,
        decoder_num_attention_heads=4,
        decoder_num_key_value_heads=1,
        decoder_head_dim=8,
        decoder_layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    for variable in backbone.weights:
        std = 0.3 if variable.path.endswith("scale") else 0.5
        variable.assign(rng.normal(0, std, variable.shape).astype("float32"))
    return backbone
