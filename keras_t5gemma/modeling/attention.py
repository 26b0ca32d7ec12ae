"""Grouped-query attention, for self and cross.

Axis legend, for every einsum and shape comment of this package:
B batch, T query length, S key length, N query heads, K key/value heads,
G = N / K queries a key/value head, H head size, D width, F feed-forward width,
V vocabulary.
"""

import functools
from typing import Any

import keras
from keras import ops

from keras_t5gemma.modeling import kv_cache
from keras_t5gemma.modeling.blockwise_attention import BlockwiseMask, attend
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator, dropout
from keras_t5gemma.modeling.layers import dense
from keras_t5gemma.modeling.rotary import apply_rotary
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.utils.backends import recomputed
from keras_t5gemma.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Attention(keras.layers.Layer):
    """Soft-capped grouped-query attention.

    Self-attention is `key_value_states = x` with rotary angles; cross-attention
    passes the encoder output and no angles: in T5Gemma it has no rotary embedding.
    Keys and values are never repeated: the queries are grouped instead.

    Args:
        hidden_dim: D, the width of the queries and of the output.
        num_query_heads: N.
        num_key_value_heads: K.
        head_dim: H.
        query_scale: factor on the queries.
        soft_cap: cap on the attention logits, or `None`.
        dropout: rate on the attention weights while training.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        query_scale: float,
        soft_cap: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        # No autocast: the rotary angles stay float32.
        super().__init__(autocast=False, **kwargs)
        self.hidden_dim = hidden_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_scale = query_scale
        self.soft_cap = soft_cap
        self.dropout = dropout
        dtype = self.dtype_policy
        self.query = dense(num_query_heads * head_dim, "query", dtype)
        self.key = dense(num_key_value_heads * head_dim, "key", dtype)
        self.value = dense(num_key_value_heads * head_dim, "value", dtype)
        self.output_projection = dense(hidden_dim, "output", dtype)

    def build(self, x_shape, key_value_states_shape=None):
        key_value_states_shape = key_value_states_shape or x_shape
        self.query.build(x_shape)
        self.key.build(key_value_states_shape)
        self.value.build(key_value_states_shape)
        width = self.num_query_heads * self.head_dim
        self.output_projection.build((*x_shape[:-1], width))

    def project_keys_values(
        self, states: Tensor, angles: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of `states` `(B, S, D)`, each `(B, K, S, H)`."""
        key = self._heads(self.key(states), self.num_key_value_heads)  # B S K H
        value = self._heads(self.value(states), self.num_key_value_heads)
        if angles is not None:
            key = apply_rotary(key, angles)
        return ops.transpose(key, (0, 2, 1, 3)), ops.transpose(value, (0, 2, 1, 3))

    def call(
        self,
        x: Tensor,
        key_value_states: Tensor = None,
        attention_mask: Tensor = None,
        angles: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        index: Tensor = None,
        count: Tensor = None,
        seeds: ReplayableSeedGenerator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention output of the queries `x`.

        Args:
            x: states of the queries `(B, T, D)`.
            key_value_states: states of the keys and values `(B, S, D)`; `None` when
                `cache` already holds all keys and values.
            attention_mask: boolean, broadcastable to `(B, T, S)`; True may be
                seen. A row that is False everywhere gets attention output 0. Or a
                `BlockwiseMask`, for long sequences.
            angles: rotary angles of the new positions, or `None`.
            cache: `(key, value)`, each `(B, K, S, H)`, or `None`.
            index: position of the first of `key_value_states`, with a cache.
            count: how many of `key_value_states` the cache keeps; `None` keeps all.
            seeds: seeds of dropout, `None` for no dropout.

        Returns:
            `(output, cache)`: `(B, T, D)`, and the `cache` passed in, with the keys
            and values of `key_value_states` added.
        """
        query = self._heads(self.query(x), self.num_query_heads)  # B T N H
        if angles is not None:
            query = apply_rotary(query, angles)
        if key_value_states is None:
            assert cache is not None
            seen = cache
        else:
            new = self.project_keys_values(key_value_states, angles)
            if cache is None:
                cache = seen = new
            else:
                seen, cache = kv_cache.extend(cache, *new, index, count)
        # The cache may be float64, while Keras's products are float32 on PyTorch.
        query = ops.cast(query, seen[0].dtype) * self.query_scale
        output = self._attend(query, *seen, attention_mask, seeds)
        return self.output_projection(output), cache

    def _attend(self, query, key, value, mask, seeds):
        if not isinstance(mask, BlockwiseMask):
            return self._attend_at_once(query, key, value, mask, seeds)

        arguments = mask.visibility, self.soft_cap, self.dropout, seeds, mask.kernel
        output = attend(query, key, value, *arguments)
        return ops.reshape(output, (*ops.shape(output)[:2], -1))

    def _attend_at_once(self, query, key, value, mask, seeds):
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        kv_heads = self.num_key_value_heads
        groups = self.num_query_heads // kv_heads
        query = ops.reshape(query, (batch, length, kv_heads, groups, self.head_dim))
        # Drawn here: what is recomputed must drop the same weights again.
        seed = None if seeds is None else seeds.draw()
        # TensorFlow would keep five arrays of the size of the logits.
        mix = recomputed(functools.partial(self._mix, mask=mask, seeds=seed))
        output = mix(query, key, value)
        return ops.reshape(
            output, (batch, length, self.num_query_heads * self.head_dim)
        )

    def _mix(self, query, key, value, mask, seeds):
        """Mixed values `(B, T, K, G, H)` of queries of that shape."""
        logits = ops.einsum("BTKGH,BKSH->BKGTS", query, key)
        logits = soft_cap(ops.cast(logits, "float32"), self.soft_cap)
        if mask is not None:
            mask = mask[:, None, None]  # B 1 1 T S
            # In float32, so that the constant fits whatever the compute dtype.
            logits = ops.where(mask, logits, -1e30)
        weights = ops.softmax(logits, axis=-1)
        if mask is not None:
            weights = ops.where(mask, weights, 0.0)
        weights = ops.cast(weights, value.dtype)
        weights = dropout(weights, self.dropout, seeds)
        return ops.einsum("BKGTS,BKSH->BTKGH", weights, value)

    def _heads(self, x, heads):
        shape = ops.shape(x)
        return ops.reshape(x, (shape[0], shape[1], heads, self.head_dim))

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "query_scale": self.query_scale,
            "soft_cap": self.soft_cap,
            "dropout": self.dropout,
        }
