"""Continued pretraining on plain text from files: `keras-t5gemma pretrain`."""

import contextlib
import dataclasses
import gc
import os
import warnings
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.average import average_presets
from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.objectives import UL2, PrefixLM
from keras_t5gemma.data.readers import read_texts
from keras_t5gemma.recipes import run_directory, training_setup
from keras_t5gemma.recipes.model_card import write_model_card
from keras_t5gemma.recipes.options import PretrainOptions
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.plots import plot_history
from keras_t5gemma.training.teacher_in_memory import TeacherInMemory
from keras_t5gemma.training.teacher_scores import TeacherScores, write_teacher_scores
from keras_t5gemma.training.warmup import CrossAttentionWarmUp
from keras_t5gemma.utils.checks import renamed
from keras_t5gemma.utils.options import takes_options

_EVALUATIONS = 10  # Number of validations when `steps_per_epoch` is not given.
_CROSS_ATTENTION_STEPS = 1000  # arXiv 2504.06225.
_WARMUP_STEPS = 100  # As T5Gemma 2.
_TEACHER_TOP_K = 64  # Log-probabilities that are precomputed per token.


@takes_options(PretrainOptions)
def pretrain(o: PretrainOptions) -> dict[str, Any]:
    """Continue the pretraining of an adapted preset on plain text.

    The second step of T5Gemma's recipe (arXiv 2504.06225), after `adapt_gemma2` and
    before fine-tuning. A run that was interrupted resumes when it is started with the
    same options, and ends with the same weights as an uninterrupted one. The run
    directory `output` holds `run.yaml` (all options, which repeat the run),
    `config.json` (options, versions, data), `log.csv`, `curves.png`, `scores.json` and
    the result, `preset/`, with a model card. See `RunDirectory`.

    Returns:
        Contents of `scores.json`: `{"valid": {"loss": {"mean": 1.2, "standard_error":
        None, "before": 3.4}, ...}}`, for the validation texts and their labels;
        `before` is the mean of the preset before training.

    Raises:
        ValueError: for an option, file or folder that cannot be used, before anything
            is trained or written.
        OSError: for a missing file or a folder that cannot be written.
        FloatingPointError: when the loss is not finite.
    """
    given = vars(o).copy()
    o = training_setup.with_verbosity(o)
    o.check()
    texts, files = _read_splits(o)
    folder = run_directory.RunDirectory(o.output)
    config = run_directory.describe(given, files)
    with folder.locked():
        clear = folder.must_be_cleared(config, o.overwrite)
        if clear or not folder.is_trained():
            _train(o, folder, texts, config, clear)
            gc.collect()  # Free the trained model before another one is loaded.
        scores = _score(o, folder, texts, config)
    if o.verbose:
        commands = [
            f"keras-t5gemma finetune --preset {folder.preset} --train pairs.jsonl "
            "--output RUN"
        ]
        print("\n".join(training_setup.report(folder, scores, commands)))
    return scores


def _read_splits(
    o: PretrainOptions,
) -> tuple[dict[str, list[str]], dict[str, tuple[str | os.PathLike[str], int]]]:
    """Texts of each split, and path and number of texts of each file."""
    texts: dict[str, list[str]] = {}
    files = {}
    for split, paths in (("train", o.train), ("valid", o.valid or [])):
        paths = [paths] if isinstance(paths, str | os.PathLike) else paths
        for i, path in enumerate(paths):
            with renamed(path=split):
                found = read_texts(path, o.field)
            texts.setdefault(split, []).extend(found)
            files[f"{split} {i + 1}" if i else split] = (path, len(found))
    if "train" not in texts:
        raise ValueError("`train` must name one file or more; got none.")
    return texts, files


def make_objective(name: str, tokenizer: Tokenizer) -> PrefixLM | UL2:
    """Objective with a name that `PretrainOptions.objective` accepts."""
    if name.startswith("prefixlm"):
        return PrefixLM("random" if name.endswith("random") else "half")
    return UL2.from_tokenizer(tokenizer, name)


def _load(o: PretrainOptions) -> Seq2SeqLM:
    model = training_setup.load_base(o)
    training_setup.require_float_weights(o, model)
    preprocessor = model.preprocessor
    preprocessor.template = None
    preprocessor.objective = make_objective(o.objective, preprocessor.tokenizer)
    return model


def _train(
    o: PretrainOptions,
    folder: run_directory.RunDirectory,
    texts: dict[str, list[str]],
    config: dict[str, Any],
    clear: bool,
) -> None:
    """Train from the preset, or resume from the backup, and write `folder.preset`."""
    loss = _loss(o, texts["train"])
    keras.utils.set_random_seed(o.seed)
    model = _load(o)
    batches = DocumentDataset(
        model.preprocessor,
        {"text": texts["train"]},
        batch_size=o.batch_size,
        shuffle=True,
        batching="packed",
        name="train",
        teacher=getattr(loss, "teacher", None),
    )
    epochs, steps = _plan(o, batches.batches_an_epoch())
    batches.limit(steps)
    if o.warmup_steps is None:
        updates = training_setup.number_of_updates(o, epochs * steps)
        o = dataclasses.replace(o, warmup_steps=min(_WARMUP_STEPS, updates // 10))
    model.compile(
        optimizer=training_setup.make_optimizer(o, epochs * steps),
        loss=loss,
        rematerialize=o.rematerialize,
    )
    callbacks = _callbacks(o, folder, epochs, steps)
    folder.begin("pretrain", config, clear)
    log = keras.callbacks.CSVLogger(folder.log, append=True)
    make = run_directory.MakePreset(folder)
    backup = BackupAndRestore(folder.backup, o.save_freq)
    try:
        model.fit(
            batches,
            epochs=epochs,
            validation_data=texts.get("valid"),
            validation_batch_size=o.batch_size,
            callbacks=[*callbacks, log, make, backup],
            verbose=o.verbose,
        )
    finally:
        log.on_train_end()  # Keras leaves the file open when `fit` fails.


def _loss(o: PretrainOptions, texts: list[str]) -> keras.losses.Loss:
    """Cross-entropy, or distillation from a teacher in memory or on disk."""
    if o.teacher is None and o.teacher_scores is None:
        return TokenCrossEntropy(o.label_smoothing)
    teacher: Any = None
    if o.teacher_scores is not None and Path(o.teacher_scores).exists():
        with renamed(folder="teacher_scores"):
            teacher = TeacherScores(o.teacher_scores)
    elif o.teacher is None:
        raise ValueError(
            f"`teacher_scores` {o.teacher_scores} does not exist; pass `teacher` to "
            "write it first."
        )
    else:
        with renamed(preset="teacher"):
            teacher = TeacherInMemory.from_preset(str(o.teacher))
        if o.teacher_scores is not None:
            preprocessor = _load(o).preprocessor
            teacher = write_teacher_scores(
                o.teacher_scores,
                teacher,
                preprocessor,
                texts,
                o.top_k or _TEACHER_TOP_K,
                verbose=o.verbose,
            )
            gc.collect()
    return Distillation(
        teacher, o.temperature, o.top_k, o.label_weight, o.label_smoothing
    )


def _plan(o: PretrainOptions, steps_of_all: int) -> tuple[int, int]:
    """Number of Keras epochs, each followed by a validation, and of steps per epoch."""
    total = o.epochs * steps_of_all
    if o.max_steps is not None:
        total = min(total, o.max_steps)
    steps = o.steps_per_epoch or max(1, total // _EVALUATIONS)
    steps = min(steps, total, steps_of_all)
    return total // steps, steps


def _callbacks(
    o: PretrainOptions, folder: run_directory.RunDirectory, epochs: int, steps: int
) -> list[keras.callbacks.Callback]:
    """Callbacks in the order of an epoch's end."""
    callbacks: list[keras.callbacks.Callback] = []
    warm_up = o.cross_attention_steps
    if warm_up is not None and warm_up >= epochs * steps:
        raise ValueError(
            f"`cross_attention_steps` must be below the {epochs * steps} steps of the "
            f"training; got {warm_up}."
        )
    if warm_up is None:
        lineage = open_checkpoint(o.preset).lineage or {}
        warm_up = min(_CROSS_ATTENTION_STEPS, epochs * steps // 10 + 1)
        warm_up *= lineage.get("needs_warm_up", False)
    if warm_up:
        callbacks.append(CrossAttentionWarmUp(warm_up))
    if o.average_last:
        callbacks.append(_SaveLast(folder, epochs, o.average_last))
    if o.ema_momentum is not None:
        return training_setup.with_average(callbacks)
    return callbacks


class _SaveLast(keras.callbacks.Callback):
    """Save the models of the last epochs, and their mean after training."""

    def __init__(
        self, folder: run_directory.RunDirectory, epochs: int, count: int
    ) -> None:
        super().__init__()
        self.folder = folder
        self.numbers = range(max(0, epochs - count), epochs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch in self.numbers:
            self.model.save_to_preset(self.folder.last / f"epoch-{epoch + 1}")

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        epochs = [n + 1 for n in self.numbers]
        epochs = [n for n in epochs if (self.folder.last / f"epoch-{n}").exists()]
        paths = [self.folder.last / f"epoch-{n}" for n in epochs]
        best = self.folder.best
        average_presets(paths, best, overwrite=True)
        run_directory.write_json(best / "best.json", {"mean_of": epochs})
        self.folder.remove_last()


def _score(
    o: PretrainOptions,
    folder: run_directory.RunDirectory,
    texts: dict[str, list[str]],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Measure the saved preset, and write model card and scores."""
    with contextlib.suppress(ImportError):  # `report` says how to get matplotlib.
        plot_history(folder.log, folder.curves)
    scores = {}
    if "valid" in texts:
        before = _measure(o, o.preset, texts["valid"])
        after = _measure(o, folder.preset, texts["valid"])
        scores["valid"] = {
            name: {"mean": after[name], "standard_error": None, "before": before[name]}
            for name in ("loss", "accuracy", "perplexity")
        }
    card = training_setup.model_card(o.preset, config, scores, "pretrained")
    write_model_card(folder.preset, **card)
    run_directory.write_json(folder.scores, scores)
    return scores


def _measure(
    o: PretrainOptions, preset: str | os.PathLike[str], texts: list[str]
) -> dict[str, float]:
    model = _load(dataclasses.replace(o, preset=preset))
    model.compile(loss=TokenCrossEntropy(o.label_smoothing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logs = model.evaluate(
            texts, batch_size=o.batch_size, return_dict=True, verbose=0
        )
    gc.collect()  # One model at a time.
    return logs
