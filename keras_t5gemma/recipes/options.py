"""Options of `finetune` and `pretrain`: their values, and how a command gets them."""

import inspect
import re

from keras_t5gemma.data.pair_dataset import BATCHINGS
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.optimizers import OPTIMIZERS

OBJECTIVES = ("prefixlm", "prefixlm_random", "t5gemma2", "ul2")

_CHOICES = {
    "batching": BATCHINGS,
    "objective": OBJECTIVES,
    "optimizer": tuple(OPTIMIZERS),
    "schedule": ("constant", "cosine"),
    "quantize": (None, "int8", "int4"),
    "freeze": (None, "encoder", "decoder"),
    "mode": ("auto", "min", "max"),
    "verbose": ("auto", 0, 1, 2),
}
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
_LARGEST = 2**31 - 1
_RANGES = {
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
_MAY_BE_NONE = ("steps_per_epoch", "max_steps", "lora_rank", "num_beams", "max_length")
_MAY_BE_NONE += ("ema_momentum", "average_last", "top_k", "cross_attention_steps")
_MAY_BE_NONE += ("warmup_steps",)


def check_values(o):
    """Raise for an option that cannot be, by its name.

    Args:
        o: an object with options as attributes, those above or some of them.

    Raises:
        ValueError: for what is not among the choices, or out of its range.
    """
    for name, accepted in _CHOICES.items():
        value = getattr(o, name, accepted[0])
        if value not in accepted:
            raise ValueError(f"`{name}` must be one of {accepted}; got {value!r}.")
    for name, (low, high) in _RANGES.items():
        value = getattr(o, name, low)
        if value is None and name in _MAY_BE_NONE:
            continue
        kinds = int if isinstance(low, int) else int | float
        if not isinstance(value, kinds) or not low <= value <= high:
            kind = "a whole number" if kinds is int else "a number"
            raise ValueError(
                f"`{name}` must be {kind} from {low} to {high}; got {value!r}."
            )
    if o.save_freq != "epoch" and not (
        isinstance(o.save_freq, int) and o.save_freq > 0
    ):
        raise ValueError(
            f"`save_freq` must be 'epoch' or a number of steps; got {o.save_freq!r}."
        )
    TokenCrossEntropy(o.label_smoothing)


def add_options(parser, function):
    """Give a command the arguments of a function, with their names and defaults.

    Args:
        parser: an `argparse.ArgumentParser`.
        function: one with annotated parameters and a docstring that says of each what
            it is.
    """
    helps = _argument_docs(inspect.getdoc(function) or "")
    for name, parameter in inspect.signature(function).parameters.items():
        default, kind = parameter.default, parameter.annotation
        text = helps.get(name, "").replace("%", "%%")
        arguments = {"dest": name, "default": default, "help": text}
        if default is parameter.empty:
            arguments |= {"default": None, "required": True}
        elif default not in (None, False):
            shown = " ".join(default) if kind is list else default
            arguments["help"] = f"{text} (default: {shown})"
        if kind is bool:
            arguments["action"] = "store_true"
        elif kind is list:
            arguments |= {"nargs": "+", "metavar": "NAME"}
        else:
            kind = _number_or_text if kind == int | str else kind
            arguments |= {"type": kind, "metavar": _METAVARS.get(kind, "TEXT")}
        parser.add_argument("--" + name.replace("_", "-"), **arguments)


def _number_or_text(value):
    return int(value) if value.isdigit() else value


_METAVARS = {int: "N", float: "X"}


def _argument_docs(doc):
    """`{name: text}` of the section `Args:` of a docstring."""
    section = re.split(r"\n(?=\S)", doc.partition("Args:\n")[2])[0]
    rows = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in rows}
