"""Batches of text that users make, tokenized one by one: datasets and iterables."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_t5gemma.data.resumable import ResumableDataset, draw_seed
from keras_t5gemma.data.text_columns import TEXT_KEYS, as_documents
from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.tokenization.token_ids import INPUTS, check_names
from keras_t5gemma.utils.buckets import ceil_div, round_up
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.texts import column_names, in_memory

Convert: TypeAlias = Callable[[Any, str, str | None], Any]

_STEPS = "`steps_per_epoch` (`steps`, `validation_steps`)"
_EMPTY = "`{}` is empty: it has no batches."
_PARTS = (8, 4, 2, 1)  # Of the preprocessor's lengths, the widths of batches.
_MAX_COUNTED = 1_000_000  # Batches that are iterated to count them.


@contextlib.contextmanager
def _numbered(number, name):
    """Errors in a batch say which one it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"In batch {number} of `{name}`: {error}") from error


class MappedBatches(ResumableDataset):
    """A user's PyDataset of text batches, tokenized batch by batch.

    `start_at` is exact when the dataset does not change between epochs. Batches are
    read in one thread: with several workers Keras changes their order.

    Args:
        convert: function `(batch, name, batching)` to arrays, e.g. `map_batch` with a
            preprocessor.
        dataset: the `keras.utils.PyDataset`.
        shuffle: a new order of the batches in every epoch.
        steps: batches per epoch; the next epoch continues where this one ends. `None`
            takes all of them.
        name: of the argument that `dataset` was passed as, for messages.
        batching: see `map_batch`.

    Raises:
        ValueError: for an endless dataset without `steps`.
    """

    def __init__(
        self,
        convert: Convert,
        dataset: keras.utils.PyDataset,
        shuffle: bool = False,
        steps: int | None = None,
        name: str = "x",
        batching: str | None = None,
    ) -> None:
        super().__init__(
            workers=min(1, dataset.workers),
            use_multiprocessing=False,
            max_queue_size=dataset.max_queue_size,
        )
        self.convert = convert
        self.dataset = dataset
        self.name = name
        self.batching = batching
        self.length = dataset.num_batches if steps is None else steps
        self.seed = None
        if shuffle and dataset.num_batches is not None:
            self.seed = draw_seed()
        if self.length is None:
            raise _endless(name)
        if 0 in (self.length, dataset.num_batches):
            raise ValueError(_EMPTY.format(name))

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
        batch = self.dataset[number]
        with _numbered(number, self.name):
            batch = self.convert(batch, self.name, self.batching)
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
        convert: as in `MappedBatches`.
        batches: the iterable.
        length: batches per epoch.
        continues: `True` starts an epoch where the previous one ended, and restarts
            the iterable when it is exhausted; `False` restarts it in every epoch.
        name: of the argument that `batches` was passed as, for messages.
        batching: see `map_batch`.
    """

    def __init__(
        self,
        convert: Convert,
        batches: Iterable,
        length: int,
        continues: bool = False,
        name: str = "x",
        batching: str | None = None,
    ) -> None:
        super().__init__(workers=0)
        self.name = name
        self.batching = batching
        self.convert = convert
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
        with _numbered(wanted, self.name):
            batch = self.convert(batch, self.name, self.batching)
        return self._count(index, batch)

    def _next(self):
        batch = next(self.iterator, None)
        if batch is None and self.continues:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, None)
        if batch is None:
            raise ValueError(
                f"`{self.name}` must have {self.length} batches in every epoch; it "
                f"ended after {self._place[1]}."
            )
        return batch


def check_not_in_memory(
    x: Any, y: Any, name: str, sample_weight: Any, validation_split: float
) -> None:
    """Raise `ValueError` for arguments that only data in memory has."""
    if y is not None and is_batches(x):
        raise ValueError(
            f"`y` must be None for batches, which hold it: (x, y); `{name}` is of type "
            f"{type(x).__name__}. For data in memory pass lists."
        )
    if validation_split:
        raise ValueError(
            "`validation_split` needs data in memory; pass `validation_data` with "
            "batches."
        )
    if sample_weight is not None:
        raise ValueError(
            "`sample_weight` needs data in memory: it must be None for batches, which "
            f"hold their weights, (x, y, sample_weight); got `{name}` of type "
            f"{type(x).__name__}."
        )


def is_batches(x: Any) -> bool:
    """Whether data is batches that a user makes, and no data in memory."""
    if isinstance(x, keras.utils.PyDataset):
        return True
    if isinstance(x, str | bytes | dict | list | tuple | set | frozenset | Path | type):
        return False
    is_iterable = hasattr(x, "__iter__") and getattr(x, "shape", None) != ()
    return is_iterable and column_names(x) is None and in_memory(x) is x


def batch_arguments(
    convert: Convert,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    shuffle: bool = False,
    steps: int | None = None,
    name: str = "x",
    validation_split: float = 0.0,
    batching: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `keras.Model.fit` for batches that a user makes.

    Args:
        convert: as in `MappedBatches`.
        x: a `keras.utils.PyDataset`, or an iterable.
        y: must be `None`.
        sample_weight: must be `None`.
        shuffle: a new order in every epoch, for a `PyDataset`.
        steps: batches per epoch; `None` is all.
        name: of the argument that `x` was passed as, for messages.
        validation_split: must be 0.
        batching: see `map_batch`.

    Raises:
        ValueError: for arguments of data in memory, and as `stream`.
    """
    check_not_in_memory(x, y, name, sample_weight, validation_split)
    if isinstance(x, keras.utils.PyDataset):
        batches = MappedBatches(convert, x, shuffle, steps, name, batching)
        return {"x": batches, "shuffle": False, "steps_per_epoch": None}
    x, steps = stream(convert, x, steps, name, batching)
    return {"x": x, "shuffle": False, "steps_per_epoch": steps}


def stream(
    convert: Convert,
    batches: Iterable,
    steps: int | None = None,
    name: str = "x",
    batching: str | None = None,
) -> tuple[Iterable, int | None]:
    """Arrays from an iterable of text batches.

    Generators, `tf.data`, Grain and PyTorch DataLoaders are all iterables.

    Args:
        convert: as in `MappedBatches`.
        batches: the iterable of what `convert` takes.
        steps: batches per epoch; with `None` an epoch is all of the iterable, which is
            iterated once to count when it has no length. For validation this many
            batches of an iterator are kept in memory.
        name: of the argument that `batches` was passed as, for messages.
        batching: see `map_batch`.

    Returns:
        `(data for keras.Model.fit, steps)`.

    Raises:
        ValueError: when it cannot be iterated, is empty, or, without `steps`, is
            endless or an iterator, which does not say whether it ends.
    """
    try:
        again = iter(batches) is not batches
    except TypeError:
        raise ValueError(
            f"`{name}` must be text in memory (lists, a dict of lists) or an iterable "
            f"of batches of it; got {shown(batches)}."
        ) from None
    if again:
        length = _length(batches, name) if steps is None else steps
        has_steps = steps is not None
        options = length, has_steps, name, batching
        return StreamBatches(convert, batches, *options), None
    if steps is None:
        raise ValueError(
            f"`{name}` is an iterator ({type(batches).__name__}), which may be "
            f"endless: pass {_STEPS}, or an iterable that can be iterated again."
        )
    if name == "validation_data":  # Each validation is of the same batches.
        kept = []
        for i, batch in enumerate(itertools.islice(batches, steps)):
            with _numbered(i, name):
                kept.append(convert(batch, name, batching))
        if len(kept) < steps:
            found = f"it ended after {len(kept)}"
            raise ValueError(f"`{name}` must have {steps} batches; {found}.")
        return StreamBatches(lambda batch, *_: batch, kept, steps, name=name), None
    if keras.config.backend() == "tensorflow":
        batching = "fixed"  # Keras takes the widths of the first two for those of all.
    arrays = (convert(batch, name, batching) for batch in batches)
    return arrays, steps


def _length(batches, name):
    cardinality = getattr(batches, "cardinality", None)
    if cardinality is not None and int(cardinality()) == -1:
        raise _endless(name)
    try:
        length = len(batches)
    except TypeError:
        length = sum(1 for _ in itertools.islice(batches, _MAX_COUNTED + 1))
    if length > _MAX_COUNTED:
        raise _endless(name)
    if not length:
        raise ValueError(_EMPTY.format(name))
    return length


def _endless(name):
    return ValueError(
        f"`{name}` never ends, or has too many batches to count them: pass {_STEPS}."
    )


def map_batch(
    preprocessor: Any, batch: Any, name: str = "x", batching: str | None = None
) -> Any:
    """Tokenize one batch of text; a batch of arrays is returned unchanged.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        batch: what the user's iterable yielded.
        name: of the argument that the iterable was passed as, for messages.
        batching: with `"fixed"` the widths are the preprocessor's; otherwise each side
            is padded to the smallest of its length's eighth, quarter, half and whole
            that holds it, in one process and without `pad_to_multiple_of`.

    Raises:
        ValueError: when it is not a batch of texts or arrays.
    """
    if column_names(batch) is not None:
        batch = in_memory(batch, (*TEXT_KEYS, "text"))
    columns, weight = batch, None
    first = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
    is_ids = isinstance(first, dict) and "encoder_token_ids" in first
    if preprocessor.objective is not None and not is_ids:
        columns = as_documents(batch, None, name) or {"text": batch}
    elif isinstance(batch, list | tuple):
        if len(batch) and isinstance(batch[0], dict):
            columns = batch[0]
            weight = batch[2] if len(batch) > 2 else None
        elif len(batch) in (2, 3):
            columns = dict(zip(TEXT_KEYS, batch[:2], strict=True))
            weight = batch[2] if len(batch) > 2 else None
    if not isinstance(columns, dict):
        raise ValueError(
            f"A batch of `{name}` must be a dict with keys {TEXT_KEYS}, or lists "
            f"(sources, targets) or (sources, targets, weights); got {shown(batch)}."
        )
    if "encoder_token_ids" in columns:
        check_names(columns, INPUTS, f"A batch of `{name}`")
        return batch
    for key, column in columns.items():
        check_batched(column, f"{shown(key)} of `{name}`")
    arrays = preprocessor.call(columns, sample_weight=weight)
    if preprocessor.pad_to_multiple_of is None and may_be_cut(batching):
        arrays = _without_padding(*arrays)
    return mesh.fill_batch(arrays)


def check_batched(column: Any, name: str) -> None:
    """Raise `ValueError` for one string in place of a batch of them."""
    if isinstance(column, str | bytes) or getattr(column, "shape", None) == ():
        raise ValueError(
            f"{name} must be a batch of strings; got one string. Batch the dataset "
            "first, e.g. `.batch(32)`."
        )


def may_be_cut(batching: str | None) -> bool:
    """Whether a batch need not have the preprocessor's lengths, see `map_batch`."""
    return batching != "fixed" and process_group.process_count() == 1


def width_for(length: int, limit: int) -> int:
    """The smallest of an eighth, a quarter, half and all of `limit` that holds it."""
    widths = [round_up(ceil_div(limit, part), 8) for part in _PARTS]
    return next(width for width in widths if width >= length)


def _without_padding(x, labels, weights):
    """Arrays of a batch, cut to widths of which there are few."""
    cut = dict(x)
    for side in ("encoder", "decoder"):
        mask = x[f"{side}_padding_mask"]
        used = np.flatnonzero(np.any(mask, axis=0))
        length = used[-1] + 1 if len(used) else 0
        width = width_for(length, mask.shape[1])
        for name in (f"{side}_token_ids", f"{side}_padding_mask"):
            cut[name] = x[name][:, :width]
    width = cut["decoder_token_ids"].shape[1]
    return cut, labels[:, :width], weights[:, :width]
