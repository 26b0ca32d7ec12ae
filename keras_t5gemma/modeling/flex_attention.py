"""PyTorch's FlexAttention on CUDA: fused kernels for blockwise attention.

`torch.compile` makes a Triton kernel of the soft cap and the mask. Which blocks are
computed at all is decided here, from ranges of segment ids, without an array of
queries x keys, which PyTorch's `create_block_mask` makes.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import keras

from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.utils.types import Tensor

_BLOCK = 128  # Rows and columns of a block of the mask; lengths are padded to it.
_HEAD_SIZES = (16, 32, 64, 128, 256)


def unavailable(query: Tensor, key: Tensor, has_dropout: bool) -> str | None:
    """Why the kernel cannot compute this attention; `None` if it can.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, K, S, H)`.
        has_dropout: whether attention weights are dropped.
    """
    if keras.config.backend() != "torch" or query.device.type != "cuda":
        return "FlexAttention needs PyTorch on a CUDA device"
    if has_dropout:
        return "FlexAttention has no dropout"
    if not has_compiler():
        return "FlexAttention needs PyTorch 2.7 or later, and Triton"
    if query.shape[-1] not in _HEAD_SIZES:
        return f"`head_dim` must be one of {_HEAD_SIZES}; it is {query.shape[-1]}"
    if query.dtype != key.dtype:
        return f"queries are {query.dtype}, keys {key.dtype}"
    if str(query.dtype) not in ("torch.float32", "torch.bfloat16", "torch.float16"):
        return f"FlexAttention does not compute in {query.dtype}"
    return None


@functools.cache
def has_compiler() -> bool:
    """Whether this PyTorch has a FlexAttention that can be compiled."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 7) and importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    soft_cap: float | None,
) -> Tensor:
    """See `blockwise_attention.attend`."""
    import torch

    length = query.shape[1]
    arrays = [_padded(x, 2) for x in (query.transpose(1, 2), key, value)]
    mask = block_mask(visibility)
    # Every length and window is a program; the default limit is for accidents.
    with torch.compiler.config.patch(recompile_limit=1000):  # type: ignore
        output = _compiled()(*arrays, mask, soft_cap)
    return output[:, :, :length].transpose(1, 2)


def _padded(x, axis):
    """`x` with zeros up to a multiple of the block size."""
    import torch

    more = -x.shape[axis] % _BLOCK
    pads = [0, 0] * (x.ndim - 1 - axis) + [0, more]
    return torch.nn.functional.pad(x, pads) if more else x


@functools.cache
def _compiled() -> Callable:
    """The compiled function of queries, keys, values, `BlockMask` and soft cap."""
    import torch
    from torch.nn.attention import flex_attention

    def run(query, key, value, mask, soft_cap):
        def capped(score, batch, head, query_index, key_index):
            return soft_cap * torch.tanh(score / soft_cap)

        return flex_attention.flex_attention(
            query,
            key,
            value,
            score_mod=None if soft_cap is None else capped,
            block_mask=mask,
            scale=1.0,
            enable_gqa=True,
        )

    # Static: FlexAttention refuses the symbol that PyTorch makes of a second soft cap.
    return torch.compile(run, fullgraph=True, dynamic=False)


def block_mask(visibility: Visibility) -> Any:
    """FlexAttention's `BlockMask` of a `Visibility`, of padded lengths."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = (_padded(x, 1) for x in (visibility.queries, visibility.keys))
    behind, ahead = visibility.reach

    def seen(batch, head, query, key):
        kind = keys[batch, key]
        mask = (queries[batch, query] == kind) & (kind > 0)
        if behind is not None:
            mask = mask & (query - key <= behind)
        if ahead is not None:
            mask = mask & (key - query <= ahead)
        return mask

    some, whole = (x[:, None] for x in block_tables(queries, keys, behind, ahead))
    masked, unmasked = _listed(some & ~whole), _listed(whole)
    return BlockMask.from_kv_blocks(
        masked[0],
        masked[1],
        unmasked[0],
        unmasked[1],
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(queries.shape[1], keys.shape[1]),
    )


def block_tables(
    queries: Tensor, keys: Tensor, behind: int | None, ahead: int | None
) -> tuple[Tensor, Tensor]:
    """Which blocks may have a visible key, and which are visible as a whole.

    Args:
        queries: int32 segment ids `(B, T)`, T a multiple of the block size.
        keys: `(B, S)`, likewise.
        behind: largest `query - key`, or `None`.
        ahead: largest `key - query`, or `None`.

    Returns:
        Two boolean `(B, T / 128, S / 128)`.
    """
    import torch

    queries, keys = (x.reshape(len(x), -1, _BLOCK) for x in (queries, keys))
    far = torch.iinfo(torch.int32).max

    def lowest(x):  # Of the segments, which padding is none of.
        return torch.where(x > 0, x, far).amin(-1)

    some = (queries.amax(-1)[:, :, None] >= lowest(keys)[:, None]) & (
        lowest(queries)[:, :, None] <= keys.amax(-1)[:, None]
    )
    least, most = queries.amin(-1)[:, :, None], queries.amax(-1)[:, :, None]
    whole = (least == most) & (keys.amin(-1)[:, None] == least)
    whole &= (keys.amax(-1)[:, None] == most) & (most > 0)
    rows, columns = (
        _BLOCK * torch.arange(x.shape[1], device=x.device) for x in (queries, keys)
    )
    distance = rows[:, None] - columns  # Of the first of each block.
    if behind is not None:
        some &= distance - (_BLOCK - 1) <= behind
        whole &= distance + (_BLOCK - 1) <= behind
    if ahead is not None:
        some &= -distance - (_BLOCK - 1) <= ahead
        whole &= -distance + (_BLOCK - 1) <= ahead
    return some, whole


def _listed(table):
    """Counts of the True of each row, and their columns, followed by the others."""
    import torch

    order = torch.argsort(table.to(torch.int8), dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.to(torch.int32)
