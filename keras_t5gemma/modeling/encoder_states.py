"""Hidden states of chosen encoder layers, the output of a text tower.

B batch, T length, D width, L number of blocks.
"""

from typing import Any

from keras import ops

from keras_t5gemma.utils.checks import one_of, whole_number
from keras_t5gemma.utils.types import Tensor

STATE_DTYPES = ("float32", "bfloat16", "float16")


def layer_numbers(layers: Any, count: int) -> tuple[int, ...]:
    """Numbers from 0 to L of one layer or several.

    Args:
        layers: a whole number, or a list of them: 0 for the embeddings, i for the
            states after block i; negative ones count from the end, -1 for L.
        count: L.

    Raises:
        ValueError: for an empty list, or a layer that does not exist.
    """
    bounds = -count - 1, count
    if not isinstance(layers, list | tuple | range):
        number = whole_number(layers, "layers", *bounds, other="a list of layers,")
        found: tuple[int, ...] = (number,)
    else:
        if not len(layers):
            raise ValueError(f"`layers` must name at least one layer; got {layers!r}.")
        numbers = enumerate(layers)
        found = tuple(whole_number(n, f"layers[{i}]", *bounds) for i, n in numbers)
    return tuple(number % (count + 1) for number in found)


def check_final_norm(final_norm: Any) -> bool | None:
    """Raise `ValueError` unless `final_norm` is `None`, `True` or `False`."""
    return one_of(final_norm, "final_norm", (None, True, False))


def encoder_states(
    encoder: Any,
    token_ids: Tensor,
    padding: Tensor,
    layers: tuple[int, ...],
    final_norm: bool | None = None,
    training: bool | None = None,
) -> list[Tensor]:
    """Hidden states of layers, in one pass that stops after the last of them.

    Args:
        encoder: an `Encoder`.
        token_ids: int `(B, T)`.
        padding: bool or int `(B, T)`, 0 for padding.
        layers: see `layer_numbers`.
        final_norm: `None` applies the encoder's final norm to the states of layer L
            only, `True` to those of every layer, `False` to none.
        training: turns dropout on.

    Returns:
        A list of `(B, T, D)`, one for each of `layers`, 0 on padding.
    """
    padding = ops.cast(padding, "int32")
    found = encoder(token_ids, padding, training=training, layers=layers)
    keep = ops.expand_dims(padding > 0, -1)  # B T 1

    def finished(number, states):
        normalized = final_norm
        if normalized is None:
            normalized = number == len(encoder.blocks)
        if normalized:
            states = encoder.normalize(states, training)
        return ops.where(keep, states, ops.zeros_like(states))

    return [finished(*pair) for pair in zip(layers, found, strict=True)]
