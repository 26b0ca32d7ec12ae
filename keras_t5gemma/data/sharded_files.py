"""Batches of more text than memory holds, from files that processes share out.

When the data is made, every process reads and tokenizes its share of the files, once,
to learn how long the rows are, and tells the others. From then on all know the same
plan: which rows are in which batch, and how wide that is. It depends on the files, the
seed and the epoch, not on how many processes there are, and any batch of any epoch can
be had at once, so that a training goes on where it stopped, on another mesh too. A
process reads only the rows that its own devices take.
"""

import copy
import itertools
import threading

import keras
import numpy as np

from keras_t5gemma.data.document_dataset import DocumentDataset, cut
from keras_t5gemma.data.indexed_files import FileRows
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.distribution import process_group
from keras_t5gemma.utils.checks import whole_number
from keras_t5gemma.utils.ragged import Ragged

_ROWS_AT_ONCE = 1000


class _Files:
    """What both kinds of files have in common; before a `PairDataset`."""

    def __init__(self, preprocessor, paths, fields, batch_size, threads, **kwargs):
        try:
            import grain
        except ImportError as error:
            raise ImportError(
                "Text in files is read by Grain: pip install grain"
            ) from error
        self._grain = grain
        self._threads = whole_number(threads, "threads", 1)
        self._next = self._batches = None
        self._lock = threading.Lock()  # TensorFlow looks ahead in a thread.
        # What is cut is counted when the lengths are read, and not again.
        self._silent = copy.copy(preprocessor)
        self._silent._counts = {}
        self.files = FileRows(paths, fields)
        process_group.require_same(
            files=[path.name for path in self.files.paths],
            bytes=self.files.sizes(),
            batch_size=batch_size,
        )
        super().__init__(
            preprocessor, self.files, batch_size=batch_size, name="paths", **kwargs
        )
        self.workers = 0  # The threads are Grain's.

    def _row_lengths(self, rows):
        """Lengths of rows of the files, a list for each."""
        raise NotImplementedError

    def _index(self):
        """Find the rows of all files, in their order.

        Returns:
            int `(rows, n)`: file, first byte, and the lengths of `_row_lengths`.
        """
        own = []
        with (
            process_group.all_or_none("the files were read"),
            self.preprocessor.report_truncation(),
        ):
            share = range(
                process_group.process_index(),
                len(self.files.paths),
                process_group.process_count(),
            )
            for file in share:
                lines = self.files.lines(file)
                while part := list(itertools.islice(lines, _ROWS_AT_ONCE)):
                    lengths = self._row_lengths([row for _, row in part])
                    places = [(file, offset) for offset, _ in part]
                    own.append(np.hstack([places, lengths]).astype("int64"))
        own = np.concatenate(own).tobytes() if own else b""
        width = 2 + len(self.files.fields)
        parts = [np.frombuffer(p, "int64") for p in process_group.gather(own)]
        table = np.concatenate(parts).reshape(-1, width)
        if not len(table):
            raise ValueError(f"`paths` has no rows: {self.files.paths[:3]} are empty.")
        return table[np.argsort(table[:, 0], kind="stable")]

    def _read_rows(self, numbers):
        """Rows by their numbers, out of the files, a list of tuples of texts."""
        files, offsets = self._places[numbers].T
        found = [None] * len(numbers)
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            rows = self.files.read(file, offsets[here].tolist())
            for place, row in zip(here, rows, strict=True):
                found[place] = row
        return found

    def _check(self, numbers, lengths, expected):
        """Raise `ValueError` when rows are not as long any more as they were."""
        for number, found, before in zip(numbers, lengths, expected, strict=True):
            if found != before:
                file, offset = self._places[number]
                raise ValueError(
                    f"{self.files.paths[file]} has changed since it was first read: "
                    f"the row at byte {offset} had {before} tokens, now {found}."
                )

    def __getitem__(self, index):
        with self._lock:
            place = (self.epoch, self.skipped, index)
            if place != self._next:
                self._batches = self._ahead(index)
            self._next = (*place[:2], index + 1)
            return next(self._batches)

    def _ahead(self, first):
        """The batches of the epoch from one on, made ahead by Grain's threads."""
        make = super().__getitem__
        distribution = keras.distribution.distribution()

        def make_here(index):
            # Each thread has its own.
            keras.distribution.set_distribution(distribution)
            return make(int(index))

        batches = self._grain.MapDataset.range(first, self.num_batches).map(make_here)
        options = self._grain.ReadOptions(self._threads, 2 * self._threads)
        return iter(batches.to_iter_dataset(options))


class PairFiles(_Files, PairDataset):
    """Batches of the text pairs of many files, for `Seq2SeqLM.fit`.

    Make it in every process, after `connect` and `distribute`, with the same files. A
    batch is that of a `PairDataset`, whose rows the processes share; the numbers in
    the progress bar are of all of them.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        paths: files of JSON lines (`.jsonl`), one object a line, or folders of such.
        source: name of the field that the encoder reads.
        target: name of the field that the decoder writes.
        batch_size: rows a batch, of all processes together.
        shuffle: a new order of all rows every epoch.
        batching: as in `Seq2SeqLM.fit`.
        steps: batches an epoch; the next epoch goes on where this one ends. `None` is
            all rows.
        threads: that make batches ahead, in each process.

    Attributes:
        seed: what the orders come from, see `PairDataset`.

    Raises:
        ValueError: for files of another kind, a row that lacks a field, with its
            place, or files that differ between processes.
        ImportError: without Grain.
    """

    def __init__(
        self,
        preprocessor,
        paths,
        source="source",
        target="target",
        batch_size=32,
        shuffle=True,
        batching="bucketed",
        steps=None,
        threads=2,
    ):
        super().__init__(
            preprocessor,
            paths,
            (source, target),
            batch_size,
            threads,
            shuffle=shuffle,
            batching=batching,
            steps=steps,
        )

    def _read(self, columns, name):
        table = self._index()
        self._places = table[:, :2]
        return table[:, 2], table[:, 3]

    def _token_rows(self, preprocessor, rows):
        sources, targets = map(list, zip(*rows, strict=True))
        columns = {"encoder_text": sources, "decoder_text": targets}
        return preprocessor.token_rows(columns)

    def _row_lengths(self, rows):
        sides = self._token_rows(self.preprocessor, rows)
        return [list(map(len, row)) for row in zip(*sides, strict=True)]

    def _tokens(self, pairs, epoch):
        if not len(pairs):
            return [], []
        sides = self._token_rows(self._silent, self._read_rows(pairs))
        for rows, lengths in zip(sides, self.lengths, strict=True):
            self._check(pairs, list(map(len, rows)), lengths[pairs].tolist())
        return sides


class TextFiles(_Files, DocumentDataset):
    """Batches of what an objective makes of the plain text in many files.

    As `PairFiles`, of a preprocessor with an objective. Documents are cut and made
    into pairs as in a `DocumentDataset`; those below two tokens are left out.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        paths: files of JSON lines (`.jsonl`) or of text (`.txt`), one document a line,
            or folders of such.
        field: name of the field of the text, in JSON.
        batch_size: as in `PairFiles`.
        shuffle: as in `PairFiles`.
        batching: as in `Seq2SeqLM.fit`.
        steps: as in `PairFiles`.
        threads: as in `PairFiles`.
        teacher: as in `DocumentDataset`.

    Raises:
        ValueError: as `PairFiles`, or without a document of two tokens.
        ImportError: without Grain.
    """

    def __init__(
        self,
        preprocessor,
        paths,
        field="text",
        batch_size=32,
        shuffle=True,
        batching="packed",
        steps=None,
        threads=2,
        teacher=None,
    ):
        super().__init__(
            preprocessor,
            paths,
            (field,),
            batch_size,
            threads,
            shuffle=shuffle,
            batching=batching,
            steps=steps,
            teacher=teacher,
        )

    def _row_lengths(self, rows):
        texts = [text for (text,) in rows]
        return [[len(ids)] for ids in self.preprocessor.tokenizer.tokenize(texts)]

    def _read_pieces(self, columns, name):
        table = self._index()
        table = table[table[:, 2] >= 2]
        if not len(table):
            raise ValueError("`paths` must hold a text of two tokens or more.")
        self._places, self._document_lengths = table[:, :2], table[:, 2]
        longest = self.preprocessor.longest_text()
        lengths, is_last = cut(self._document_lengths, longest)
        # The document of each piece.
        self._document = np.cumsum(is_last) - is_last
        return Ragged(lengths, None), is_last

    def _take(self, pairs):
        if not len(pairs):
            return Ragged(np.zeros(0, "int64"), np.zeros(0, "int32"))
        documents, places = np.unique(self._document[pairs], return_inverse=True)
        texts = [text for (text,) in self._read_rows(documents)]
        ids = self.preprocessor.tokenizer.tokenize(texts)
        expected = self._document_lengths[documents]
        self._check(documents, list(map(len, ids)), expected.tolist())
        ends = np.cumsum(self._document_lengths)
        starts = self.pieces.starts[pairs] - (ends[documents] - expected)[places]
        lengths = self.pieces.lengths[pairs]
        pieces = zip(places, starts, lengths, strict=True)
        return Ragged.from_rows([ids[i][low : low + size] for i, low, size in pieces])
