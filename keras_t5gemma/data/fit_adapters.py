"""Data adapters for `fit`: text, arrays, datasets and iterables, as batches of arrays.

Keras's own adapters accept arrays of every kind; this module only adds the tokenizer.
"""

import functools
import threading
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.pair_dataset import BATCHINGS, PairDataset
from keras_t5gemma.data.resumable import ResumableDataset, draw_seed
from keras_t5gemma.data.text_columns import TEXT_KEYS, as_columns, as_documents
from keras_t5gemma.distribution import mesh
from keras_t5gemma.tokenization.token_ids import INPUTS, check_ids
from keras_t5gemma.utils.checks import number, one_of
from keras_t5gemma.utils.texts import column_names, in_memory


class MappedBatches(ResumableDataset):
    """A user's PyDataset of text batches, tokenized batch by batch.

    `start_at` is exact when the dataset does not change between epochs.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        dataset: the `keras.utils.PyDataset`.
        shuffle: a new order of the batches in every epoch.
        steps: batches per epoch; the next epoch continues where this one ends. `None`
            takes all of them.
        name: of the argument that `dataset` was passed as, for messages.

    Raises:
        ValueError: for an endless dataset without `steps`.
    """

    def __init__(
        self,
        preprocessor: Any,
        dataset: keras.utils.PyDataset,
        shuffle: bool = False,
        steps: int | None = None,
        name: str = "x",
    ) -> None:
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
    """An iterable of text batches that can be iterated again.

    Batches are read in order; an earlier batch restarts the iterable. `start_at` is
    exact when the iterable gives the same batches in every run.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        batches: the iterable.
        length: batches per epoch.
        continues: `True` starts an epoch where the previous one ended, and restarts
            the iterable when it is exhausted; `False` restarts it in every epoch.
    """

    def __init__(
        self, preprocessor: Any, batches: Iterable, length: int, continues: bool = False
    ) -> None:
        super().__init__(workers=0)
        self.preprocessor = preprocessor
        self.batches = batches
        self.length = length
        self.continues = continues
        self._place = (None, None)  # The epoch, and the next of its batches.
        self._lock = threading.Lock()  # TensorFlow prefetches in a thread.

    def batches_an_epoch(self):
        """Batches of a whole epoch."""
        return self.length

    def __getitem__(self, index):
        epoch, wanted = self.epoch, self.skipped + index
        if self.continues:
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
        if batch is None and self.continues:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, None)
        if batch is None:
            raise ValueError(
                f"The data must have {self.length} batches in every epoch; it ended "
                f"after {self._place[1]}."
            )
        return batch


def stream(
    preprocessor: Any, batches: Iterable, steps: int | None = None, name: str = "x"
) -> tuple[Iterable, int | None]:
    """Arrays from an iterable of text batches.

    Generators, `tf.data`, Grain and PyTorch DataLoaders are all iterables.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        batches: the iterable; each item is a dict of text columns, or a
            `(sources, targets)` pair of lists.
        steps: batches per epoch, for endless data; with `None` an epoch is all of the
            iterable, which is iterated once to count when it has no length.
        name: of the argument that `batches` was passed as, for messages.

    Returns:
        `(data for keras.Model.fit, steps)`.

    Raises:
        ValueError: when it cannot be iterated, is empty, or is endless without
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


def map_batch(preprocessor: Any, batch: Any) -> Any:
    """Tokenize one batch of text; a batch of arrays is returned unchanged.

    Raises:
        ValueError: when it is not a batch of texts or arrays.
    """
    if column_names(batch) is not None:
        batch = in_memory(batch, (*TEXT_KEYS, "text"))
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
    preprocessor: Any,
    vocabulary_size: int,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
    shuffle: bool = False,
    steps: int | None = None,
    name: str = "x",
    validation_split: float = 0.0,
    batching: str | None = None,
    like: Any = None,
    teacher: Any = None,
) -> dict[str, Any]:
    """Keyword arguments of `keras.Model.fit` for a user's data.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`; with `None` only arrays are accepted.
        vocabulary_size: ids in arrays must be below this.
        x: in-memory text, arrays, an iterable of batches, or a `PairDataset`.
        y: targets, when `x` does not have them.
        sample_weight: one weight per pair.
        batch_size: rows per batch of in-memory text; 32 when `None`.
        shuffle: a new order in every epoch, for in-memory text.
        steps: batches per epoch, for endless data.
        name: of the argument that `x` was passed as, for messages.
        validation_split: share of in-memory data to hold out, from its end.
        batching: of `PairDataset`; `None` is `"packed"` with an objective, else
            `"bucketed"`.
        like: the training data, when this is validation data: its bucket widths are
            used here too.
        teacher: of `DocumentDataset`; `None` for pairs and batches.

    Returns:
        The dict; with a validation split of text, `"held_out"` is the dict for
        validation.

    Raises:
        ValueError: when `x` is not data of text pairs.
    """
    number(validation_split, "validation_split", at_least=0, below=1)
    # A `ResumableDataset` shuffles and counts its steps itself.
    dataset_arguments = {"shuffle": False, "steps_per_epoch": None}
    if isinstance(x, PairDataset) and getattr(x, "teacher", None) is teacher:
        return {"x": x, **dataset_arguments}  # Made earlier, for the same arguments.
    has_objective = preprocessor is not None and preprocessor.objective is not None
    read = as_documents if has_objective else as_columns
    columns = None if preprocessor is None else read(x, y)
    if teacher is not None and (columns is None or not has_objective):
        raise ValueError(
            f"Distillation needs plain text in memory as `{name}` (a list of strings, "
            "a Dataset, a path) and a preprocessor with an `objective`."
        )
    size = 32 if batch_size is None else batch_size
    if columns is not None:
        options = {"preprocessor": preprocessor, "batch_size": size}
        options["batching"] = batching or ("packed" if has_objective else "bucketed")
        training = {"shuffle": shuffle, "steps": steps}
        if teacher is not None:
            training["teacher"] = teacher
        kind = DocumentDataset if has_objective else PairDataset
        make = functools.partial(kind, name=name, **options)
        data = _split_datasets(
            make, columns, sample_weight, validation_split, like, training
        )
        return {**data, **dataset_arguments}
    if one_of(batching or "bucketed", "batching", BATCHINGS) == "packed":
        raise ValueError(
            "`batching='packed'` needs text in memory; "
            f"got `{name}` of type {type(x).__name__}, which is not text in memory."
        )
    if isinstance(x, dict):
        _check_arrays(x, y, vocabulary_size, size, validation_split, name)
        arrays = {"x": {key: x[key] for key in INPUTS}, "y": y}
        arrays |= {"sample_weight": sample_weight, "batch_size": batch_size}
        if validation_split:
            arrays["validation_split"] = validation_split
        return {**arrays, "shuffle": shuffle, "steps_per_epoch": steps}
    if validation_split:
        raise ValueError(
            "`validation_split` needs data in memory; pass `validation_data` with "
            "batches."
        )
    if preprocessor is None:
        return {"x": x, "shuffle": shuffle, "steps_per_epoch": steps}
    if isinstance(x, keras.utils.PyDataset):
        batches = MappedBatches(preprocessor, x, shuffle, steps, name)
        return {"x": batches, **dataset_arguments}
    x, steps = stream(preprocessor, x, steps, name)
    return {"x": x, "shuffle": False, "steps_per_epoch": steps}


def _split_datasets(make, columns, sample_weight, share, like, training):
    """Datasets for training and, with a validation split, for validation.

    Args:
        make: function that makes a `PairDataset`.
        columns: dict of lists.
        sample_weight: one weight per row, or `None`.
        share: of the rows that is held out, from their end.
        like: a dataset whose widths are used, if it is a `PairDataset`.
        training: keyword arguments of the dataset for training alone.
    """

    def dataset(rows, like, **kwargs):
        return make(
            columns={key: column[rows] for key, column in columns.items()},
            sample_weight=None if sample_weight is None else sample_weight[rows],
            widths=like.widths if isinstance(like, PairDataset) else None,
            **kwargs,
        )

    rows = len(next(iter(columns.values())))
    cut = rows - int(rows * share)
    if share and cut == rows:
        raise ValueError(f"`validation_split` {share} of {rows} rows leaves none.")
    data = {"x": dataset(slice(cut), like, **training)}
    if share:
        data["held_out"] = {"x": dataset(slice(cut, None), data["x"])}
    return data


def _check_arrays(x, y, vocabulary_size, batch_size, validation_split, name):
    """Raise `ValueError` for ids out of range, or batches that no mesh can split."""
    check_ids(x, y, vocabulary_size)
    rows = len(x[INPUTS[0]])
    cut = int(rows * (1 - validation_split))
    for part in (cut, rows - cut):
        mesh.check_rows(part % batch_size, f"the last batch of `{name}`")
    mesh.check_rows(min(rows, batch_size), "batch_size")
