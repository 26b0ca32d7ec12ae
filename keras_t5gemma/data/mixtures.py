"""Denoisers of pretraining objectives, and the published mixtures of them."""

import dataclasses
import numbers
from typing import Any

from keras_t5gemma.utils.checks import number, shown, string


@dataclasses.dataclass(frozen=True)
class Spans:
    """Span corruption: random spans are removed, each replaced by a sentinel.

    Args:
        mean_length: mean length of a span in tokens, at least 1.
        rate: share of the tokens that is removed, in (0, 1).
        mode: name of the mode token at the start of the encoder's input, or `None`.
    """

    mean_length: float
    rate: float
    mode: str | None = None

    def __post_init__(self):
        number(self.rate, "rate", above=0, below=1)
        number(self.mean_length, "mean_length", at_least=1)
        _check_mode(self.mode)


@dataclasses.dataclass(frozen=True)
class Suffix:
    """Sequential denoising: the end of the text is removed, without a sentinel.

    Args:
        rate: share of the tokens that is removed, in (0, 1); `None` draws it uniformly
            for each text.
        mode: as in `Spans`.
    """

    rate: float | None = 0.5
    mode: str | None = None

    def __post_init__(self):
        if self.rate is not None:
            number(self.rate, "rate", above=0, below=1)
        _check_mode(self.mode)


def _check_mode(mode):
    if mode is not None:
        string(mode, "mode")


MIXTURES = {
    # arXiv 2205.05131, section 3.1: regular, extreme and sequential denoising.
    "ul2": (
        (1, Spans(3, 0.15, "[NLU]")),
        (1, Spans(8, 0.15, "[NLU]")),
        (1, Spans(3, 0.5, "[NLG]")),
        (1, Spans(8, 0.5, "[NLG]")),
        (1, Spans(64, 0.15, "[NLG]")),
        (1, Spans(64, 0.5, "[NLG]")),
        (1, Suffix(0.25, "[S2S]")),
    ),
    # T5Gemma 2, arXiv 2512.14856, section 3.1. T5Gemma 1's is not published.
    "t5gemma2": (
        (1, Spans(3, 0.15)),
        (1, Spans(12, 0.5)),
        (1, Spans(32, 0.15)),
        (1, Spans(32, 0.5)),
        (4, Suffix(0.75)),
    ),
}


def mixture_rows(mixture: Any) -> tuple[tuple[float, Any], ...]:
    """The rows of a mixture.

    Args:
        mixture: a name of `MIXTURES`, or a list of `(weight, Spans or Suffix)`.

    Raises:
        ValueError: for anything else.
    """
    rows = None
    if isinstance(mixture, str):
        rows = MIXTURES.get(mixture)
    elif isinstance(mixture, list | tuple):
        rows = tuple(mixture)
    if not rows or not all(map(_is_row, rows)):
        raise ValueError(
            f"`mixture` must be one of {list(MIXTURES)}, or rows of (weight > 0, Spans "
            f"or Suffix); got {shown(mixture)}."
        )
    return rows


def _is_row(row):
    if not isinstance(row, list | tuple) or len(row) != 2:
        return False
    weight = row[0]
    is_weight = isinstance(weight, numbers.Real) and 0 < weight < 2**31
    return is_weight and isinstance(row[1], Spans | Suffix)
