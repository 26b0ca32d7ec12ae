"""Heads on the encoder output: pooling, and hybrid dense-lexical vectors.

B batch, T length, D width.
"""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.utils.types import Tensor

POOLINGS = ("mean", "last", "first", "weighted")


def pool(states: Tensor, padding: Tensor, pooling: str) -> Tensor:
    """Pool hidden states over the tokens: float32 `(B, D)`, independent of padding.

    Args:
        states: `(B, T, D)`, in any float dtype.
        padding: `(B, T)`, 0 for padding, which is on the right. A row that is all
            padding gives zeros.
        pooling: `"mean"` of the tokens; `"last"`, the last token, as in the paper's
            classifiers; `"first"`; or `"weighted"`, the mean with weight i for
            token i (arXiv 2202.08904).
    """
    keep = ops.cast(padding > 0, "float32")  # B T
    if pooling in ("last", "first"):
        number = ops.cumsum(keep, axis=1)
        last = ops.sum(keep, axis=1, keepdims=True)
        chosen = last if pooling == "last" else ops.ones_like(last)
        weights = keep * ops.cast(ops.equal(number, chosen), "float32")
    else:
        weights = keep if pooling == "mean" else ops.cumsum(keep, axis=1) * keep
        weights /= ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1.0)
    return ops.einsum("bt,btd->bd", weights, ops.cast(states, "float32"))


def l2_normalize(vectors: Tensor) -> Tensor:
    """Vectors of length 1; zero vectors stay zero, with a finite gradient."""
    squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squares, 1e-24))


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class HybridVector(keras.layers.Layer):
    """Hybrid dense and lexical vector of a text, float32 `(B, D + bins)`.

    The dense part is the pooled state. The lexical part has a weight for each token of
    the vocabulary: a linear function of the token's state (uniCOIL, arXiv 2106.14807),
    summed over equal tokens, then `log(1 + sum)`. With fewer bins than tokens in the
    vocabulary several tokens share a bin, with different signs (feature hashing, arXiv
    0902.2206). Both parts are normalized to length 1 and scaled by a learned share.

    Args:
        bins: dimensions of the lexical part.
    """

    def __init__(self, bins: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.bins = bins

    def build(self, pooled_shape, states_shape, *_):
        width = states_shape[-1]
        self.kernel = self.add_weight((width,), initializer="zeros", name="kernel")
        self.share = self.add_weight((), initializer="zeros", name="share")

    def call(
        self, pooled: Tensor, states: Tensor, token_ids: Tensor, padding: Tensor
    ) -> Tensor:
        """The vector `(B, D + bins)`.

        Args:
            pooled: dense part `(B, D)`.
            states: hidden states `(B, T, width)`.
            token_ids: int `(B, T)`.
            padding: `(B, T)`, 0 for padding.
        """
        weights = ops.softplus(ops.matmul(ops.cast(states, "float32"), self.kernel))
        lexical = self._binned(weights, token_ids, padding)
        parts = (ops.sigmoid(self.share), pooled), (ops.sigmoid(-self.share), lexical)
        return ops.concatenate([ops.sqrt(s) * l2_normalize(x) for s, x in parts], -1)

    def _binned(self, weights, token_ids, padding):
        sign = 1 - 2 * (token_ids // self.bins % 2)
        weights *= ops.cast(sign * ops.cast(padding > 0, "int32"), "float32")
        rows = ops.shape(token_ids)[0]
        places = token_ids % self.bins + self.bins * ops.arange(rows)[:, None]
        sums = ops.segment_sum(
            ops.reshape(weights, (-1,)), ops.reshape(places, (-1,)), rows * self.bins
        )
        sums = ops.reshape(sums, (rows, self.bins))
        return ops.sign(sums) * ops.log1p(ops.abs(sums))

    def compute_output_spec(self, pooled, *_):
        size = pooled.shape[-1] + self.bins
        return keras.KerasTensor((pooled.shape[0], size), dtype="float32")

    def get_config(self):
        return {**super().get_config(), "bins": self.bins}
