"""Reading sources on PyTorch, without Keras layers.

The arithmetic of `Encoder` and of the cross-attention cache on the model's tensors, for
short sources: what is read in blocks takes its time in attention. A test compares both.
In eager PyTorch on a CPU, reading 128 tokens through the layers takes up to twice the
time, in many small calls and in functions for which there are faster forms:

- int8: rows are rounded once for all projections that read them; the soft cap is
  `2 cap sigmoid(2 x / cap)`, since the softmax ignores a constant, with an error of
  6e-8 of the cap, for usual caps far below that of rounding;
- GELU of float32 is computed with the sigmoid, in half the time;
- a batch is read in parts of rows whose activations fit the processor's cache.

Weights are read from the layers at every call: nothing is copied. Layers are not
called, so hooks on them are not, either.
"""

import math
from typing import Any

import keras
import torch

from keras_t5gemma.modeling import int8_products
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.blockwise_attention import BlockwiseMask, attention_mask
from keras_t5gemma.modeling.float_products import matmul
from keras_t5gemma.modeling.int8_products import (
    torch_product_of_rounded,
    torch_rounded,
)
from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.modeling.rotary import rotary_angles
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.modeling.towers import Encoder

_LARGEST_CAP = 64.0  # For which the sigmoid is precise enough.
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def read(
    backbone: Any, token_ids: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, tuple | None]:
    """Encoder output, and the keys and values that the decoder takes from it.

    Args:
        backbone: a `Backbone`.
        token_ids: int `(B, S)`.
        padding: `(B, S)`, 0 for padding.

    Returns:
        `(states (B, S, D), cross)`, `cross` as in `Decoder.make_cache`; `None` for a
        model or a length that goes through the layers.
    """
    encoder = backbone.encoder
    masks = _masks(encoder, padding)
    is_fast = masks is not None and _is_supported(backbone, padding)
    if is_fast:
        (x,) = encoder(token_ids, padding, layers=[0])  # The embeddings.
        is_fast = x.dtype == getattr(torch, encoder.compute_dtype)
    if not is_fast:
        return backbone.encode(token_ids, padding), None
    batch, length, width = x.shape
    rows = max(1, _tokens_at_once(encoder.stack) // length)
    turn = _Turn(length, encoder.stack)
    states = torch.empty_like(x)
    for i in range(0, batch, rows):
        some = slice(i, i + rows)
        part = {k: m if m is None else m[some] for k, m in masks.items()}
        y = _layers(encoder, x[some].reshape(-1, width).clone(), turn, part)
        states[some] = encoder.normalize(y.view(-1, length, width))
    return states, _keys_values(backbone.decoder, states)


def _tokens_at_once(stack):
    """Tokens whose activations fit a processor's cache, or enough for the weights."""
    return max(256, 2**18 // stack.intermediate_dim)


def _layers(encoder, x, turn, masks):
    """States `(R, D)` after all layers; `x`, their input, is overwritten."""
    rounded = bool(encoder.blocks[0].mlp.down.quantization_mode)
    stack = encoder.stack
    for block, kind in zip(encoder.blocks, stack.layer_types, strict=True):
        attention, mlp = block.self_attention, block.mlp
        y = _norm(block.pre_self_norm, x)
        y = _products(y, attention.query, attention.key, attention.value)
        y = _attend(y, stack, turn, masks[kind], rounded)
        (y,) = _products(y, attention.output_projection)
        x += _norm(block.post_self_norm, y)
        gate, up = _products(_norm(block.pre_mlp_norm, x), mlp.gate, mlp.up)
        (y,) = _products(_gated(gate, up), mlp.down)
        x += _norm(block.post_mlp_norm, y)
    return x


def _masks(encoder, padding):
    """The mask of each kind of layer, `None` where all is seen; `None` for blocks."""
    windows = {
        "full_attention": None,
        "sliding_attention": encoder.stack.sliding_window,
    }
    masks = {}
    for kind in set(encoder.stack.layer_types):
        visibility = Visibility(padding, padding, False, windows[kind])
        mask = attention_mask(visibility, encoder.attention_kernel)
        if isinstance(mask, BlockwiseMask):
            return None
        masks[kind] = None if bool(mask.all()) else ~mask[:, None, None]
    return masks


def _is_supported(backbone, x):
    """Whether every projection is a plain float or int8 matrix, without LoRA.

    All in one dtype, in a model whose encoder is that of this package.
    """
    encoder = backbone.encoder
    if type(backbone).encode is not Backbone.encode or type(encoder) is not Encoder:
        return False
    layers = [encoder.token_embedding, encoder.final_norm]
    for block in encoder.blocks:
        layers += [block.pre_self_norm, block.post_self_norm]
        layers += [block.pre_mlp_norm, block.post_mlp_norm]
    dtypes = {layer.compute_dtype for layer in layers}
    layers = []
    for block in encoder.blocks:
        attention, mlp = block.self_attention, block.mlp
        layers += [attention.query, attention.key, attention.value]
        layers += [attention.output_projection, mlp.gate, mlp.up, mlp.down]
    for block in backbone.decoder.blocks:
        layers += [block.cross_attention.key, block.cross_attention.value]
    modes = {layer.quantization_mode for layer in layers}
    if any(getattr(layer, "lora_enabled", False) for layer in layers):
        return False
    dtypes |= {layer.compute_dtype for layer in layers}
    # Keras's products of float64 are float32 on PyTorch.
    if dtypes != {encoder.compute_dtype} or "float64" in dtypes:
        return False
    return modes == {None} or (modes == {"int8"} and int8_products.is_fast(x))


def _norm(layer, x):
    weight = layer.scale.value.float() + 1.0
    y = torch.nn.functional.rms_norm(x.float(), weight.shape, weight, layer.epsilon)
    return y.to(x.dtype)


def _products(x, *layers):
    """`x` `(R, in)` times the kernels of some layers."""
    if not layers[0].quantization_mode:
        return [matmul(x, layer.kernel.value.to(x.dtype)) for layer in layers]
    rounded = torch_rounded(x)
    weights = [(layer.kernel.value, layer.kernel_scale.value) for layer in layers]
    return [torch_product_of_rounded(*rounded, *w).to(x.dtype) for w in weights]


class _Turn:
    """Rotary embedding in float32, of `(R, heads H)` as `(B, heads, T, H)`."""

    def __init__(self, length, stack):
        positions = keras.ops.arange(length)
        angles = rotary_angles(positions, stack.head_dim, stack.rope_base)
        self.sin, self.cos = (torch.as_tensor(a) for a in angles)  # T H/2
        self.length, self.size = length, stack.head_dim

    def __call__(self, x):
        x = _by_heads(x.float(), self.length, self.size)
        first, second = x.chunk(2, dim=-1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        left, right = out.chunk(2, dim=-1)
        torch.mul(first, self.cos, out=left).addcmul_(second, self.sin, value=-1)
        torch.mul(second, self.cos, out=right).addcmul_(first, self.sin)
        return out


def _by_heads(x, length, size):
    """`(R, heads H)` as `(B, heads, T, H)`."""
    return x.view(-1, length, x.shape[1] // size, size).transpose(1, 2)


def _attend(projections, stack, turn, mask, rounded):
    """Mixed values `(R, N H)`."""
    query, key, value = projections
    kv_heads, size, length = stack.num_key_value_heads, stack.head_dim, turn.length
    groups = stack.num_query_heads // kv_heads
    cap, dtype = stack.attention_soft_cap, value.dtype
    value = _by_heads(value, length, size)  # B K S H
    batch = len(value)
    query = turn(query).to(dtype).mul_(stack.query_scale)
    query = query.view(batch, kv_heads, groups * length, size)  # B K GT H
    logits = (query @ turn(key).to(dtype).transpose(-1, -2)).float()
    if rounded and cap is not None and cap <= _LARGEST_CAP:
        logits.mul_(2 / cap).sigmoid_().mul_(2 * cap)
    else:
        logits = soft_cap(logits, cap)
    if mask is not None:
        by_group = logits.view(batch, kv_heads, groups, length, length)
        by_group.masked_fill_(mask, -1e30)
    weights = logits.softmax(-1)
    if mask is not None:  # Padding sees nothing.
        weights.view(by_group.shape).masked_fill_(mask, 0.0)
    mixed = weights.to(dtype) @ value
    mixed = mixed.view(batch, kv_heads, groups, length, size)
    return mixed.permute(0, 3, 1, 2, 4).reshape(batch * length, -1)


def _gated(gate, up):
    """`gelu(gate) * up`, in the tanh form."""
    if gate.dtype != torch.float32:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    slope = gate.new_tensor(_SLOPE)
    inner = torch.addcmul(slope, gate, gate, value=_SLOPE * _CUBIC)
    inner.mul_(gate).sigmoid_()
    return inner.mul_(gate).mul_(up)


def _keys_values(decoder, states):
    """Keys and values of every layer, `(B, K, S, H)`."""
    batch, length, width = states.shape
    stack = decoder.stack
    attentions = [block.cross_attention for block in decoder.blocks]
    layers = [layer for a in attentions for layer in (a.key, a.value)]
    shape = batch, length, stack.num_key_value_heads, stack.head_dim
    heads = [
        y.view(shape).transpose(1, 2)
        for y in _products(states.reshape(-1, width), *layers)
    ]
    return tuple(zip(heads[::2], heads[1::2], strict=True))
