"""Encoder evaluation: models x tasks x seeds, with resumable results and a table."""

import dataclasses
import importlib.util
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints.atomic import atomic_file
from keras_t5gemma.checkpoints.folder_lock import folder_lock
from keras_t5gemma.evaluation.candidates import Model, Recipe, TfIdf
from keras_t5gemma.evaluation.measures import mean_and_error
from keras_t5gemma.evaluation.options import EvaluateOptions
from keras_t5gemma.evaluation.tasks import CLASSES, Task, read_task
from keras_t5gemma.utils.checks import path, shown
from keras_t5gemma.utils.files import read_json_file
from keras_t5gemma.utils.options import PathsOrNames, as_yaml, takes_options
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.texts import to_list

RESULTS, TABLE, OPTIONS = "results.json", "results.md", "run.yaml"

Scores = dict[str, dict[str, dict[str, dict[str, float | None]]]]


@takes_options(EvaluateOptions)
def evaluate_encoders(o: EvaluateOptions) -> Scores:
    """Fine-tune encoders on tasks and compare their test scores.

    Each model is trained with AdamW once per seed. The first seed tries all learning
    rates, and the other seeds use the one that is best on validation. Finished runs are
    kept in `output`: repeating the call resumes, and a call with more models or tasks
    adds them. `run.yaml` there holds all options, which repeat the call.

    Returns:
        `{task: {model: {measure: {"mean": ..., "standard_error": ...}}}}`, in percent.

    Raises:
        ValueError: for an unknown task, nothing to measure, an option out of range, or
            an `output` with other options; and as `from_preset` does for a preset.
        FileNotFoundError: naming the missing file.
        FolderInUseError: if another process or thread writes `output`.
        ImportError: without scikit-learn.
    """
    _require_scikit_learn()
    o.check()
    rates = _numbers(o.learning_rates)
    models = _models(o)
    recipe = Recipe(
        **{field.name: getattr(o, field.name) for field in dataclasses.fields(Recipe)}
    )
    for model in models:
        model.check()
    tasks = _tasks(o)
    options = {**dataclasses.asdict(recipe), "train_rows": o.train_rows}
    if Path(o.output).is_file():
        raise ValueError(f"`output` {o.output} is a file; it must be a folder.")
    with folder_lock(o.output):
        runs = Runs(o.output, {**options, "learning_rates": rates})
        runs.write(OPTIONS, as_yaml("evaluate", vars(o)))
        _measure(runs, tasks, models, recipe, o.seeds, rates)
        print(runs.table({task.name: task.measures for task in tasks}))
    return runs.summary()


def _measure(runs, tasks, models, recipe, seeds, rates):
    """Add the runs that are missing."""
    total = sum(seeds if model.has_seeds else 1 for model in models) * len(tasks)
    data = {task.name: task.fingerprint() for task in tasks}
    weights = {model.name: model.fingerprint() for model in models}
    runs.require_same(data, weights)  # Of what was measured before, too.
    with progress_bar("Measuring", total) as advance:
        for task in tasks:
            for model in models:
                chosen = rates
                for seed in range(seeds if model.has_seeds else 1):
                    name = f"{task.name}/{model.name}/{seed}"
                    if name not in runs:
                        run = _best(model, task, recipe, seed, chosen)
                        measured_on = {
                            "data": data[task.name],
                            "model": weights[model.name],
                        }
                        runs[name] = {**run, "measured_on": measured_on}
                        print(f"{name}: {_short(runs[name]['measures'])}", flush=True)
                    chosen = [runs[name]["learning_rate"]]
                    advance(1)


def _names(names: PathsOrNames, name: str) -> list[str]:
    if isinstance(names, str | os.PathLike):
        names = [names]
    return [str(path(each, name)) for each in to_list(names, name)]


def _tasks(o: EvaluateOptions) -> list[Task]:
    """Tasks to measure on, which must have different names."""
    names = _names(o.tasks, "tasks")
    if not names:
        raise ValueError("`tasks` must name one task at least; got none.")
    tasks = [_shortened(read_task(name, o.data), o.train_rows) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(
            "`tasks` must have different names of folders; got "
            f"{[task.name for task in tasks]}."
        )
    return tasks


def _models(o: EvaluateOptions) -> list[Model | TfIdf]:
    """Models to compare, which must have different names."""
    models: list[Model | TfIdf] = []
    for kind in ("preset", "scratch", "decoder_only"):
        name = "presets" if kind == "preset" else kind
        models += [Model(preset, kind) for preset in _names(getattr(o, name), name)]
    models += [TfIdf()] if o.tfidf else []
    if not models:
        raise ValueError(
            "There is nothing to measure: pass `presets`, `scratch`, `decoder_only` or "
            "`tfidf`."
        )
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"Models must have different names; got {names}.")
    return models


def _best(
    model: Model | TfIdf, task: Task, recipe: Recipe, seed: int, rates: Sequence[float]
) -> dict[str, Any]:
    """Run with the learning rate that is best on the validation rows."""
    tried = []
    needs_no_rate = not model.has_seeds or recipe.frozen
    for rate in rates[:1] if needs_no_rate else rates:
        found, valid = model.run(task, recipe, seed, rate)
        tried.append({"learning_rate": rate, "valid": valid, "measures": found})
    return max(tried, key=lambda run: run["valid"])


def _shortened(task: Task, rows: int | None) -> Task:
    if rows is None or rows >= len(task.train):
        return task
    chosen = np.random.default_rng(0).permutation(len(task.train))
    if task.kind == CLASSES:  # Keep a row of every class.
        _, first = np.unique(np.array(task.train.y)[chosen], return_index=True)
        if len(first) > rows:
            raise ValueError(
                f"`train_rows` must be {len(first)} or more, the classes of "
                f"{task.name!r}; got {rows}."
            )
        chosen = np.concatenate([chosen[first], np.delete(chosen, first)])
    return dataclasses.replace(task, train=task.train.take(chosen[:rows].tolist()))


def _require_scikit_learn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("Evaluation needs scikit-learn: pip install scikit-learn")


def _numbers(rates: Any) -> list[float]:
    is_one = isinstance(rates, str | numbers.Real)
    try:
        found = [rates] if is_one else to_list(rates, "learning_rates")
        found = [float(rate) for rate in found]
    except (OverflowError, TypeError, ValueError):
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ValueError(
            "`learning_rates` must be one or more finite numbers above 0; got "
            f"{shown(rates)}."
        )
    return found


def _short(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in measures.items())


class Runs:
    """Finished runs, saved in results.json.

    Args:
        folder: of the file.
        options: options that all runs in the folder share.

    Raises:
        ValueError: when the folder has runs with other options.
    """

    def __init__(self, folder: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self.folder, self.options = Path(folder), options
        self.runs: dict[str, dict[str, Any]] = {}
        file = self.folder / RESULTS
        if not file.exists():
            # A run that was interrupted early has its options alone.
            others = set(os.listdir(folder)) if self.folder.exists() else set()
            others = {name for name in others - {OPTIONS} if name[0] != "."}
            if others:
                raise ValueError(
                    f"`output` {self.folder} must be a new folder or one of an "
                    f"evaluation; it has {sorted(others)[:3]} and no {RESULTS}. Choose "
                    "another folder."
                )
            return
        try:
            found = read_json_file(file)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"options", "runs"} <= set(found):
            raise ValueError(
                f"`output` {self.folder} has a {RESULTS} that was not "
                "written by an evaluation; choose another folder."
            )
        other = {k: v for k, v in found["options"].items() if options.get(k) != v}
        if other:
            raise ValueError(
                f"`output` {self.folder} has results with other options: {other}; "
                "choose another folder."
            )
        self.runs = found["runs"]

    def require_same(self, data: dict[str, str], models: dict[str, str]) -> None:
        """Raise `ValueError` if a finished run is of other data or another model.

        Args:
            data: fingerprints by the name of the task.
            models: fingerprints by the name of the model.
        """
        for name, run in self.runs.items():
            task, model, _ = name.split("/")
            found = run.get("measured_on", {})
            now = {"data": data.get(task), "model": models.get(model)}
            for what, value in now.items():
                if value is not None and found.get(what, value) != value:
                    raise ValueError(
                        f"`output` {self.folder} has results of {name!r} with other "
                        f"contents of the {what}; choose another folder."
                    )

    def __contains__(self, name: str) -> bool:
        return name in self.runs

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.runs[name]

    def __setitem__(self, name: str, run: dict[str, Any]) -> None:
        self.runs[name] = run
        content = {
            "options": self.options,
            "summary": self.summary(),
            "runs": self.runs,
        }
        self.write(RESULTS, json.dumps(content, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file in the folder atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / name) as staged:
            staged.write_text(text, encoding="utf-8")

    def summary(self) -> Scores:
        """Mean and standard error of each measure over the seeds."""
        values: dict[str, dict[str, dict[str, list[float]]]] = {}
        for name, run in self.runs.items():
            task, model, _ = name.split("/")
            measures = values.setdefault(task, {}).setdefault(model, {})
            for measure, value in run["measures"].items():
                measures.setdefault(measure, []).append(value)
        scores: Scores = {}
        for task, models in values.items():
            for model, measures in models.items():
                row = scores.setdefault(task, {}).setdefault(model, {})
                for measure, found in measures.items():
                    mean, error = mean_and_error(found)
                    row[measure] = {"mean": mean, "standard_error": error}
        return scores

    def table(self, measures: Mapping[str, Sequence[str]]) -> str:
        """Markdown table of models and tasks, also written to results.md.

        Args:
            measures: `{task: its measures}`; the table shows the mean of several.
        """
        found = self.summary()
        heads = [f"{task} ({', '.join(names)})" for task, names in measures.items()]
        lines = [["", *heads]]
        models = dict.fromkeys(model for task in measures for model in found[task])
        for model in models:
            scores = [found[task].get(model) for task in measures]
            lines.append(
                [model, *map(_cell, scores, measures.values())],
            )
        lines.insert(1, ["---"] * len(lines[0]))
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.write(TABLE, text + "\n")
        return text


def _cell(scores: Mapping[str, Mapping[str, Any]] | None, names: Sequence[str]) -> str:
    if scores is None:
        return ""
    mean = np.mean([scores[name]["mean"] for name in names])
    errors = [scores[name]["standard_error"] for name in names]
    if None in errors:
        return f"{mean:.1f}"
    # An upper bound of the error of the mean, reached when the measures correlate.
    return f"{mean:.1f} ± {np.mean(errors):.1f}"
