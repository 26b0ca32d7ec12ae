"""Arrays of token ids: padding of rows, and checks of arrays that users pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.utils import buckets
from keras_t5gemma.utils.checks import shown
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


def pair_arrays(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    start_id: int,
    width: int,
    target_width: int,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Inputs of the backbone, labels and their mask, from the ids of pairs.

    Args:
        sources: ids of each source.
        targets: ids of each target, with the end token.
        start_id: first id of the decoder input.
        width: of the encoder arrays.
        target_width: of the decoder arrays.
    """
    labels, mask = pad(targets, target_width)
    shifted, _ = pad([[start_id, *row[:-1]] for row in targets], target_width)
    encoder = named("encoder", *pad(sources, width))
    return {**encoder, **named("decoder", shifted, mask)}, labels, mask


def named(side: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Ids and mask as inputs of the backbone's `side`: `"encoder"` or `"decoder"`."""
    return {f"{side}_token_ids": ids, f"{side}_padding_mask": mask}


def check_ids(x: Mapping[str, Any], y: Any, vocabulary_size: int) -> None:
    """Raise `ValueError` unless `x` holds the four inputs, with all ids in range."""
    if set(x) != set(INPUTS):
        raise ValueError(
            f"Arrays must be a dict `x` with keys {INPUTS}; got {shown(list(x))}."
        )
    shapes: dict[str, tuple] = {}
    for side in ("encoder", "decoder"):
        names = f"{side}_token_ids", f"{side}_padding_mask"
        check_range(x[names[0]], names[0], vocabulary_size)
        shapes |= {name: id_array(x[name], name).shape for name in names}
        if shapes[names[0]] != shapes[names[1]]:
            raise ValueError(
                f"`{names[1]}` must have the shape of `{names[0]}`, "
                f"{shapes[names[0]]}; got {shapes[names[1]]}."
            )
    if y is not None:
        check_range(y, "y", vocabulary_size)
        shapes["y"] = id_array(y, "y").shape
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"`x` and `y` must have the same number of rows; got {shapes}")


def check_names(x: Mapping[str, Any], needed: Sequence[str], name: str) -> None:
    """Raise `ValueError` when a dict of arrays lacks one that a model reads.

    Args:
        x: dict of arrays.
        needed: names of the model's inputs.
        name: what has them, for the message.
    """
    missing = [key for key in needed if key not in x]
    if missing:
        raise ValueError(
            f"{name} must have the arrays {tuple(needed)}; it has {shown(list(x))}, "
            f"without {shown(missing)}."
        )


def id_array(ids: Any, name: str) -> np.ndarray:
    """Ids, or a padding mask, of any array or nested list as a NumPy array.

    Args:
        ids: whole numbers or bools, `(batch, length)`, at least one row and token.
        name: of the argument, for the message.

    Raises:
        ValueError: for anything else, such as ragged lists and floats.
    """
    array = None
    try:
        is_list = isinstance(ids, list | tuple)
        array = np.asarray(ids) if is_list else ops.convert_to_numpy(ids)
    except Exception:  # Whatever a backend raises for what it cannot convert.
        pass
    if array is None or array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(
            f"`{name}` must be whole numbers (batch, length); got {_kind(ids, array)}."
        )
    if not array.size:
        raise ValueError(
            f"`{name}` must have a row and a token at least; got shape {array.shape}."
        )
    return array


def _kind(ids, array):
    if array is None or array.dtype.kind not in "iubf" or array.size < 10:
        return shown(ids)
    return f"{array.dtype} {array.shape}"


def check_range(ids: Any, name: str, vocabulary_size: int) -> np.ndarray:
    """The `id_array`; raises `ValueError` for an id outside the vocabulary."""
    ids = id_array(ids, name)
    if not (ids.min() >= 0 and ids.max() < vocabulary_size):
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size}); got ids from "
            f"{ids.min()} to {ids.max()}."
        )
    return ids


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
