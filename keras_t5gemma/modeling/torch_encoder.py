"""The blocks of an encoder on PyTorch, without Keras layers.

The arithmetic of `EncoderBlock` on the model's tensors, for inference on short
sequences: what attends in blocks takes its time in attention. A test compares both.
In eager PyTorch on a CPU, reading 128 tokens through the layers takes up to twice the
time, in many small calls and in functions for which there are faster forms:

- int8: rows are rounded once for all projections that read them; the soft cap is
  `2 cap sigmoid(2 x / cap)`, since the softmax ignores a constant, with an error of
  6e-8 of the cap, for usual caps far below that of rounding;
- GELU of float32 is computed with the sigmoid, in half the time;
- a batch is read in parts of rows whose activations fit the processor's cache.

Weights are read from the layers at every call: nothing is copied. Where a layer has a
hook or another `call` than its class, the layers are called.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from keras_t5gemma import _compat
from keras_t5gemma.modeling import int8_products
from keras_t5gemma.modeling.attention import Attention
from keras_t5gemma.modeling.blocks import EncoderBlock
from keras_t5gemma.modeling.blockwise_attention import BlockwiseMask
from keras_t5gemma.modeling.float_products import matmul
from keras_t5gemma.modeling.int8_products import (
    torch_product_of_rounded,
    torch_rounded,
)
from keras_t5gemma.modeling.layers import GatedMLP, Projection, RMSNorm
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.utils.backends import on_cpu

_LARGEST_CAP = 64.0  # For which the sigmoid is precise enough.
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def is_supported(encoder: Any, x: torch.Tensor, masks: dict) -> bool:
    """Whether `run` may be used.

    On a CPU, without gradients and outside of a program that PyTorch compiles or
    transforms; for plain layers of one dtype, float or int8, without LoRA and hooks.

    Args:
        encoder: an `Encoder`.
        x: see `run`.
        masks: see `run`.
    """
    if not on_cpu(x) or torch.is_grad_enabled() or _compat.torch_is_tracing():
        return False
    if any(isinstance(mask, BlockwiseMask) for mask in masks.values()):
        return False
    return x.dtype == getattr(torch, encoder.compute_dtype) and _is_plain(encoder, x)


def run(
    encoder: Any,
    x: torch.Tensor,
    masks: dict,
    angles: tuple[torch.Tensor, torch.Tensor],
    numbers: Iterable[int],
) -> dict[int, torch.Tensor]:
    """States after blocks, without the final norm.

    Args:
        encoder: an `Encoder` that `is_supported`.
        x: embeddings `(B, T, D)`.
        masks: boolean mask `(B, T, T)` of each kind of layer.
        angles: `(sin, cos)` of the positions, `(T, H/2)`.
        numbers: of the blocks after which states are wanted; 0 for `x`.

    Returns:
        `{number: (B, T, D)}`.
    """
    batch, length, width = x.shape
    turn = _Turn(length, encoder.stack.head_dim, angles)
    # `None` where nothing is masked.
    hidden = {k: None if bool(m.all()) else ~m[:, None, None] for k, m in masks.items()}
    found = {number: torch.empty_like(x) if number else x for number in numbers}
    rows = max(1, _tokens_at_once(encoder.stack) // max(1, length))
    for i in range(0, batch, rows):
        some = slice(i, i + rows)
        part = {k: m if m is None else m[some] for k, m in hidden.items()}
        y = x[some].reshape(-1, width).clone()
        for j in range(max(found, default=0)):
            y = _block(encoder, j, y, turn, part)
            if j + 1 in found:
                found[j + 1][some] = y.view(-1, length, width)
    return found


def products(x: torch.Tensor, *layers: Projection) -> list[torch.Tensor]:
    """`x` `(R, in)` times the kernels of some layers, all float or all int8."""
    if not layers[0].quantization_mode:
        return [matmul(x, layer.kernel.value.to(x.dtype)) for layer in layers]
    rounded = torch_rounded(x)
    weights = [(layer.kernel.value, layer.kernel_scale.value) for layer in layers]
    return [torch_product_of_rounded(*rounded, *w).to(x.dtype) for w in weights]


def are_plain(layers: list[Projection], x: torch.Tensor, dtypes: Iterable = ()) -> bool:
    """Whether `products` of `x` is what the layers compute.

    Args:
        layers: projections.
        x: their input.
        dtypes: compute dtypes of other layers, which must be the same.
    """
    if any(type(layer) is not Projection or layer.lora_enabled for layer in layers):
        return False
    if any(map(is_changed, layers)):
        return False
    dtypes = {layer.compute_dtype for layer in layers}.union(dtypes)
    # Keras's products of float64 are float32 on PyTorch.
    if len(dtypes) > 1 or "float64" in dtypes:
        return False
    modes = {layer.quantization_mode for layer in layers}
    return modes == {None} or (modes == {"int8"} and int8_products.is_fast(x))


def is_changed(layer: Any) -> bool:
    """Whether a user gave a layer a hook or another `call`."""
    is_replaced = not {"call", "forward"}.isdisjoint(vars(layer))
    return is_replaced or _compat.has_torch_hooks(layer)


def _tokens_at_once(stack):
    """Tokens whose activations fit a processor's cache, or enough for the weights."""
    return max(256, 2**18 // stack.intermediate_dim)


def _is_plain(encoder, x):
    """Whether all blocks are of this package, without LoRA, hooks or mixed dtypes."""
    layers, projections = [], []
    for block in encoder.blocks:
        if type(block) is not EncoderBlock:
            return False
        attention, mlp = block.self_attention, block.mlp
        if type(attention) is not Attention or type(mlp) is not GatedMLP:
            return False
        norms = [block.pre_self_norm, block.post_self_norm]
        norms += [block.pre_mlp_norm, block.post_mlp_norm]
        if any(type(norm) is not RMSNorm for norm in norms):
            return False
        layers += [block, attention, mlp, *norms]
        projections += [attention.query, attention.key, attention.value]
        projections += [attention.output_projection, mlp.gate, mlp.up, mlp.down]
    if any(map(is_changed, layers)):
        return False
    dtypes = {layer.compute_dtype for layer in layers} | {encoder.compute_dtype}
    return are_plain(projections, x, dtypes)


def _block(encoder, number, x, turn, masks):
    """States `(R, D)` after a block; `x`, its input, is overwritten."""
    block, kind = encoder.blocks[number], encoder.stack.layer_types[number]
    attention, mlp = block.self_attention, block.mlp
    rounded = bool(mlp.down.quantization_mode)
    y = _norm(block.pre_self_norm, x)
    y = products(y, attention.query, attention.key, attention.value)
    y = _attend(y, attention, turn, masks[kind], rounded)
    (y,) = products(y, attention.output_projection)
    x += _norm(block.post_self_norm, y)
    gate, up = products(_norm(block.pre_mlp_norm, x), mlp.gate, mlp.up)
    (y,) = products(_gated(gate, up), mlp.down)
    x += _norm(block.post_mlp_norm, y)
    return x


def _norm(layer, x):
    with _compat.variables_as_stored():  # As in the layer, which does not autocast.
        weight = layer.scale.value.float() + 1.0
    y = torch.nn.functional.rms_norm(x.float(), weight.shape, weight, layer.epsilon)
    return y.to(x.dtype)


class _Turn:
    """Rotary embedding in float32, of `(R, heads H)` as `(B, heads, T, H)`."""

    def __init__(self, length, size, angles):
        self.sin, self.cos = angles  # T H/2
        self.length, self.size = length, size

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


def _attend(projections, attention, turn, mask, rounded):
    """Mixed values `(R, N H)`."""
    query, key, value = projections
    kv_heads, size = attention.num_key_value_heads, attention.head_dim
    groups, length = attention.num_query_heads // kv_heads, turn.length
    cap, dtype = attention.soft_cap, value.dtype
    value = _by_heads(value, length, size)  # B K S H
    batch = len(value)
    query = turn(query).to(dtype).mul_(attention.query_scale)
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
