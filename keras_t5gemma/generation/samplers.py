"""Samplers of `Seq2SeqLM.compile`: by name, from a saved model, or KerasHub's objects.

The names, the arguments and the saved form are KerasHub's, so that a saved model loads
with and without it. Its own classes are used where it was imported.
"""

import sys
from typing import Any

import keras

from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.utils.checks import shown


class _Sampler:
    """How the next token is chosen; `options_of_sampler` reads the attributes."""

    settings: dict[str, Any] = {}

    def __init__(self, temperature: float = 1.0, **settings: Any) -> None:
        unknown = set(settings) - set(self.settings)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no {sorted(unknown)}; its arguments are "
                f"temperature, {', '.join(self.settings)}."
            )
        self.config = {"temperature": temperature, **self.settings, **settings}
        vars(self).update(self.config)
        if self.config.get("seed") is not None:
            self.seed_generator = keras.random.SeedGenerator(self.config["seed"])


class GreedySampler(_Sampler):
    """The most likely token."""


class BeamSampler(_Sampler):
    """The most likely sequence among `num_beams`."""

    settings = {"num_beams": 5, "return_all_beams": False}


class RandomSampler(_Sampler):
    """A token at random by its probability."""

    settings = {"seed": None}


class TopKSampler(_Sampler):
    """A token at random among the `k` most likely ones."""

    settings = {"k": 5, "seed": None}


class TopPSampler(_Sampler):
    """A token at random among the most likely ones of total probability `p`."""

    settings = {"p": 0.1, "k": None, "seed": None}


SAMPLERS = {
    "greedy": GreedySampler,
    "beam": BeamSampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
}
_OF_KERAS_HUB = ("contrastive", "speculative")
_BY_CLASS = {kind.__name__: (name, kind) for name, kind in SAMPLERS.items()}


def kind_of(sampler: Any) -> str | None:
    """The name of a sampler's kind, of `SAMPLERS`; `None` for others and subclasses."""
    name, own = _BY_CLASS.get(type(sampler).__name__, (None, None))
    is_known = type(sampler) is own or type(sampler).__module__.startswith("keras_hub.")
    return name if is_known else None


def get(sampler: Any) -> Any:
    """A sampler from its name, its serialized form, or itself.

    Raises:
        ValueError: for anything else.
        ModuleNotFoundError: for a kind that only KerasHub has, if it is missing.
    """
    kind, config = None, {}
    if isinstance(sampler, str):
        kind = SAMPLERS.get(sampler)
    elif isinstance(sampler, dict):
        if str(sampler.get("registered_name")).startswith("keras_hub>"):
            _, kind = _BY_CLASS.get(sampler.get("class_name", ""), (None, None))
        config = sampler.get("config", {})
    elif callable(sampler) or kind_of(sampler) is not None:
        return sampler
    if kind is not None and sys.modules.get("keras_hub") is None:
        return kind(**config)
    is_other = isinstance(sampler, str) and sampler in _OF_KERAS_HUB
    if kind is not None or is_other or isinstance(sampler, dict):
        hub = require_keras_hub(f"The sampler {sampler!r}")
        try:
            return hub.samplers.get(sampler)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`sampler` {shown(sampler)}: {error}") from error
    raise ValueError(
        "`sampler` must be a keras_hub.samplers.Sampler or the name of one, "
        f"such as {', '.join(map(repr, SAMPLERS))}; got {shown(sampler)}."
    )


def serialize(sampler: Any) -> dict:
    """KerasHub's serialized form of a sampler."""
    if not isinstance(sampler, _Sampler):
        return keras.saving.serialize_keras_object(sampler)
    name = type(sampler).__name__
    module = f"keras_hub.src.samplers.{_BY_CLASS[name][0]}_sampler"
    return {
        "module": module,
        "class_name": name,
        "config": dict(sampler.config),
        "registered_name": f"keras_hub>{name}",
    }
