"""In-memory texts for an encoder alone, with labels or in matching pairs."""

import numpy as np

from keras_t5gemma.data.pair_dataset import PairDataset, tokenize
from keras_t5gemma.tokenization.preprocessor import named, pad

LADDER = (16, 24, 32, 48, 64, 96)  # Widths of `by_length`, and these doubled.


class EncoderDataset(PairDataset):
    """`PairDataset` of texts that are read and not written.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`; its encoder side is used.
        columns: `{input name: texts}`, one column or two that belong together.
            The arrays of a batch are called `NAME_token_ids` and `NAME_padding_mask`.
        labels: array `(texts, ...)`, or `None`: then those of a batch are zeros.
        token_rows: a function of a dict of columns that returns a list of ids a
            text, for each column or for all of them together.
        **kwargs: those of `PairDataset`, but for `batching="packed"`.
    """

    def __init__(self, preprocessor, columns, labels, token_rows, **kwargs):
        if kwargs.get("batching") == "packed":
            raise ValueError(
                "`batching` must be 'bucketed' or 'fixed' for an encoder alone; got "
                "'packed'."
            )
        self.labels = labels
        self.names = list(columns)
        self._rows_of = token_rows
        super().__init__(preprocessor, columns, **kwargs)

    def _read(self, columns, name):
        sides = encoder_ids(self.preprocessor, columns, name, self._rows_of)
        self.names = self.names[: len(sides)]
        self.sources, self.targets = sides[0], sides[-1]
        if len(sides) == 2:
            return sides[0].lengths, sides[1].lengths
        return sides[0].lengths, np.zeros(len(sides[0]), "int64")

    def _limits(self):
        length = self.preprocessor.encoder_sequence_length
        return length, length if len(self.names) == 2 else 1

    def __getitem__(self, index):
        rows, widths = self._own_batch(index)
        chosen = self._pairs(rows)
        weights = np.zeros(len(rows), "float32")
        weights[: len(chosen)] = self.weights[chosen]
        sides = zip(self.names, self._tokens(chosen, 0), widths, strict=False)
        x = {}
        for name, tokens, width in sides:
            x |= arrays(tokens, (len(rows), width), name)
        if self.labels is None:
            return x, np.zeros(len(rows), "int32"), weights
        labels = np.zeros((len(rows), *self.labels.shape[1:]), self.labels.dtype)
        labels[: len(chosen)] = self.labels[chosen]
        return x, labels, weights


def arrays(tokens, shape, name="encoder"):
    """Rows of ids as int32 arrays of a shape, rows that are left over empty."""
    count, width = shape
    filled = [*tokens, *[[]] * (count - len(tokens))]
    return named(name, *pad(filled, width))


def by_length(rows, batch_size, limit):
    """Batches of rows of similar length, in shapes that are few.

    Args:
        rows: a `Ragged` of ids.
        batch_size: rows a batch; the last one is filled with empty rows.
        limit: the largest width.

    Yields:
        `(numbers of the rows, arrays)`, the longest rows first, so that what does not
        fit into memory fails at once.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        shape = batch_size, width_of(int(rows.lengths[chosen[0]]), limit)
        yield chosen, arrays([rows[i] for i in chosen], shape)


def width_of(length, limit):
    """The first step of the ladder that a length fits, or the limit."""
    steps = list(LADDER)
    while steps[-1] < length:
        steps += [2 * step for step in steps[-2:]]
    return min(limit, next(step for step in steps if step >= length))


def encoder_ids(preprocessor, columns, name, token_rows):
    """The ids of columns of texts, a list of `Ragged`, cut with a warning.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        columns: `{name: texts}`.
        name: of the argument that they came by, for messages.
        token_rows: as in `EncoderDataset`.

    Raises:
        ValueError: for what is no list of texts, none at all, or empty ones.
    """
    for key, texts in columns.items():
        if isinstance(texts, str | bytes):
            raise ValueError(f"{key!r} must be a list of texts; got {texts!r}.")
        empty = [i for i, text in enumerate(texts) if not len(text)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(texts)} texts of {key!r} are empty, the first "
                f"is number {empty[0]}: leave them out."
            )
    return tokenize(preprocessor, columns, name, token_rows)
