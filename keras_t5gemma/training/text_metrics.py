"""Text metrics: ROUGE, BLEU, chrF, exact match, and functions of the user."""

import importlib
import json
import math
from collections.abc import Callable, Iterable

import numpy as np

from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.texts import as_texts, to_list

_RESAMPLES = 400


def score_texts(
    predictions: Iterable[str],
    references: Iterable[str],
    metrics: str | Callable | Iterable[str | Callable] = ("rouge",),
) -> dict[str, dict[str, float | None]]:
    """Score generated texts, with the standard error of each score.

    Args:
        predictions: list of strings, the generated texts.
        references: list of strings, one for each prediction.
        metrics: a metric or a list of them, as in `text_metric`.

    Returns:
        `{"rougeL": {"mean": 31.2, "standard_error": 0.6}, ...}`. The error is that of
        the mean over rows for ROUGE and exact match, of the bootstrap for BLEU and
        chrF; `None` for a single row and for a user's function.

    Raises:
        ValueError: for no rows, lists of unequal length, or an unknown metric.
        ImportError: for a metric whose library is not installed, with its name.

    Examples:
        >>> scores = keras_t5gemma.score_texts(
        ...     ["chess", "go"], ["chess", "checkers"], "exact_match"
        ... )
        >>> scores["exact_match"]["mean"]
        50.0
    """
    predictions = as_texts(predictions, "predictions")
    references = as_texts(references, "references")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "`predictions` and `references` must have the same number of rows, at "
            f"least one; got {len(predictions)} and {len(references)}."
        )
    scores: dict = {}
    for function in text_metrics(metrics).values():
        scores |= function(predictions, references)
    return scores


def text_metrics(
    metrics: str | Callable | Iterable[str | Callable],
) -> dict[str, Callable]:
    """`{name: text_metric(metric)}` of a metric or a list of them.

    Raises:
        ValueError: for none, an unknown one, or two of one name.
        ImportError: see `text_metric`.
    """
    is_one = isinstance(metrics, str) or callable(metrics)
    given: list = [metrics] if is_one else to_list(metrics, "metrics")
    functions = [text_metric(metric) for metric in given]
    names = [_name(metric) for metric in given]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`metrics` must be one or more with different names; got {shown(names)}."
        )
    return dict(zip(names, functions, strict=True))


def text_metric(metric: str | Callable) -> Callable:
    """A metric by its name, or a user's function, as one kind of function.

    Args:
        metric: `"rouge"` (rouge1, rouge2, rougeL: F1 x 100 with stemmer, the mean over
            rows, by rouge-score), `"bleu"`, `"chrf"` (of the corpus, by sacrebleu),
            `"exact_match"` (x 100, surrounding white space ignored); or a
            function `f(predictions, references)` of two lists of strings that
            returns a number or a dict of numbers.

    Returns:
        `(predictions, references) -> {name: {"mean": float, "standard_error": float
        or None}}`.

    Raises:
        ValueError: for an unknown name.
        ImportError: for a metric whose library is not installed, with its name.
    """
    if callable(metric):
        return _of_user(metric)
    if not isinstance(metric, str) or metric not in _METRICS:
        raise ValueError(
            f"`metrics` must be among {', '.join(_METRICS)}, or a function "
            "(predictions, references) -> number or dict of numbers; got "
            f"{shown(metric)}."
        )
    return _METRICS[metric]()


def _name(metric):
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__)
    return metric


def _of_user(function):
    def score(predictions, references):
        result = function(predictions, references)
        if not isinstance(result, dict):
            result = {_name(function): result}
        return {
            name: {"mean": float(value), "standard_error": None}
            for name, value in result.items()
        }

    return score


def _mean(shares):
    """Mean of one share per row, x 100, with its standard error."""
    shares = 100 * np.asarray(shares, "float64")
    error = None
    if len(shares) > 1:
        error = float(shares.std(ddof=1) / math.sqrt(len(shares)))
    return {"mean": float(shares.mean()), "standard_error": error}


def _rouge():
    names = ("rouge1", "rouge2", "rougeL")
    module = _import("rouge_score.rouge_scorer", "rouge-score")
    scorer = module.RougeScorer(names, use_stemmer=True)

    def score(predictions, references):
        pairs = zip(references, predictions, strict=True)
        rows = [scorer.score(*pair) for pair in pairs]
        return {name: _mean([row[name].fmeasure for row in rows]) for name in names}

    return score


def _exact_match():
    def score(predictions, references):
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": _mean([p.strip() == r.strip() for p, r in pairs])}

    return score


def _of_corpus(name, kind):
    """A metric of sacrebleu, whose bootstrap has a fixed seed."""
    metric = getattr(_import("sacrebleu.metrics", "sacrebleu"), kind)()

    def score(predictions, references):
        result = metric.corpus_score(predictions, [references], n_bootstrap=_RESAMPLES)
        error = None
        if len(predictions) > 1:
            # Its confidence interval is public in JSON only, and not for a mean of 0.
            text = result.format(width=12, signature="a:b", is_json=True)
            # Half the width of the 95 % interval is 1.96 standard errors.
            error = json.loads(text).get("confidence_var", 0.0) / 1.96
        return {name: {"mean": float(result.score), "standard_error": error}}

    return score


_METRICS = {
    "rouge": _rouge,
    "bleu": lambda: _of_corpus("bleu", "BLEU"),
    "chrf": lambda: _of_corpus("chrf", "CHRF"),
    "exact_match": _exact_match,
}


def _import(module, package):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This metric needs {package}: pip install {package}"
        ) from error
