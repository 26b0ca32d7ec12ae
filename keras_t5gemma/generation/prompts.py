"""From what a user asks for to batches of the decoding loop, and back."""

import numpy as np
from keras import ops

from keras_t5gemma.text.ids import INPUTS, check_range
from keras_t5gemma.text.preprocessor import pad


def id_prompts(inputs, max_length, vocabulary_size):
    """The arrays of `generate_preprocess`, from a user's own arrays.

    Args:
        inputs: dict of `encoder_token_ids` `(batch, length)` and, as an option,
            the other three inputs of the backbone. Without a mask, id 0 is
            padding; without a prompt, the decoder starts from bos, id 2.
        max_length: length of the decoder arrays that are returned.
        vocabulary_size: the bound of the ids.

    Raises:
        ValueError: for unknown keys, shapes that do not fit, ids out of range, or
            a prompt longer than `max_length`.
    """
    unknown = set(inputs) - set(INPUTS)
    if unknown:
        raise ValueError(
            f"`inputs` has unknown keys {sorted(unknown)}; known: {INPUTS}."
        )
    arrays = {k: ops.convert_to_numpy(v) for k, v in inputs.items()}
    source = arrays["encoder_token_ids"]
    if source.ndim != 2 or not source.shape[1]:
        raise ValueError(
            "`encoder_token_ids` must be (batch, length) with length >= 1; got "
            f"shape {source.shape}."
        )
    arrays.setdefault("encoder_padding_mask", source != 0)
    start = np.full((len(source), 1), 2)
    prompt = arrays.get("decoder_token_ids", start)
    mask = arrays.get("decoder_padding_mask", prompt != 0).astype(bool)
    for name, array in (
        ("encoder_token_ids", source),
        ("decoder_token_ids", prompt),
    ):
        check_range(array, name, vocabulary_size)
    lengths = mask.sum(axis=1)
    if len(prompt) != len(source) or lengths.min(initial=1) < 1:
        raise ValueError(
            "`decoder_token_ids` must hold at least the start token of each of "
            f"the {len(source)} sources; got shape {prompt.shape}."
        )
    if lengths.max(initial=1) > max_length:
        raise ValueError(
            f"`decoder_token_ids` holds a prompt of {lengths.max()} tokens, more "
            f"than the `max_length` of {max_length}."
        )
    rows = [row[keep].tolist() for row, keep in zip(prompt, mask, strict=True)]
    ids, mask = pad(rows, max_length)
    return {
        "encoder_token_ids": source.astype("int32"),
        "encoder_padding_mask": arrays["encoder_padding_mask"].astype("int32"),
        "decoder_token_ids": ids,
        "decoder_padding_mask": mask,
    }


def decode_all(function, arrays, stop_ids, batch_size):
    """Decode all rows, in batches whose prompts are equally long.

    A sampler holds a single position for the whole batch, and beams of a row that
    is still being forced through its prompt would be no beams.

    Args:
        function: of `make_generate_function`.
        arrays: of `id_prompts` or `generate_preprocess`.
        stop_ids: ids that end a row, or `None`.
        batch_size: most rows at a time.

    Returns:
        int32 `(rows, max length)`, row by row what decoding it alone gives.
    """
    ids = np.array(arrays["decoder_token_ids"])
    lengths = arrays["decoder_padding_mask"].sum(axis=1)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            decoder_ids = arrays["decoder_token_ids"][batch]
            out = function(
                {
                    "encoder_token_ids": arrays["encoder_token_ids"][batch],
                    "encoder_padding_mask": arrays["encoder_padding_mask"][batch],
                    "prefix_token_ids": decoder_ids[:, : length - 1],
                    "decoder_token_ids": decoder_ids,
                },
                stop_token_ids=stop_ids,
            )
            ids[batch] = ops.convert_to_numpy(out)
    return ids


def answer_mask(ids, prompt_lengths, stop_ids):
    """1 for prompt and answer, stop id included; 0 after it. int32, as `ids`."""
    mask = np.ones_like(ids)
    if stop_ids is None:
        return mask
    positions = np.arange(ids.shape[1])
    stop = np.isin(ids, stop_ids) & (positions >= prompt_lengths[:, None])
    return ((np.cumsum(stop, axis=1) - stop) == 0).astype("int32")
