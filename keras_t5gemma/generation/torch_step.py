"""The decoding step on PyTorch, without Keras layers.

In eager PyTorch a token through the layers costs several times its arithmetic, because
of thousands of small calls. This is the same arithmetic on the model's tensors; a test
compares it with `Decoder.step`. With few rows the time is that of reading the weights,
so matrix products are written to read at memory bandwidth:

- eager: as a batch of column blocks, which MKL distributes over threads; many rows as
  in `float_products`;
- compiled, one row: as multiply and sum, which Inductor fuses with its surroundings;
- int8: by FBGEMM, with activations of 7 or 8 bits scaled row by row.
"""

import warnings
from typing import Any

import keras
import torch

from keras_t5gemma import _compat
from keras_t5gemma.config import SLIDING
from keras_t5gemma.modeling.float_products import is_faster, matmul
from keras_t5gemma.modeling.kv_cache import slot_positions
from keras_t5gemma.modeling.layers import Projection
from keras_t5gemma.modeling.masks import causal_mask
from keras_t5gemma.modeling.rotary import rotary_angles
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.modeling.torch_encoder import is_changed
from keras_t5gemma.utils.buckets import equal_chunks

_LOGIT_CHUNKS = 4
# Projections of a block.
_ATTENTION = ("query", "key", "value", "output_projection")
_MLP = ("gate", "up", "down")


def is_supported(backbone: Any) -> bool:
    """Whether all projections are plain float or int8 matrices, no LoRA, no hooks."""
    layers = _projections(backbone.decoder)
    modes = {layer.quantization_mode for layer in layers}
    more = any(getattr(layer, "lora_enabled", False) for layer in layers)
    more |= any(map(is_changed, layers))
    more |= any(type(layer) is not Projection for layer in layers[1:])
    if modes == {"int8"}:
        on_cpu = backbone.variables[0].value.device.type == "cpu"
        has_kernels = "fbgemm" in torch.backends.quantized.supported_engines
        has_kernels &= _compat.has_per_channel_int8()
        return not more and on_cpu and has_kernels
    return not more and modes == {None}


def _projections(decoder):
    """The table and every matrix that a decoding step multiplies with."""
    layers = [decoder.token_embedding]
    for block in decoder.blocks:
        for attention in (block.self_attention, block.cross_attention):
            layers += [getattr(attention, name) for name in _ATTENTION]
        layers += [getattr(block.mlp, name) for name in _MLP]
    return layers


def fingerprint(backbone: Any) -> tuple:
    """A value that changes when a weight of the decoder changes."""
    return tuple(
        (id(variable.value), _compat.tensor_version(variable.value))
        for variable in backbone.decoder.variables
    )


class TorchStep:
    """The decoding step of one decoder; see `decoding.plain_step`.

    Args:
        backbone: a `Backbone` that `is_supported`. When its weights change, make a new
            step; see `fingerprint`.
        compiled: use one code path for all positions, as `torch.compile` needs.
        one_row: whether it will be used for one row only.
    """

    def __init__(
        self, backbone: Any, compiled: bool = False, one_row: bool = False
    ) -> None:
        decoder = backbone.decoder
        self.stack = decoder.stack
        self.compiled = compiled
        self.groups = self.stack.num_query_heads // self.stack.num_key_value_heads
        self.dtype = getattr(torch, decoder.compute_dtype)
        self.final_cap = backbone.config.final_soft_cap
        self.scale = torch.tensor(self.stack.hidden_dim**0.5, dtype=self.dtype)
        self.make_product: type = _Columns
        if decoder.token_embedding.quantization_mode:
            self.make_product = _Int8
        elif compiled and one_row:
            self.make_product = _MultiplySum
        self.embed, self.table = self._table(decoder.token_embedding)
        self.final_norm = self._norm(decoder.final_norm)
        self.blocks = [self._block(block) for block in decoder.blocks]
        positions = keras.ops.arange(backbone.config.max_positions)
        sin, cos = rotary_angles(positions, self.stack.head_dim, self.stack.rope_base)
        self.sin, self.cos = (
            torch.as_tensor(a)[:, None] for a in (sin, cos)
        )  # L 1 H/2

    def _table(self, layer):
        """The embedding lookup, and the product with the logit table."""
        values = layer.embeddings.value.detach()
        if layer.quantization_mode:
            scale = layer.embeddings_scale.value.detach()

            def embed(token):
                rows = values[token].to(self.dtype)
                return rows / scale[token][:, None].to(self.dtype)

            return embed, _Int8(values, scale)
        values = values.to(self.dtype)
        return lambda token: values[token], _Table(values)

    def _norm(self, layer):
        return 1.0 + layer.scale.value.detach().float(), layer

    def _product(self, layer):
        kernel = layer.kernel.value.detach()
        if layer.quantization_mode:
            return _Int8(kernel.t().contiguous(), layer.kernel_scale.value.detach())
        return self.make_product(kernel.to(self.dtype))

    def _block(self, block):
        def products(layer, names):
            return {name: self._product(getattr(layer, name)) for name in names}

        return {
            "layer": block,
            "self": products(block.self_attention, _ATTENTION),
            "cross": products(block.cross_attention, ("query", "output_projection")),
            "mlp": products(block.mlp, _MLP),
            "norms": {
                f"{place}_{name}": self._norm(getattr(block, f"{place}_{name}_norm"))
                for name in ("self", "cross", "mlp")
                for place in ("pre", "post")
            },
        }

    def __call__(
        self,
        token: torch.Tensor,
        cache: dict,
        index: Any,
        capped: bool = True,
    ) -> tuple[torch.Tensor, dict]:
        """Logits `(R, V)` after one more token; the cache is updated in place.

        Args:
            token: int `(R,)`, the token at position `index`; or `(R, T)`, the tokens of
                each row from its own position on, for a cache with spare slots.
            cache: from `Decoder.make_cache`.
            index: int, or a scalar tensor; or `(R,)`.
            capped: apply the final soft cap.

        Returns:
            `(logits, cache)`; logits `(R T, V)` for several tokens.
        """
        return self.logits(self.hidden(token, cache, index), capped), cache

    def logits(self, hidden: torch.Tensor, capped: bool) -> torch.Tensor:
        """Logits `(R, V)` of states `(R, D)`."""
        logits = self.table(hidden)
        if not capped:
            return logits
        # Sampling and beam search read them row by row, several times.
        return soft_cap(logits.contiguous(), self.final_cap)

    def hidden(self, token: torch.Tensor, cache: dict, index: Any) -> torch.Tensor:
        """States `(R, D)` of one more token; the cache is updated in place."""
        if token.ndim == 2:
            index = _Positions(index, token.shape[1], self.groups)
            token = token.reshape(-1)
        else:
            index = index.long().reshape(1) if self.compiled else int(index)
        mask = cache["cross_mask"]
        mask = ~mask[:, None, None]  # B 1 1 S, True is masked out.
        if not self.compiled and not bool(mask.any()):
            mask = None
        x = self.embed(token) * self.scale  # R D
        for i, block in enumerate(self.blocks):
            norms = block["norms"]
            y = self._rms(x, norms["pre_self"])
            x = x + self._rms(
                self._self_attention(y, i, cache["self"][i], index),
                norms["post_self"],
            )
            y = self._rms(x, norms["pre_cross"])
            x = x + self._rms(
                self._cross_attention(y, block, cache["cross"][i], mask),
                norms["post_cross"],
            )
            y = self._rms(x, norms["pre_mlp"])
            mlp = block["mlp"]
            gate = torch.nn.functional.gelu(mlp["gate"](y), approximate="tanh")
            x = x + self._rms(mlp["down"](gate * mlp["up"](y)), norms["post_mlp"])
        return self._rms(x, self.final_norm)

    def _rms(self, x, norm):
        weight, layer = norm
        y = torch.nn.functional.rms_norm(x.float(), weight.shape, weight, layer.epsilon)
        return y.to(self.dtype)

    def _self_attention(self, y, layer, cache, index):
        weights = self.blocks[layer]["self"]
        attention = self.blocks[layer]["layer"].self_attention
        heads, kv_heads = self.stack.num_query_heads, self.stack.num_key_value_heads
        several = isinstance(index, _Positions)
        place = index.flat if several else index
        # Proposed tokens may lie beyond the last position.
        turn = place.clamp(max=len(self.sin) - 1) if several else place
        query = self._turn(weights["query"](y), heads, turn)
        key = self._turn(weights["key"](y), kv_heads, turn)
        value = weights["value"](y).view(len(y), kv_heads, self.stack.head_dim)
        keys, values = cache
        slots = keys.shape[2]
        slot = place % slots
        if several:
            keys[index.rows, :, slot] = key
            values[index.rows, :, slot] = value
            is_local = self.stack.layer_types[layer] == SLIDING
            window = self.stack.sliding_window if is_local else None
            mask = index.mask(slots, window)
            mixed = self._attend(attention, query, keys, values, mask)
        elif self.compiled:
            keys.index_copy_(2, slot, key[:, :, None])
            values.index_copy_(2, slot, value[:, :, None])
            mask = torch.arange(slots, device=keys.device) > index
            mixed = self._attend(attention, query, keys, values, mask)
        else:
            keys[:, :, slot] = key
            values[:, :, slot] = value
            past = (part[:, :, : index + 1] for part in cache)
            mixed = self._attend(attention, query, *past, None)
        return weights["output_projection"](mixed)

    def _cross_attention(self, y, block, cache, mask):
        weights, attention = block["cross"], block["layer"].cross_attention
        mixed = self._attend(attention, weights["query"](y), *cache, mask)
        return weights["output_projection"](mixed)

    def _turn(self, x, heads, index):
        """Rotary embedding in float32: `(R, heads H)` to `(R, heads, H)`."""
        x = x.view(len(x), heads, self.stack.head_dim)
        first, second = x.float().chunk(2, dim=-1)
        sin, cos = self.sin[index], self.cos[index]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, dim=-1).to(self.dtype)

    def _attend(self, attention, query, key, value, mask):
        """Queries of `(R, N H)`, keys `(B, K, S, H)`; R a multiple of B."""
        sources, kv_heads, _, size = key.shape
        query = query.view(sources, -1, kv_heads, self.groups, size)
        rows = query.shape[1]
        query = query.transpose(1, 2).reshape(sources, kv_heads, -1, size)
        # Keras's products of float64 are float32 on PyTorch, those of the cache too.
        query = query.to(key.dtype) * attention.query_scale
        logits = (query @ key.transpose(-1, -2)).float()  # B K (rows G) S
        logits = soft_cap(logits, attention.soft_cap)
        if mask is None:
            weights = logits.softmax(-1)
        else:
            weights = logits.masked_fill(mask, -1e30).softmax(-1)
            weights = weights.masked_fill(mask, 0.0)
        mixed = weights.to(value.dtype) @ value
        mixed = mixed.view(sources, kv_heads, rows, self.groups, size).transpose(1, 2)
        return mixed.reshape(sources * rows, -1).to(self.dtype)


class _Positions:
    """T positions of each row, from its `index` `(R,)` on."""

    def __init__(self, index, length, groups):
        self.index, self.groups = index[:, None], groups
        self.positions = self.index + torch.arange(length, device=index.device)
        self.flat = self.positions.reshape(-1)  # R T
        rows = torch.arange(len(index), device=index.device)
        self.rows = rows.repeat_interleave(length)
        self.masks = {}

    def mask(self, slots, window):
        """Boolean `(R, 1, T G, S)`, True is masked out."""
        if (slots, window) not in self.masks:
            keys = slot_positions(self.index + self.positions.shape[1], slots)
            mask = ~causal_mask(self.positions, keys, window)  # R T S
            mask = mask.repeat_interleave(self.groups, dim=1)[:, None]
            self.masks[slots, window] = mask
        return self.masks[slots, window]


class CompiledStep:
    """A `TorchStep` through `torch.compile`, or eager when compiling fails.

    The logits are computed outside: compiling does not speed up one large product.

    Args:
        step: a `TorchStep` with `compiled=True`.
    """

    def __init__(self, step: TorchStep) -> None:
        self.step = step
        self.hidden = torch.compile(step.hidden, fullgraph=True, dynamic=False)

    def __call__(
        self, token: torch.Tensor, cache: dict, index: Any, capped: bool = True
    ) -> tuple[torch.Tensor, dict]:
        """See `TorchStep`."""
        try:
            # Every batch size is a program; the default limit is for accidents.
            with torch.compiler.config.patch(recompile_limit=1000):  # type: ignore
                hidden = self.hidden(token, cache, index)
        except RuntimeError as error:  # Dynamo's errors are.
            if self.hidden == self.step.hidden:
                raise
            warnings.warn(
                "`jit_compile=True`, but torch.compile failed; decoding continues "
                f"uncompiled. The start of its error: {str(error).strip()[:300]}",
                stacklevel=2,
            )
            self.hidden = self.step.hidden
            hidden = self.hidden(token, cache, index)
        return self.step.logits(hidden, capped), cache


class _Columns:
    """`x @ weight` of `(R, in)` and `(in, out)`, few rows as two halves of columns."""

    def __init__(self, weight):
        self.weight = weight
        rows, columns = weight.shape
        halves = equal_chunks(columns, min(2, torch.get_num_threads()))
        self.halves = weight.view(rows, halves, columns // halves).permute(1, 0, 2)

    def __call__(self, x):
        if is_faster(x, self.weight):
            return matmul(x, self.weight)
        out = torch.bmm(x.expand(len(self.halves), *x.shape), self.halves)
        return out.transpose(0, 1).reshape(len(x), -1)


class _Table:
    """`x @ table.T` of `(R, D)` and `(V, D)`, few rows in chunks of the vocabulary."""

    def __init__(self, table):
        self.weight = table.t()
        size, width = table.shape
        chunks = equal_chunks(size, _LOGIT_CHUNKS)
        self.parts = table.view(chunks, size // chunks, width)

    def __call__(self, x):
        if is_faster(x, self.weight):
            return matmul(x, self.weight)
        columns = x.t().expand(len(self.parts), *x.t().shape)
        out = torch.bmm(self.parts, columns)  # chunks V/chunks R
        return out.reshape(-1, len(x)).t()


class _MultiplySum:
    """`x @ weight` of one row, `weight` `(in, out)`; holds a transposed copy."""

    def __init__(self, weight):
        self.rows = weight.t().contiguous()

    def __call__(self, x):
        return (self.rows * x).sum(-1)[None]


class _Int8:
    """`x @ (rows / scale).T` by FBGEMM, of int8 `rows` `(out, in)`, `scale` `(out,)`.

    Activations have 7 bits without VNNI instructions, where the sum of two 8-bit
    products overflows FBGEMM's 16 bits. Each row has its own scale, so that its result
    does not depend on other rows.
    """

    def __init__(self, rows, scale):
        ops = torch.ops.quantized
        self.largest = 127 if _compat.torch_has_int8_products() else 63
        self.function = ops.linear_with_input_q_dq_qweight_dq_output_fp32
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():  # This way of making one is deprecated.
                warnings.simplefilter("ignore", UserWarning)
                quantized = _compat.per_channel_int8(
                    rows.contiguous(), 1.0 / scale.double()
                )
            self.packed = ops.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = engine

    def __call__(self, x):
        largest = x.float().abs().amax(1, keepdim=True).clamp_min_(1e-30)
        out = self.function(
            x.float() / largest, 1 / self.largest, self.largest + 1, self.packed
        )
        return out.mul_(largest).to(x.dtype)
