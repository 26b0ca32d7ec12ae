"""What `finetune` and `pretrain` share: model, optimizer, callbacks, report."""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

import keras

from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.recipes.options import TrainingOptions
from keras_t5gemma.recipes.run_directory import RunDirectory
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.training.optimizers import OPTIMIZERS
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.progress import to_terminal

SPLITS = ("train", "valid", "test")

Options = TypeVar("Options", bound=TrainingOptions)


def with_verbosity(o: Options) -> Options:
    """Copy of the options in which `verbose` is a number."""
    if o.verbose != "auto":
        return dataclasses.replace(o)
    return dataclasses.replace(o, verbose=1 if to_terminal() else 2)


def load_base(o: Any) -> Seq2SeqLM:
    """Load the preset to start from, with the sequence lengths of the training.

    Args:
        o: `FinetuneOptions` or `PretrainOptions`.
    """
    names = ("encoder_sequence_length", "decoder_sequence_length")
    lengths = {n: getattr(o, n) for n in names if getattr(o, n) is not None}
    preprocessor = Seq2SeqLMPreprocessor.from_preset(o.preset, **lengths)
    return Seq2SeqLM.from_preset(o.preset, dtype=o.dtype, preprocessor=preprocessor)


def require_float_weights(o: Any, model: Seq2SeqLM) -> None:
    """Raise `ValueError` for quantized weights, which are not trained.

    Args:
        o: `FinetuneOptions` or `PretrainOptions`.
        model: that was loaded, without adapters.
    """
    layers = iter_layers(model.backbone)
    if any(getattr(layer, "quantization_mode", None) for layer in layers):
        adapters = ", or `lora_rank` for adapters" if hasattr(o, "lora_rank") else ""
        raise ValueError(
            "`preset` must have float weights: quantized ones are not trained. Pass a "
            f"float `dtype`{adapters}; got {shown(o.preset)} with `dtype` {o.dtype!r}."
        )


def number_of_updates(o: TrainingOptions, steps: int) -> int:
    """Updates of a training; the last one may accumulate fewer batches.

    Args:
        o: options of the training.
        steps: number of training steps.
    """
    return -(-steps // o.gradient_accumulation_steps)


def make_optimizer(o: TrainingOptions, steps: int) -> keras.optimizers.Optimizer:
    """Build the optimizer and its learning rate schedule.

    Args:
        o: options of the training.
        steps: number of training steps.

    Raises:
        ValueError: when the warm-up is not shorter than the training.
    """
    updates = number_of_updates(o, steps)
    warmup_steps = o.warmup_steps or 0
    if warmup_steps and warmup_steps >= updates:
        raise ValueError(
            f"`warmup_steps` must be below the {updates} updates of the training; got "
            f"{warmup_steps}."
        )
    rate: Any = o.learning_rate
    if warmup_steps or o.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup_steps else rate,
            decay_steps=max(updates - warmup_steps, 1),
            alpha=0.0 if o.schedule == "cosine" else 1.0,  # 1 keeps the rate constant.
            warmup_target=rate if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    arguments: dict[str, Any] = {
        "learning_rate": rate,
        "weight_decay": o.weight_decay or None,
    }
    if o.optimizer == "adamw":
        arguments["weight_decay"] = o.weight_decay  # AdamW does not accept `None`.
    if o.optimizer == "muon":
        arguments["adam_weight_decay"] = o.weight_decay
    if o.global_clipnorm:
        arguments["global_clipnorm"] = o.global_clipnorm
    if o.gradient_accumulation_steps > 1:
        arguments["gradient_accumulation_steps"] = o.gradient_accumulation_steps
    if o.ema_momentum is not None:
        arguments |= {"use_ema": True, "ema_momentum": o.ema_momentum}
    return OPTIMIZERS[o.optimizer](**arguments)


def with_average(
    callbacks: list[keras.callbacks.Callback],
) -> list[keras.callbacks.Callback]:
    """Run callbacks with the moving average of the weights, as validation does."""
    swap = keras.callbacks.SwapEMAWeights()
    Lambda = keras.callbacks.LambdaCallback
    before = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_begin())
    after = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_end())
    return [swap, before, *callbacks, after]


def model_card(
    preset: str | os.PathLike[str],
    config: dict[str, Any],
    scores: dict[str, Any],
    how: str,
) -> dict[str, Any]:
    """Arguments of `write_model_card` for a run.

    Args:
        preset: that the training started from.
        config: contents of the run's config.json.
        scores: contents of its scores.json.
        how: what was done, for the title: `"fine-tuned"`.
    """
    # The path of a local folder means nothing to others, and may be private.
    base = Path(preset).name if os.path.isdir(preset) else preset
    omitted = {"preset", "output", "overwrite", "verbose", "save_freq", *SPLITS}
    training = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config["options"].items()
        if name not in omitted and value is not None
    }
    versions = ("keras_t5gemma", "keras", "backend")
    return {
        "title": f"{base}, {how} on {config['data']['train']['file']}",
        "base": base,
        "data": [{"split": k, **file} for k, file in config["data"].items()],
        "training": training | {name: config[name] for name in versions},
        "scores": {
            f"{split} {name}": score
            for split, measured in scores.items()
            for name, score in measured.items()
        },
    }


def report(
    folder: RunDirectory, scores: dict[str, Any], next_steps: list[str]
) -> list[str]:
    """Lines printed at the end of a run: result, scores and next steps.

    Args:
        folder: of the run.
        scores: contents of its scores.json.
        next_steps: commands to suggest.
    """
    lines = ["", f"{folder.preset}: {folder.which_model()}."]
    for split, measured in scores.items():
        numbers = []
        for name, score in measured.items():
            error = score["standard_error"]
            end = "" if error is None else f" ± {error:.2g}"
            numbers.append(f"{name} {score['before']:.4g} -> {score['mean']:.4g}{end}")
        lines.append(f"  {split}: {', '.join(numbers)}")
    if not folder.curves.exists():
        lines.append(
            f"No {folder.curves.name} without matplotlib: pip install matplotlib, then "
            f"keras_t5gemma.plot_history({str(folder.log)!r}, {str(folder.curves)!r})."
        )
    lines += [
        "Next:",
        *(f"  {step}" for step in next_steps),
        f"  {folder.preset / 'README.md'}: the model card, to be completed by hand",
    ]
    return lines
