"""Evaluation tasks: text classification and retrieval, from SuperGLUE or a folder."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from keras_t5gemma.data.readers import read_objects
from keras_t5gemma.evaluation import superglue
from keras_t5gemma.utils.checks import shown, string

CLASSES, RETRIEVAL = "classes", "retrieval"
SPLITS = ("train", "valid", "test")
MEASURES = {CLASSES: ("accuracy",), RETRIEVAL: ("recall@10",)}
TASKS = tuple(superglue.TASKS)
# kind: (field of the text or query, field of the class or document)
_FIELDS = {CLASSES: ("text", "label"), RETRIEVAL: ("query", "document")}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of one split of a task.

    Attributes:
        x: texts or pairs of texts; queries in a retrieval task.
        y: class names; in a retrieval task the document that answers each query.
        groups: the group of each row where a measure is computed per group, as in
            MultiRC; else `None`.
    """

    x: list
    y: list
    groups: list | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Sequence[int]) -> "Examples":
        """The examples at these indices."""
        groups = None if self.groups is None else [self.groups[i] for i in rows]
        return Examples([self.x[i] for i in rows], [self.y[i] for i in rows], groups)


@dataclasses.dataclass(frozen=True)
class Task:
    """Training, validation and test examples of an evaluation task.

    Attributes:
        name: of the task.
        kind: `CLASSES` or `RETRIEVAL`.
        train: examples to train on.
        valid: examples that the epoch and the learning rate are chosen by.
        test: examples that are reported.
        measures: names from `measures.py`; the task's score is their mean.
    """

    name: str
    kind: str
    train: Examples
    valid: Examples
    test: Examples
    measures: tuple

    @property
    def class_names(self) -> list:
        """Sorted class names of the training rows."""
        return sorted(set(self.train.y))

    def fingerprint(self) -> str:
        """Hex digest of all rows."""
        splits = [dataclasses.astuple(getattr(self, name)) for name in SPLITS]
        return hashlib.sha256(repr(splits).encode("utf-8", "replace")).hexdigest()


def read_task(name: str, data: str | os.PathLike) -> Task:
    """Read an evaluation task.

    Args:
        name: one of `TASKS`, or a folder with the files `train`, `valid` and `test`,
            `.jsonl` or `.jsonl.gz`. Their rows have `text`, optionally `text_pair`,
            and `label`; or `query` and `document`.
        data: the folder that contains the tasks' folders.

    Raises:
        ValueError: for an unknown name, rows that lack a field, a single class, or a
            class that occurs in no training row.
        FileNotFoundError: naming the missing file.
    """
    data = Path(data)
    if name in superglue.TASKS:
        splits, measures = superglue.read(name, data)
        parts = dict(zip(SPLITS, (Examples(*rows) for rows in splits), strict=True))
        task = Task(name, CLASSES, **parts, measures=measures)
    else:
        folder = data / name
        if not folder.is_dir():
            raise ValueError(
                f"`tasks` must be of {', '.join(TASKS)}, or folders in `data` {data}; "
                f"got {name!r}."
            )
        rows = {split: _rows(folder, split) for split in SPLITS}
        kind = _kind_of(folder, first=rows["train"][0][1])
        parts = {split: _examples(found, kind) for split, found in rows.items()}
        name = Path(os.path.abspath(folder)).name  # Of "a/b", ".", "../b" too.
        task = Task(name, kind, **parts, measures=MEASURES[kind])
    _check_classes(task)
    return task


def _check_classes(task):
    if task.kind == RETRIEVAL:
        return
    names = task.class_names
    if len(names) < 2:
        raise ValueError(f"Task {task.name!r} has a single class in train: {names}.")
    for split in ("valid", "test"):
        unknown = set(getattr(task, split).y) - set(names)
        if unknown:
            raise ValueError(
                f"Task {task.name!r} has classes in {split} that no training row has: "
                f"{sorted(unknown)[:5]}."
            )


def _kind_of(folder, first):
    """The kind of a user's task, from the fields of its first training row."""
    for kind, fields in _FIELDS.items():
        if set(fields) <= set(first):
            return kind
    raise ValueError(
        f"Rows of {folder} must have the fields 'text' and 'label', or 'query' and "
        f"'document'; got {sorted(first)}."
    )


def _rows(folder, split):
    """`(place, row)` of each row of a split."""
    files = [folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"There is no {files[0]}, and none with .gz.")
    return read_objects(file)


def _examples(rows, kind):
    fields, x, y = _FIELDS[kind], [], []
    for place, row in rows:
        for field in fields:
            if field not in row:
                raise ValueError(f"{place}: no field {field!r}; got {sorted(row)}.")
        text, label = (row[field] for field in fields)
        read = (*fields, "text_pair") if kind == RETRIEVAL else ("text", "text_pair")
        texts = {name: row[name] for name in read if name in row}
        if kind != RETRIEVAL and not isinstance(label, str | int):  # A bool is an int.
            raise ValueError(
                f"{place}: 'label' must be a string or a whole number; got "
                f"{shown(label)}."
            )
        for name, value in texts.items():
            string(value, f"{place}: {name}")
        x.append((text, row["text_pair"]) if "text_pair" in row else text)
        y.append(label if kind == RETRIEVAL else str(label))
    return Examples(x, y)
