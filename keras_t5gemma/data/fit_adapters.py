"""What users hand to `fit`, turned into batches of arrays.

Keras's own adapters take arrays from everywhere; this module only puts the
tokenizer between the text and them.
"""

import threading

import keras
import numpy as np

from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.pair_dataset import BATCHINGS, PairDataset
from keras_t5gemma.data.resumable import ResumableDataset, draw_seed
from keras_t5gemma.data.text_columns import TEXT_KEYS, as_columns, as_documents
from keras_t5gemma.distribution import mesh
from keras_t5gemma.tokenization.token_ids import INPUTS, check_ids


class MappedBatches(ResumableDataset):
    """A user's PyDataset of text batches, with the tokenizer behind it.

    `start_at` is exact when the dataset does not change with the epochs.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        dataset: the `keras.utils.PyDataset`.
        shuffle: a new order of the batches every epoch.
        steps: batches an epoch; the next epoch goes on where this one ends. `None`
            is all of them.

    Raises:
        ValueError: for an endless dataset without `steps`.
    """

    def __init__(self, preprocessor, dataset, shuffle=False, steps=None, name="x"):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=False,
            max_queue_size=dataset.max_queue_size,
        )
        self.preprocessor = preprocessor
        self.dataset = dataset
        self.length = steps or dataset.num_batches
        self.seed = None
        if shuffle and dataset.num_batches is not None:
            self.seed = draw_seed()
        if self.length is None:
            raise _endless(name)

    def batches_an_epoch(self):
        """Batches of a whole epoch."""
        return self.length

    def __getitem__(self, index):
        number, count = self._position(index), self.dataset.num_batches
        if count is not None:
            epoch, number = divmod(number, count)
            if self.seed is not None:
                order = np.random.default_rng((self.seed, epoch)).permutation(count)
                number = int(order[number])
        batch = map_batch(self.preprocessor, self.dataset[number])
        return self._count(index, batch)

    def on_epoch_begin(self):
        super().on_epoch_begin()
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        super().on_epoch_end()
        self.dataset.on_epoch_end()


class StreamBatches(ResumableDataset):
    """An iterable of text batches that can be started again.

    Batches are found by going through it, from its start when the one asked for has
    gone by. `start_at` is exact when the iterable gives the same batches in every run.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        batches: the iterable.
        length: batches an epoch.
        goes_on: whether an epoch begins where the one before it ended, and the
            iterable anew when it is through; otherwise every epoch begins anew.
    """

    def __init__(self, preprocessor, batches, length, goes_on=False):
        super().__init__(workers=0)
        self.preprocessor = preprocessor
        self.batches = batches
        self.length = length
        self.goes_on = goes_on
        self._place = (None, None)  # The epoch, and the next of its batches.
        self._lock = threading.Lock()  # TensorFlow looks ahead in a thread.

    def batches_an_epoch(self):
        """Batches of a whole epoch."""
        return self.length

    def __getitem__(self, index):
        epoch, wanted = self.epoch, self.skipped + index
        if self.goes_on:
            epoch, wanted = 0, self._position(index)
        with self._lock:
            if self._place[0] != epoch or self._place[1] > wanted:
                self.iterator, self._place = iter(self.batches), (epoch, 0)
            while self._place[1] <= wanted:
                batch = self._next()
                self._place = (epoch, self._place[1] + 1)
        return self._count(index, map_batch(self.preprocessor, batch))

    def _next(self):
        batch = next(self.iterator, None)
        if batch is None and self.goes_on:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, None)
        if batch is None:
            raise ValueError("The data has fewer batches than when they were counted.")
        return batch


def stream(preprocessor, batches, steps=None, name="x"):
    """Arrays from an iterable of text batches.

    Generators, `tf.data`, Grain and PyTorch DataLoaders are all iterables.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
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
    if again:
        length = steps or _length(batches, name)
        return StreamBatches(preprocessor, batches, length, steps is not None), None
    return (map_batch(preprocessor, batch) for batch in batches), steps


def _length(batches, name):
    cardinality = getattr(batches, "cardinality", None)
    if cardinality is not None and int(cardinality()) == -1:
        raise _endless(name)
    try:
        length = len(batches)
    except TypeError:
        length = sum(1 for _ in batches)
    if not length:
        raise ValueError(f"`{name}` is empty.")
    return length


def _endless(name):
    return ValueError(
        f"`{name}` never ends: pass `steps_per_epoch` (or `validation_steps`)."
    )


def map_batch(preprocessor, batch):
    """One batch of text through the preprocessor; of arrays, as it is."""
    columns, weight = batch, None
    first = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
    is_ids = isinstance(first, dict) and "encoder_token_ids" in first
    if preprocessor.objective is not None and not is_ids:
        columns = as_documents(batch) or {"text": batch}
    elif isinstance(batch, list | tuple):
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
    return mesh.fill_batch(preprocessor(columns, sample_weight=weight))


def fit_arguments(
    preprocessor,
    vocabulary_size,
    x,
    y=None,
    sample_weight=None,
    batch_size=None,
    shuffle=False,
    steps=None,
    name="x",
    validation_split=0.0,
    batching=None,
    like=None,
    teacher=None,
):
    """Keyword arguments of `keras.Model.fit` for the data of a user.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None`: only arrays are taken.
        vocabulary_size: the bound of ids in arrays.
        x: in-memory text, arrays, an iterable of batches, or a `PairDataset`.
        y: targets, where `x` does not hold them.
        sample_weight: one weight a pair.
        batch_size: rows a batch of in-memory text; 32 when `None`.
        shuffle: a new order every epoch, for in-memory text.
        steps: batches an epoch, for what is endless.
        name: the argument's name, for messages.
        validation_split: share of in-memory data to hold out, from its end.
        batching: of `PairDataset`; `None` is `"packed"` with an objective, else
            `"bucketed"`.
        like: the training data that this data validates; its widths are taken.
        teacher: of `DocumentDataset`; `None` for pairs and batches.

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
    whole = {
        "shuffle": False,
        "steps_per_epoch": None,
    }  # A `ResumableDataset` does both.
    if isinstance(x, PairDataset) and getattr(x, "teacher", None) is teacher:
        return {"x": x, **whole}  # Made before, with all that is asked for here.
    columns, make = None, PairDataset
    if preprocessor is not None and preprocessor.objective is not None:
        columns, make = as_documents(x, y), DocumentDataset
        if columns is not None:
            batching = batching or "packed"
    elif preprocessor is not None:
        columns = as_columns(x, y)
    batching = batching or "bucketed"
    if teacher is not None and (columns is None or make is PairDataset):
        raise ValueError(
            f"Distillation needs plain text in memory as `{name}` (a list of strings, "
            "a Dataset, a path) and a preprocessor with an `objective`."
        )
    if columns is not None:

        def batches(rows, shuffle, steps=None, like=None, **kwargs):
            return make(
                preprocessor,
                {key: column[rows] for key, column in columns.items()},
                None if sample_weight is None else sample_weight[rows],
                batch_size or 32,
                shuffle,
                batching,
                steps,
                like.widths if isinstance(like, PairDataset) else None,
                name,
                **kwargs,
            )

        rows = len(next(iter(columns.values())))
        cut = rows - int(rows * validation_split)
        if validation_split and cut == rows:
            raise ValueError(
                f"`validation_split` {validation_split} of {rows} rows is none."
            )
        with_teacher = {} if teacher is None else {"teacher": teacher}
        training = batches(slice(cut), shuffle, steps, like, **with_teacher)
        data = {"x": training, **whole}
        if validation_split:
            held_out = batches(slice(cut, None), False, None, data["x"])
            data["held_out"] = {"x": held_out}
        return data
    if batching not in BATCHINGS:
        raise ValueError(f"`batching` must be one of {BATCHINGS}; got {batching!r}.")
    if batching == "packed":
        raise ValueError(
            "`batching='packed'` is for in-memory text; "
            f"`{name}` is {type(x).__name__} of something else."
        )
    if isinstance(x, dict):
        check_ids(x, y, vocabulary_size)
        rows = len(x[INPUTS[0]])
        cut = int(rows * (1 - validation_split))
        for part in (cut, rows - cut):
            mesh.check_rows(part % (batch_size or 32), f"the last batch of `{name}`")
        mesh.check_rows(min(rows, batch_size or 32), "batch_size")
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
    if preprocessor is None:
        return {**common, "x": x}
    if isinstance(x, keras.utils.PyDataset):
        return {"x": MappedBatches(preprocessor, x, shuffle, steps, name), **whole}
    x, steps = stream(preprocessor, x, steps, name)
    return {**whole, "x": x, "steps_per_epoch": steps}
