"""Blockwise attention in `keras.ops`, for JAX and TensorFlow, compiled by XLA.

The algorithm of `blockwise_attention`. Nested loops over blocks of queries and of keys,
the inner one over the range of blocks that are seen, so that a program does not grow
with the length. XLA computes soft cap, mask and exponential of a block in one pass.

A cap bounds the logits: up to `_BOUNDED` their exponentials, and the sum of those of
any sequence, fit into float32 as they are, and no running maximum is needed.

On a mesh the loops are over lengths, which no axis splits; every device computes its
rows and heads. A sequence split over devices would need the keys of the others in turn
(ring attention, arXiv 2310.01889), which is not built.
"""

import dataclasses
import functools
from typing import Any

import keras
from keras import ops
from keras.backend import standardize_dtype

from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator
from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.utils.backends import compiled, on_cpu
from keras_t5gemma.utils.types import Tensor

_BOUNDED = 64.0
_NOTHING = -1e30
_FAR = 2**31 - 1


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    soft_cap: float | None,
    dropout: float,
    seed: Any,
    blocks: tuple[int, int],
) -> Tensor:
    """See `blockwise_attention.attend`."""
    batch, length, heads, size = (ops.shape(query)[i] for i in range(4))
    kv_heads = key.shape[1]
    queries, keys = blocks
    query, segments = (_padded(x, 1, queries) for x in (query, visibility.queries))
    key, value = (_padded(x, 2, keys) for x in (key, value))
    make_loops = functools.partial(
        _Loops,
        reach=visibility.reach,
        blocks=blocks,
        groups=heads // kv_heads,
        cap=soft_cap,
        rate=0.0 if seed is None else dropout,
        dtype="float32" if on_cpu(query) else standardize_dtype(query.dtype),
    )
    shape = (batch, -1, kv_heads, heads // kv_heads, size)
    query = ops.transpose(ops.reshape(query, shape), (0, 2, 1, 3, 4))  # B K T G H
    constants = segments, _padded(visibility.keys, 1, keys), seed
    output = _with_gradient(make_loops)(query, key, value, *constants)
    output = ops.transpose(output, (0, 2, 1, 3, 4))
    return ops.reshape(output, (batch, -1, heads, size))[:, :length]


def _with_gradient(make_loops):
    """The function of query, key, value, and the three tensors of `_Loops`."""
    if keras.config.backend() == "jax":
        return _with_jax_gradient(make_loops)

    def attend(query, key, value, *constants):
        loops = make_loops(*constants)
        forward, backward = compiled(loops.forward), compiled(loops.backward)

        def compute(query, key, value):
            output, log_z = forward(query, key, value)

            def gradient(*args, upstream=None):  # PyTorch passes it by name.
                upstream = args[0] if upstream is None else upstream
                return backward(query, key, value, output, log_z, upstream)

            return output, gradient

        return ops.custom_gradient(compute)(query, key, value)

    return attend


def _with_jax_gradient(make_loops):
    """With the constants as arguments: rematerialization makes them, too, again."""
    import jax

    @jax.custom_vjp
    def attend(*arguments):
        return forward(*arguments)[0]

    def forward(query, key, value, *constants):
        output, log_z = make_loops(*constants).forward(query, key, value)
        return output, ((query, key, value, output, log_z), constants)

    def backward(kept, upstream):
        arrays, constants = kept
        found = make_loops(*constants).backward(*arrays, upstream)
        return *found, *(None for _ in constants)

    attend.defvjp(forward, backward)
    return attend


def _padded(x, axis, multiple):
    """`x` with zeros up to a multiple of the block size: they are in no segment."""
    length = ops.shape(x)[axis]
    more = -length % multiple
    if isinstance(more, int) and more == 0:
        return x
    pads = [(0, 0)] * len(x.shape)
    pads[axis] = (0, more)
    return ops.pad(x, pads)


@dataclasses.dataclass(eq=False)
class _Loops:
    """The forward and backward pass, over blocks.

    Args:
        segments: segment ids of the queries, int32 `(B, T)`.
        key_segments: those of the keys, `(B, S)`.
        seed: of dropout, `(2,)`, or `None`.
        reach: of a `Visibility`.
        blocks: numbers of queries and keys in a block, which divide T and S.
        groups: G.
        cap: soft cap, or `None`.
        rate: of dropout.
        dtype: of the products.
    """

    segments: Tensor
    key_segments: Tensor
    seed: Tensor
    reach: tuple[int | None, int | None]
    blocks: tuple[int, int]
    groups: int
    cap: float | None
    rate: float
    dtype: str

    def __post_init__(self):
        self.bounded = (
            self.cap is not None and self.cap <= _BOUNDED and self.dtype != "float16"
        )

    def ranges(self):
        """First and last + 1 block of keys of every block of queries, two int32."""
        lowest, highest = [], []
        for x, size in zip(
            (self.segments, self.key_segments), self.blocks, strict=True
        ):
            x = ops.reshape(x, (ops.shape(x)[0], -1, size))
            lowest.append(ops.min(ops.where(x > 0, x, _FAR), axis=-1))
            highest.append(ops.max(x, axis=-1))
        seen = ops.logical_and(
            highest[0][:, :, None] >= lowest[1][:, None],
            lowest[0][:, :, None] <= highest[1][:, None],
        )
        seen = ops.any(seen, axis=0)
        behind, ahead = self.reach
        queries, keys = (
            ops.arange(ops.shape(x)[1]) * size
            for x, size in zip(highest, self.blocks, strict=True)
        )
        queries, keys = queries[:, None], keys[None]
        if behind is not None:
            near = queries - (keys + self.blocks[1] - 1) <= behind
            seen = ops.logical_and(seen, near)
        if ahead is not None:
            near = keys - (queries + self.blocks[0] - 1) <= ahead
            seen = ops.logical_and(seen, near)
        blocks = ops.arange(ops.shape(seen)[1])
        first = ops.min(ops.where(seen, blocks, _FAR), axis=1)
        return first, ops.max(ops.where(seen, blocks + 1, 0), axis=1)

    def rows(self, x, i):
        """The i-th block of queries, `(B, K, queries G, width)`, in the dtype."""
        shape = x.shape
        start = (0, 0, i * self.blocks[0], 0, 0)
        sizes = (ops.shape(x)[0], shape[1], self.blocks[0], self.groups, shape[4])
        x = ops.slice(x, start, sizes)
        x = ops.reshape(x, (-1, shape[1], self.blocks[0] * self.groups, shape[4]))
        return ops.cast(x, self.dtype)

    def write(self, x, i, rows):
        """`x` `(B, K, T, G, width)` with the i-th block of queries replaced."""
        shape = (ops.shape(x)[0], x.shape[1], self.blocks[0], self.groups, x.shape[4])
        rows = ops.cast(ops.reshape(rows, shape), x.dtype)
        return ops.slice_update(x, (0, 0, i * self.blocks[0], 0, 0), rows)

    def columns(self, x, j):
        """The j-th block of keys or values, `(B, K, keys, H)`."""
        sizes = (ops.shape(x)[0], x.shape[1], self.blocks[1], x.shape[3])
        x = ops.slice(x, (0, 0, j * self.blocks[1], 0), sizes)
        return ops.cast(x, self.dtype)

    def mask(self, i, j):
        """Boolean `(B, 1, queries, 1, keys)`."""
        (queries, keys), rows = self.blocks, ops.shape(self.segments)[0]
        of_queries = ops.slice(self.segments, (0, i * queries), (rows, queries))
        of_keys = ops.slice(self.key_segments, (0, j * keys), (rows, keys))
        of_keys = of_keys[:, None]
        mask = ops.logical_and(of_queries[:, :, None] == of_keys, of_keys > 0)
        behind, ahead = self.reach
        distance = ops.arange(queries)[:, None] - ops.arange(keys)[None]
        distance = distance + (i * queries - j * keys)
        if behind is not None:
            mask = ops.logical_and(mask, distance <= behind)
        if ahead is not None:
            mask = ops.logical_and(mask, -distance <= ahead)
        return mask[:, None, :, None]

    def select(self, mask, x, other):
        """`x` `(B, K, queries G, keys)` where the mask is True, else `other`."""
        grouped = (-1, x.shape[1], self.blocks[0], self.groups, self.blocks[1])
        shape = (-1, *x.shape[1:])
        return ops.reshape(ops.where(mask, ops.reshape(x, grouped), other), shape)

    def logits(self, queries, keys):
        """Capped logits, and the derivative of the cap; float32."""
        x = ops.einsum("bkqh,bksh->bkqs", queries, keys)
        x = ops.cast(x, "float32")
        if self.cap is None:
            return x, 1.0
        x = ops.tanh(x / self.cap)
        return x * self.cap, 1.0 - ops.square(x)

    def kept(self, i, j, x):
        """The factors of dropout of a block."""
        step = ops.stack([i * 65_537 + j, i]) + 1
        seed = self.seed + ops.cast(step, self.seed.dtype)
        seeds = ReplayableSeedGenerator(seed)
        return keras.random.dropout(ops.ones_like(x), self.rate, seed=seeds)

    def forward(self, query, key, value):
        """Output `(B, K, T, G, H)`, and log-sum-exp `(B, K, T, G, 1)`."""
        first, last = self.ranges()

        def add_queries(i, found):
            queries = self.rows(query, i)

            def add_keys(j, sums):
                output, total, largest = sums
                x, _ = self.logits(queries, self.columns(key, j))
                mask = self.mask(i, j)
                shrink = None
                if not self.bounded:
                    x = self.select(mask, x, _NOTHING)
                    new = ops.maximum(largest, ops.max(x, axis=-1, keepdims=True))
                    shrink, largest = ops.exp(largest - new), new
                    x = x - largest
                weights = self.select(mask, ops.exp(x), 0.0)
                more = ops.sum(weights, axis=-1, keepdims=True)
                if self.rate:
                    weights = weights * self.kept(i, j, weights)
                weights = ops.cast(weights, self.dtype)
                states = ops.einsum("bkqs,bksh->bkqh", weights, self.columns(value, j))
                states = ops.cast(states, "float32")
                if shrink is not None:
                    output, total = output * shrink, total * shrink
                return output + states, total + more, largest

            zeros = ops.zeros_like(queries, dtype="float32")
            few = zeros[..., :1]
            start = (zeros, few, few + _NOTHING)
            sums = ops.fori_loop(first[i], last[i], add_keys, start)
            output, total, largest = sums
            output = output / ops.maximum(total, 1e-37)
            log_z = ops.log(ops.maximum(total, 1e-37))
            if not self.bounded:
                log_z = log_z + largest
            return self.write(found[0], i, output), self.write(found[1], i, log_z)

        start = ops.zeros_like(query), ops.zeros_like(query[..., :1], dtype="float32")
        return ops.fori_loop(0, ops.shape(first)[0], add_queries, start)

    def backward(self, query, key, value, output, log_z, upstream):
        """Gradients by query, key and value."""
        first, last = self.ranges()

        def add_queries(i, found):
            queries, slopes, states = (
                self.rows(x, i) for x in (query, upstream, output)
            )
            norm = ops.cast(self.rows(log_z, i), "float32")
            mean = ops.cast(slopes, "float32") * ops.cast(states, "float32")
            mean = ops.sum(mean, axis=-1, keepdims=True)

            def add_keys(j, sums):
                by_query, by_key, by_value = sums
                keys, values = self.columns(key, j), self.columns(value, j)
                x, slope = self.logits(queries, keys)
                weights = self.select(self.mask(i, j), ops.exp(x - norm), 0.0)
                by_weights = ops.einsum("bkqh,bksh->bkqs", slopes, values)
                by_weights = ops.cast(by_weights, "float32")
                dropped = weights
                if self.rate:
                    kept = self.kept(i, j, weights)
                    dropped, by_weights = weights * kept, by_weights * kept
                slope = ops.cast(weights * (by_weights - mean) * slope, self.dtype)
                dropped = ops.cast(dropped, self.dtype)
                more = ops.einsum("bkqs,bksh->bkqh", slope, keys)
                by_query = by_query + ops.cast(more, "float32")
                by_key = self.add_columns(by_key, j, slope, queries)
                by_value = self.add_columns(by_value, j, dropped, slopes)
                return by_query, by_key, by_value

            by_query, by_key, by_value = found
            start = ops.zeros_like(queries, dtype="float32"), by_key, by_value
            sums = ops.fori_loop(first[i], last[i], add_keys, start)
            return self.write(by_query, i, sums[0]), *sums[1:]

        start = [ops.zeros_like(x, dtype="float32") for x in (key, value)]
        start = ops.zeros_like(query), *start
        by_query, *others = ops.fori_loop(0, ops.shape(first)[0], add_queries, start)
        return by_query, *(ops.cast(x, key.dtype) for x in others)

    def add_columns(self, sums, j, slope, states):
        """`sums` with `slope.T @ states` added to the j-th block of keys."""
        more = ops.cast(ops.einsum("bkqs,bkqh->bksh", slope, states), "float32")
        sizes = (ops.shape(sums)[0], sums.shape[1], self.blocks[1], sums.shape[3])
        start = (0, 0, j * self.blocks[1], 0)
        return ops.slice_update(sums, start, ops.slice(sums, start, sizes) + more)
