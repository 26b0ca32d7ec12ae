"""Batches of training pairs that an objective makes from documents."""

from typing import Any

import numpy as np

from keras_t5gemma.data import objective_pairs
from keras_t5gemma.data.pair_dataset import PairDataset, tokenize
from keras_t5gemma.utils.buckets import ceil_div
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.ragged import Ragged


class DocumentDataset(PairDataset):
    """Batches of training pairs that an objective makes from documents.

    Documents longer than the preprocessor's lengths allow are cut into pieces. Each
    piece becomes one pair: no pair crosses a document boundary, and packed pairs do
    not attend to each other. The objective draws from the number of the piece and of
    the epoch; the lengths of a pair are the same in every epoch.

    Args:
        *args: of `PairDataset`: a `Seq2SeqLMPreprocessor` with an objective, and
            `{"text": [...]}`, the documents. Those below two tokens are left out.
        teacher: adds a teacher's inputs to every batch: a `TeacherInMemory`, a
            `TeacherScores`, or `None`.
        **kwargs: further arguments of `PairDataset`.

    Raises:
        ValueError: as `PairDataset`, when no document has two tokens, or for a teacher
            with another vocabulary or with scores of other texts.
    """

    def __init__(self, *args: Any, teacher: Any = None, **kwargs: Any) -> None:
        if teacher is not None and not hasattr(teacher, "inputs"):
            raise ValueError(
                "`teacher` must be None, a TeacherInMemory or TeacherScores; got "
                f"{shown(teacher)}."
            )
        self.teacher = teacher
        super().__init__(*args, **kwargs)
        if teacher is not None:
            teacher.check(self)

    def _read(self, columns, name):
        self.pieces, self.is_last = self._read_pieces(columns, name)
        lengths = self.pieces.lengths
        numbers = np.arange(len(lengths))
        return objective_pairs.lengths(
            self.preprocessor, lengths, numbers, self.is_last
        )

    def _read_pieces(self, columns, name):
        return read_pieces(self.preprocessor, columns, name)

    def max_pieces(self, rows: int) -> int:
        """Maximum number of pieces in a batch of `rows` rows."""
        return int(np.sort(self.packs.lengths)[-rows:].sum())

    def __getitem__(self, index):
        x, labels, weights = super().__getitem__(index)
        if self.teacher is not None:
            rows, widths = self._own_batch(index)
            pairs = self._pairs(rows)
            lengths, is_last = self.pieces.lengths, self.is_last[pairs]
            places = objective_pairs.places(
                self.preprocessor, lengths[pairs], pairs, is_last, self._pass(index)
            )
            mask = x["decoder_padding_mask"]
            width = min(lengths.max(), sum(widths))
            x |= self.teacher.inputs(self, pairs, places, mask, width)
        return x, labels, weights

    def _tokens(self, pairs, epoch):
        pieces, is_last = self._take(pairs), self.is_last[pairs]
        return objective_pairs.make(self.preprocessor, pieces, pairs, is_last, epoch)

    def _take(self, pairs):
        """The pieces of these numbers, as a `Ragged`."""
        return self.pieces.take(pairs)


def read_pieces(
    preprocessor: Any, columns: dict, name: str
) -> tuple[Ragged, np.ndarray]:
    """Tokenize documents and cut them to a preprocessor's lengths.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        columns: `{"text": [...]}`.
        name: of the argument that `columns` was passed as, for messages.

    Returns:
        `(pieces, is_last)`: a `Ragged`, and bool `(pieces,)`, whether the piece ends
        its document.

    Raises:
        ValueError: when no document has two tokens.
    """

    def token_rows(part):
        return [preprocessor.tokenizer.tokenize(part["text"])]

    (documents,) = tokenize(preprocessor, columns, name, token_rows)
    documents = documents.take(np.flatnonzero(documents.lengths >= 2))
    if not len(documents):
        raise ValueError(f"`{name}` must hold a text of two tokens or more.")
    longest = preprocessor.longest_text()
    lengths, is_last = cut(documents.lengths, longest)
    return Ragged(lengths, documents.values), is_last


def cut(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut texts into pieces of 2 to `longest` tokens.

    Args:
        lengths: int `(texts,)`, at least 2 tokens each.
        longest: maximum length of a piece, at least 3 tokens.

    Returns:
        `(lengths, is_last)` of the pieces, in the order of the texts: int and bool
        `(pieces,)`, whether the piece ends its text.
    """
    counts = ceil_div(lengths, longest)
    last = np.cumsum(counts) - 1
    pieces = np.full(counts.sum(), longest)
    pieces[last] = lengths - (counts - 1) * longest
    lonely = last[pieces[last] == 1]
    pieces[lonely] += 1
    pieces[lonely - 1] -= 1
    is_last = np.zeros(len(pieces), bool)
    is_last[last] = True
    return pieces, is_last
