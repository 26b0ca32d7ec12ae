"""Encoders compared: several models, several tasks, several seeds, one table."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np

from keras_t5gemma.evaluation.candidates import Model, Recipe, TfIdf
from keras_t5gemma.evaluation.measures import mean_and_error
from keras_t5gemma.evaluation.tasks import CLASSES, read_task
from keras_t5gemma.modeling.heads import POOLINGS
from keras_t5gemma.utils.progress import progress_bar

RESULTS, TABLE = "results.json", "results.md"


def evaluate_encoders(
    tasks: list,
    data: str,
    output: str,
    presets: list = (),
    scratch: list = (),
    decoder_only: list = (),
    tfidf: bool = False,
    frozen: bool = False,
    seeds: int = 3,
    learning_rates: list = ("1e-4",),
    epochs: int = 3,
    batch_size: int = 32,
    retrieval_batch_size: int = 64,
    lexical_dim: int = None,
    pooling: str = "last",
    dropout: float = 0.0,
    encoder_sequence_length: int = 256,
    train_rows: int = None,
    dtype: str = None,
):
    """Train encoders for tasks, and measure them on test rows.

    Each model is trained once a seed with AdamW. Of several learning rates the first
    seed tries all, and the best by the validation rows is taken. What is done is kept:
    the same call goes on after a stop, and adds models and tasks.

    Args:
        tasks: of supersense, section, synopsis, boolq, cb, copa, multirc, rte, wic,
            wsc; or folders of `data` with rows of text (and text_pair) and label, or
            of query and document.
        data: folder that the tasks' folders are in.
        output: folder for results.json and results.md.
        presets: T5Gemma presets whose encoders are measured.
        scratch: presets whose encoders are measured with random weights.
        decoder_only: Gemma 2 presets of KerasHub, with the same head.
        tfidf: measure TF-IDF with a linear model too.
        frozen: train no encoder, only a linear model on its states; search with them
            as they are.
        seeds: trainings of each model.
        learning_rates: to choose among.
        epochs: passes over the training rows; kept is the best by validation.
        batch_size: texts a step.
        retrieval_batch_size: pairs a step of a retrieval.
        lexical_dim: in a retrieval so many numbers of a vector say which tokens a text
            has, see `TextEmbedder`.
        pooling: last, mean, first or weighted, of the classifiers.
        dropout: of what the classifier's head reads.
        encoder_sequence_length: tokens that are read, the same for all models.
        train_rows: use so many training rows of each task, the first ones of a
            shuffle that is the same for all.
        dtype: policy of the models.

    Returns:
        `{task: {model: {measure: {"mean": ..., "standard_error": ...}}}}`, percents.

    Raises:
        ValueError: for an unknown task, nothing to measure, options out of range, or
            an `output` of other options; as `from_preset` for a preset.
        FileNotFoundError: naming the file that is not there.
        ImportError: without scikit-learn.
    """
    _require_scikit_learn()
    tasks, presets, scratch, decoder_only = (
        [names] if isinstance(names, str | os.PathLike) else list(names)
        for names in (tasks, presets, scratch, decoder_only)
    )
    rates = _numbers(learning_rates)
    counts = {"seeds": seeds, "epochs": epochs, "batch_size": batch_size}
    counts |= {"retrieval_batch_size": retrieval_batch_size, "train_rows": train_rows}
    counts |= {"encoder_sequence_length": encoder_sequence_length}
    counts |= {"lexical_dim": lexical_dim}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more; got {value!r}.")
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {POOLINGS}; got {pooling!r}.")
    models = [Model(str(preset), "preset") for preset in presets]
    models += [Model(str(preset), "scratch") for preset in scratch]
    models += [Model(str(preset), "decoder_only") for preset in decoder_only]
    models += [TfIdf()] if tfidf else []
    if not models:
        raise ValueError(
            "There is nothing to measure: pass `presets`, `scratch`, `decoder_only` or "
            "`tfidf`."
        )
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"Models must have different names; got {names}.")
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        retrieval_batch_size=retrieval_batch_size,
        lexical_dim=lexical_dim,
        pooling=pooling,
        dropout=dropout,
        encoder_sequence_length=encoder_sequence_length,
        dtype=dtype,
        frozen=frozen,
    )
    for model in models:
        model.check()
    read = {name: _shortened(read_task(name, data), train_rows) for name in tasks}
    options = {**dataclasses.asdict(recipe), "train_rows": train_rows}
    runs = Runs(output, {**options, "learning_rates": rates})
    total = sum(seeds if model.has_seeds else 1 for model in models) * len(read)
    with progress_bar("Measuring", total) as advance:
        for task in read.values():
            for model in models:
                chosen = rates
                for seed in range(seeds if model.has_seeds else 1):
                    name = f"{task.name}/{model.name}/{seed}"
                    if name not in runs:
                        runs[name] = _best(model, task, recipe, seed, chosen)
                        print(f"{name}: {_short(runs[name]['measures'])}", flush=True)
                    chosen = [runs[name]["learning_rate"]]
                    advance(1)
    table = runs.table({name: task.measures for name, task in read.items()})
    print(table)
    return runs.summary()


def _best(model, task, recipe, seed, rates):
    """The run of the learning rate that does best on the validation rows."""
    tried = []
    needs_no_rate = not model.has_seeds or recipe.frozen
    for rate in rates[:1] if needs_no_rate else rates:
        found, valid = model.run(task, recipe, seed, rate)
        tried.append({"learning_rate": rate, "valid": valid, "measures": found})
    return max(tried, key=lambda run: run["valid"])


def _shortened(task, rows):
    if rows is None or rows >= len(task.train):
        return task
    chosen = np.random.default_rng(0).permutation(len(task.train))
    if task.kind == CLASSES:  # No class may be lost.
        _, first = np.unique(np.array(task.train.y)[chosen], return_index=True)
        if len(first) > rows:
            raise ValueError(
                f"`train_rows` must be {len(first)} or more, the classes of "
                f"{task.name!r}; got {rows}."
            )
        chosen = np.concatenate([chosen[first], np.delete(chosen, first)])
    return dataclasses.replace(task, train=task.train.take(chosen[:rows]))


def _require_scikit_learn():
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("Measuring needs scikit-learn: pip install scikit-learn")


def _numbers(rates):
    try:
        rates = [float(rate) for rate in np.atleast_1d(rates)]
    except ValueError as error:
        raise ValueError(f"`learning_rates` must be numbers; {error}.") from error
    if not rates or min(rates) <= 0:
        raise ValueError(f"`learning_rates` must be above 0; got {rates}.")
    return rates


def _short(measures):
    return ", ".join(f"{name} {value:.1f}" for name, value in measures.items())


class Runs:
    """Runs that are done, kept in a file.

    Args:
        folder: path.
        options: of all runs of the folder.

    Raises:
        ValueError: when the folder has runs of other options.
    """

    def __init__(self, folder, options):
        self.folder, self.options, self.runs = Path(folder), options, {}
        file = self.folder / RESULTS
        if not file.exists():
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        other = {k: v for k, v in found["options"].items() if options.get(k) != v}
        if other:
            raise ValueError(
                f"`output` {self.folder} has results of other options: {other}; take "
                "another folder."
            )
        self.runs = found["runs"]

    def __contains__(self, name):
        return name in self.runs

    def __getitem__(self, name):
        return self.runs[name]

    def __setitem__(self, name, run):
        self.runs[name] = run
        content = {
            "options": self.options,
            "summary": self.summary(),
            "runs": self.runs,
        }
        self._write(RESULTS, json.dumps(content, indent=1) + "\n")

    def _write(self, name, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"{name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.folder / name)

    def summary(self):
        """Mean and standard error of each measure over the seeds."""
        found = {}
        for name, run in self.runs.items():
            task, model, _ = name.split("/")
            measures = found.setdefault(task, {}).setdefault(model, {})
            for measure, value in run["measures"].items():
                measures.setdefault(measure, []).append(value)
        for task in found.values():
            for model, measures in task.items():
                rows = {m: mean_and_error(values) for m, values in measures.items()}
                task[model] = {
                    measure: {"mean": mean, "standard_error": error}
                    for measure, (mean, error) in rows.items()
                }
        return found

    def table(self, measures):
        """A Markdown table of models and tasks, written to results.md too.

        Args:
            measures: `{task: its measures}`; of several the mean is shown.
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
        self._write(TABLE, text + "\n")
        return text


def _cell(scores, names):
    if scores is None:
        return ""
    mean = np.mean([scores[name]["mean"] for name in names])
    errors = [scores[name]["standard_error"] for name in names]
    if None in errors:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {np.mean(errors):.1f}"  # At most: the measures go together.
