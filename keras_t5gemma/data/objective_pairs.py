"""Pairs that an objective makes for a preprocessor, with their end tokens."""

import zlib
from typing import Any

import numpy as np

from keras_t5gemma.utils.ragged import Ragged


def make(
    preprocessor: Any,
    texts: Ragged,
    seeds: np.ndarray,
    is_last: np.ndarray,
    epoch: int = 0,
) -> tuple[Ragged, Ragged]:
    """Sources and targets of texts.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        texts: a `Ragged` of ids, 2 to `preprocessor.longest_text()` each.
        seeds: int `(rows,)`, the random seed of each text.
        is_last: bool `(rows,)`, whether the text ends its document.
        epoch: number of the epoch.

    Returns:
        `(sources, targets)`, a `Ragged` each. A target ends with the end token, unless
        it ends with its text and the document continues.
    """
    sources, targets = preprocessor.objective(texts, seeds, epoch)
    ends = _has_end(preprocessor, seeds, is_last)
    values = np.insert(targets.values, targets.ends[ends], preprocessor.end_id)
    return sources, Ragged(targets.lengths + ends, values)


def places(
    preprocessor: Any,
    lengths: np.ndarray,
    seeds: np.ndarray,
    is_last: np.ndarray,
    epoch: int = 0,
) -> Ragged:
    """Position in its text of every target token that `make` returns.

    Args:
        preprocessor: as in `make`.
        lengths: int `(rows,)`, tokens of the texts.
        seeds: as in `make`.
        is_last: as in `make`.
        epoch: as in `make`.

    Returns:
        A `Ragged` as long as the targets: 0 for the first token of the text, the
        length of the text for the end token after it, -1 for sentinels and other
        tokens that are not in the text.
    """
    lengths = np.asarray(lengths)
    texts = Ragged(lengths, None)
    inside = np.arange(lengths.sum()) - np.repeat(texts.starts, lengths)
    # Positions in place of ids: those below `size` are ids that the objective adds.
    size = preprocessor.tokenizer.vocabulary_size()
    texts.values = inside + size
    _, targets = preprocessor.objective(texts, seeds, epoch)
    values = np.maximum(targets.values.astype("int64") - size, -1)
    ends = _has_end(preprocessor, seeds, is_last)
    in_text = preprocessor.objective.ends_with_the_text(seeds)
    last = np.where(in_text, lengths, -1)[ends]
    return Ragged(targets.lengths + ends, np.insert(values, targets.ends[ends], last))


def lengths(
    preprocessor: Any, lengths: np.ndarray, seeds: np.ndarray, is_last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the sources and targets that `make` returns, int `(rows,)` each."""
    sources, targets = preprocessor.objective.lengths(lengths, seeds)
    return sources, targets + _has_end(preprocessor, seeds, is_last)


def _has_end(preprocessor, seeds, is_last):
    return is_last | ~preprocessor.objective.ends_with_the_text(seeds)


def of_rows(preprocessor: Any, rows: list[list[int]]) -> list[list[list[int]]]:
    """Pairs of single texts, truncated to fit, drawn from a hash of the text.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        rows: lists of ids; fewer than two tokens give an empty pair.

    Returns:
        `[sources, targets]`, a list of ids for each row.
    """
    longest = preprocessor.longest_text()
    is_whole = np.array([len(row) <= longest for row in rows], bool)
    rows = [row[:longest] for row in rows]
    long = [i for i, row in enumerate(rows) if len(row) > 1]
    seeds = [zlib.crc32(np.array(rows[i], "int32").tobytes()) for i in long]
    texts = Ragged.from_rows([rows[i] for i in long])
    made = make(preprocessor, texts, np.array(seeds, "int64"), is_whole[long])
    pairs: list[list[list[int]]] = [[[] for _ in rows] for _ in made]
    for side, ragged in zip(pairs, made, strict=True):
        for place, i in enumerate(long):
            side[i] = ragged[place].tolist()
    return pairs
