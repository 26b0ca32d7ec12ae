"""SuperGLUE tasks (arXiv 1905.00537) as text classification.

Every task assigns a class to a text or a pair of texts, as in the T5Gemma paper
(arXiv 2504.06225, section 4), which does not say how fields become texts: the functions
below do. The test sets have no labels, so `val.jsonl` is the test split and a tenth of
the training rows is the validation split.
"""

import os
from pathlib import Path

import numpy as np

from keras_t5gemma.data.readers import read_objects

HELD_OUT = 10  # One training row in ten is for validation.


def read(name: str, data: str | os.PathLike) -> tuple[tuple, tuple]:
    """Read a SuperGLUE task.

    Args:
        name: one of `TASKS`.
        data: folder that contains the archive's folders `BoolQ`, `CB`, ...

    Returns:
        `((train, valid, test), measures)`; a split is `(texts, classes, groups)`.

    Raises:
        ValueError: for a row that lacks a field, with its line number.
        FileNotFoundError: naming the missing file.
    """
    folder_name, examples, measures = TASKS[name]
    folder = Path(data) / folder_name
    splits = []
    for split in ("train", "val"):
        file = folder / f"{split}.jsonl"
        if not file.exists():
            raise FileNotFoundError(
                f"There is no {file}: SuperGLUE's {folder.name} is a folder of "
                "train.jsonl and val.jsonl."
            )
        rows = []
        for place, row in read_objects(file):
            try:
                rows += examples(row)
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{place}: not a row of {name}: {error!r}.") from error
        if len(rows) < 2:
            raise ValueError(f"{file} has fewer than two rows.")
        splits.append(rows)
    known, test = splits
    order = np.random.default_rng(0).permutation(len(known))
    cut = max(1, len(known) // HELD_OUT)
    valid, train = ([known[i] for i in part] for part in (order[:cut], order[cut:]))
    columns = (
        tuple(map(list, zip(*part, strict=True))) for part in (train, valid, test)
    )
    return tuple(columns), measures


def _boolq(row):
    return [((row["question"], row["passage"]), str(row["label"]), None)]


def _entailment(row):
    return [((row["premise"], row["hypothesis"]), str(row["label"]), None)]


_ASKS = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def _copa(row):
    asked = f"{row['premise']} {_ASKS[row['question']]}"
    choices = f"0: {row['choice1']}\n1: {row['choice2']}"
    return [((asked, choices), str(row["label"]), None)]


def _multirc(row):
    passage = row["passage"]
    return [
        (
            (f"{question['question']}\n{answer['text']}", passage["text"]),
            str(answer["label"]),
            f"{row['idx']}/{question['idx']}",
        )
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def _wic(row):
    asked = f"{row['word']}: {row['sentence1']}"
    return [((asked, row["sentence2"]), str(row["label"]), None)]


def _wsc(row):
    """Mark both spans in the text: `[The city] ... *they* ...`."""
    words, target = row["text"].split(), row["target"]
    for number, signs in ((1, "[]"), (2, "**")):
        first = target[f"span{number}_index"]
        last = first + len(target[f"span{number}_text"].split()) - 1
        words[first] = signs[0] + words[first]
        words[last] += signs[1]
    return [(" ".join(words), str(row["label"]), None)]


# name: (folder, function from a row to its examples, measures)
TASKS = {
    "boolq": ("BoolQ", _boolq, ("accuracy",)),
    "cb": ("CB", _entailment, ("accuracy", "macro_f1")),
    "copa": ("COPA", _copa, ("accuracy",)),
    "multirc": ("MultiRC", _multirc, ("f1_of_1", "exact_match")),
    "rte": ("RTE", _entailment, ("accuracy",)),
    "wic": ("WiC", _wic, ("accuracy",)),
    "wsc": ("WSC", _wsc, ("accuracy",)),
}
