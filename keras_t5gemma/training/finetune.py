"""`keras-t5gemma finetune`: text pairs in files in, a preset out."""

import contextlib
import gc
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras

from keras_t5gemma.progress import progress_bar
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.text.files import read_pairs
from keras_t5gemma.text.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.text.text_batches import TextBatches
from keras_t5gemma.training import run_folder
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import GenerationMetrics
from keras_t5gemma.training.finetune_options import OPTIMIZERS, check
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.model_card import write_model_card
from keras_t5gemma.training.plots import plot_history
from keras_t5gemma.training.text_metrics import score_texts

_SPLITS = ("train", "valid", "test")
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
    `adapters.lora.h5`. See `RunFolder`.

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
    check(o)
    data = {
        split: read_pairs(options[split], source, target)
        for split in _SPLITS
        if options[split] is not None
    }
    folder = run_folder.RunFolder(output)
    config = run_folder.describe(options, data)
    clear = folder.must_be_cleared(config, overwrite)
    if clear or not folder.is_trained():
        _train(o, folder, data, config, clear)
        gc.collect()  # The model that was trained, before another one is loaded.
    scores = _score(o, folder, data, config)
    if o.verbose:
        print("\n".join(_report(folder, scores)))
    return scores


def _train(o, folder, data, config, clear):
    """From the preset, or from the backup, to `folder.preset`."""
    keras.utils.set_random_seed(o.seed)
    model = _load(o)
    epochs, steps = _plan(o, model, data["train"])
    model.compile(
        optimizer=_optimizer(o, epochs * steps),
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


def _base(o):
    """The preset to start from, with the lengths of the training."""
    lengths = ("encoder_sequence_length", "decoder_sequence_length")
    lengths = {n: getattr(o, n) for n in lengths if getattr(o, n) is not None}
    preprocessor = Seq2SeqLMPreprocessor.from_preset(o.preset, **lengths)
    return Seq2SeqLM.from_preset(o.preset, dtype=o.dtype, preprocessor=preprocessor)


def _load(o):
    model = _base(o)
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
            batches = TextBatches(
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


def _optimizer(o, steps):
    """Of `steps` training steps in all."""
    updates = steps // o.gradient_accumulation_steps
    if o.warmup_steps and o.warmup_steps >= updates:
        raise ValueError(
            f"`warmup_steps` must be below the {updates} updates of the training; got "
            f"{o.warmup_steps}."
        )
    rate = o.learning_rate
    if o.warmup_steps or o.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if o.warmup_steps else rate,
            decay_steps=max(updates - o.warmup_steps, 1),
            alpha=0.0 if o.schedule == "cosine" else 1.0,  # Of 1: it stays.
            warmup_target=rate if o.warmup_steps else None,
            warmup_steps=o.warmup_steps,
        )
    arguments = {
        "learning_rate": rate,
        "weight_decay": o.weight_decay or None,
    }
    if o.optimizer == "adamw":
        arguments["weight_decay"] = o.weight_decay  # It does not take `None`.
    if o.optimizer == "muon":
        arguments["adam_weight_decay"] = o.weight_decay
    if o.global_clipnorm:
        arguments["global_clipnorm"] = o.global_clipnorm
    if o.gradient_accumulation_steps > 1:
        arguments["gradient_accumulation_steps"] = o.gradient_accumulation_steps
    if o.ema_momentum is not None:
        arguments |= {"use_ema": True, "ema_momentum": o.ema_momentum}
    return OPTIMIZERS[o.optimizer](**arguments)


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
        best = run_folder.SaveBestOfRun(folder.best, o.monitor, o.mode)
        callbacks = [generation, best]
        if o.ema_momentum is not None:
            callbacks = _with_average(callbacks)
    backup = BackupAndRestore(folder.backup, o.save_freq)
    return [*callbacks, log, run_folder.MakePreset(folder), backup]


def _with_average(callbacks):
    """Let them see the moving average of the weights, as the validation does."""
    swap = keras.callbacks.SwapEMAWeights()
    Lambda = keras.callbacks.LambdaCallback
    before = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_begin())
    after = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_end())
    return [swap, before, *callbacks, after]


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
        before, _ = _measure(o, _base(o), data, "of the preset as it was")
        gc.collect()  # One model at a time.
        dtype = None if o.quantize else o.dtype
        model = Seq2SeqLM.from_preset(folder.preset, dtype=dtype)
        scores, answers = _measure(o, model, data)
    for split, pairs in data.items():
        for name, score in scores[split].items():
            score["before"] = before[split][name]["mean"]
        folder.add_samples(split, pairs, answers[split])
    write_model_card(folder.preset, **_card(o, config, scores))
    run_folder.write_json(folder.scores, scores)
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


def _card(o, config, scores):
    """Arguments of `write_model_card`."""
    # A folder of the user's says nothing to others.
    base = Path(o.preset).name if os.path.isdir(o.preset) else o.preset
    left_out = {"preset", "output", "overwrite", "verbose", "save_freq", *_SPLITS}
    training = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config["options"].items()
        if name not in left_out and value is not None
    }
    versions = ("keras_t5gemma", "keras", "keras_hub", "backend")
    return {
        "title": f"{base}, fine-tuned on {config['data']['train']['file']}",
        "base": base,
        "data": [{"split": k, **file} for k, file in config["data"].items()],
        "training": training | {name: config[name] for name in versions},
        "scores": {
            f"{split} {name}": score
            for split, measured in scores.items()
            for name, score in measured.items()
        },
    }


def _report(folder, scores):
    """Lines that say what there is, and what to do next."""
    lines = ["", f"{folder.preset}: {folder.which_model()}."]
    for split, measured in scores.items():
        numbers = []
        for name, score in measured.items():
            error = score["standard_error"]
            more = "" if error is None else f" ± {error:.2g}"
            numbers.append(f"{name} {score['before']:.4g} -> {score['mean']:.4g}{more}")
        lines.append(f"  {split}: {', '.join(numbers)}")
    if not folder.curves.exists():
        lines.append(
            f"No {folder.curves.name} without matplotlib: pip install matplotlib, then "
            f"keras_t5gemma.plot_history({str(folder.log)!r}, {str(folder.curves)!r})."
        )
    lines += [
        "Next:",
        f"  keras-t5gemma generate --preset {folder.preset} 'a text'",
        f"  {folder.preset / 'README.md'}: a model card, to be completed by hand",
    ]
    return lines
