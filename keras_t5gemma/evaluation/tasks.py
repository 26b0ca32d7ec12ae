"""What encoders are measured on: texts with classes, queries with documents."""

import dataclasses
from pathlib import Path

import numpy as np

from keras_t5gemma.data.readers import read_objects
from keras_t5gemma.evaluation import superglue

CLASSES, RETRIEVAL = "classes", "retrieval"
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Some of the rows of a task.

    Attributes:
        x: texts, or pairs of texts; of a retrieval the queries.
        y: names of classes; of a retrieval the documents, the i-th the i-th query's.
        groups: what rows belong to, where a measure is of groups, or `None`.
    """

    x: list
    y: list
    groups: list | None = None

    def __len__(self):
        return len(self.x)

    def take(self, rows):
        """The examples of these numbers."""
        groups = None if self.groups is None else [self.groups[i] for i in rows]
        return Examples([self.x[i] for i in rows], [self.y[i] for i in rows], groups)


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples to train on, to choose by, and to measure.

    Attributes:
        name: of the task.
        kind: `CLASSES` or `RETRIEVAL`.
        train: `Examples`.
        valid: likewise.
        test: likewise.
        measures: of `measures.py`; the task's score is their mean.
    """

    name: str
    kind: str
    train: Examples
    valid: Examples
    test: Examples
    measures: tuple

    @property
    def class_names(self):
        """Names of the classes of the training rows, sorted."""
        return sorted(set(self.train.y))


@dataclasses.dataclass(frozen=True)
class Source:
    """A task out of a folder of `train`, `valid` and `test` rows, JSON lines.

    Attributes:
        folder: its name beside those of the other tasks.
        kind: `CLASSES` or `RETRIEVAL`.
        x: field of the text, or of the query.
        y: field of the class, or of the document.
        least_rows: classes of fewer training rows are left out.
    """

    folder: str
    kind: str
    x: str
    y: str
    least_rows: int = 1


SOURCES = {
    "supersense": Source("supersense", CLASSES, "text", "label"),
    "section": Source("synopsis", CLASSES, "text", "section", least_rows=150),
    "synopsis": Source("synopsis", RETRIEVAL, "summary", "text"),
}
MEASURES = {CLASSES: ("accuracy",), RETRIEVAL: ("recall@10",)}
TASKS = (*SOURCES, *superglue.TASKS)


def read_task(name, data):
    """Read a task.

    Args:
        name: one of `TASKS`; or a folder with files `train`, `valid` and `test`,
            `.jsonl` or `.jsonl.gz`, of rows with `text`, perhaps `text_pair`, and
            `label`, or with `query` and `document`.
        data: the folder that the folders of the tasks are in.

    Raises:
        ValueError: for an unknown name, rows that lack a field, a single class, or a
            class that only test rows have.
        FileNotFoundError: naming the file that is not there.
    """
    data = Path(data)
    if name in superglue.TASKS:
        splits, measures = superglue.read(name, data)
        parts = dict(zip(SPLITS, (Examples(*rows) for rows in splits), strict=True))
        task = Task(name, CLASSES, **parts, measures=measures)
    else:
        source = SOURCES.get(name) or _look(name, data)
        rows = {split: _rows(data / source.folder, split) for split in SPLITS}
        parts = {split: _examples(found, source) for split, found in rows.items()}
        if source.least_rows > 1:
            parts = _without_rare_classes(parts, source.least_rows)
        name = Path(name).name  # Of a folder of the user's.
        task = Task(name, source.kind, **parts, measures=MEASURES[source.kind])
    _check(task)
    return task


def _check(task):
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


def _look(name, data):
    """What a user's own folder holds, by the fields of its first row."""
    if not (data / name).is_dir():
        raise ValueError(
            f"`tasks` must be of {', '.join(TASKS)}, or folders of `data` {data}; got "
            f"{name!r}."
        )
    _, first = _rows(data / name, "train")[0]
    for kind, x, y in ((CLASSES, "text", "label"), (RETRIEVAL, "query", "document")):
        if x in first and y in first:
            return Source(name, kind, x, y)
    raise ValueError(
        f"Rows of {data / name} must have the fields 'text' and 'label', or 'query' "
        f"and 'document'; there are {sorted(first)}."
    )


def _rows(folder, split):
    """`(place, row)` of each row of a split."""
    files = [folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"There is no {files[0]}, and none with .gz.")
    return read_objects(file)


def _examples(rows, source):
    x, y = [], []
    for place, row in rows:
        for field in (source.x, source.y):
            if field not in row:
                raise ValueError(
                    f"{place}: no field {field!r}; there are {sorted(row)}."
                )
        text, label = row[source.x], row[source.y]
        x.append((text, row["text_pair"]) if "text_pair" in row else text)
        y.append(label if source.kind == RETRIEVAL else str(label))
    return Examples(x, y)


def _without_rare_classes(parts, least):
    names, counts = np.unique(parts["train"].y, return_counts=True)
    kept = set(names[counts >= least])
    return {
        split: found.take([i for i, label in enumerate(found.y) if label in kept])
        for split, found in parts.items()
    }
