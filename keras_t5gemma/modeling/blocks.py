"""One layer of each tower: pre- and post-normalized residual sub-layers."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.modeling.attention import Attention
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator, dropout
from keras_t5gemma.modeling.layer_iteration import sublayers
from keras_t5gemma.modeling.layers import GatedMLP, RMSNorm
from keras_t5gemma.utils.types import Tensor


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

    def __init__(
        self,
        stack: StackConfig,
        sub_layers: tuple[str, ...],
        dropout: float,
        **kwargs: Any,
    ):
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
        for layer in sublayers(self):
            if isinstance(layer, RMSNorm | GatedMLP):
                layer.build(x_shape)
        self.self_attention.build(x_shape)

    def _feed_forward(self, x, seeds):
        y = self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))
        return x + dropout(y, self.dropout, seeds)


class EncoderBlock(_Block):
    """Self-attention, feed-forward: Gemma 2's layer.

    Args:
        stack: the encoder's `StackConfig`.
        dropout: rate while training.
    """

    def __init__(self, stack: StackConfig, dropout: float = 0.0, **kwargs: Any):
        super().__init__(stack, ("self", "mlp"), dropout, **kwargs)

    def call(
        self,
        x: Tensor,
        attention_mask: Tensor = None,
        angles: tuple[Tensor, Tensor] | None = None,
        seeds: ReplayableSeedGenerator | None = None,
    ) -> Tensor:
        """`x` `(B, T, D)`, mask as in `Attention.call` -> `(B, T, D)`."""
        y = self.pre_self_norm(x)
        y, _ = self.self_attention(
            y,
            key_value_states=y,
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
        encoder_dim: D of the encoder.
        dropout: rate while training.
    """

    def __init__(
        self,
        stack: StackConfig,
        encoder_dim: int,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(stack, ("self", "cross", "mlp"), dropout, **kwargs)
        self.encoder_dim = encoder_dim
        self.cross_attention = _attention(
            stack, "cross_attention", dropout, self.dtype_policy
        )

    def build(self, x_shape):
        super().build(x_shape)
        self.cross_attention.build(x_shape, (None, None, self.encoder_dim))

    def call(
        self,
        x: Tensor,
        encoder_output: Tensor = None,
        attention_mask: Tensor = None,
        cross_mask: Tensor = None,
        angles: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cross_cache: tuple[Tensor, Tensor] | None = None,
        index: Tensor = None,
        count: Tensor = None,
        seeds: ReplayableSeedGenerator | None = None,
        cross_attention: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One decoder layer.

        Args:
            x: `(B, T, D)`.
            encoder_output: `(B, S, D of the encoder)`, or `None` when `cross_cache`
                holds its keys and values.
            attention_mask: self-attention mask; see `Attention.call`.
            cross_mask: cross-attention mask, likewise.
            angles: rotary angles of the T new positions.
            cache: this layer's self-attention `(key, value)`, or `None`.
            cross_cache: this layer's cross-attention `(key, value)`, or `None`; B
                may be a multiple of its rows.
            index: position of the first new token, with a cache.
            count: how many of the new tokens go into `cache`; `None` is all.
            seeds: seeds of dropout, `None` for no dropout.
            cross_attention: `False` leaves the cross-attention sub-layer out.

        Returns:
            `(x, cache)`.
        """
        y = self.pre_self_norm(x)
        y, cache = self.self_attention(
            y,
            key_value_states=y,
            attention_mask=attention_mask,
            angles=angles,
            cache=cache,
            index=index,
            count=count,
            seeds=seeds,
        )
        x = x + dropout(self.post_self_norm(y), self.dropout, seeds)
        if cross_attention:
            x = self._attend_to_encoder(
                x, encoder_output, cross_mask, cross_cache, seeds
            )
        return self._feed_forward(x, seeds), cache

    def _attend_to_encoder(self, x, encoder_output, mask, cache, seeds):
        y = self.pre_cross_norm(x)
        if cache is not None:  # The queries of one source side by side.
            sources = ops.shape(cache[0])[0]
            y = ops.reshape(y, (sources, -1, self.stack.hidden_dim))
        y, _ = self.cross_attention(
            y,
            key_value_states=encoder_output,
            attention_mask=mask,
            cache=cache,
            seeds=seeds,
        )
        y = ops.reshape(y, ops.shape(x))
        return x + dropout(self.post_cross_norm(y), self.dropout, seeds)
