"""Reading sources on PyTorch: the encoder, and all that the decoder takes from it."""

from typing import Any

import torch

from keras_t5gemma.modeling.attention import Attention
from keras_t5gemma.modeling.torch_encoder import are_plain, products


def read(
    backbone: Any, token_ids: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, tuple | None]:
    """Encoder output, and the keys and values that the decoder takes from it.

    Rows of int8 models are rounded once for the keys and values of all layers.

    Args:
        backbone: a `Backbone`.
        token_ids: int `(B, S)`.
        padding: `(B, S)`, 0 for padding.

    Returns:
        `(states (B, S, D), cross)`, `cross` as in `Decoder.make_cache`; `None` where
        the layers are to compute it.
    """
    states = backbone.encode(token_ids, padding)
    attentions = [block.cross_attention for block in backbone.decoder.blocks]
    layers = [layer for a in attentions for layer in (a.key, a.value)]
    if any(type(a) is not Attention for a in attentions):
        return states, None
    if not are_plain(layers, states):
        return states, None
    if states.dtype != getattr(torch, layers[0].compute_dtype):
        return states, None
    batch, length, width = states.shape
    stack = backbone.decoder.stack
    shape = batch, length, stack.num_key_value_heads, stack.head_dim
    heads = [
        y.view(shape).transpose(1, 2)
        for y in products(states.reshape(-1, width), *layers)
    ]  # B K S H
    return states, tuple(zip(heads[::2], heads[1::2], strict=True))
