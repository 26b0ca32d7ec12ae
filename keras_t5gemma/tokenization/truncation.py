"""Warnings about truncated texts and empty targets."""

import warnings
from collections.abc import Mapping

_STACKLEVEL = 4  # The `with` block of the caller of `report_truncation`.


def warn_of_truncation(
    counts: Mapping[str, tuple[int, int]],
    lengths: Mapping[str, int],
    empty_targets: bool,
) -> None:
    """Warn of what was truncated, with counts.

    Args:
        counts: `(affected, total)` by kind: `"encoder"` and `"decoder"` texts, `"text"`
            of an objective, and `"empty"` targets.
        lengths: maximum number of tokens by kind.
        empty_targets: also warn about empty targets.
    """
    for kind, (affected, total) in counts.items():
        if not affected or (kind == "empty" and not empty_targets):
            continue
        if kind == "empty":
            message = (
                f"{affected} of {total} targets are empty: they teach the model to "
                "answer nothing. Remove such pairs if that is not intended."
            )
        elif kind == "text":
            message = (
                f"{affected} of {total} texts were longer than {lengths[kind]} tokens "
                "and were truncated. `fit` uses whole texts if they are in memory."
            )
        else:
            message = (
                f"{affected} of {total} {kind} texts were longer than {lengths[kind]} "
                "tokens and were truncated; increase "
                f"`preprocessor.{kind}_sequence_length` to keep them whole."
            )
        warnings.warn(message, stacklevel=_STACKLEVEL)
