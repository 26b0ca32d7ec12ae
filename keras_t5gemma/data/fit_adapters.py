"""Data adapters for `fit`: text, arrays, datasets and iterables, as batches of arrays.

Keras's own adapters accept arrays of every kind; this module only adds the tokenizer.
"""

import functools
from typing import Any

import numpy as np

from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.pair_dataset import BATCHINGS, PairDataset
from keras_t5gemma.data.text_batches import (
    batch_arguments,
    check_not_in_memory,
    map_batch,
)
from keras_t5gemma.data.text_columns import as_columns, as_documents
from keras_t5gemma.distribution import mesh
from keras_t5gemma.tokenization.token_ids import INPUTS, check_ids
from keras_t5gemma.utils.checks import (
    number,
    number_array,
    one_of,
    row_weights,
    rows_of_batch,
)


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
            `"bucketed"`. Batches that a user makes are `"bucketed"` (see
            `text_batches.map_batch`) or `"fixed"`.
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
    columns = None if preprocessor is None else read(x, y, name)
    if batching is not None:
        one_of(batching, "batching", BATCHINGS)
    if teacher is not None and (columns is None or not has_objective):
        raise ValueError(
            f"Distillation needs plain text in memory as `{name}` (a list of strings, "
            "a Dataset, a path) and a preprocessor with an `objective`."
        )
    size = 32 if batch_size is None else rows_of_batch(batch_size)
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
    if batching == "packed":
        raise ValueError(
            "`batching='packed'` needs text in memory; "
            f"got `{name}` of type {type(x).__name__}, which is not text in memory."
        )
    if isinstance(x, dict):
        _check_arrays(x, y, vocabulary_size, size, validation_split, name)
        if sample_weight is not None:
            sample_weight = _array_weights(sample_weight, x[INPUTS[0]], y)
        arrays = {"x": {key: x[key] for key in INPUTS}, "y": y}
        arrays |= {"sample_weight": sample_weight, "batch_size": batch_size}
        if validation_split:
            arrays["validation_split"] = validation_split
        return {**arrays, "shuffle": shuffle, "steps_per_epoch": steps}
    if preprocessor is None:
        check_not_in_memory(x, y, name, sample_weight, validation_split)
        return {"x": x, "shuffle": shuffle, "steps_per_epoch": steps}
    convert = functools.partial(map_batch, preprocessor)
    return batch_arguments(
        convert, x, y, sample_weight, shuffle, steps, name, validation_split, batching
    )


def rows_for_training(rows: int, validation_split: float) -> int:
    """Number of rows before those that a validation split holds out, at the end.

    Raises:
        ValueError: for a split that holds out no row.
    """
    held_out = int(rows * validation_split)
    if validation_split and not held_out:
        raise ValueError(
            f"`validation_split` {validation_split} of {rows} rows holds out no row."
        )
    return rows - held_out


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
    if sample_weight is not None:
        sample_weight = row_weights(sample_weight, "sample_weight", rows)
    cut = rows_for_training(rows, share)
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


def _array_weights(sample_weight, x, y):
    """Weights of arrays, one per row or one per target token."""
    weights = number_array(sample_weight, "sample_weight")
    shapes = [(len(x),), (len(x), 1), *([] if y is None else [np.shape(y)])]
    if weights.shape not in shapes:
        raise ValueError(
            f"`sample_weight` must have one of the shapes {shapes}; got "
            f"{weights.shape}."
        )
    return weights
