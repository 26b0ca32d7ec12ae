"""Options of `finetune` and `pretrain`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from keras_t5gemma.utils.checks import number, whole_number
from keras_t5gemma.utils.options import PathOrName, PathsOrNames, check_choices

_LARGEST = 2**31 - 1
_COUNTS = (
    "batch_size",
    "epochs",
    "steps_per_epoch",
    "max_steps",
    "gradient_accumulation_steps",
    "lora_rank",
    "sample_rows",
    "num_beams",
    "max_length",
    "top_k",
    "average_last",
)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS, (1, _LARGEST)),
    "warmup_steps": (0, _LARGEST),
    "cross_attention_steps": (0, _LARGEST),
    "seed": (0, _LARGEST),
    "learning_rate": (0.0, 1e3),
    "weight_decay": (0.0, 1e3),
    "global_clipnorm": (0.0, 1e9),
    "ema_momentum": (0.0, 1.0),
    "temperature": (0.01, 100.0),
    "label_weight": (0.0, 1.0),
}


@dataclasses.dataclass
class FinetuneData:
    """Files of `finetune`."""

    preset: PathOrName
    """Name, folder or handle of the model to start from."""
    train: PathOrName
    """File of training pairs: .jsonl, .csv, .tsv, also with .gz, or .parquet; see
    `read_pairs`."""
    output: PathOrName
    """Run directory, which will hold the result in preset/; the same options resume an
    interrupted run there."""
    valid: PathOrName | None = None
    """File of validation pairs, by which the best epoch is chosen."""
    test: PathOrName | None = None
    """File of pairs on which the result is measured once, after training."""
    _: dataclasses.KW_ONLY
    source: str = "source"
    """Field of the files with the encoder's text."""
    target: str = "target"
    """Field of the files with the decoder's text."""


@dataclasses.dataclass
class PretrainData:
    """Files of `pretrain`."""

    preset: PathOrName
    """Name, folder or handle of the model to start from, as `keras-t5gemma adapt`
    writes it."""
    train: PathsOrNames
    """Files of text, one document per line or row: .txt, .jsonl, .csv, .tsv, also with
    .gz, or .parquet; see `read_texts`."""
    output: PathOrName
    """Run directory, which will hold the result in preset/; the same options resume an
    interrupted run there."""
    valid: PathsOrNames | None = None
    """Files of text on which the loss is measured."""
    _: dataclasses.KW_ONLY
    field: str = "text"
    """Field with the text, for file formats that have fields."""
    objective: Literal["prefixlm", "prefixlm_random", "t5gemma2", "ul2"] = "prefixlm"
    """prefixlm splits texts in half, prefixlm_random at a random place; t5gemma2 and
    ul2 are mixtures of denoisers."""


@dataclasses.dataclass(kw_only=True)
class TrainingOptions:
    """Options that `finetune` and `pretrain` share."""

    dtype: str | None = None
    """Data type of the model, e.g. mixed_bfloat16; None is Keras's default."""
    encoder_sequence_length: int | None = None
    """Maximum number of encoder tokens; None is the preset's, or 512."""
    decoder_sequence_length: int | None = None
    """Maximum number of decoder tokens; None is the preset's."""
    batch_size: int = 32
    """Rows per step."""
    epochs: int = 3
    """Passes over the training data."""
    steps_per_epoch: int | None = None
    """Steps between validations; None is the whole training data."""
    max_steps: int | None = None
    """Maximum number of training steps; None is all of `epochs`."""
    optimizer: Literal["adafactor", "adamw", "lion", "muon"] = "adafactor"
    """Keras optimizer; Adafactor needs the least memory."""
    learning_rate: float = 1e-4
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine decay to 0."""
    warmup_steps: int | None = None
    """Optimizer updates in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    global_clipnorm: float = 1.0
    """Maximum global norm of the gradients; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Share of each target spread over the vocabulary, in [0, 1)."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer update; the last update uses the remaining batches."""
    ema_momentum: float | None = None
    """Momentum of a moving average of the weights, e.g. 0.999, which is validated and
    saved; None keeps no average."""
    rematerialize: bool = False
    """Recompute activations in the backward pass: less memory, more time; see
    `Seq2SeqLM.compile`."""
    seed: int = 0
    """Seed of the order of the data, dropout and new weights."""
    save_freq: Literal["epoch"] | int = "epoch"
    """Write a backup every epoch, or every N steps."""
    overwrite: bool = False
    """Replace a finished run, or one with other options, in the run directory."""
    verbose: Literal["auto", 0, 1, 2] = "auto"
    """0 silent, 1 progress bars, 2 one line per epoch; auto is 1 on a terminal, else
    2."""

    def check(self) -> None:
        """Check choices and ranges.

        Raises:
            ValueError: naming the option, its value and what is accepted.
        """
        check_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _RANGES or (value is None and field.default is None):
                continue
            low, high = _RANGES[field.name]
            if isinstance(low, int):
                whole_number(value, field.name, low, int(high))
            else:
                number(value, field.name, at_least=low, at_most=high)
        number(self.label_smoothing, "label_smoothing", at_least=0, below=1)
        if self.save_freq != "epoch":
            whole_number(self.save_freq, "save_freq", 1, other="'epoch'")


@dataclasses.dataclass
class FinetuneOptions(TrainingOptions, FinetuneData):
    """Options of `finetune`."""

    _: dataclasses.KW_ONLY
    warmup_steps: int = 0
    """Optimizer updates in which the learning rate rises from 0."""
    batching: Literal["bucketed", "packed", "fixed"] = "bucketed"
    """How pairs become batches; see `Seq2SeqLM.fit`. A row is a pair, with packed
    several pairs."""
    lora_rank: int | None = None
    """Rank of LoRA adapters, which are then the only trained weights; None trains the
    model itself."""
    lora_parts: Sequence[str] | None = None
    """Where the adapters are: encoder, decoder, cross_attention, mlp, embeddings; None
    is all attention layers."""
    quantize: Literal["int8", "int4"] | None = None
    """Quantize the weights below the adapters, in the result too."""
    freeze: Literal["encoder", "decoder"] | None = None
    """Tower that is not trained."""
    metrics: str | Sequence[str | Callable[..., Any]] | Callable[..., Any] = ("rouge",)
    """Metrics of generated texts: rouge, bleu, chrf, exact_match."""
    monitor: str = "val_loss"
    """Measure that chooses the best epoch: val_loss, val_rougeL, ..."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether a lower (min) or higher (max) `monitor` is better; auto works for losses
    and the built-in metrics."""
    sample_rows: int = 200
    """Number of validation pairs for which texts are generated after each epoch."""
    num_beams: int | None = None
    """Number of beams for those texts; None is greedy search."""
    max_length: int | None = None
    """Maximum number of tokens of those texts; None is the preset's."""

    def check(self) -> None:
        """As `TrainingOptions.check`, and options that exclude or need each other."""
        super().check()
        for name in ("lora_parts", "quantize"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise ValueError(
                    f"`{name}` needs `lora_rank`: only adapters are trained."
                )
        if self.freeze is not None and self.lora_rank is not None:
            raise ValueError(
                "`freeze` is for training without adapters; with `lora_rank`, "
                "`lora_parts` says which parts are trained."
            )


@dataclasses.dataclass
class PretrainOptions(TrainingOptions, PretrainData):
    """Options of `pretrain`."""

    _: dataclasses.KW_ONLY
    batch_size: int = 8
    """Rows per step; each is packed with several texts."""
    epochs: int = 1
    """Passes over the texts."""
    steps_per_epoch: int | None = None
    """Steps between validations; None is a tenth of the training."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or cosine decay to 0."""
    warmup_steps: int | None = None
    """Optimizer updates in which the learning rate rises from 0; None is 100, or a
    tenth of a training of fewer than 1000 updates."""
    cross_attention_steps: int | None = None
    """Number of initial steps that train only the cross-attention. Default: 1000, at
    most a tenth of the training, if the cross-attention is random, else 0."""
    average_last: int | None = None
    """Number of last epochs whose weights are averaged into the result; T5Gemma 2 uses
    5."""
    teacher: PathOrName | None = None
    """Name, folder or handle of a KerasHub causal LM with the same vocabulary to
    distill from; see `Distillation`."""
    teacher_scores: PathOrName | None = None
    """Folder of precomputed teacher log-probabilities. It is written first where it
    does not exist, so that the teacher is not in memory during training."""
    top_k: int | None = None
    """Number of likeliest tokens of the teacher that are used; None is all of a
    `teacher`, 64 in `teacher_scores`."""
    temperature: float = 1.0
    """Temperature of the distillation."""
    label_weight: float = 0.0
    """Weight of the labels' loss, from 0 to 1; the teacher's gets the rest."""

    def check(self) -> None:
        """As `TrainingOptions.check`, and options that exclude or need each other."""
        super().check()
        if self.average_last and self.ema_momentum is not None:
            raise ValueError(
                "`average_last` and `ema_momentum` both average weights: take one."
            )
        if self.teacher is None and self.teacher_scores is None:
            for name in ("top_k", "temperature", "label_weight"):
                if getattr(self, name) != getattr(PretrainOptions, name):
                    raise ValueError(f"`{name}` needs a `teacher` or `teacher_scores`.")
