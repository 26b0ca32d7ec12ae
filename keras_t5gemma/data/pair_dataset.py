"""Batches of in-memory text pairs, tokenized once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keras_t5gemma.data import packing
from keras_t5gemma.data.resumable import ResumableDataset, draw_seed
from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.utils.buckets import ceil_div
from keras_t5gemma.utils.checks import (
    one_of,
    row_weights,
    rows_of_batch,
    whole_number,
)
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.ragged import Ragged
from keras_t5gemma.utils.texts import as_texts

BATCHINGS = ("bucketed", "packed", "fixed")
MAX_WIDTHS = 4
_BATCHES_PER_WIDTH = 8  # With fewer, compiling one more program does not pay.
_TEXTS_AT_ONCE = 1000
_MANY = 10_000  # Texts; fewer are tokenized without a progress bar.


class PairDataset(ResumableDataset):
    """Batches of in-memory text pairs.

    The texts are tokenized once, when the dataset is made. The batches of an epoch are
    a function of the seed and the number of the epoch.

    `"bucketed"`: pairs of similar length share a batch, padded to one of at most four
    bucket widths that are chosen for the least padding, so that at most four programs
    are compiled; all batches have `batch_size` rows. Without shuffling the pairs keep
    their order, and a batch takes the smallest widths that it fits. `"packed"`: several
    pairs share a row of the preprocessor's lengths; the padding masks hold their
    segment ids, see `Encoder.call`. The rows are packed once and only their order
    changes. In both cases rows of weight 0 fill the last batch. `"fixed"`: every batch
    is padded to the preprocessor's lengths, and the last one is short except on a mesh
    of devices. With several processes all of them hold all pairs, and each one's
    batches are the rows for its own devices.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        columns: dict of `"encoder_text"` and `"decoder_text"`, equally long.
        sample_weight: one weight per pair, or `None`.
        batch_size: rows per batch.
        shuffle: a new order in every epoch.
        batching: `"bucketed"`, `"packed"` or `"fixed"`.
        steps: batches per epoch, at most those of all pairs; the next epoch continues
            where this one ends. `None` takes all pairs.
        widths: `"bucketed"` only: the widths of another dataset, so that the same
            compiled programs serve both.
        name: of the argument that `columns` was passed as, for messages.

    Attributes:
        seed: seed of the orders, drawn from NumPy's global generator
            (`keras.utils.set_random_seed` makes it repeatable). Set it before the
            first batch to repeat an earlier run.
        widths: the `(encoder, decoder)` widths of the batches, increasing.

    Raises:
        ValueError: for columns or weights of different lengths, values that are not
            strings, an unknown `batching`, or too many `steps`.
    """

    def __init__(
        self,
        preprocessor: Any,
        columns: Any,
        sample_weight: ArrayLike | None = None,
        batch_size: int = 32,
        shuffle: bool = False,
        batching: str = "bucketed",
        steps: int | None = None,
        widths: list[tuple[int, int]] | None = None,
        name: str = "x",
    ) -> None:
        super().__init__()
        one_of(batching, "batching", BATCHINGS)
        batch_size = rows_of_batch(batch_size)
        mesh.check_rows(batch_size, "batch_size")
        self.preprocessor = preprocessor
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.batching = batching
        self.seed = draw_seed() if shuffle else 0
        self._plan = (None, None)
        self.lengths = self._read(columns, name)
        count = len(self.lengths[0])
        self.weights = np.ones(count, "float32")
        if sample_weight is not None:
            self.weights = row_weights(sample_weight, "sample_weight", count)
        self._arrange(widths)
        self._all = self._steps = ceil_div(len(self.packs), batch_size)
        if steps is not None:
            self.limit(steps, name)

    def limit(self, steps: int, name: str = "x") -> None:
        """Shorten epochs to `steps` batches; each continues where the last one ended.

        Raises:
            ValueError: for more batches than there are.
        """
        if whole_number(steps, "steps", 1) > self._all:
            raise ValueError(
                f"`{name}` has {self._all} batches of {self.batch_size} rows, fewer "
                f"than the {steps} steps per epoch. Leave the steps out to take all."
            )
        self._steps = steps

    def _read(self, columns, name):
        """Tokenize, and return the lengths of the sources and of the targets."""
        token_rows = self.preprocessor.token_rows
        columns = tokenize(self.preprocessor, columns, name, token_rows)
        self.sources, self.targets = columns
        return self.sources.lengths, self.targets.lengths

    def _limits(self):
        """Maximum widths, encoder and decoder."""
        sides = ("encoder", "decoder")
        return tuple(getattr(self.preprocessor, f"{s}_sequence_length") for s in sides)

    def _tokens(self, pairs, epoch):
        """Sources and targets of the pairs of these numbers, rows of ids each."""
        return [self.sources[i] for i in pairs], [self.targets[i] for i in pairs]

    def _arrange(self, widths):
        """Which pairs share a row, and the widths that rows are padded to."""
        sources, targets = self.lengths
        pairs = np.arange(len(sources))
        limits = self._limits()
        multiple = self.preprocessor.pad_to_multiple_of or 8
        self.packs = Ragged(np.ones(len(pairs), "int64"), pairs)
        self.widths = [limits]
        if self.batching == "packed":
            # Always the same order: the number of rows must not depend on the seed.
            pairs = np.random.default_rng(0).permutation(pairs)
            rows = packing.first_fit(sources[pairs], targets[pairs], limits)
            in_rows = pairs[np.argsort(rows, kind="stable")]
            self.packs = Ragged(np.bincount(rows), in_rows)
            used = [np.bincount(rows, x[pairs]).max() for x in (sources, targets)]
            self.widths = [_round_up(used, multiple, limits)]
        elif self.batching == "bucketed":
            count = len(pairs) // (_BATCHES_PER_WIDTH * self.batch_size)
            count = min(max(count, 1), MAX_WIDTHS)
            self.widths = widths or packing.choose_widths(
                sources, targets, limits, count, multiple
            )
            widest = _round_up((sources.max(), targets.max()), multiple, limits)
            widest = tuple(map(max, widest, self.widths[-1]))
            self.widths = [*self.widths[:-1], widest]
        self.level = packing.levels(sources, targets, self.widths)

    def batches_an_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self._steps

    def _pass(self, step):
        """How many times all pairs were used before a batch."""
        return self._position(step) // self._all

    def _batch(self, step):
        """Row numbers, -1 for filler rows, and the widths of a batch."""
        key = (self.seed, self._pass(step))
        plan = self._plan  # Another thread may set another one.
        if plan[0] != key:
            self._plan = plan = (key, self._order(*key))
        rows = plan[1][self._position(step) % self._all]
        if self.batching == "fixed":
            rows = rows[: mesh.round_up(np.count_nonzero(rows >= 0))]
            multiple = self.preprocessor.pad_to_multiple_of
            if multiple is None:
                return rows, self.widths[0]
            used = [lengths[rows[rows >= 0]].max() for lengths in self.lengths]
            return rows, _round_up(used, multiple, self.widths[0])
        if self.batching == "packed":
            return rows, self.widths[0]
        return rows, self.widths[self.level[rows[rows >= 0]].max()]

    def _own_batch(self, step):
        """The part of `_batch` for the devices of this process."""
        rows, widths = self._batch(step)
        return rows[process_group.local_rows(len(rows))], widths

    def _order(self, seed, epoch):
        """Row numbers of all batches of one epoch, int `(batches, batch_size)`."""
        order = np.arange(len(self.packs))
        if not self.shuffle:
            return packing.in_batches(order, self.batch_size)
        random = np.random.default_rng((seed, epoch))
        order = random.permutation(order)
        if self.batching != "bucketed":
            return packing.in_batches(order, self.batch_size)
        batches = packing.batches_by_level(
            order, self.level, self.batch_size, len(self.widths)
        )
        return random.permutation(batches)

    def __getitem__(self, index):
        rows, widths = self._own_batch(index)
        shapes = [(len(rows), width) for width in widths]
        x = {
            f"{side}_{name}": np.zeros(shape, "int32")
            for side, shape in zip(("encoder", "decoder"), shapes, strict=True)
            for name in ("token_ids", "padding_mask")
        }
        labels, weights = np.zeros(shapes[1], "int32"), np.zeros(shapes[1], "float32")
        start = self.preprocessor.tokenizer.start_token_id
        tokens = zip(*self._tokens(self._pairs(rows), self._pass(index)), strict=True)
        for row, pack in enumerate(rows):
            encoder = decoder = 0
            pairs = self.packs[pack] if pack >= 0 else ()
            for segment, pair in enumerate(pairs, 1):
                source, target = next(tokens)
                here = row, slice(encoder, encoder + len(source))
                x["encoder_token_ids"][here] = source
                x["encoder_padding_mask"][here] = segment
                here = row, slice(decoder, decoder + len(target))
                x["decoder_token_ids"][here] = np.concatenate([[start], target[:-1]])
                x["decoder_padding_mask"][here] = segment
                labels[here] = target
                weights[here] = self.weights[pair]
                encoder, decoder = encoder + len(source), decoder + len(target)
        return x, labels, weights

    def counts(self, step: int) -> tuple[int, int]:
        rows, widths = self._batch(step)
        pairs = self._pairs(rows)
        tokens = sum(lengths[pairs].sum() for lengths in self.lengths)
        return int(tokens), len(rows) * sum(widths)

    def rows(self, step: int) -> list[int]:
        return self._pairs(self._batch(step)[0]).tolist()

    def _pairs(self, rows):
        packs = [self.packs[row] for row in rows if row >= 0]
        return np.concatenate([np.zeros(0, "int64"), *packs])


def tokenize(
    preprocessor: Any, columns: dict, name: str, token_rows: Callable[[dict], list]
) -> list[Ragged]:
    """Tokenize columns of text in parts, with a progress bar.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`, which reports truncation.
        columns: `{name: texts}`.
        name: of the argument that `columns` was passed as, for messages.
        token_rows: function from a dict of columns to lists of token ids per text.

    Returns:
        A `Ragged` for each list that `token_rows` returns.

    Raises:
        ValueError: for columns that are empty or of different lengths.
    """
    columns = {key: as_texts(column, key) for key, column in columns.items()}
    lengths = {key: len(column) for key, column in columns.items()}
    count = min(lengths.values())
    if len(set(lengths.values())) != 1 or not count:
        raise ValueError(
            f"`{name}` must have the same number of rows in every column, at least "
            f"one; got {lengths}."
        )
    parts = []
    with (
        preprocessor.report_truncation(),
        progress_bar("Tokenizing", count, verbose=count >= _MANY) as advance,
    ):
        for start in range(0, count, _TEXTS_AT_ONCE):
            here = slice(start, min(start + _TEXTS_AT_ONCE, count))
            part = {key: column[here] for key, column in columns.items()}
            parts.append([Ragged.from_rows(rows) for rows in token_rows(part)])
            advance(here.stop - here.start)
    return [Ragged.concatenate(side) for side in zip(*parts, strict=True)]


def _round_up(used, multiple, limits):
    return tuple(
        int(packing.round_up(length, multiple, limit))
        for length, limit in zip(used, limits, strict=True)
    )
