"""`keras-t5gemma pretrain`: plain text in files in, a preset out."""

import contextlib
import gc
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras

from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.average import average_presets
from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.objectives import UL2, PrefixLM
from keras_t5gemma.data.readers import read_texts
from keras_t5gemma.recipes import common, run_directory
from keras_t5gemma.recipes.model_card import write_model_card
from keras_t5gemma.recipes.options import check_values
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.plots import plot_history
from keras_t5gemma.training.teacher_in_memory import TeacherInMemory
from keras_t5gemma.training.teacher_scores import TeacherScores, write_teacher_scores
from keras_t5gemma.training.warmup import CrossAttentionWarmUp

_EVALUATIONS = 10  # Of a run that does not say how many.
_WARM_UP = 1000  # Steps of the cross-attention alone, as in the paper.
_RISE = 100  # Updates in which the learning rate rises, as in T5Gemma 2.


def pretrain(
    preset: str,
    train: list,
    output: str,
    valid: list = None,
    *,
    field: str = "text",
    objective: str = "prefixlm",
    dtype: str = None,
    encoder_sequence_length: int = None,
    decoder_sequence_length: int = None,
    batch_size: int = 8,
    epochs: int = 1,
    steps_per_epoch: int = None,
    max_steps: int = None,
    cross_attention_steps: int = None,
    optimizer: str = "adafactor",
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    warmup_steps: int = None,
    weight_decay: float = 0.0,
    global_clipnorm: float = 1.0,
    label_smoothing: float = 0.0,
    gradient_accumulation_steps: int = 1,
    ema_momentum: float = None,
    average_last: int = None,
    rematerialize: bool = False,
    teacher: str = None,
    teacher_scores: str = None,
    top_k: int = None,
    temperature: float = 1.0,
    label_weight: float = 0.0,
    seed: int = 0,
    save_freq: int | str = "epoch",
    overwrite: bool = False,
    verbose: int | str = "auto",
):
    """Continue the training of an adapted preset on plain text.

    The second step of T5Gemma's recipe (arXiv 2504.06225), after `adapt_gemma2` and
    before fine-tuning. A run that was stopped goes on when it is started again with the
    same options, and ends as it would have ended. The folder `output` holds
    `config.json` (options, versions, data), `log.csv`, `curves.png`, `scores.json` and
    the result, `preset/`, with a model card. See `RunDirectory`.

    Args:
        preset: name, folder or handle of the model to start from, which
            `keras-t5gemma adapt` writes.
        train: files of text, one document a line or row: .txt, .jsonl, .csv, .tsv, also
            with .gz, or .parquet; see `read_texts`.
        output: folder of the run.
        valid: files of texts to measure the loss on.
        field: of the files that have fields.
        objective: prefixlm (equal halves), prefixlm_random (a random split), t5gemma2
            or ul2 (mixtures of denoisers).
        dtype: of the model, such as mixed_bfloat16; default: Keras's own.
        encoder_sequence_length: tokens of a row of sources; default: the preset's.
        decoder_sequence_length: tokens of a row of targets; default: the preset's.
        batch_size: rows a step; several texts share one.
        epochs: passes over the texts.
        steps_per_epoch: steps from one evaluation to the next; default: a tenth of the
            training.
        max_steps: most training steps.
        cross_attention_steps: steps in which only the cross-attention learns; default:
            1000, or a tenth of a shorter training, where it is random, else none.
        optimizer: adafactor, adamw, lion or muon.
        learning_rate: of the optimizer, after the warm-up.
        schedule: constant, or cosine: down to 0 in the end.
        warmup_steps: updates in which the learning rate rises from 0; default: 100, or
            a tenth of a shorter training.
        weight_decay: of the optimizer.
        global_clipnorm: longest gradient, of all weights together; 0 is any.
        label_smoothing: share of each target that goes to all tokens alike.
        gradient_accumulation_steps: steps an update.
        ema_momentum: keep and use a moving average of the weights, 0.999 say.
        average_last: let the result be the mean of the models after so many last
            epochs; the paper's successor takes 5.
        rematerialize: less memory, more time; see `Seq2SeqLM.compile`.
        teacher: name, folder or handle of a KerasHub causal LM of the same vocabulary
            to learn from; see `Distillation`.
        teacher_scores: folder of what the teacher says of the texts; written first if
            there is none, so that the teacher is not in memory while training.
        top_k: of the teacher's choices, so many; 64 are written.
        temperature: of the distillation.
        label_weight: share of the labels in it.
        seed: of order and objective.
        save_freq: epoch, or steps from one backup to the next.
        overwrite: replace what a finished run, or one of other options, left there.
        verbose: 0 silent, 1 progress bars, 2 a line an epoch; auto is 1 on a terminal
            and else 2.

    Returns:
        What is in `scores.json`: `{"valid": {"loss": {"mean": 1.2, "standard_error":
        None, "before": 3.4}, ...}}`, of the validation texts against their labels;
        `before` is the mean of the preset that it started from.

    Raises:
        ValueError: for an option, a file or a folder that cannot be used, before
            anything is trained or written.
        OSError: for a file that is missing or a folder that cannot be written.
        FloatingPointError: when the loss is not finite.
    """
    options = dict(locals())
    o = SimpleNamespace(**options)
    if o.verbose == "auto":
        o.verbose = 1 if sys.stdout.isatty() else 2
    check_values(o)
    if o.average_last and o.ema_momentum is not None:
        raise ValueError("`average_last` and `ema_momentum` are two ways: take one.")
    if o.teacher is None and o.teacher_scores is None and o.top_k is not None:
        raise ValueError("`top_k` needs a `teacher` or `teacher_scores`.")
    texts, files = {}, {}
    for split in ("train", "valid"):
        paths = options[split] or []
        for i, path in enumerate([paths] if isinstance(paths, str | Path) else paths):
            found = read_texts(path, field)
            texts.setdefault(split, []).extend(found)
            files[f"{split} {i + 1}" if i else split] = (path, len(found))
    if "train" not in texts:
        raise ValueError("`train` must name a file or more; got none.")
    folder = run_directory.RunDirectory(output)
    config = run_directory.describe(options, files)
    clear = folder.must_be_cleared(config, overwrite)
    if clear or not folder.is_trained():
        _train(o, folder, texts, config, clear)
        gc.collect()  # The model that was trained, before another one is loaded.
    scores = _score(o, folder, texts, config)
    if o.verbose:
        commands = [
            f"keras-t5gemma finetune --preset {folder.preset} --train pairs.jsonl "
            "--output RUN"
        ]
        print("\n".join(common.report(folder, scores, commands)))
    return scores


def make_objective(name, tokenizer):
    """The objective of a name among `run_options.OBJECTIVES`."""
    if name.startswith("prefixlm"):
        return PrefixLM("random" if name.endswith("random") else "half")
    return UL2.from_tokenizer(tokenizer, name)


def _load(o):
    model = common.load_base(o)
    preprocessor = model.preprocessor
    preprocessor.template = None
    preprocessor.objective = make_objective(o.objective, preprocessor.tokenizer)
    return model


def _train(o, folder, texts, config, clear):
    """From the preset, or from the backup, to `folder.preset`."""
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
        updates = epochs * steps // o.gradient_accumulation_steps
        o.warmup_steps = min(_RISE, updates // 10)
    model.compile(
        optimizer=common.make_optimizer(o, epochs * steps),
        loss=loss,
        rematerialize=o.rematerialize,
    )
    callbacks = _callbacks(o, folder, epochs, steps)
    folder.begin(config, clear)
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
        log.on_train_end()  # It leaves its file open when `fit` fails.


def _loss(o, texts):
    """The labels', or that of a teacher, live or on disk."""
    if o.teacher is None and o.teacher_scores is None:
        return TokenCrossEntropy(o.label_smoothing)
    teacher = None
    if o.teacher_scores is not None and Path(o.teacher_scores).exists():
        teacher = TeacherScores(o.teacher_scores)
    elif o.teacher is None:
        raise ValueError(
            f"`teacher_scores` {o.teacher_scores} does not exist; with a `teacher` it "
            "is written first."
        )
    else:
        teacher = TeacherInMemory.from_preset(o.teacher)
        if o.teacher_scores is not None:
            preprocessor = _load(o).preprocessor
            teacher = write_teacher_scores(
                o.teacher_scores,
                teacher,
                preprocessor,
                texts,
                o.top_k or 64,
                verbose=o.verbose,
            )
            gc.collect()
    return Distillation(
        teacher, o.temperature, o.top_k, o.label_weight, o.label_smoothing
    )


def _plan(o, steps_of_all):
    """Epochs, from one evaluation to the next, and steps of each."""
    total = o.epochs * steps_of_all
    if o.max_steps is not None:
        total = min(total, o.max_steps)
    steps = o.steps_per_epoch or max(1, total // _EVALUATIONS)
    steps = min(steps, total, steps_of_all)
    return total // steps, steps


def _callbacks(o, folder, epochs, steps):
    """In the order of an epoch's end."""
    callbacks = []
    warm_up = o.cross_attention_steps
    if warm_up is None:
        lineage = open_checkpoint(o.preset).lineage or {}
        is_random = lineage.get("needs_warm_up", False)
        warm_up = min(_WARM_UP, epochs * steps // 10 + 1) if is_random else 0
    if warm_up:
        callbacks.append(CrossAttentionWarmUp(warm_up))
    if o.average_last:
        callbacks.append(_SaveLast(folder, epochs, o.average_last))
    if o.ema_momentum is not None:
        return common.with_average(callbacks)
    return callbacks


class _SaveLast(keras.callbacks.Callback):
    """Keep the models after the last epochs, and their mean in the end."""

    def __init__(self, folder, epochs, count):
        super().__init__()
        self.folder = folder
        self.numbers = range(max(0, epochs - count), epochs)

    def on_epoch_end(self, epoch, logs=None):
        if epoch in self.numbers:
            self.model.save_to_preset(self.folder.last / f"epoch-{epoch + 1}")

    def on_train_end(self, logs=None):
        there = [n + 1 for n in self.numbers]
        there = [n for n in there if (self.folder.last / f"epoch-{n}").exists()]
        paths = [self.folder.last / f"epoch-{n}" for n in there]
        best = self.folder.best
        average_presets(paths, best, overwrite=True)
        run_directory.write_json(best / "best.json", {"mean_of": there})
        shutil.rmtree(self.folder.last)


def _score(o, folder, texts, config):
    """Measure the result, as anybody would load it; write all that tells of it."""
    with contextlib.suppress(ImportError):  # `report` says how to get it.
        plot_history(folder.log, folder.curves)
    scores = {}
    if "valid" in texts:
        before = _measure(o, o.preset, texts["valid"])
        after = _measure(o, folder.preset, texts["valid"])
        scores["valid"] = {
            name: {"mean": after[name], "standard_error": None, "before": before[name]}
            for name in ("loss", "accuracy", "perplexity")
        }
    card = common.model_card(o.preset, config, scores, "pretrained")
    write_model_card(folder.preset, **card)
    run_directory.write_json(folder.scores, scores)
    return scores


def _measure(o, preset, texts):
    o = SimpleNamespace(**{**vars(o), "preset": preset})
    model: Seq2SeqLM = _load(o)
    model.compile(loss=TokenCrossEntropy(o.label_smoothing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logs = model.evaluate(
            texts, batch_size=o.batch_size, return_dict=True, verbose=0
        )
    gc.collect()  # One model at a time.
    return logs
