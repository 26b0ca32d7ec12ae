"""Datasets of text files larger than memory, shared by several processes.

When a dataset is made, every process reads and tokenizes its share of the files once,
to learn the lengths of the rows, and sends them to the others. Then all processes know
the same plan: the rows and the width of every batch. It depends on the files, the seed
and the epoch, not on the number of processes, and gives random access to any batch of
any epoch: training can resume on another mesh. A process reads only the rows for its
own devices.
"""

import itertools
import os
import threading
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_t5gemma.data.document_dataset import DocumentDataset, cut
from keras_t5gemma.data.indexed_files import FileRows
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.distribution import process_group
from keras_t5gemma.tokenization.compatibility import check_preprocessor
from keras_t5gemma.utils.checks import rows_of_batch, string, whole_number
from keras_t5gemma.utils.ragged import Ragged

_ROWS_AT_ONCE = 1000
_MAX_THREADS = 256

Paths = str | os.PathLike | Iterable[str | os.PathLike]


class _Files:
    """Reading and sharing of files; a mixin in front of a `PairDataset`."""

    def __init__(self, preprocessor, paths, fields, batch_size, threads, **kwargs):
        try:
            import grain
        except ImportError as error:
            raise ImportError(
                "Text in files is read by Grain: pip install grain"
            ) from error
        self._grain = grain
        check_preprocessor(preprocessor, type(self).__name__)
        self._threads = whole_number(threads, "threads", 1, _MAX_THREADS)
        rows_of_batch(batch_size)
        self._next = self._batches = None
        self._lock = threading.Lock()  # TensorFlow prefetches in a thread.
        # Truncation is counted when the lengths are read, and not again.
        self._silent = preprocessor.silent()
        self.files = FileRows(paths, fields)
        process_group.require_same(
            files=[path.name for path in self.files.paths],
            bytes=self.files.sizes(),
            batch_size=batch_size,
        )
        super().__init__(
            preprocessor, self.files, batch_size=batch_size, name="paths", **kwargs
        )
        self.workers = 0  # Grain starts the threads.

    def _row_lengths(self, rows):
        """Lengths of rows of the files, one list per row."""
        raise NotImplementedError

    def _index(self):
        """Index the rows of all files, in their order.

        Returns:
            int `(rows, n)`: file number, byte offset, and the lengths of
            `_row_lengths`.
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
        """Read rows by their numbers, as a list of tuples of texts."""
        files, offsets = self._places[numbers].T
        found = [None] * len(numbers)
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            rows = self.files.read(file, offsets[here].tolist())
            for place, row in zip(here, rows, strict=True):
                found[place] = row
        return found

    def _check(self, numbers, lengths, expected):
        """Raise `ValueError` when the lengths of rows have changed."""
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
        """Batches of the epoch from one on, prefetched by Grain's threads."""
        make = super().__getitem__
        distribution = keras.distribution.distribution()

        def make_here(index):
            # Keras keeps the distribution per thread.
            keras.distribution.set_distribution(distribution)
            return make(int(index))

        batches = self._grain.MapDataset.range(first, self.num_batches).map(make_here)
        options = self._grain.ReadOptions(self._threads, 2 * self._threads)
        return iter(batches.to_iter_dataset(options))


class PairFiles(_Files, PairDataset):
    """Text pairs in files larger than memory, for `Seq2SeqLM.fit`.

    Make it in every process with the same files, after `connect` and `distribute`. The
    processes share the rows of each batch of a `PairDataset`; the metrics in the
    progress bar cover all processes.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        paths: JSON lines files (`.jsonl`), one object per line, or folders of them.
        source: name of the field with the encoder's text.
        target: name of the field with the decoder's text.
        batch_size: rows per batch, of all processes together.
        shuffle: a new order of all rows in every epoch.
        batching: as in `Seq2SeqLM.fit`.
        steps: batches per epoch; the next epoch continues where this one ends. `None`
            takes all rows.
        threads: number of threads that prefetch batches, in each process.

    Attributes:
        seed: seed of the orders, see `PairDataset`.

    Raises:
        ValueError: for files of another kind, a row in which a field is missing, with
            its place, or files that differ between processes.
        ImportError: without Grain.
    """

    def __init__(
        self,
        preprocessor: Any,
        paths: Paths,
        source: str = "source",
        target: str = "target",
        batch_size: int = 32,
        shuffle: bool = True,
        batching: str = "bucketed",
        steps: int | None = None,
        threads: int = 2,
    ) -> None:
        super().__init__(
            preprocessor,
            paths,
            (string(source, "source"), string(target, "target")),
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
    """Documents in files larger than memory, for `Seq2SeqLM.fit` with an objective.

    Works as `PairFiles`. Documents are cut and made into pairs as in
    `DocumentDataset`; those below two tokens are left out.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor` with an objective.
        paths: JSON lines (`.jsonl`) or text files (`.txt`), one document per line, or
            folders of them.
        field: name of the field with the text, in JSON.
        batch_size: as in `PairFiles`.
        shuffle: as in `PairFiles`.
        batching: as in `Seq2SeqLM.fit`.
        steps: as in `PairFiles`.
        threads: as in `PairFiles`.
        teacher: as in `DocumentDataset`.

    Raises:
        ValueError: as `PairFiles`, or when no document has two tokens.
        ImportError: without Grain.
    """

    def __init__(
        self,
        preprocessor: Any,
        paths: Paths,
        field: str = "text",
        batch_size: int = 32,
        shuffle: bool = True,
        batching: str = "packed",
        steps: int | None = None,
        threads: int = 2,
        teacher: Any = None,
    ) -> None:
        super().__init__(
            preprocessor,
            paths,
            (string(field, "field"),),
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
