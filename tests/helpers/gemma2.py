"""Tiny decoder-only Gemma 2 models of KerasHub."""

import keras_hub
import numpy as np

VOCABULARY = 480
WINDOW, VOCABULARY = 6, 480


BIG = {"hidden_dim": 32, "intermediate_dim": 96, "num_layers": 4}


SMALL = {"hidden_dim": 24, "intermediate_dim": 80, "num_layers": 2}


def make_gemma2(num_query_heads=4, num_key_value_heads=2, seed=0, **sizes):
    """A random Gemma 2 of KerasHub's, large enough that soft caps bite."""
    backbone = keras_hub.models.GemmaBackbone(
        **{"vocabulary_size": VOCABULARY, **sizes},
        num_query_heads=num_query_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=8,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=WINDOW,
        dtype="float32",
    )
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        std = 0.3 if variable.path.endswith("scale") else 0.25
        variable.assign(rng.normal(0, std, variable.shape).astype("float32"))
    return backbone
