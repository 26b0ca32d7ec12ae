"""Batches of texts for an encoder alone, with labels or in matching pairs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_t5gemma.data.fit_adapters import rows_for_training
from keras_t5gemma.data.pair_dataset import PairDataset, tokenize
from keras_t5gemma.data.text_batches import check_batched, may_be_cut, width_for
from keras_t5gemma.distribution import mesh
from keras_t5gemma.tokenization.token_ids import named, pad
from keras_t5gemma.utils.buckets import (
    SHORT,
    batch_bounds,
    bucket,
    power_of_two,
    round_up,
)
from keras_t5gemma.utils.checks import row_weights, rows_of_batch, shown
from keras_t5gemma.utils.ragged import Ragged
from keras_t5gemma.utils.texts import as_texts


class EncoderDataset(PairDataset):
    """Batches of texts for an encoder alone, with labels or in matching pairs.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`, of which the encoder side is used.
        columns: `{input name: texts}`, one column or two that belong together. The
            arrays of a batch are called `NAME_token_ids` and `NAME_padding_mask`.
        labels: array `(texts, ...)`; with `None` the labels of a batch are zeros.
        token_rows: function from a dict of columns to lists of token ids per text, one
            list for each column or one for all of them joined.
        **kwargs: those of `PairDataset`, except `batching="packed"`.

    Raises:
        ValueError: as `PairDataset`, or for `batching="packed"`.
    """

    def __init__(
        self,
        preprocessor: Any,
        columns: dict,
        labels: np.ndarray | None,
        token_rows: Callable[[dict], list],
        **kwargs: Any,
    ) -> None:
        check_batching(kwargs.get("batching"))
        self.labels = labels
        self.names = list(columns)
        self._rows_of = token_rows
        super().__init__(preprocessor, columns, **kwargs)

    def _read(self, columns, name):
        sides = encoder_ids(self.preprocessor, columns, name, self._rows_of)
        self.names = self.names[: len(sides)]
        self.sources, self.targets = sides[0], sides[-1]
        if len(sides) == 2:
            return sides[0].lengths, sides[1].lengths
        return sides[0].lengths, np.zeros(len(sides[0]), "int64")

    def _limits(self):
        length = self.preprocessor.encoder_sequence_length
        return length, length if len(self.names) == 2 else 1

    def __getitem__(self, index):
        rows, widths = self._own_batch(index)
        chosen = self._pairs(rows)
        weights = np.zeros(len(rows), "float32")
        weights[: len(chosen)] = self.weights[chosen]
        sides = zip(self.names, self._tokens(chosen, 0), widths, strict=False)
        x = {}
        for name, tokens, width in sides:
            x |= arrays(tokens, (len(rows), width), name)
        if self.labels is None:
            return x, np.zeros(len(rows), "int32"), weights
        labels = np.zeros((len(rows), *self.labels.shape[1:]), self.labels.dtype)
        labels[: len(chosen)] = self.labels[chosen]
        return x, labels, weights


def check_batching(batching: str | None) -> None:
    """Raise `ValueError` for packed rows, which an encoder alone does not read."""
    if batching == "packed":
        raise ValueError(
            "`batching` must be 'bucketed' or 'fixed' for an encoder alone; got "
            "'packed'."
        )


def encoder_arguments(
    make: Callable[..., EncoderDataset],
    columns: dict,
    labels: np.ndarray | None,
    sample_weight: Any,
    validation_split: float,
    like: Any,
    training: dict[str, Any],
) -> dict[str, Any]:
    """Keyword arguments of `keras.Model.fit` for texts in memory.

    Args:
        make: `EncoderDataset` with the arguments that all rows share.
        columns: `{input name: texts}`.
        labels: see `EncoderDataset`.
        sample_weight: one weight per row, or `None`.
        validation_split: share of the rows to hold out, from their end.
        like: the training data, when this is validation data: its widths are used.
        training: keyword arguments of the dataset for training alone.

    Returns:
        The dict; with a validation split, `"held_out"` is the dict for validation.
    """
    count = len(next(iter(columns.values())))
    if sample_weight is not None:
        sample_weight = row_weights(sample_weight, "sample_weight", count)

    def dataset(rows, like, **kwargs):
        return make(
            {key: column[rows] for key, column in columns.items()},
            None if labels is None else labels[rows],
            sample_weight=None if sample_weight is None else sample_weight[rows],
            widths=like.widths if isinstance(like, EncoderDataset) else None,
            **kwargs,
        )

    cut = rows_for_training(count, validation_split)
    data = dataset(slice(cut), like, **training)
    result = {"x": data, "shuffle": False, "steps_per_epoch": None}
    if cut < count:
        result["held_out"] = {"x": dataset(slice(cut, None), data)}
    return result


def check_lengths(
    columns: dict, labels: np.ndarray | None, name: str, first: str
) -> None:
    """Raise `ValueError` unless all columns have the same number of rows.

    Args:
        columns: `{input name: texts}`.
        labels: one per row, or `None`.
        name: what has the columns, for the message.
        first: what users call the column of the model's first input.
    """
    lengths = {
        first if key == "encoder" else key: len(column)
        for key, column in columns.items()
    }
    if labels is not None:
        lengths["labels"] = len(labels)
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{name} must have the same number of rows in every column; got {lengths}."
        )


def _is_list(part):
    return isinstance(part, list | tuple) or getattr(part, "shape", ()) != ()


def unpack_batch(batch: Any, name: str) -> tuple[Any, Any, Any]:
    """`(x, y, sample_weight)` of a batch that a user makes; the last two may be `None`.

    Args:
        batch: `(x, y)` or `(x, y, sample_weight)`, or a dict or a table, which is `x`.
            In `x` pairs are a dict or a table of columns.
        name: of the argument that the batches were passed as, for messages.

    Raises:
        ValueError: for another number of parts, one string in place of a batch, and
            lists in a list, which may be pairs or columns.
    """
    parts = list(batch) if isinstance(batch, list | tuple) else [batch]
    if len(parts) not in (1, 2, 3):
        raise ValueError(
            f"A batch must be (x, y), (x, y, sample_weight), or a dict of columns with "
            f"the names that `{name}` has in memory; got {shown(batch)}."
        )
    check_batched(parts[0], f"A batch of `{name}`")
    if isinstance(parts[0], list | tuple) and any(map(_is_list, parts[0])):
        raise ValueError(
            f"Pairs in a batch of `{name}` must be a dict of two columns, with the "
            f"names that they have in memory; got {shown(parts[0])}."
        )
    if isinstance(parts[0], list | tuple) and not parts[0]:
        raise ValueError("it is empty.")
    x, y, weights = [*parts, None, None][:3]
    return x, y, weights


def encoder_batch(
    preprocessor: Any,
    columns: dict,
    labels: np.ndarray | None,
    sample_weight: Any,
    token_rows: Callable[[dict], list],
    name: str,
    batching: str | None,
) -> tuple:
    """Arrays of a batch of texts that a user makes.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`, of which the encoder side is used.
        columns: `{input name: texts}`.
        labels: see `EncoderDataset`.
        sample_weight: one weight per row; `None` is 1.
        token_rows: see `EncoderDataset`.
        name: of the argument that the batches were passed as, for messages.
        batching: with `"fixed"` the width is the preprocessor's length; otherwise the
            smallest multiple of `pad_to_multiple_of` that holds the texts, or without
            it the smallest of an eighth, a quarter, half and all of the length.

    Returns:
        `(x, labels, weights)` as of an `EncoderDataset`.
    """
    sides = encoder_ids(preprocessor, columns, name, token_rows)
    count, limit = len(sides[0]), preprocessor.encoder_sequence_length
    filled = mesh.round_up(count)  # With empty rows, which no loss counts.
    multiple = preprocessor.pad_to_multiple_of
    x: dict[str, np.ndarray] = {}
    for key, rows in zip(columns, sides, strict=False):
        width, longest = limit, int(rows.lengths.max())
        if may_be_cut(batching) and multiple:
            width = min(limit, round_up(longest, multiple))
        elif may_be_cut(batching):
            width = min(limit, width_for(longest, limit))
        x |= arrays([rows[i] for i in range(count)], (filled, width), key)
    if labels is None:
        labels = np.zeros(count, "int32")
    weights = np.ones(count, "float32")
    if sample_weight is not None:
        weights = row_weights(sample_weight, "sample_weight", count)

    def fill(values):
        more = [(0, filled - count)] + [(0, 0)] * (values.ndim - 1)
        return np.pad(values, more)

    return x, fill(labels), fill(weights)


def arrays(
    tokens: Sequence, shape: tuple[int, int], name: str = "encoder"
) -> dict[str, np.ndarray]:
    """Token ids and padding mask, int32 arrays of a shape; missing rows are empty."""
    count, width = shape
    filled = [*tokens, *[[]] * (count - len(tokens))]
    return named(name, *pad(filled, width))


def by_length(
    rows: Ragged, batch_size: int, limit: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches of rows of similar length, in few shapes where shapes are compiled.

    Args:
        rows: a `Ragged` of ids.
        batch_size: maximum rows per batch, fewer of long rows, see `batch_bounds`.
        limit: maximum width in tokens.

    Yields:
        `(row numbers, arrays)`, longest rows first: a batch that does not fit into
        memory fails at once.
    """
    rows_of_batch(batch_size)
    order = np.argsort(-rows.lengths, kind="stable")
    bounds = batch_bounds(rows.lengths[order], batch_size, mesh.size("data"))
    for start, stop in bounds:
        chosen = order[start:stop]
        longest = int(rows.lengths[chosen[0]])
        if keras.config.backend() == "torch":  # Eager: any shape will do.
            count, width = len(chosen), round_up(longest, 8)
        else:
            count, width = batch_size, bucket(longest, halves_from=16)
            # Filling up a few rows, or long ones, would cost much.
            if len(rows) < batch_size or longest > SHORT:
                count = mesh.round_up(min(power_of_two(len(chosen)), batch_size))
        yield chosen, arrays([rows[i] for i in chosen], (count, min(limit, width)))


def encoder_ids(
    preprocessor: Any, columns: dict, name: str, token_rows: Callable[[dict], list]
) -> list[Ragged]:
    """Tokenize columns of texts for the encoder; warns when texts are truncated.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        columns: `{name: texts}`.
        name: of the argument that `columns` was passed as, for messages.
        token_rows: as in `EncoderDataset`.

    Returns:
        A `Ragged` of token ids for each list that `token_rows` returns.

    Raises:
        ValueError: when a column is not a list of texts, is empty, or has empty texts.
    """
    # The first column has the name of the model's input.
    names = {key: name if key == "encoder" else key for key in columns}
    columns = {key: as_texts(texts, names[key]) for key, texts in columns.items()}
    for key, texts in columns.items():
        empty = [i for i, text in enumerate(texts) if not len(text)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(texts)} texts of `{names[key]}` are empty, the "
                f"first is number {empty[0]}: leave them out."
            )
    return tokenize(preprocessor, columns, name, token_rows)
