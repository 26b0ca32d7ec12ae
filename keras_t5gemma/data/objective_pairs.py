"""What an objective makes for a preprocessor: pairs that fit, with their ends."""

import zlib

import numpy as np

from keras_t5gemma.utils.ragged import Ragged


def make(preprocessor, texts, seeds, is_last, epoch=0):
    """Sources and targets of texts.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        texts: a `Ragged` of ids, 2 to `preprocessor.longest_text()` each.
        seeds: int `(rows,)`, what is drawn for each.
        is_last: bool `(rows,)`, whether the document ends with the text.
        epoch: int.

    Returns:
        `(sources, targets)`, a `Ragged` each. A target ends in the end token, unless
        it is the end of a text which goes on.
    """
    sources, targets = preprocessor.objective(texts, seeds, epoch)
    ends = _has_end(preprocessor, seeds, is_last)
    values = np.insert(targets.values, targets.ends[ends], preprocessor.end_id)
    return sources, Ragged(targets.lengths + ends, values)


def places(preprocessor, lengths, seeds, is_last, epoch=0):
    """Where in its text every token of a target is that `make` makes.

    Args:
        preprocessor: as in `make`.
        lengths: int `(rows,)`, of the texts.
        seeds: as in `make`.
        is_last: as in `make`.
        epoch: as in `make`.

    Returns:
        A `Ragged` of the lengths of the targets: 0 for the first token of the text, as
        much as its length for the end token after it, -1 for what is not of the text.
    """
    lengths = np.asarray(lengths)
    texts = Ragged(lengths, None)
    inside = np.arange(lengths.sum()) - np.repeat(texts.starts, lengths)
    # The objective moves ids about, whatever they are, and adds some of its own.
    size = preprocessor.tokenizer.vocabulary_size()
    texts.values = inside + size
    _, targets = preprocessor.objective(texts, seeds, epoch)
    values = np.maximum(targets.values.astype("int64") - size, -1)
    ends = _has_end(preprocessor, seeds, is_last)
    in_text = preprocessor.objective.ends_with_the_text(seeds)
    last = np.where(in_text, lengths, -1)[ends]
    return Ragged(targets.lengths + ends, np.insert(values, targets.ends[ends], last))


def lengths(preprocessor, lengths, seeds, is_last):
    """The lengths of what `make` makes, of texts of so many tokens."""
    sources, targets = preprocessor.objective.lengths(lengths, seeds)
    return sources, targets + _has_end(preprocessor, seeds, is_last)


def _has_end(preprocessor, seeds, is_last):
    return is_last | ~preprocessor.objective.ends_with_the_text(seeds)


def of_rows(preprocessor, rows):
    """Pairs of single texts, what is too long cut, drawn by what a text says.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        rows: lists of ids; one below two tokens gives an empty pair.

    Returns:
        `(sources, targets)`, a list of ids each row.
    """
    longest = preprocessor.longest_text()
    is_whole = np.array([len(row) <= longest for row in rows], bool)
    rows = [row[:longest] for row in rows]
    long = [i for i, row in enumerate(rows) if len(row) > 1]
    seeds = [zlib.crc32(np.array(rows[i], "int32").tobytes()) for i in long]
    texts = Ragged.from_rows([rows[i] for i in long])
    made = make(preprocessor, texts, np.array(seeds, "int64"), is_whole[long])
    pairs = [[[] for _ in rows] for _ in made]
    for side, ragged in zip(pairs, made, strict=True):
        for place, i in enumerate(long):
            side[i] = ragged[place].tolist()
    return pairs
