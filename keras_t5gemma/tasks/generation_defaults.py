"""Defaults of `generate` that come with a checkpoint."""

import warnings
from collections.abc import Mapping
from typing import Any

from keras_t5gemma.checkpoints import generation_config, presets
from keras_t5gemma.checkpoints.generation_config import SAMPLING
from keras_t5gemma.generation.options import (
    GenerationOptions,
    id_tuple,
    options_of_sampler,
)
from keras_t5gemma.utils.checks import is_auto, json_object, shown, whole_number

_NAMES = ("stop_token_ids", "max_length")
# What generation_config.json can hold, and does not change what `generate` returns.
_KNOWN = (*_NAMES, *generation_config.OPTIONS)


class GenerationDefaults:
    """Mixin of a task: keywords of `generate` that hold where a call has none.

    `from_preset` reads them from generation_config.json; the saves and the export
    write them.
    """

    sampler: Any
    is_auto_sampler: bool = True
    backbone: Any
    preprocessor: Any

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Keywords of `generate`, e.g. `{"temperature": 0.7, "max_length": 65}`.

        With `temperature`, `top_k` or `top_p`, as of a checkpoint with `do_sample`,
        answers are random. `compile(sampler="greedy")` decodes greedily in spite of
        them; `generation_defaults = None` removes all. `num_beams=1` in a call switches
        off beams, and not sampling, as in transformers.

        Raises when they are set:
            ValueError: for an unknown name or a wrong value.
        """
        return self.__dict__.setdefault("_generation_defaults", {})

    @generation_defaults.setter
    def generation_defaults(self, defaults: Mapping[str, Any] | None) -> None:
        checked = dict(json_object(defaults or {}, "generation_defaults"))
        if checked.get("stop_token_ids") is not None:
            stops = id_tuple(checked["stop_token_ids"], "stop_token_ids")
            checked["stop_token_ids"] = stops
        if checked.get("max_length") is not None:
            checked["max_length"] = whole_number(checked["max_length"], "max_length", 2)
        if unknown := [name for name in checked if name not in _KNOWN]:
            raise ValueError(
                f"`generation_defaults` has unknown keywords {shown(unknown)}; known: "
                f"{list(_KNOWN)}."
            )
        names = [name for name in checked if name not in _NAMES]
        options = GenerationOptions(**{name: checked[name] for name in names})
        # As plain numbers and tuples, which can be saved.
        checked |= {name: getattr(options, name) for name in names}
        # Bypasses Keras, which would wrap the dict.
        self.__dict__["_generation_defaults"] = checked

    def read_generation_defaults(self, source: presets.Source) -> None:
        """Take the defaults of a checkpoint.

        Warns about fields of generation_config.json that are not implemented.

        Raises:
            ValueError: naming the file and the field, for a wrong value.
        """
        found = generation_config.read(source)
        size = self.backbone.config.vocabulary_size
        for name in ("stop_token_ids", "banned_token_ids"):
            ids = found.defaults.get(name, ())
            if max(ids, default=0) >= size:
                raise ValueError(
                    f"{source.location}: generation_config.json has {ids} for "
                    f"`{name}`; the model has {size} ids."
                )
        if found.unused:
            warnings.warn(
                f"{source}: generation_config.json has {found.unused}, which are not "
                "implemented; its other fields are used.",
                stacklevel=4,
            )
        self.generation_defaults = found.defaults

    def get_config(self) -> dict:
        config = super().get_config()  # type: ignore[misc]
        if defaults := self.generation_defaults:
            config["generation_defaults"] = defaults
        return config

    def _with_defaults(self, max_length, stop_token_ids, options):
        """Arguments of `generate`, with the defaults where there is none."""
        defaults = {
            name: value
            for name, value in self.generation_defaults.items()
            if value is not None
        }
        stops, length = (defaults.pop(name, None) for name in _NAMES)
        if max_length is None and length is not None:
            max_length = min(length, self.backbone.config.max_positions)
        if is_auto(stop_token_ids) and stops:
            stop_token_ids = generation_config.stop_ids(
                self.generation_defaults, self.preprocessor
            )
        base = options_of_sampler(self.sampler)
        if base is None:  # A sampler that runs in KerasHub's code has no options.
            return max_length, stop_token_ids, options
        # They exclude each other: what is asked for replaces the others.
        dropped: set[str] = set()
        beams = options.get("num_beams", 1)  # Not checked yet: it may be an array.
        is_other = not isinstance(beams, int) or beams != 1
        if is_other or not self.is_auto_sampler:
            dropped |= {*SAMPLING, "num_beams"}
        names = (*SAMPLING, "speculate", "draft")
        if any(options.get(name) is not None for name in names):
            dropped.add("num_beams")
        defaults = {k: v for k, v in defaults.items() if k not in dropped}
        return max_length, stop_token_ids, {**defaults, **options}
