"""In-memory pairs as batches: tokenized once, then only put together."""

import numpy as np

from keras_t5gemma.data import packing
from keras_t5gemma.data.resumable import ResumableDataset, draw_seed
from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.tokenization.tokenizer import as_texts
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.ragged import Ragged

BATCHINGS = ("bucketed", "packed", "fixed")
MOST_WIDTHS = 4
_BATCHES_A_WIDTH = 8  # With fewer, compiling one more program does not pay.
_TEXTS_AT_ONCE = 1000
_MANY = 10_000  # Texts that take long enough to show a bar.


class PairDataset(ResumableDataset):
    """Batches of in-memory pairs.

    The texts are tokenized here, once. What an epoch holds is a function of the seed
    and of the number of the epoch.

    With `"bucketed"` pairs of similar length share a batch, padded to one of at most
    four pairs of widths that are chosen to pad least, so that at most four programs
    are compiled; all batches have `batch_size` rows. Without shuffling the pairs stay
    in order and a batch takes the smallest widths it fits. With `"packed"` several
    pairs share a row, as long as the preprocessor's lengths allow; their masks number
    them, see `Encoder.call`; the rows are made once and only their order changes. In
    both the last batch is filled up with rows of weight 0. `"fixed"` pads every batch
    to the preprocessor's lengths and leaves the last one short, but not on a mesh of
    devices. Of several processes all have the same pairs; each one's batches are the
    rows that its own devices take.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        columns: dict of equally long `"encoder_text"` and `"decoder_text"`.
        sample_weight: `None`, or one weight a pair.
        batch_size: rows a batch.
        shuffle: a new order every epoch.
        batching: `"bucketed"`, `"packed"` or `"fixed"`.
        steps: batches an epoch, at most those of all pairs; the next epoch goes on
            where this one ends. `None` is all pairs.
        widths: `"bucketed"` only: the pairs of widths of another dataset, so that the
            same programs serve both.
        name: of the argument that `columns` came by, for messages.

    Attributes:
        seed: what the orders come from, drawn from NumPy's global generator
            (`keras.utils.set_random_seed` makes it repeatable). Set it before the
            first batch to repeat an earlier run.
        widths: the `(encoder, decoder)` widths of the batches, growing.

    Raises:
        ValueError: for columns or weights of different lengths, what is no text, an
            unknown `batching`, or too many `steps`.
    """

    def __init__(
        self,
        preprocessor,
        columns,
        sample_weight=None,
        batch_size=32,
        shuffle=False,
        batching="bucketed",
        steps=None,
        widths=None,
        name="x",
    ):
        super().__init__()
        if batching not in BATCHINGS:
            raise ValueError(
                f"`batching` must be one of {BATCHINGS}; got {batching!r}."
            )
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(
                f"`batch_size` must be a whole number >= 1; got {batch_size!r}."
            )
        mesh.check_rows(batch_size, "batch_size")
        self.preprocessor = preprocessor
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.batching = batching
        self.seed = draw_seed() if shuffle else 0
        self._plan = (None, None)
        self.lengths = self._read(columns, name)
        self.weights = _weights(sample_weight, len(self.lengths[0]))
        self._arrange(widths)
        self._all = self._steps = -(-len(self.packs) // batch_size)
        if steps is not None:
            self.limit(steps, name)

    def limit(self, steps, name="x"):
        """Make epochs of so many batches, one going on where the other ends.

        Raises:
            ValueError: for more than there are.
        """
        if not 1 <= steps <= self._all:
            raise ValueError(
                f"`{name}` has {self._all} batches of {self.batch_size} rows: "
                f"{steps} steps an epoch cannot be had. Leave the steps out to go "
                "through all of it."
            )
        self._steps = steps

    def _read(self, columns, name):
        """Tokenize; the lengths of the sources and of the targets."""
        token_rows = self.preprocessor.token_rows
        columns = tokenize(self.preprocessor, columns, name, token_rows)
        self.sources, self.targets = columns
        return self.sources.lengths, self.targets.lengths

    def _limits(self):
        """The largest widths, encoder and decoder."""
        sides = ("encoder", "decoder")
        return tuple(getattr(self.preprocessor, f"{s}_sequence_length") for s in sides)

    def _tokens(self, pairs, epoch):
        """Sources and targets of so many pairs, rows of ids each."""
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
            # Shuffled always alike: the number of rows must not depend on the seed.
            pairs = np.random.default_rng(0).permutation(pairs)
            rows = packing.first_fit(sources[pairs], targets[pairs], limits)
            in_rows = pairs[np.argsort(rows, kind="stable")]
            self.packs = Ragged(np.bincount(rows), in_rows)
            used = [np.bincount(rows, x[pairs]).max() for x in (sources, targets)]
            self.widths = [_round_up(used, multiple, limits)]
        elif self.batching == "bucketed":
            count = len(pairs) // (_BATCHES_A_WIDTH * self.batch_size)
            count = min(max(count, 1), MOST_WIDTHS)
            self.widths = widths or packing.choose_widths(
                sources, targets, limits, count, multiple
            )
            widest = _round_up((sources.max(), targets.max()), multiple, limits)
            widest = tuple(map(max, widest, self.widths[-1]))
            self.widths = [*self.widths[:-1], widest]
        self.level = packing.levels(sources, targets, self.widths)

    def batches_an_epoch(self):
        """Batches of a whole epoch."""
        return self._steps

    def _pass(self, step):
        """How often all pairs have been gone through before a batch."""
        return self._position(step) // self._all

    def _batch(self, step):
        """Row numbers, -1 where there is none, and the widths of a batch."""
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
        """The part of `_batch` that the devices of this process take."""
        rows, widths = self._batch(step)
        return rows[process_group.local_rows(len(rows))], widths

    def _order(self, seed, epoch):
        """The rows of all batches of one epoch, int `(batches, batch_size)`."""
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
            for number, pair in enumerate(pairs, 1):
                source, target = next(tokens)
                here = row, slice(encoder, encoder + len(source))
                x["encoder_token_ids"][here] = source
                x["encoder_padding_mask"][here] = number
                here = row, slice(decoder, decoder + len(target))
                x["decoder_token_ids"][here] = np.concatenate([[start], target[:-1]])
                x["decoder_padding_mask"][here] = number
                labels[here] = target
                weights[here] = self.weights[pair]
                encoder, decoder = encoder + len(source), decoder + len(target)
        return x, labels, weights

    def counts(self, step):
        rows, widths = self._batch(step)
        pairs = self._pairs(rows)
        tokens = sum(lengths[pairs].sum() for lengths in self.lengths)
        return int(tokens), len(rows) * sum(widths)

    def rows(self, step):
        return self._pairs(self._batch(step)[0]).tolist()

    def _pairs(self, rows):
        packs = [self.packs[row] for row in rows if row >= 0]
        return np.concatenate([np.zeros(0, "int64"), *packs])


def tokenize(preprocessor, columns, name, token_rows):
    """What `token_rows` makes of columns of text, as a list of `Ragged`."""
    columns = {key: as_texts(column, key) for key, column in columns.items()}
    lengths = {key: len(column) for key, column in columns.items()}
    count = min(lengths.values())
    if len(set(lengths.values())) != 1 or not count:
        raise ValueError(
            f"`{name}` must have as many rows in every column, and at least one; "
            f"got {lengths}."
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


def _weights(sample_weight, count):
    """float32 `(count,)`, one weight a pair."""
    if sample_weight is None:
        return np.ones(count, "float32")
    weights = np.asarray(sample_weight, "float32")
    if weights.size != count:
        raise ValueError(
            f"`sample_weight` must be one weight for each of the {count} pairs; got "
            f"shape {weights.shape}."
        )
    return weights.reshape(count)


def _round_up(used, multiple, limits):
    return tuple(
        int(packing.round_up(length, multiple, limit))
        for length, limit in zip(used, limits, strict=True)
    )
