"""A tiny teacher for distillation."""

import keras_hub
import numpy as np

VOCABULARY = 480


def make_teacher(vocabulary=VOCABULARY, seed=0):
    """A random Gemma 2 of KerasHub's, sure enough of itself to teach something."""
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=vocabulary,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=48,
        head_dim=8,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        dtype="float32",
    )
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
