"""Arrays of token ids: padding of rows, and checks of arrays that users pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.utils import buckets
from keras_t5gemma.utils.types import Tensor

INPUTS = (
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)


def pad(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad lists of ids with 0: int32 ids and mask, `(rows, width)`."""
    ids = np.zeros((len(rows), width), "int32")
    mask = np.zeros((len(rows), width), "int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def padded_width(
    rows: Sequence[Sequence[int]], limit: int, multiple: int | None = None
) -> int:
    """Width to pad rows of ids to.

    Args:
        rows: lists of ids.
        limit: largest width.
        multiple: round the longest row up to a multiple; `None` is always `limit`.
    """
    if multiple is None:
        return limit
    longest = max(1, max(map(len, rows), default=1))
    return min(limit, buckets.round_up(longest, multiple))


def named(side: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Ids and mask as inputs of the backbone's `side`: `"encoder"` or `"decoder"`."""
    return {f"{side}_token_ids": ids, f"{side}_padding_mask": mask}


def check_ids(x: Mapping[str, Any], y: Any, vocabulary_size: int) -> None:
    """Raise `ValueError` unless `x` holds the four inputs, with all ids in range."""
    if set(x) != set(INPUTS):
        raise ValueError(f"Arrays must be a dict with keys {INPUTS}; got {sorted(x)}.")
    for name in ("encoder_token_ids", "decoder_token_ids"):
        check_range(x[name], name, vocabulary_size)
    if y is not None:
        check_range(y, "y", vocabulary_size)


def check_range(ids: Any, name: str, vocabulary_size: int) -> None:
    """Raise `ValueError` for an id outside the vocabulary."""
    ids = ops.convert_to_numpy(ids)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary_size):
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size}); got ids from "
            f"{ids.min()} to {ids.max()}."
        )


def check_vocabulary(tokenizer: Any, vocabulary_size: int) -> None:
    """Raise `ValueError` when a tokenizer has ids without a row in the embeddings.

    A tokenizer without a vocabulary is accepted; loading a saved model sets it later.
    """
    if tokenizer.proto is None:
        return
    size = tokenizer.vocabulary_size()
    if size > vocabulary_size:
        raise ValueError(
            f"The tokenizer has {size} ids, the model only {vocabulary_size}: they do "
            "not belong together."
        )
