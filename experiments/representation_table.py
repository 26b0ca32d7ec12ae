"""Table and figure of the representation experiment, from results of its cells."""

import json
import statistics
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PREFIX = "representation_"
TASKS = ("supersense", "section", "belongs", "sense", "wic")
SIZES = ("small", "shallow", "deep")
NAMES = {
    "encoder": "adapted encoder",
    "source": "decoder-only source",
    "bidirectional": "source, bidirectional",
    "scratch": "from scratch",
    "mixture": "adapted, 500 steps",
    "documents": "adapted, 500 steps, no repeated texts",
}
DRAWN = ("encoder", "source", "scratch")
MODES = ("frozen", "tuned")


def read_cells():
    """`{(size, model, mode): {task: results of its seeds}}`."""
    found = {}
    for path in sorted((HERE / "results").glob(f"{PREFIX}*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        cell = result["cell"]
        key = cell["size"], cell["model"], cell["mode"]
        found.setdefault(key, {}).setdefault(cell["task"], []).append(result)
    return found


def of_rows(runs):
    """Right answers, mean over seeds, and rows of each group of test rows."""
    right = np.mean([list(map(int, run["right"])) for run in runs], axis=0)
    return right, np.array(list(map(int, runs[0]["rows"])), "float64")


def variance(runs, others=None):
    """Squared standard error of the accuracy in percent, or of a difference.

    Groups of test rows and seeds are both samples; two models that are compared answer
    the same rows.
    """
    right, rows = of_rows(runs)
    if others is not None:
        right = right - of_rows(others)[0]
    residuals = right - right.sum() / rows.sum() * rows
    groups = len(rows)
    of_groups = groups / (groups - 1) * np.sum(residuals**2) / rows.sum() ** 2
    return 1e4 * of_groups + sum(_of_seeds(part) for part in (runs, others or []))


def _of_seeds(runs):
    if len(runs) < 2:
        return 0.0
    return statistics.variance(run["accuracy"] for run in runs) / len(runs)


def accuracy(runs):
    """Mean over seeds, in percent."""
    return statistics.fmean(run["accuracy"] for run in runs)


def with_error(value, squared, sign=""):
    """`mean ± standard error` as text."""
    return f"{value:{sign}.1f} ± {squared**0.5:.1f}"


def rows_of_table(cells):
    """Header and rows; differences of the encoder and its source below each size."""
    yield ["", *TASKS, "mean"]
    yield _row("TF-IDF, linear", cells.get(("", "tfidf", "tuned"), {}))
    for size in SIZES:
        for mode in MODES:
            for model, name in NAMES.items():
                if found := cells.get((size, model, mode)):
                    yield _row(f"{size}, {mode}: {name}", found)
            pair = [
                cells.get((size, model, mode), {}) for model in ("encoder", "source")
            ]
            if all(pair):
                yield _row(f"{size}, {mode}: **encoder − source**", *pair)


def _row(label, found, others=None):
    sign = "" if others is None else "+"
    values, texts = [], []
    for task in TASKS:
        if task not in found or (others is not None and task not in others):
            texts.append("")
            continue
        other = None if others is None else others[task]
        mean = accuracy(found[task]) - (accuracy(other) if other else 0)
        values.append((mean, variance(found[task], other)))
        texts.append(with_error(*values[-1], sign))
    if len(values) < len(TASKS):  # Not all cells are finished.
        return [label, *texts, ""]
    means, squares = zip(*values, strict=True)
    squared = sum(squares) / len(TASKS) ** 2
    return [label, *texts, with_error(statistics.fmean(means), squared, sign)]


def draw(cells):
    """Accuracy by task, frozen and tuned, of the largest size that is finished."""
    from matplotlib.figure import Figure

    finished = [
        size
        for size in SIZES
        if all(
            len(cells.get((size, model, mode), ())) == len(TASKS)
            for model in ("encoder", "source")
            for mode in MODES
        )
    ]
    if not finished:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, mode in zip(panels, MODES, strict=True):
        bars = [(NAMES[model], (finished[-1], model, mode)) for model in DRAWN]
        bars.append(("TF-IDF, linear", ("", "tfidf", "tuned")))
        for i, (name, key) in enumerate(bars):
            found = cells.get(key, {})
            tasks = [task for task in TASKS if task in found]
            x = [TASKS.index(task) + (i - len(bars) / 2) * 0.2 for task in tasks]
            y = [accuracy(found[task]) for task in tasks]
            error = [variance(found[task]) ** 0.5 for task in tasks]
            color = f"C{i}"
            panel.bar(x, y, 0.2, yerr=error, label=name, align="edge", color=color)
        panel.set_xticks(range(len(TASKS)), TASKS)
        panel.set_title(f"{finished[-1]}, {mode}")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("accuracy, %")
    panels[1].legend(fontsize=8, ncols=2, loc="upper right")
    panels[0].set_ylim(0, 90)
    figure.savefig(HERE / "representation.png", dpi=100)
