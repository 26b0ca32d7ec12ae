"""What users hand to `fit`, turned into batches of arrays.

Keras's own adapters take arrays from everywhere; this module only puts the
tokeniser between the text and them, one batch at a time.
"""

import itertools

import keras
import numpy as np

from keras_t5gemma.text.ids import INPUTS, check_ids

TEXT_KEYS = ("encoder_text", "decoder_text")


def as_columns(x, y=None):
    """In-memory pairs as `{"encoder_text": [...], "decoder_text": [...]}`.

    Args:
        x: that dict; or a list of sources (with `y`); or a list of
            `(source, target)` pairs; or a list of dicts, one a pair.
        y: a list of targets, only with a list of sources.

    Returns:
        The dict, or `None` when `x` is not in-memory text.

    Raises:
        ValueError: when `y` is missing, or given beside targets in `x`.
    """
    if isinstance(x, str | bytes):
        raise ValueError(f"`x` must be a list of strings; got the string {x!r}.")
    if isinstance(x, dict) and any("text" in str(key) for key in x):
        columns = x
    elif isinstance(x, list | tuple | np.ndarray) and len(x):
        first = x[0]
        if isinstance(first, str | bytes):
            if y is None:
                raise ValueError(
                    "`y` must be the list of targets when `x` is a list of "
                    "strings; got None. A dict with keys "
                    f"{TEXT_KEYS} holds both in `x`."
                )
            return _no_single_strings({"encoder_text": x, "decoder_text": y})
        if isinstance(first, dict) and any("text" in str(k) for k in first):
            columns = {key: [row.get(key) for row in x] for key in first}
        elif (
            isinstance(first, list | tuple)
            and len(first) == 2
            and all(isinstance(text, str) for text in first)
        ):
            columns = dict(zip(TEXT_KEYS, map(list, zip(*x, strict=True)), strict=True))
        else:
            return None
    else:
        return None
    if set(columns) != set(TEXT_KEYS):
        raise ValueError(
            f"`x` must be text pairs with keys {TEXT_KEYS}; got {sorted(columns)}."
        )
    if y is not None:
        raise ValueError("`y` must be None when `x` holds the targets too.")
    return _no_single_strings(columns)


def _no_single_strings(columns):
    for key, column in columns.items():
        if isinstance(column, str | bytes):
            raise ValueError(f"{key!r} must be a list of strings; got {column!r}.")
    return columns


class TextBatches(keras.utils.PyDataset):
    """Batches of in-memory pairs, tokenised a batch at a time off the main thread.

    Args:
        preprocess: `(columns, sample_weight) -> (x, y, sample_weight)` arrays.
        columns: dict of equally long lists.
        sample_weight: `None`, or one weight a row.
        batch_size: rows a batch; the last may be shorter.
        shuffle: draw a new order every epoch, from NumPy's global generator
            (`keras.utils.set_random_seed` makes it repeatable).
    """

    def __init__(self, preprocess, columns, sample_weight, batch_size, shuffle):
        super().__init__(workers=1)
        self.preprocess = preprocess
        self.columns = columns
        self.sample_weight = sample_weight
        self.batch_size = batch_size
        self.shuffle = shuffle
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise ValueError(
                "`x` must have as many rows in every column, and at least one; "
                f"got {lengths}."
            )
        self.order = np.arange(min(lengths.values()))
        self._reorder()

    def _reorder(self):
        if self.shuffle:
            self.order = np.random.permutation(len(self.order))

    @property
    def num_batches(self):
        """Batches an epoch."""
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        rows = self.order[start : start + self.batch_size]
        columns = {key: [c[i] for i in rows] for key, c in self.columns.items()}
        weight = self.sample_weight
        return self.preprocess(
            columns, None if weight is None else np.asarray(weight)[rows]
        )

    def on_epoch_end(self):
        self._reorder()


class MappedBatches(keras.utils.PyDataset):
    """A user's PyDataset of text batches, with the tokeniser behind it."""

    def __init__(self, preprocess, dataset):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=False,
            max_queue_size=dataset.max_queue_size,
        )
        self.preprocess = preprocess
        self.dataset = dataset

    @property
    def num_batches(self):
        """Batches an epoch."""
        return self.dataset.num_batches

    def __getitem__(self, index):
        return map_batch(self.preprocess, self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class StreamBatches(keras.utils.PyDataset):
    """An iterable of text batches that can be started again, once an epoch.

    Batches are asked for in order; the first one starts the iterable anew, so that
    Keras's looking ahead at the end of an epoch costs the next one nothing.
    """

    def __init__(self, preprocess, batches, length):
        super().__init__(workers=0)
        self.preprocess = preprocess
        self.batches = batches
        self.length = length

    @property
    def num_batches(self):
        """Batches an epoch."""
        return self.length

    def __getitem__(self, index):
        if index == 0:
            self.iterator = iter(self.batches)
        return map_batch(self.preprocess, next(self.iterator))


def stream(preprocess, batches, steps=None, name="x"):
    """Arrays from an iterable of text batches.

    Generators, `tf.data`, Grain and PyTorch DataLoaders are all iterables.

    Args:
        preprocess: as in `TextBatches`.
        batches: the iterable; each item a dict of text columns, or a
            `(sources, targets)` pair of lists.
        steps: batches an epoch, for what is endless; `None` takes as an epoch all
            that the iterable gives, which is gone through once to count when it
            does not know its length.
        name: the argument's name, for messages.

    Returns:
        `(data for keras.Model.fit, steps)`.

    Raises:
        ValueError: for what cannot be iterated, is empty, or is endless without
            `steps`.
    """
    try:
        again = iter(batches) is not batches
    except TypeError:
        raise ValueError(
            f"`{name}` must be text pairs (lists, a dict of lists) or an iterable "
            f"of batches of them; got {type(batches).__name__}."
        ) from None
    if again and steps is None:
        return StreamBatches(preprocess, batches, _length(batches, name)), None

    def generate():
        for _ in itertools.count() if again else range(1):
            for batch in batches:
                yield map_batch(preprocess, batch)

    return generate(), steps


def _length(batches, name):
    cardinality = getattr(batches, "cardinality", None)
    if cardinality is not None and int(cardinality()) == -1:
        raise ValueError(
            f"`{name}` never ends: pass `steps_per_epoch` (or `validation_steps`)."
        )
    try:
        length = len(batches)
    except TypeError:
        length = sum(1 for _ in batches)
    if not length:
        raise ValueError(f"`{name}` is empty.")
    return length


def map_batch(preprocess, batch):
    """One batch of text through `preprocess`; of arrays, as it is."""
    columns, weight = batch, None
    if isinstance(batch, list | tuple):
        if len(batch) and isinstance(batch[0], dict):
            columns = batch[0]
            weight = batch[2] if len(batch) > 2 else None
        elif len(batch) == 2:
            columns = dict(zip(TEXT_KEYS, batch, strict=True))
    if not isinstance(columns, dict):
        raise ValueError(
            f"A batch must be a dict with keys {TEXT_KEYS}, or a pair (sources, "
            f"targets) of lists; got {type(batch).__name__}."
        )
    if "encoder_token_ids" in columns:
        return batch
    for key, column in columns.items():
        if isinstance(column, str | bytes) or getattr(column, "shape", None) == ():
            raise ValueError(
                f"{key!r} must be a batch of strings; got one string. Batch the "
                "dataset first, e.g. `.batch(32)`."
            )
    return preprocess(columns, weight)


def fit_arguments(
    preprocess,
    vocabulary_size,
    x,
    y=None,
    sample_weight=None,
    batch_size=None,
    shuffle=False,
    steps=None,
    name="x",
    validation_split=0.0,
):
    """Keyword arguments of `keras.Model.fit` for the data of a user.

    Args:
        preprocess: as in `TextBatches`, or `None`: only arrays are taken.
        vocabulary_size: the bound of ids in arrays.
        x: in-memory text, arrays, or an iterable of batches.
        y: targets, where `x` does not hold them.
        sample_weight: one weight a pair.
        batch_size: rows a batch of in-memory text; 32 when `None`.
        shuffle: a new order every epoch, for in-memory text.
        steps: batches an epoch, for what is endless.
        name: the argument's name, for messages.
        validation_split: share of in-memory data to hold out, from its end.

    Returns:
        The dict; with a split of text, `"held_out"` is the dict for validation.

    Raises:
        ValueError: for what is no data of pairs.
    """
    if not 0 <= validation_split < 1:
        raise ValueError(
            f"`validation_split` must be in [0, 1); got {validation_split!r}."
        )
    common = {"shuffle": shuffle, "steps_per_epoch": steps}
    columns = None if preprocess is None else as_columns(x, y)
    if columns is not None:

        def batches(rows, shuffle):
            return TextBatches(
                preprocess,
                {key: column[rows] for key, column in columns.items()},
                None if sample_weight is None else sample_weight[rows],
                batch_size or 32,
                shuffle,
            )

        rows = len(columns["encoder_text"])
        cut = rows - int(rows * validation_split)
        data = {**common, "x": batches(slice(cut), shuffle), "shuffle": False}
        if validation_split:
            data["held_out"] = {"x": batches(slice(cut, None), False)}
        return data
    if isinstance(x, dict):
        check_ids(x, y, vocabulary_size)
        if validation_split:
            common["validation_split"] = validation_split
        return {
            **common,
            "x": {key: x[key] for key in INPUTS},
            "y": y,
            "sample_weight": sample_weight,
            "batch_size": batch_size,
        }
    if validation_split:
        raise ValueError(
            "`validation_split` works on in-memory data; pass `validation_data` "
            "beside batches."
        )
    if preprocess is None:
        return {**common, "x": x}
    if isinstance(x, keras.utils.PyDataset):
        return {**common, "x": MappedBatches(preprocess, x)}
    x, steps = stream(preprocess, x, steps, name)
    return {"x": x, "shuffle": False, "steps_per_epoch": steps}
