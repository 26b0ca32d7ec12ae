"""Arrays of token ids that a user brings, checked."""

from keras import ops

INPUTS = (
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)


def check_ids(x, y, vocabulary_size):
    """Raise `ValueError` unless `x` holds the four inputs, all ids in range."""
    if set(x) != set(INPUTS):
        raise ValueError(
            f"Arrays must come as a dict with keys {INPUTS}; got {sorted(x)}."
        )
    for name in ("encoder_token_ids", "decoder_token_ids"):
        check_range(x[name], name, vocabulary_size)
    if y is not None:
        check_range(y, "y", vocabulary_size)


def check_range(ids, name, vocabulary_size):
    """Raise `ValueError` for an id outside the vocabulary."""
    ids = ops.convert_to_numpy(ids)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary_size):
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size}); got ids from "
            f"{ids.min()} to {ids.max()}."
        )
