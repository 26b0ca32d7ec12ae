"""What `finetune` and `pretrain` have in common, from their options."""

import os
from pathlib import Path

import keras

from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.training.optimizers import OPTIMIZERS

SPLITS = ("train", "valid", "test")


def load_base(o):
    """The preset to start from, with the lengths of the training."""
    lengths = ("encoder_sequence_length", "decoder_sequence_length")
    lengths = {n: getattr(o, n) for n in lengths if getattr(o, n) is not None}
    preprocessor = Seq2SeqLMPreprocessor.from_preset(o.preset, **lengths)
    return Seq2SeqLM.from_preset(o.preset, dtype=o.dtype, preprocessor=preprocessor)


def make_optimizer(o, steps):
    """The optimizer that options ask for, of `steps` training steps in all."""
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


def with_average(callbacks):
    """Let them see the moving average of the weights, as the validation does."""
    swap = keras.callbacks.SwapEMAWeights()
    Lambda = keras.callbacks.LambdaCallback
    before = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_begin())
    after = Lambda(on_epoch_end=lambda epoch, logs: swap.on_test_end())
    return [swap, before, *callbacks, after]


def model_card(preset, config, scores, how):
    """Arguments of `write_model_card`."""
    # A folder of the user's says nothing to others.
    base = Path(preset).name if os.path.isdir(preset) else preset
    left_out = {"preset", "output", "overwrite", "verbose", "save_freq", *SPLITS}
    training = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config["options"].items()
        if name not in left_out and value is not None
    }
    versions = ("keras_t5gemma", "keras", "keras_hub", "backend")
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


def report(folder, scores, next_steps):
    """Lines that say what there is, and what to do next.

    Args:
        folder: a `RunDirectory`.
        scores: what is in its scores.json.
        next_steps: commands.
    """
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
        *(f"  {step}" for step in next_steps),
        f"  {folder.preset / 'README.md'}: a model card, to be completed by hand",
    ]
    return lines
