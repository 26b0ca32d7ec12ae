"""Plot training curves."""

import csv
import io
import math
import numbers
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_t5gemma.utils.checks import path as checked_path
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.files import read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_FAMILIES = ("rouge",)
_SPEED = ("tokens_per_second", "padding")


def plot_history(history: Any, path: str | os.PathLike | None = None) -> "Figure":
    """Plot logged metrics: the loss first, then a panel for every other metric.

    Args:
        history: the result of `fit`, its `history` dict, or the path of a file written
            by `keras.callbacks.CSVLogger` (when an epoch has two rows, as after a
            resumed run, the later one counts).
        path: file to write, `.png`, `.svg`, `.pdf` or another suffix supported by
            matplotlib; `None` writes nothing.

    Returns:
        A `matplotlib.figure.Figure`. Epochs are counted from 1, as in the progress bar.

    Raises:
        ValueError: for no epochs, a file that is not such a log, a metric with missing
            epochs in a dict, or an unknown suffix.
        ImportError: without matplotlib.

    Examples:
        >>> figure = keras_t5gemma.plot_history(
        ...     {"loss": [2.0, 1.0], "val_loss": [2.1, 1.5]}, "curves.png"
        ... )
        >>> len(figure.axes)
        1
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "`plot_history` needs matplotlib: pip install matplotlib"
        ) from error
    path = None if path is None else checked_path(path, "path")
    epochs, curves = _read(history)
    families = _group(curves)
    columns = min(len(families), _COLUMNS)
    rows = math.ceil(len(families) / columns)
    # Not pyplot: no window, no global state, no display needed.
    figure = Figure(figsize=(3.8 * columns, 3.0 * rows), layout="constrained")
    for i, (family, names) in enumerate(families.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name in names:
            label = _label(name, family)
            axes.plot(epochs, curves[name], marker="o", markersize=3, label=label)
        axes.set_title(family.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if family in _SPEED:
            axes.set_ylim(bottom=0)  # Small changes are noise.
        axes.grid(alpha=0.3)
        axes.legend()
    if path is not None:
        _save(figure, path)
    return figure


def _save(figure, path):
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(
            f"`path` must end in one of {', '.join(known)}; got {str(path)!r}."
        )
    figure.savefig(path, dpi=150)


def _read(history):
    """`(epochs from 1, {name: values})`."""
    if isinstance(history, str | Path):
        return _read_csv(checked_path(history, "history"))
    epochs = getattr(history, "epoch", None)
    curves = getattr(history, "history", history)
    if not isinstance(curves, dict) or not curves or not _are_curves(curves):
        raise ValueError(
            "`history` must be what `fit` returns, its dict with at least one epoch, "
            f"or a CSVLogger file; got {shown(history)}."
        )
    if epochs is None:
        epochs = range(len(next(iter(curves.values()))))
    for name, values in curves.items():
        if len(values) != len(epochs):
            raise ValueError(
                f"`history` has {len(values)} values of {name!r} for {len(epochs)} "
                "epochs, without their numbers; plot the file of a CSVLogger."
            )
    return [epoch + 1 for epoch in epochs], curves


def _are_curves(curves):
    """Whether a dict holds a list of numbers for each name."""
    return all(
        isinstance(name, str)
        and isinstance(values, list | tuple | np.ndarray)
        and len(values)
        and all(isinstance(value, numbers.Real) for value in values)
        for name, values in curves.items()
    )


def _read_csv(path):
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(
            f"`history` {path} must have a column 'epoch' and at least one row."
        )
    rows = sorted({int(row["epoch"]): row for row in rows}.items())
    curves = {}
    for name in rows[0][1]:
        values = [_number(row[name]) for _, row in rows]
        if name != "epoch" and not all(map(math.isnan, values)):
            curves[name] = values
    return [epoch + 1 for epoch, _ in rows], curves


def _number(text):
    """A cell as a float, NaN for the `NA` of CSVLogger."""
    try:
        return float(text)
    except (ValueError, TypeError):
        return math.nan


def _group(curves):
    """`{panel: names}`: the loss first, speed last; training before validation."""

    def place(name):
        family = _family(name)
        return family != "loss", family in _SPEED, _is_valid(name)

    families = {}
    for name in sorted(curves, key=place):
        families.setdefault(_family(name), []).append(name)
    return families


def _is_valid(name):
    return name.startswith("val_")


def _family(name):
    """`rouge` for `val_rouge1`, `loss` for `val_loss`."""
    name = name.removeprefix("val_")
    return next((f for f in _FAMILIES if name.startswith(f)), name)


def _label(name, family):
    side = "validation" if _is_valid(name) else "training"
    metric = name.removeprefix("val_")
    return side if metric == family else f"{metric}, {side}"
