"""Fine-tuning on text pairs from files: `keras-t5gemma finetune`."""

import contextlib
import gc
import shlex
import warnings
from typing import Any

import keras

from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.readers import read_pairs
from keras_t5gemma.recipes import run_directory, training_setup
from keras_t5gemma.recipes.model_card import write_model_card
from keras_t5gemma.recipes.options import FinetuneOptions
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import GenerationMetrics
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.plots import plot_history
from keras_t5gemma.training.text_metrics import score_texts, text_metrics
from keras_t5gemma.utils.checks import renamed
from keras_t5gemma.utils.options import takes_options
from keras_t5gemma.utils.progress import progress_bar

Pairs = dict[str, list[str]]

_GENERATED_ROWS = (
    512  # Texts per call of `generate`, between steps of the progress bar.
)


@takes_options(FinetuneOptions)
def finetune(o: FinetuneOptions) -> dict[str, Any]:
    """Fine-tune a preset on the text pairs of a file, and save the result as a preset.

    A run that was interrupted resumes when it is started with the same options, and
    ends with the same weights as an uninterrupted one. The run directory `output` holds
    `run.yaml` (all options, which repeat the run), `config.json` (options, versions,
    data), `log.csv`, `curves.png`, `samples.jsonl`, `best/`, `scores.json` and the
    result, `preset/`, with a model card: the best model where there is validation data,
    else the last. LoRA adapters are merged, and also saved separately as
    `adapters.lora.h5`. See `RunDirectory`.

    Returns:
        Contents of `scores.json`: `{"valid": {"loss": {"mean": 1.2, "standard_error":
        None, "before": 3.4}, ...}, "test": ...}`, for the files that were given;
        `before` is the mean of the preset before training.

    Raises:
        ValueError: for an option, file or folder that cannot be used, before anything
            is trained or written.
        OSError: for a missing file or a folder that cannot be written.
        ImportError: for a metric whose library is not installed.
        FloatingPointError: when the loss is not finite.
    """
    given = vars(o).copy()
    o = training_setup.with_verbosity(o)
    o.check()
    if o.valid is not None or o.test is not None:
        text_metrics(o.metrics)
    if o.valid is not None:
        _check_monitor(o)
    data = {}
    for split in training_setup.SPLITS:
        if given[split] is not None:
            with renamed(path=split):
                data[split] = read_pairs(given[split], o.source, o.target)
    folder = run_directory.RunDirectory(o.output)
    files = {k: (given[k], len(v["encoder_text"])) for k, v in data.items()}
    config = run_directory.describe(given, files)
    with folder.locked():
        clear = folder.must_be_cleared(config, o.overwrite)
        if clear or not folder.is_trained():
            _train(o, folder, data, config, clear)
            gc.collect()  # Free the trained model before another one is loaded.
        scores = _score(o, folder, data, config)
    if o.verbose:
        preset = shlex.quote(str(folder.preset))
        command = f"keras-t5gemma generate --preset {preset} 'a text'"
        print("\n".join(training_setup.report(folder, scores, [command])))
    return scores


def _check_monitor(o: FinetuneOptions) -> None:
    is_single = isinstance(o.metrics, str) or callable(o.metrics)
    metrics: list[Any] = [o.metrics] if is_single else list(o.metrics)  # type: ignore[arg-type]
    named = [metric for metric in metrics if isinstance(metric, str)]
    known = ["val_loss", "val_accuracy", "val_perplexity"]
    if named:
        known += [f"val_{name}" for name in score_texts(["a"], ["a"], named)]
    # The names that a user's metric function returns are only known after it has run.
    may_be_custom = len(named) < len(metrics) and o.mode != "auto"
    if o.monitor not in known and not may_be_custom:
        raise ValueError(
            f"`monitor` must be one of {known}, or, with `mode`, a number that your "
            f"own metric function returns; got {o.monitor!r}."
        )


def _train(
    o: FinetuneOptions,
    folder: run_directory.RunDirectory,
    data: dict[str, Pairs],
    config: dict[str, Any],
    clear: bool,
) -> None:
    """Train from the preset, or resume from the backup, and write `folder.preset`."""
    keras.utils.set_random_seed(o.seed)
    model = _load(o)
    epochs, steps = _plan(o, model, data["train"])
    model.compile(
        optimizer=training_setup.make_optimizer(o, epochs * steps),
        loss=TokenCrossEntropy(o.label_smoothing),
        sampler="greedy",
        rematerialize=o.rematerialize,
    )
    model.generate([], **_generate_options(o))  # Wrong options fail before training.
    folder.begin("finetune", config, clear)
    log = keras.callbacks.CSVLogger(folder.log, append=True)
    callbacks = _callbacks(o, folder, data.get("valid"), log)
    try:
        model.fit(
            data["train"],
            batch_size=o.batch_size,
            batching=o.batching,
            epochs=epochs,
            steps_per_epoch=steps,
            validation_data=data.get("valid"),
            callbacks=callbacks,
            verbose=o.verbose,
        )
    finally:
        log.on_train_end()  # Keras leaves the file open when `fit` fails.


def _load(o: FinetuneOptions) -> Seq2SeqLM:
    model = training_setup.load_base(o)
    if o.quantize is not None:
        model.quantize(o.quantize)
    if o.lora_rank is not None:
        parts = None if o.lora_parts is None else list(o.lora_parts)
        with renamed(rank="lora_rank", parts="lora_parts"):
            model.enable_lora(o.lora_rank, parts=parts)
    else:
        training_setup.require_float_weights(o, model)
    if o.freeze is not None:
        getattr(model.backbone, o.freeze).trainable = False
    return model


def _plan(o: FinetuneOptions, model: Seq2SeqLM | None, pairs: Pairs) -> tuple[int, int]:
    """Number of epochs, and of steps per epoch."""
    steps = -(-len(pairs["encoder_text"]) // o.batch_size)
    if o.batching == "packed" and model is not None:  # Packing tells how many rows.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `fit` repeats the warnings.
            batches = PairDataset(
                model.preprocessor, pairs, batch_size=o.batch_size, batching="packed"
            )
        steps = batches.batches_an_epoch()
    if o.steps_per_epoch is not None:
        if o.steps_per_epoch > steps:
            raise ValueError(
                f"`steps_per_epoch` must be at most {steps}, which is all of `train`; "
                f"got {o.steps_per_epoch}."
            )
        steps = o.steps_per_epoch
    if o.max_steps is None:
        return o.epochs, steps
    epochs = min(o.epochs, -(-o.max_steps // steps))
    return epochs, min(steps, o.max_steps // epochs)


def _callbacks(
    o: FinetuneOptions,
    folder: run_directory.RunDirectory,
    valid: Pairs | None,
    log: keras.callbacks.Callback,
) -> list[keras.callbacks.Callback]:
    """Callbacks in the order of an epoch's end: the backup follows all it covers."""
    callbacks: list[keras.callbacks.Callback] = []
    if valid is not None:
        generation = GenerationMetrics(
            valid,
            metrics=o.metrics,
            max_rows=o.sample_rows,
            samples=folder.samples,
            seed=o.seed,
            **_generate_options(o),
        )
        best = run_directory.SaveBestOfRun(folder.best, o.monitor, o.mode)
        callbacks = [generation, best]
        if o.ema_momentum is not None:
            callbacks = training_setup.with_average(callbacks)
    backup = BackupAndRestore(folder.backup, o.save_freq)
    return [*callbacks, log, run_directory.MakePreset(folder), backup]


def _generate_options(o: FinetuneOptions) -> dict[str, Any]:
    options = {"num_beams": o.num_beams, "max_length": o.max_length}
    return {name: value for name, value in options.items() if value is not None}


def _score(
    o: FinetuneOptions,
    folder: run_directory.RunDirectory,
    data: dict[str, Pairs],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Measure the saved preset, and write samples, model card and scores."""
    with contextlib.suppress(ImportError):  # `report` says how to get matplotlib.
        plot_history(folder.log, folder.curves)
    data = {split: pairs for split, pairs in data.items() if split != "train"}
    scores: dict[str, Any] = {}
    if data:
        before, _ = _measure(o, training_setup.load_base(o), data, "by the base preset")
        gc.collect()  # One model at a time.
        dtype = None if o.quantize else o.dtype
        model = Seq2SeqLM.from_preset(folder.preset, dtype=dtype)
        scores, answers = _measure(o, model, data)
    for split, pairs in data.items():
        for name, score in scores[split].items():
            score["before"] = before[split][name]["mean"]
        folder.add_samples(split, pairs, answers[split])
    card = training_setup.model_card(o.preset, config, scores, "fine-tuned")
    write_model_card(folder.preset, **card)
    run_directory.write_json(folder.scores, scores)
    return scores


def _measure(
    o: FinetuneOptions, model: Seq2SeqLM, data: dict[str, Pairs], which: str = ""
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Scores and generated texts of each split."""
    model.compile(loss=TokenCrossEntropy(o.label_smoothing), sampler="greedy")
    scores: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for split, pairs in data.items():
        title = f"Generating for {split} {which}".strip()
        answers[split] = _answers(o, model, pairs["encoder_text"], title)
        logs = model.evaluate(
            pairs,
            batch_size=o.batch_size,
            batching=o.batching,
            return_dict=True,
            verbose=0,
        )
        scores[split] = {
            name: {"mean": logs[name], "standard_error": None}
            for name in ("loss", "accuracy", "perplexity")
        }
        scores[split] |= score_texts(answers[split], pairs["decoder_text"], o.metrics)
    return scores, answers


def _answers(
    o: FinetuneOptions, model: Seq2SeqLM, sources: list[str], title: str
) -> list[str]:
    answers: list[str] = []
    with progress_bar(title, len(sources), verbose=bool(o.verbose)) as advance:
        for start in range(0, len(sources), _GENERATED_ROWS):
            part = sources[start : start + _GENERATED_ROWS]
            answers += model.generate(part, **_generate_options(o))
            advance(len(part))
    return answers
