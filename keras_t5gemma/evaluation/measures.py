"""How good classes and rankings are, in percent."""

import numpy as np

RANKS = (1, 10)


def of_classes(predicted, examples):
    """Measures of predicted classes.

    Args:
        predicted: names of classes.
        examples: `Examples`.

    Returns:
        Percents: `accuracy`; `macro_f1`, the mean of the classes' F1; with groups
        also `f1_of_1`, that of class "1", and `exact_match`, the share of groups that
        are right altogether, the two of MultiRC.
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


def of_ranking(queries, documents, texts, rows_at_once=1024):
    """Measures of a search for the document of each query.

    Args:
        queries: vectors `(n, d)` of length 1, an array or a SciPy matrix.
        documents: likewise, the i-th the i-th query's.
        texts: the documents; equal ones answer the same queries.
        rows_at_once: queries that are compared at a time.

    Returns:
        Percents: `recall@1` and `recall@10`, how often the document is among the
        nearest, and `mrr`, the mean of 1 / rank. Documents that are as near as a
        query's own count half.
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
        beside = ((near == own) & others).sum(axis=1)
        ranks[rows] = 1 + before + beside / 2
    measures = {f"recall@{k}": (ranks <= k).mean() for k in RANKS}
    return _percents({**measures, "mrr": (1 / ranks).mean()})


def _percents(measures):
    return {name: round(100 * float(value), 4) for name, value in measures.items()}


def mean_and_error(values):
    """Mean and its standard error over seeds; of a single one the error is `None`."""
    values = np.asarray(values, "float64")
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
