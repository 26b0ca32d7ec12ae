"""Callbacks of `fit`: generation metrics, speed, stop on NaN, the best model."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import saved_files
from keras_t5gemma.checkpoints.atomic import atomic_folder, finish_interrupted_save
from keras_t5gemma.data.text_columns import as_columns
from keras_t5gemma.training.backup import BackupAndRestore as BackupAndRestore
from keras_t5gemma.training.text_metrics import text_metrics
from keras_t5gemma.training.warmup import CrossAttentionWarmUp as CrossAttentionWarmUp
from keras_t5gemma.utils.checks import one_of, shown, string, whole_number
from keras_t5gemma.utils.checks import path as checked_path
from keras_t5gemma.utils.files import read_json_file

_BEST_FILE = "best.json"


class GenerationMetrics(keras.callbacks.Callback):
    """Generate answers for a sample of validation pairs, and score them.

    This happens at the end of the first epoch of a `fit`, of every `every`-th and of
    the last one. The epochs in between repeat the last scores, so that `CSVLogger` has
    its columns from the start and `EarlyStopping` a number in every epoch. Callbacks
    that use the scores come after this one in the list; `EarlyStopping` and similar
    ones also need `mode="max"`.

    Args:
        x: in-memory pairs, as for `fit`.
        y: their targets, when `x` does not have them.
        metrics: a metric or a list of them: `"rouge"`, `"bleu"`, `"chrf"`,
            `"exact_match"`, or a function `(predictions, references)` that returns a
            number or a dict of numbers. A function that raises is logged as NaN, with
            a warning.
        every: number of epochs between two measurements.
        max_rows: maximum number of pairs to generate for, sampled once.
        examples: number of answers to print, when `fit` is verbose.
        samples: path of a file to append all answers to, one JSON object per line:
            `epoch` (from 0, as in `CSVLogger`), `source`, `reference`, `answer`.
        prefix: of the names in the logs, e.g. `val_rougeL`.
        seed: of the sample of pairs, and of the answers when they are sampled.
        **generate_options: of `Seq2SeqLM.generate`: `num_beams`, `max_length`,
            `batch_size` and others.

    Raises:
        ValueError: for no pairs, or arguments out of range.
        ImportError: for a metric whose library is not installed, with its name.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        metrics: str | Callable | Iterable[str | Callable] = ("rouge",),
        every: int = 1,
        max_rows: int = 200,
        examples: int = 2,
        samples: str | os.PathLike | None = None,
        prefix: str = "val_",
        seed: int = 0,
        **generate_options: Any,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("every", every, 1),
            ("max_rows", max_rows, 1),
            ("examples", examples, 0),
        ):
            whole_number(value, name, low)
        whole_number(seed, "seed", 0, 2**128 - 1)
        string(prefix, "prefix")
        one_answer = {"num_return_sequences", "return_scores"} & set(generate_options)
        if one_answer:
            raise ValueError(
                f"GenerationMetrics needs one answer per source; got {one_answer}."
            )
        sources, targets = _pairs(x, y)
        rng = np.random.default_rng(seed)
        size = min(max_rows, len(sources))
        rows = sorted(rng.choice(len(sources), size, replace=False))
        self.sources = [sources[i] for i in rows]
        self.references = [targets[i] for i in rows]
        self.metrics = text_metrics(metrics)
        self.every = every
        self.examples = examples
        self.samples = None if samples is None else checked_path(samples, "samples")
        self.prefix = prefix
        self.seed = seed
        self.generate_options = generate_options
        self._names = {name: [name] for name in self.metrics}

    def on_train_begin(self, logs=None):
        self._last = {}
        self._options = dict(self.generate_options)
        if self.model.sampler_options is not None:
            self._options["seed"] = self.seed  # Does not draw from Keras's global one.
        self.model.generate([], **self._options)  # Wrong options fail before training.

    def on_epoch_end(self, epoch, logs=None):
        is_last = epoch + 1 == self.params["epochs"]
        if not self._last or is_last or (epoch + 1) % self.every == 0:
            answers = self.model.generate(self.sources, **self._options)
            self._last = {}
            for name, metric in self.metrics.items():
                self._last |= self._measure(name, metric, answers)
            if self.params["verbose"]:
                self._print(epoch, answers)
            if self.samples is not None:
                self._append(epoch, answers)
        logs.update(self._last)

    def _measure(self, name, metric, answers):
        try:
            scores = metric(answers, self.references)
        except Exception as error:  # Training must not stop because of a metric.
            warnings.warn(
                f"The metric {name!r} failed and is logged as nan: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return {self.prefix + key: math.nan for key in self._names[name]}
        self._names[name] = list(scores)
        return {self.prefix + key: score["mean"] for key, score in scores.items()}

    def _print(self, epoch, answers):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self._last.items())
        print(f"\n{len(answers)} answers after epoch {epoch + 1}: {numbers}")
        labels = ("source", "reference", "answer")
        rows = list(zip(self.sources, self.references, answers, strict=True))
        for row in rows[: self.examples]:
            for label, text in zip(labels, row, strict=True):
                # A console may have few characters, which must not end training.
                encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
                line = _one_line(text).encode(encoding, "backslashreplace")
                print(f"  {label:<10} {line.decode(encoding)}")
            print()

    def _append(self, epoch, answers):
        keys = ("epoch", "source", "reference", "answer")
        rows = zip(self.sources, self.references, answers, strict=True)
        with open(self.samples, "a", encoding="utf-8") as file:
            for row in rows:
                line = dict(zip(keys, (epoch, *row), strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _pairs(x, y):
    columns = as_columns(x, y)
    if columns is None and isinstance(x, list | tuple) and not x:
        columns = {"encoder_text": [], "decoder_text": []}
    if columns is None:
        raise ValueError(
            "GenerationMetrics needs text pairs in memory (`x` and `y`: lists of "
            f"strings, or a list of pairs); got {shown(x)}."
        )
    sources, targets = columns["encoder_text"], columns["decoder_text"]
    if not len(sources) or len(sources) != len(targets):
        raise ValueError(
            "The validation pairs `x` (and `y`) must have one target per source, and "
            f"at least one; got {len(sources)} sources and {len(targets)} targets."
        )
    return sources, targets


def _one_line(text, width=160):
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


class _BatchRange(keras.callbacks.Callback):
    """Maps Keras's batch numbers to steps of the data."""

    def on_train_batch_begin(self, batch, logs=None):
        self._first = batch

    def _steps(self, batch):
        """The step of a batch, or its steps with `steps_per_execution`."""
        steps = self.params["steps"] or batch + 1
        return range(self._first, max(self._first, min(batch, steps - 1)) + 1)


class StopOnNaN(_BatchRange):
    """Stop `fit` at the first batch with a NaN or infinite loss, and name the batch.

    Args:
        data: a dataset with `rows(step) -> list of row numbers or None`, as `fit` makes
            them; `None` leaves the rows out of the message.

    Raises:
        FloatingPointError: at the end of that batch.
    """

    def __init__(self, data: Any = None) -> None:
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The running mean of the epoch: not finite from the first bad batch on.
        loss = float((logs or {}).get("loss", 0.0))
        if math.isfinite(loss):
            return
        steps = self._steps(batch)
        name = f"batch {steps[0] + 1}"
        if len(steps) > 1:
            name = f"one of the batches {steps[0] + 1} to {steps[-1] + 1}"
        raise FloatingPointError(
            f"The loss is {loss} at {name} of epoch {self._epoch + 1}"
            f"{self._rows(steps)}. Look for a broken row there; if there is none, the "
            "previous update was too large. The weights are not usable any more: load "
            "the last backup or preset. Then try a lower learning rate, an optimizer "
            "with `global_clipnorm=1.0`, or dtype 'float32' or 'mixed_bfloat16'."
        )

    def _rows(self, steps):
        found = [] if self.data is None else map(self.data.rows, steps)
        rows = [int(row) for batch in found for row in batch or ()]
        if not rows:
            return ""
        more = f" and {len(rows) - 64} more" if len(rows) > 64 else ""
        return f" (rows {', '.join(map(str, rows[:64]))}{more} of the data)"


class TrainingReport(_BatchRange):
    """Tokens per second and share of padding, in the progress bar and the history.

    Both are of the current epoch. The first batch of every shape is left out of the
    rate, because it may include compiling. Time between epochs (validation, saving)
    does not count. Callbacks that log these numbers come after this one in the list.

    Args:
        data: a dataset with `counts(step) -> (tokens, positions)`: tokens of a batch
            without padding, source and target together, and with padding; both 0 when
            unknown, which leaves the numbers out.

    Raises:
        ValueError: for data without `counts`.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        if not hasattr(data, "counts"):
            raise ValueError(
                f"`data` must have a method `counts(step)`; got {type(data).__name__}."
            )
        self.data = data
        self._sizes: set[int] = set()

    def on_epoch_begin(self, epoch, logs=None):
        self._all = np.zeros(3)  # Tokens, positions, seconds.
        self._timed = np.zeros(3)  # The same, without batches that may have compiled.
        self._time = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        counts = [tuple(self.data.counts(step)) for step in self._steps(batch)]
        amount = np.array([*np.sum(counts, axis=0), now - self._time])
        self._time = now
        self._all += amount
        sizes = {positions for _, positions in counts}
        if sizes <= self._sizes:
            self._timed += amount
        self._sizes |= sizes
        logs.update(self._numbers())

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._numbers())

    def _numbers(self):
        tokens, positions, _ = self._all
        if not positions:  # Arrays without padding masks.
            return {}
        timed, _, seconds = self._timed if self._timed[2] else self._all
        return {
            "tokens_per_second": float(timed / max(seconds, 1e-9)),
            "padding": float(1 - tokens / positions),
        }


class SaveBest(keras.callbacks.Callback):
    """Save the model of the best epoch as a preset.

    The monitored value is saved with the weights, in `best.json` of the preset: a run
    that is resumed, or started again in that folder, replaces the model only with a
    better one. A value that is not finite is never the best.

    Args:
        folder: path of the preset.
        monitor: name in the logs.
        mode: `"min"`, `"max"`, or `"auto"`, which knows the loss, perplexity, accuracy,
            ROUGE, BLEU, chrF and exact match.

    Raises:
        ValueError: for an unknown mode, `"auto"` with an unknown name, or a folder with
            the best model by another monitor.
    """

    def __init__(
        self, folder: str | os.PathLike, monitor: str = "val_loss", mode: str = "auto"
    ) -> None:
        super().__init__()
        self.folder = checked_path(folder, "folder")
        self.monitor = string(monitor, "monitor")
        self.mode = _mode(monitor, mode)
        self.best: float | None = None
        finish_interrupted_save(self.folder)
        path = self.folder / _BEST_FILE
        if path.exists():
            if not saved_files.is_marked(path):
                raise ValueError(
                    f"`folder` {folder} has a {_BEST_FILE} that SaveBest has not "
                    "written. Pass another folder."
                )
            noted = read_json_file(path)
            found = (noted.get("monitor"), noted.get("mode"))
            if found != (self.monitor, self.mode):
                raise ValueError(
                    f"`folder` {folder} has the best model by {found}; got `monitor` "
                    f"and `mode` {(self.monitor, self.mode)}. Pass another folder."
                )
            self.best = noted["value"]

    def on_train_begin(self, logs=None):
        self._warned = False

    def on_epoch_end(self, epoch, logs=None):
        if self.monitor not in logs:
            if not self._warned:
                warnings.warn(
                    f"SaveBest saves nothing: {self.monitor!r} is not in the logs, "
                    f"which have {', '.join(sorted(logs))}.",
                    stacklevel=2,
                )
            self._warned = True
            return
        value = float(logs[self.monitor])
        if not math.isfinite(value) or not self._is_better(value):
            return
        noted = {"monitor": self.monitor, "mode": self.mode}
        noted |= {"value": value, "epoch": epoch}
        with atomic_folder(self.folder) as staging:
            self._save(staging)
            text = json.dumps(noted, indent=4) + "\n"
            (staging / _BEST_FILE).write_text(text, encoding="utf-8")
        self.best = value

    def _save(self, folder):
        self.model.save_to_preset(folder)

    def _is_better(self, value):
        if self.best is None:
            return True
        return value < self.best if self.mode == "min" else value > self.best


def _mode(monitor, mode):
    one_of(mode, "mode", ("auto", "min", "max"))
    if mode in ("min", "max"):
        return mode
    name = monitor.removeprefix("val_")
    if mode == "auto" and name in ("loss", "perplexity"):
        return "min"
    larger = ("accuracy", "rouge", "bleu", "chrf", "exact_match")
    if mode == "auto" and name.startswith(larger):
        return "max"
    raise ValueError(
        "`mode` must be 'min' or 'max', or 'auto' for a known `monitor`; got "
        f"{shown(mode)} for {monitor!r}."
    )
