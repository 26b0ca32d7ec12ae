"""Plain text as training batches, by an objective."""

import numpy as np

from keras_t5gemma.data import objective_pairs
from keras_t5gemma.data.pair_dataset import PairDataset, tokenize
from keras_t5gemma.utils.ragged import Ragged


class DocumentDataset(PairDataset):
    """Batches of what a preprocessor's objective makes of documents.

    A document that is too long for the preprocessor's lengths, whatever is drawn, is
    cut into pieces that are not. Every piece is a pair of its own: none crosses from
    one document into the next, and packed pairs do not see each other. What is drawn
    for a piece comes from its number and the epoch's; its lengths stay the same.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        columns: `{"text": [...]}`, the documents; those below two tokens are left out.
        **kwargs: further arguments of `PairDataset`.

        teacher: whose view of the texts comes with them: a `TeacherInMemory`, a
            `TeacherScores`, or `None`.

    Raises:
        ValueError: as `PairDataset`, without a document of two tokens, or for a teacher
            of another vocabulary or other texts.
    """

    def __init__(self, *args, teacher=None, **kwargs):
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

    def most_pieces(self, rows):
        """More pieces are in no `rows` of a batch, however they are shuffled."""
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
        """So many pieces, as a `Ragged`."""
        return self.pieces.take(pairs)


def read_pieces(preprocessor, columns, name):
    """Documents, tokenized and cut to a preprocessor's lengths.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        columns: `{"text": [...]}`.
        name: of the argument that `columns` came by.

    Returns:
        `(pieces, is_last)`: a `Ragged`, and whether a document ends with each.
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


def cut(lengths, longest):
    """Cut texts into pieces of at least 2 tokens, and at most so many.

    Args:
        lengths: int `(texts,)`, at least 2.
        longest: int, at least 3.

    Returns:
        `(lengths, is_last)` of the pieces, those of a text one after the other:
        ints, and whether the text ends with the piece.
    """
    counts = -(-lengths // longest)
    last = np.cumsum(counts) - 1
    pieces = np.full(counts.sum(), longest)
    pieces[last] = lengths - (counts - 1) * longest
    lonely = last[pieces[last] == 1]
    pieces[lonely] += 1
    pieces[lonely - 1] -= 1
    is_last = np.zeros(len(pieces), bool)
    is_last[last] = True
    return pieces, is_last
