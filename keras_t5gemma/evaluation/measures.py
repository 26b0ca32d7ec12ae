"""Metrics of classification and retrieval, in percent."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RANKS = (1, 10)


def of_classes(predicted: Sequence[str], examples: Any) -> dict[str, float]:
    """Accuracy and F1 of predicted classes.

    Args:
        predicted: class names.
        examples: `Examples`.

    Returns:
        Percentages: `accuracy`; `macro_f1`, the unweighted mean over classes; with
        groups also MultiRC's `f1_of_1`, the F1 of class "1", and `exact_match`, the
        share of groups without an error.
    """
    from sklearn.metrics import f1_score

    right = np.array(predicted) == np.array(examples.y)
    measures = {
        "accuracy": right.mean(),
        "macro_f1": f1_score(examples.y, predicted, average="macro", zero_division=0),
    }
    if examples.groups is not None and any(examples.groups):
        wrong = {g for g, ok in zip(examples.groups, right, strict=True) if not ok}
        measures["f1_of_1"] = f1_score(
            examples.y, predicted, pos_label="1", zero_division=0
        )
        measures["exact_match"] = 1 - len(wrong) / len(set(examples.groups))
    return _percents(measures)


def of_ranking(
    queries: Any, documents: Any, texts: Sequence[str], rows_at_once: int = 1024
) -> dict[str, float]:
    """Recall and mean reciprocal rank of retrieval by cosine similarity.

    Args:
        queries: unit vectors `(n, d)`, an array or a SciPy matrix.
        documents: unit vectors `(n, d)`; the i-th answers the i-th query.
        texts: the documents' texts; equal texts answer the same queries.
        rows_at_once: number of queries compared at a time.

    Returns:
        Percentages: `recall@1` and `recall@10`, how often the document is among the
        nearest, and `mrr`, the mean of 1 / rank. A tie with another document counts
        as half a rank.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    same = np.array([number[text] for text in texts])
    ranks = np.zeros(len(same))
    for start in range(0, len(same), rows_at_once):
        rows = slice(start, start + rows_at_once)
        near = queries[rows] @ documents.T
        near = near if isinstance(near, np.ndarray) else near.toarray()
        own = np.take_along_axis(near, np.arange(len(same))[rows, None], axis=1)
        others = same[rows, None] != same
        before = ((near > own) & others).sum(axis=1)
        tied = ((near == own) & others).sum(axis=1)
        ranks[rows] = 1 + before + tied / 2
    measures = {f"recall@{k}": (ranks <= k).mean() for k in RANKS}
    return _percents({**measures, "mrr": (1 / ranks).mean()})


def _percents(measures):
    return {name: round(100 * float(value), 4) for name, value in measures.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error, `None` for a single seed."""
    array = np.asarray(values, "float64")
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))
