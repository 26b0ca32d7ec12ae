"""The decoding cache: an explicit argument, made, written and handed back.

A cache is a dict of tensors whose first axis is the batch, so that a sampler
may repeat or reorder its rows (beam search) without knowing what is inside:

    {"self": ((key, value), ...), "cross": ((key, value), ...), "cross_mask": m}

one pair a decoder layer, each `(B, K, S, H)`, the layout the attention product
reads; `cross_mask` is the encoder's padding mask, boolean `(B, S)`.
"""

from keras import ops


def make_self_cache(stack, batch_size, length, dtype):
    """Zeros for the self-attention of every layer of a decoder.

    Args:
        stack: the decoder's `StackConfig`.
        batch_size: B.
        length: S, the longest sequence that will be decoded.
        dtype: the compute dtype of the attention.

    Returns:
        A tuple of `(key, value)` pairs, each `(B, K, S, H)`.
    """
    shape = (batch_size, stack.num_key_value_heads, length, stack.head_dim)
    return tuple(
        (ops.zeros(shape, dtype), ops.zeros(shape, dtype))
        for _ in range(stack.num_layers)
    )


def write(cache, key, value, index):
    """Put new keys and values at positions `index, index + 1, ...`.

    Args:
        cache: one layer's `(key, value)`, each `(B, K, S, H)`.
        key: `(B, K, T, H)`.
        value: `(B, K, T, H)`.
        index: scalar int, the position of the first new one.

    Returns:
        The updated `(key, value)`.
    """
    start = (0, 0, index, 0)
    return (
        ops.slice_update(cache[0], start, ops.cast(key, cache[0].dtype)),
        ops.slice_update(cache[1], start, ops.cast(value, cache[1].dtype)),
    )
