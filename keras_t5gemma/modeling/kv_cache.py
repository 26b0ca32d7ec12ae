"""The decoding cache: an explicit argument, made, written and handed back.

A cache is a dict of tensors:

    {"self": ((key, value), ...), "cross": ((key, value), ...), "cross_mask": m}

one pair a decoder layer, each `(B, K, S, H)`, the layout the attention product
reads; `cross_mask` is the encoder's padding mask, boolean `(B, S)`. The rows of
"self" may be a multiple of those of "cross": several answers to one source, next to
each other.

A layer with a window keeps only the window, as a ring: position p lies in slot
p modulo the number of slots.

    4 slots after 6 tokens   slot      0 1 2 3
                             position  4 5 2 3
"""

from keras import ops


def make_self_cache(stack, rows, length, dtype):
    """Zeros for the self-attention of every layer of a decoder.

    Args:
        stack: the decoder's `StackConfig`.
        rows: B.
        length: the longest sequence that will be decoded.
        dtype: the compute dtype of the attention.

    Returns:
        A tuple of `(key, value)` pairs, each `(B, K, S, H)`, S the length or the
        layer's window.
    """
    slots = {
        "full_attention": length,
        "sliding_attention": min(length, stack.sliding_window),
    }

    def zeros(kind):
        shape = (rows, stack.num_key_value_heads, slots[kind], stack.head_dim)
        return ops.zeros(shape, dtype)

    return tuple((zeros(kind), zeros(kind)) for kind in stack.layer_types)


def slot_positions(count, slots):
    """The position that each slot holds after `count` tokens: int `(slots,)`.

    Negative where there is none yet.
    """
    last = count - 1
    return last - ops.mod(last - ops.arange(slots), slots)


def key_positions(index, length, slots):
    """The positions of the keys of `extend`'s first result."""
    if length == 1:
        return slot_positions(index + 1, slots)
    new = index + ops.arange(length)
    return ops.concatenate([slot_positions(index, slots), new])


def extend(cache, key, value, index, count=None):
    """Put in new keys and values, at positions `index, index + 1, ...`.

    Args:
        cache: one layer's `(key, value)`, each `(B, K, S, H)`.
        key: `(B, K, T, H)`.
        value: `(B, K, T, H)`.
        index: scalar int, the position of the first new one.
        count: how many of the T are real, the first ones; `None` is all. Those after
            are not kept.

    Returns:
        `(seen, cache)`: the keys and values that the new queries attend to, whose
        positions `key_positions` tells, and the updated cache.
    """
    slots, length = cache[0].shape[2], key.shape[2]
    new = [ops.cast(t, old.dtype) for t, old in zip((key, value), cache, strict=True)]
    if length == 1:
        start = (0, 0, ops.mod(index, slots), 0)
        cache = tuple(
            ops.slice_update(old, start, t) for old, t in zip(cache, new, strict=True)
        )
        return cache, cache
    # A ring may lose what the first of the queries still sees: attend, then keep.
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
