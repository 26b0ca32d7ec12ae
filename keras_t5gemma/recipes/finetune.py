"""`keras-t5gemma finetune`: text pairs in files in, a preset out."""

import contextlib
import gc
import sys
import warnings
from types import SimpleNamespace

import keras

from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.readers import read_pairs
from keras_t5gemma.recipes import common, run_directory
from keras_t5gemma.recipes.model_card import write_model_card
from keras_t5gemma.recipes.options import check_values
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import GenerationMetrics
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.plots import plot_history
from keras_t5gemma.training.text_metrics import score_texts, text_metrics
from keras_t5gemma.utils.progress import progress_bar

_ROWS_AT_ONCE = 512  # Of a file that answers are written for.


def finetune(
    preset: str,
    train: str,
    output: str,
    valid: str = None,
    test: str = None,
    *,
    source: str = "source",
    target: str = "target",
    dtype: str = None,
    encoder_sequence_length: int = None,
    decoder_sequence_length: int = None,
    batching: str = "bucketed",
    batch_size: int = 32,
    epochs: int = 3,
    steps_per_epoch: int = None,
    max_steps: int = None,
    optimizer: str = "adafactor",
    learning_rate: float = 1e-4,
    schedule: str = "constant",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    global_clipnorm: float = 1.0,
    label_smoothing: float = 0.0,
    gradient_accumulation_steps: int = 1,
    ema_momentum: float = None,
    rematerialize: bool = False,
    lora_rank: int = None,
    lora_parts: list = None,
    quantize: str = None,
    freeze: str = None,
    metrics: list = ("rouge",),
    monitor: str = "val_loss",
    mode: str = "auto",
    sample_rows: int = 200,
    num_beams: int = None,
    max_length: int = None,
    seed: int = 0,
    save_freq: int | str = "epoch",
    overwrite: bool = False,
    verbose: int | str = "auto",
):
    """Train a preset on the text pairs of a file, and write the result as a preset.

    A run that was stopped goes on when it is started again with the same options, and
    ends as it would have ended. The folder `output` holds `config.json` (options,
    versions, data), `log.csv`, `curves.png`, `samples.jsonl`, `best/`, `scores.json`
    and the result, `preset/`, with a model card: the best model where there is
    validation data, else the last; adapters are merged, and lie beside it as
    `adapters.lora.h5`. See `RunDirectory`.

    Args:
        preset: name, folder or handle of the model to start from.
        train: file of the text pairs to learn: .jsonl, .csv, .tsv, also with .gz, or
            .parquet; see `read_pairs`.
        output: folder of the run.
        valid: file of the pairs to choose the best epoch by.
        test: file of the pairs that the result is measured on, once.
        source: field of the files that the encoder reads.
        target: field of the files that the decoder writes.
        dtype: of the model, such as mixed_bfloat16; default: Keras's own.
        encoder_sequence_length: most tokens of a source; default: the preset's.
        decoder_sequence_length: most tokens of a target; default: the preset's.
        batching: bucketed, packed or fixed; see `Seq2SeqLM.fit`.
        batch_size: pairs a step, rows with packed.
        epochs: passes over the training pairs.
        steps_per_epoch: steps from one validation to the next, where that is to come
            before all pairs were seen.
        max_steps: most training steps; the epochs become fewer and equally shorter.
        optimizer: adafactor, adamw, lion or muon.
        learning_rate: of the optimizer, after the warm-up.
        schedule: constant, or cosine: down to 0 in the end.
        warmup_steps: updates in which the learning rate rises from 0.
        weight_decay: of the optimizer.
        global_clipnorm: longest gradient, of all weights together; 0 is any.
        label_smoothing: share of each target that goes to all tokens alike.
        gradient_accumulation_steps: steps an update.
        ema_momentum: keep and use a moving average of the weights, 0.999 say.
        rematerialize: less memory, more time; see `Seq2SeqLM.compile`.
        lora_rank: train adapters of this rank and nothing else.
        lora_parts: where, of encoder, decoder, cross_attention, mlp, embeddings;
            default: all attention.
        quantize: int8 or int4 weights below the adapters, and in the result.
        freeze: the tower that does not learn, encoder or decoder.
        metrics: of the answers: rouge, bleu, chrf, exact_match.
        monitor: what the best epoch is best in: val_loss, val_rougeL, ...
        mode: min or max, for a monitor that is not known.
        sample_rows: pairs of the validation that answers are written for every epoch.
        num_beams: beams of those answers; default: greedy.
        max_length: most tokens of those answers; default: the preset's.
        seed: of order, dropout and adapters.
        save_freq: epoch, or steps from one backup to the next.
        overwrite: replace what a finished run, or one of other options, left there.
        verbose: 0 silent, 1 progress bars, 2 a line an epoch; auto is 1 on a terminal
            and else 2.

    Returns:
        What is in `scores.json`: `{"valid": {"loss": {"mean": 1.2, "standard_error":
        None, "before": 3.4}, ...}, "test": ...}`, of the files that were given;
        `before` is the mean of the preset that it started from.

    Raises:
        ValueError: for an option, a file or a folder that cannot be used, before
            anything is trained or written.
        OSError: for a file that is missing or a folder that cannot be written.
        ImportError: for a metric whose library is not installed.
        FloatingPointError: when the loss is not finite.
    """
    options = dict(locals())
    o = SimpleNamespace(**options)
    if o.verbose == "auto":
        o.verbose = 1 if sys.stdout.isatty() else 2
    _check(o)
    data = {
        split: read_pairs(options[split], source, target)
        for split in common.SPLITS
        if options[split] is not None
    }
    folder = run_directory.RunDirectory(output)
    files = {k: (options[k], len(v["encoder_text"])) for k, v in data.items()}
    config = run_directory.describe(options, files)
    clear = folder.must_be_cleared(config, overwrite)
    if clear or not folder.is_trained():
        _train(o, folder, data, config, clear)
        gc.collect()  # The model that was trained, before another one is loaded.
    scores = _score(o, folder, data, config)
    if o.verbose:
        command = f"keras-t5gemma generate --preset {folder.preset} 'a text'"
        print("\n".join(common.report(folder, scores, [command])))
    return scores


def _check(o):
    check_values(o)
    if o.warmup_steps is None:
        raise ValueError("`warmup_steps` must be a whole number; got None.")
    for name in ("lora_parts", "quantize"):
        if getattr(o, name) is not None and o.lora_rank is None:
            raise ValueError(f"`{name}` needs `lora_rank`: only adapters are trained.")
    if o.freeze is not None and o.lora_rank is not None:
        raise ValueError(
            "`freeze` is for training without adapters; with `lora_rank`, `lora_parts` "
            "says what is trained."
        )
    if o.valid is not None or o.test is not None:
        text_metrics(o.metrics)
    if o.valid is not None:
        _check_monitor(o)


def _check_monitor(o):
    metrics = [o.metrics] if isinstance(o.metrics, str) or callable(o.metrics) else []
    metrics = metrics or list(o.metrics)
    named = [metric for metric in metrics if isinstance(metric, str)]
    known = ["val_loss", "val_accuracy", "val_perplexity"]
    if named:
        known += [f"val_{name}" for name in score_texts(["a"], ["a"], named)]
    # What a user's function calls its numbers is known when it has run.
    is_theirs = len(named) < len(metrics) and o.mode != "auto"
    if o.monitor not in known and not is_theirs:
        raise ValueError(
            f"`monitor` must be one of {known}, or with a `mode` a number of your own "
            f"function; got {o.monitor!r}."
        )


def _train(o, folder, data, config, clear):
    """From the preset, or from the backup, to `folder.preset`."""
    keras.utils.set_random_seed(o.seed)
    model = _load(o)
    epochs, steps = _plan(o, model, data["train"])
    model.compile(
        optimizer=common.make_optimizer(o, epochs * steps),
        loss=TokenCrossEntropy(o.label_smoothing),
        rematerialize=o.rematerialize,
    )
    folder.begin(config, clear)
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
        log.on_train_end()  # It leaves its file open when `fit` fails.


def _load(o):
    model = common.load_base(o)
    if o.quantize is not None:
        model.quantize(o.quantize)
    if o.lora_rank is not None:
        model.enable_lora(o.lora_rank, parts=o.lora_parts)
    if o.freeze is not None:
        getattr(model.backbone, o.freeze).trainable = False
    return model


def _plan(o, model, pairs):
    """Epochs, and steps of each."""
    steps = -(-len(pairs["encoder_text"]) // o.batch_size)
    if o.batching == "packed":  # How many rows they fill is known when they are packed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `fit` will say it.
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


def _callbacks(o, folder, valid, log):
    """In the order of an epoch's end; what is there after a stop comes last."""
    callbacks = []
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
            callbacks = common.with_average(callbacks)
    backup = BackupAndRestore(folder.backup, o.save_freq)
    return [*callbacks, log, run_directory.MakePreset(folder), backup]


def _generate_options(o):
    options = {"num_beams": o.num_beams, "max_length": o.max_length}
    return {name: value for name, value in options.items() if value is not None}


def _score(o, folder, data, config):
    """Measure the result, as anybody would load it; write all that tells of it."""
    with contextlib.suppress(ImportError):  # `_report` says how to get it.
        plot_history(folder.log, folder.curves)
    data = {split: pairs for split, pairs in data.items() if split != "train"}
    scores = {}
    if data:
        before, _ = _measure(o, common.load_base(o), data, "of the preset as it was")
        gc.collect()  # One model at a time.
        dtype = None if o.quantize else o.dtype
        model = Seq2SeqLM.from_preset(folder.preset, dtype=dtype)
        scores, answers = _measure(o, model, data)
    for split, pairs in data.items():
        for name, score in scores[split].items():
            score["before"] = before[split][name]["mean"]
        folder.add_samples(split, pairs, answers[split])
    card = common.model_card(o.preset, config, scores, "fine-tuned")
    write_model_card(folder.preset, **card)
    run_directory.write_json(folder.scores, scores)
    return scores


def _measure(o, model, data, which=""):
    """Scores, and the answers that they are of; a dict of the splits each."""
    model.compile(loss=TokenCrossEntropy(o.label_smoothing))
    scores, answers = {}, {}
    for split, pairs in data.items():
        title = f"Answers to {split} {which}".strip()
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


def _answers(o, model, sources, title):
    answers = []
    with progress_bar(title, len(sources), verbose=bool(o.verbose)) as advance:
        for start in range(0, len(sources), _ROWS_AT_ONCE):
            part = sources[start : start + _ROWS_AT_ONCE]
            answers += model.generate(part, **_generate_options(o))
            advance(len(part))
    return answers
