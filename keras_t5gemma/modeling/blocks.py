"""One layer of each tower: pre- and post-normalized residual sub-layers."""

import keras
from keras import ops

from keras_t5gemma.modeling.attention import Attention
from keras_t5gemma.modeling.dropout import dropout
from keras_t5gemma.modeling.layers import GatedMLP, RMSNorm


def _attention(stack, name, dropout, dtype):
    return Attention(
        hidden_dim=stack.hidden_dim,
        num_query_heads=stack.num_query_heads,
        num_key_value_heads=stack.num_key_value_heads,
        head_dim=stack.head_dim,
        query_scale=stack.query_scale,
        soft_cap=stack.attention_soft_cap,
        dropout=dropout,
        name=name,
        dtype=dtype,
    )


class _Block(keras.layers.Layer):
    """`x += dropout(post_norm(f(pre_norm(x))))`, for each sub-layer f."""

    def __init__(self, stack, sub_layers, dropout, **kwargs):
        # No autocast: the rotary angles stay float32.
        super().__init__(autocast=False, **kwargs)
        self.stack = stack
        for name in sub_layers:
            for place in ("pre", "post"):
                norm = RMSNorm(
                    stack.rms_norm_epsilon,
                    name=f"{place}_{name}_norm",
                    dtype=self.dtype_policy,
                )
                setattr(self, f"{place}_{name}_norm", norm)
        self.self_attention = _attention(
            stack, "self_attention", dropout, self.dtype_policy
        )
        self.mlp = GatedMLP(
            stack.hidden_dim,
            stack.intermediate_dim,
            name="mlp",
            dtype=self.dtype_policy,
        )
        self.dropout = dropout

    def build(self, x_shape):
        for layer in self._layers:
            if isinstance(layer, RMSNorm | GatedMLP):
                layer.build(x_shape)
        self.self_attention.build(x_shape)

    def _feed_forward(self, x, seeds):
        y = self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))
        return x + dropout(y, self.dropout, seeds)


class EncoderBlock(_Block):
    """Self-attention, feed-forward: Gemma 2's layer, seen both ways.

    Args:
        stack: the encoder's `StackConfig`.
        dropout: rate while training.
    """

    def __init__(self, stack, dropout=0.0, **kwargs):
        super().__init__(stack, ("self", "mlp"), dropout, **kwargs)

    def call(self, x, attention_mask=None, angles=None, seeds=None):
        """`x` `(B, T, D)`, `attention_mask` `(B, T, T)` -> `(B, T, D)`."""
        y = self.pre_self_norm(x)
        y, _ = self.self_attention(
            y,
            memory=y,
            attention_mask=attention_mask,
            angles=angles,
            seeds=seeds,
        )
        x = x + dropout(self.post_self_norm(y), self.dropout, seeds)
        return self._feed_forward(x, seeds)


class DecoderBlock(_Block):
    """Self-attention, cross-attention, feed-forward (arXiv 2504.06225, 3.1).

    Args:
        stack: the decoder's `StackConfig`.
        memory_dim: D of the encoder.
        dropout: rate while training.
    """

    def __init__(self, stack, memory_dim, dropout=0.0, **kwargs):
        super().__init__(stack, ("self", "cross", "mlp"), dropout, **kwargs)
        self.memory_dim = memory_dim
        self.cross_attention = _attention(
            stack, "cross_attention", dropout, self.dtype_policy
        )

    def build(self, x_shape):
        super().build(x_shape)
        self.cross_attention.build(x_shape, (None, None, self.memory_dim))

    def call(
        self,
        x,
        memory=None,
        attention_mask=None,
        cross_mask=None,
        angles=None,
        cache=None,
        cross_cache=None,
        index=None,
        count=None,
        seeds=None,
    ):
        """One decoder layer.

        Args:
            x: `(B, T, D)`.
            memory: encoder output `(B, S, D of the encoder)`, or `None` when
                `cross_cache` holds its keys and values.
            attention_mask: boolean self-attention mask, `(B, T, S)`.
            cross_mask: boolean, broadcastable to `(B, T, S)`.
            angles: rotary angles of the T new positions.
            cache: this layer's self-attention `(key, value)`, or `None`.
            cross_cache: this layer's cross-attention `(key, value)`, or `None`; B
                may be a multiple of its rows.
            index: position of the first new token, with a cache.
            count: how many of the new tokens go into `cache`; `None` is all.
            seeds: `ReplayableSeedGenerator` of dropout, `None` for none.

        Returns:
            `(x, cache)`.
        """
        y = self.pre_self_norm(x)
        y, cache = self.self_attention(
            y,
            memory=y,
            attention_mask=attention_mask,
            angles=angles,
            cache=cache,
            index=index,
            count=count,
            seeds=seeds,
        )
        x = x + dropout(self.post_self_norm(y), self.dropout, seeds)
        y = self.pre_cross_norm(x)
        if cross_cache is not None:  # The queries of one source side by side.
            sources = ops.shape(cross_cache[0])[0]
            y = ops.reshape(y, (sources, -1, self.stack.hidden_dim))
        y, _ = self.cross_attention(
            y,
            memory=memory,
            attention_mask=cross_mask,
            cache=cross_cache,
            seeds=seeds,
        )
        y = ops.reshape(y, ops.shape(x))
        x = x + dropout(self.post_cross_norm(y), self.dropout, seeds)
        return self._feed_forward(x, seeds), cache
