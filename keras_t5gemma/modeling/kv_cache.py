"""Key/value cache of decoding, passed in and returned.

A cache is a dict of tensors:

    {"self": ((key, value), ...), "cross": ((key, value), ...), "cross_mask": m}

with one pair for each decoder layer, each `(B, K, S, H)`, the layout of the attention
product; `cross_mask` is the encoder's padding mask, boolean `(B, S)`. "self" may have a
multiple of the rows of "cross": several answers to one source, in adjacent rows.

A layer with a sliding window keeps only the window, as a ring buffer: position p is in
slot p modulo the number of slots.

    4 slots after 6 tokens   slot      0 1 2 3
                             position  4 5 2 3

In speculative decoding every row has its own index, and the last tokens written may be
rejected: the next ones are written over them. A ring then needs spare slots, so that
up to k rejected tokens leave the window before them untouched.
"""

from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.utils.types import Tensor

KeyValue = tuple[Tensor, Tensor]


def make_self_cache(
    stack: StackConfig, rows: int, length: int, dtype: str, spare: int = 0
) -> tuple[KeyValue, ...]:
    """Empty self-attention cache of every layer of a decoder.

    Args:
        stack: the decoder's `StackConfig`.
        rows: B.
        length: longest sequence to decode, in tokens.
        dtype: compute dtype of the attention.
        spare: maximum number of tokens that are written and rejected at a time.

    Returns:
        A tuple of `(key, value)` pairs, each `(B, K, S, H)`; S is the length or the
        layer's window, whichever is smaller, and `spare`.
    """
    slots = {
        "full_attention": length,
        "sliding_attention": min(length, stack.sliding_window),
    }

    def zeros(kind):
        size = slots[kind] + spare
        shape = (rows, stack.num_key_value_heads, size, stack.head_dim)
        return ops.zeros(shape, dtype)

    return tuple((zeros(kind), zeros(kind)) for kind in stack.layer_types)


def slot_positions(count: Tensor, slots: int) -> Tensor:
    """The position in each slot after `count` tokens: int `(slots,)`.

    With a `count` of `(B, 1)` `(B, slots)`. Negative positions mark empty slots.
    """
    last = count - 1
    return last - ops.mod(last - ops.arange(slots), slots)


def key_positions(index: Tensor, length: int, slots: int) -> Tensor:
    """Positions of the keys that `extend` returns as `seen`: `(S,)` or `(B, S)`."""
    if _is_per_row(index):
        return slot_positions(index[:, None] + length, slots)
    if length == 1:
        return slot_positions(index + 1, slots)
    new = index + ops.arange(length)
    return ops.concatenate([slot_positions(index, slots), new])


def extend(
    cache: KeyValue, key: Tensor, value: Tensor, index: Tensor, count: Tensor = None
) -> tuple[KeyValue, KeyValue]:
    """Add keys and values at positions `index, index + 1, ...` to a layer's cache.

    Args:
        cache: one layer's `(key, value)`, each `(B, K, S, H)`.
        key: `(B, K, T, H)`.
        value: `(B, K, T, H)`.
        index: position of the first new key, scalar int; or `(B,)`, one of each row,
            for a cache with T - 1 spare slots.
        count: how many of the T are kept, the first ones; `None` keeps all. With a
            scalar index only.

    Returns:
        `(seen, cache)`: the keys and values that the new queries attend to, whose
        positions `key_positions` gives, and the updated cache.
    """
    slots, length = cache[0].shape[2], key.shape[2]
    new = [ops.cast(t, old.dtype) for t, old in zip((key, value), cache, strict=True)]
    if _is_per_row(index):
        slot = ops.mod(index[:, None] + ops.arange(length), slots)  # B T
        cache = tuple(_write(old, t, slot) for old, t in zip(cache, new, strict=True))
        return cache, cache
    if length == 1:
        start = (0, 0, ops.mod(index, slots), 0)
        cache = tuple(
            ops.slice_update(old, start, t) for old, t in zip(cache, new, strict=True)
        )
        return cache, cache
    # Writing first would overwrite keys in the ring that the first queries still see.
    seen = tuple(
        ops.concatenate([old, t], axis=2) for old, t in zip(cache, new, strict=True)
    )
    positions = slot_positions(index + (length if count is None else count), slots)
    place = ops.clip(positions - index, 0, length - 1)
    is_new = (positions >= index)[:, None]  # S 1
    updated = tuple(
        ops.where(is_new, ops.take(t, place, axis=2), old)
        for old, t in zip(cache, new, strict=True)
    )
    return seen, updated


def _is_per_row(index):
    return len(getattr(index, "shape", ())) == 1


def _write(old, new, slot):
    """`old` `(B, K, S, H)` with `new` `(B, K, T, H)` in the slots `(B, T)`."""
    rows, heads, slots, size = old.shape
    head = ops.reshape(ops.arange(rows * heads), (rows, heads, 1)) * slots
    place = ops.reshape(head + slot[:, None], (-1, 1))  # (B K T) 1
    flat = ops.reshape(old, (rows * heads * slots, size))
    flat = ops.scatter_update(flat, place, ops.reshape(new, (-1, size)))
    return ops.reshape(flat, old.shape)
