"""Chunks of the vocabulary: their number, rows, logits, and loops over them."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.modeling.float_products import matmul
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.utils.backends import on_cpu
from keras_t5gemma.utils.buckets import (
    LOGITS_ON_ACCELERATOR,
    LOGITS_ON_CPU,
    ceil_div,
    vocabulary_chunks,
)
from keras_t5gemma.utils.types import Tensor


def chunk_rows(table: Tensor, chunk: Tensor, step: int, shards: int = 1) -> Tensor:
    """Rows of a chunk of a table, `(shards * step, D)`: `step` from each shard."""
    width = table.shape[1]
    if shards == 1:
        return ops.slice(table, (chunk * step, 0), (step, width))
    table = ops.reshape(table, (shards, -1, width))
    rows = ops.slice(table, (0, chunk * step, 0), (shards, step, width))
    return ops.reshape(rows, (-1, width))


def chunk_ids(chunk: Tensor, step: int, size: int, shards: int) -> Tensor:
    """Token ids of the rows of `chunk_rows`."""
    ids = chunk * step + ops.arange(step, dtype="int32")
    if shards == 1:
        return ids
    first = ops.arange(0, size, size // shards, dtype="int32")
    return ops.reshape(first[:, None] + ids[None], (-1,))


def chunk_logits(states: Tensor, rows: Tensor, cap: float | None) -> Tensor:
    """Soft-capped logits, float32 `(N, rows)`."""
    logits = ops.cast(matmul(states, ops.transpose(rows)), "float32")
    return soft_cap(logits, cap)


def add_mass(
    sums: tuple[Tensor, Tensor], logits: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """One step of a running `logsumexp`.

    Args:
        sums: `(largest logit, sum of exp(logit - largest))` so far, `(N,)` each.
        logits: the next ones, `(N, step)`.

    Returns:
        `(sums, factor of the earlier sums, exp(logits - largest))`.
    """
    largest, mass = sums
    new = ops.maximum(largest, ops.max(logits, axis=1))
    kept, more = ops.exp(largest - new), ops.exp(logits - new[:, None])
    return (new, mass * kept + ops.sum(more, axis=1)), kept, more


def logits_at_once(states: Tensor) -> int:
    """Number of logits to compute at a time on one device; see `utils.buckets`."""
    return LOGITS_ON_CPU if on_cpu(states) else LOGITS_ON_ACCELERATOR


def chunk_count(size: int, tokens: int | None, at_once: int) -> int:
    """Number of chunks of a vocabulary; see `vocabulary_chunks`."""
    tokens = tokens or 2**11  # Unknown while a TensorFlow function is traced.
    tokens = ceil_div(tokens, mesh.size("data"))
    return vocabulary_chunks(size, tokens, at_once, mesh.pieces_of_width())


def loop(count: int, body: Callable, state: Any) -> Any:
    """`keras.ops.fori_loop` from 0 to `count`."""
    if keras.config.backend() == "torch":  # Eager, with a Python int as index.
        for i in range(count):
            state = body(i, state)
        return state
    return ops.fori_loop(0, count, body, state)


def write_rows(array: Tensor, start: Tensor, rows: Tensor, shards: int = 1) -> Tensor:
    """`array` with `rows` from row `start` on; updated in place on PyTorch."""
    if keras.config.backend() == "torch":
        array[start : start + len(rows)] = rows
        return array
    if shards == 1:
        return ops.slice_update(array, (start, 0), rows)
    pieces, rows = (ops.reshape(x, (shards, -1, x.shape[1])) for x in (array, rows))
    return ops.reshape(ops.slice_update(pieces, (0, start, 0), rows), array.shape)


def add_rows(array: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """`array` with each of `rows` added to the row of its id."""
    if keras.config.backend() == "torch":
        return array.index_add_(0, ids, rows)
    return ops.scatter_update(array, ids[:, None], rows, reduction="add")
