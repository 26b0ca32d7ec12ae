"""generation_config.json of transformers: defaults of `Seq2SeqLM.generate`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_t5gemma.checkpoints.presets import Source
from keras_t5gemma.utils.checks import flag, number, shown, whole_number
from keras_t5gemma.utils.files import named_values

GENERATION_CONFIG = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p")
_IDS = {"bos_token_id": 2, "decoder_start_token_id": 2, "pad_token_id": 0}
_TOP_K = 50  # transformers' where a file has none.
# Fields of the name and meaning of our options; their neutral values.
_OPTIONS: dict[str, Any] = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
# Options that a file can hold.
OPTIONS = (*_OPTIONS, "banned_token_ids", *SAMPLING)
# Fields that change the tokens and are not implemented; their neutral values.
_OTHERS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "max_time": None,
    "min_length": 0,
    "min_p": None,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "stop_strings": None,
    "typical_p": 1.0,
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What a generation_config.json says.

    Args:
        defaults: keywords of `Seq2SeqLM.generate`.
        unused: fields that change the tokens, but are not implemented.
    """

    defaults: dict[str, Any]
    unused: dict[str, Any]


def read(source: Source) -> GenerationConfig:
    """Defaults of a checkpoint's generation_config.json; empty without one.

    Raises:
        ValueError: naming the file and the field, for a wrong value.
    """
    try:
        fields = source.read_json(GENERATION_CONFIG, default={})
    except OSError:  # Without a network, of a model that was downloaded before.
        fields = {}
    with named_values(f"{source.location}: {GENERATION_CONFIG}"):
        return parse(fields)


def parse(fields: Mapping[str, Any]) -> GenerationConfig:
    """Defaults from the parsed file.

    Raises:
        ValueError: naming the field, for a value of a wrong type or range.
    """
    for name, needed in _IDS.items():
        if fields.get(name) not in (None, needed):
            raise ValueError(
                f"`{name}` must be {needed}, as in Gemma's vocabulary; got "
                f"{shown(fields[name])}."
            )
    defaults: dict[str, Any] = {}
    if stops := _ids(fields.get("eos_token_id"), "eos_token_id"):
        defaults["stop_token_ids"] = stops
    new, length = fields.get("max_new_tokens"), fields.get("max_length")
    if new is not None:  # It has precedence, and does not count the start token.
        defaults["max_length"] = 1 + whole_number(new, "max_new_tokens", 1)
    elif length is not None:
        defaults["max_length"] = whole_number(length, "max_length", 2)
    if banned := _ids(fields.get("suppress_tokens"), "suppress_tokens"):
        defaults["banned_token_ids"] = banned
    for name, neutral in _OPTIONS.items():
        value = fields.get(name)
        if value is None or value == neutral and not isinstance(value, bool):
            continue
        if isinstance(neutral, int):
            defaults[name] = whole_number(value, name, 0 + (name == "num_beams"))
        else:
            above = None if name == "length_penalty" else 0
            defaults[name] = number(value, name, above=above)
    unused = {
        name: fields[name]
        for name, neutral in _OTHERS.items()
        if fields.get(name) not in (None, neutral)
    }
    sampling = _sampling(fields)
    if "num_beams" in defaults and sampling:
        unused["do_sample"] = True  # Beams that sample are not implemented.
    else:
        defaults |= sampling
    return GenerationConfig(defaults, unused)


def _sampling(fields):
    """Sampling options; transformers ignores the fields without `do_sample`."""
    is_sampling = flag(fields.get("do_sample") or False, "do_sample")
    values = {name: fields.get(name) for name in SAMPLING}
    temperature = values["temperature"]
    if temperature is not None and (is_sampling or temperature != 0):  # 0: greedy.
        values["temperature"] = number(temperature, "temperature", above=0)
    if values["top_k"] is not None:
        values["top_k"] = whole_number(values["top_k"], "top_k", 0) or None
    elif "top_k" not in fields:
        values["top_k"] = _TOP_K
    if values["top_p"] is not None:
        values["top_p"] = number(values["top_p"], "top_p", above=0, at_most=1)
    if not is_sampling:
        return {}
    if values["temperature"] is None:
        values["temperature"] = 1.0
    return {
        name: value
        for name, value in values.items()
        if value is not None and (name, value) != ("top_p", 1.0)
    }


def _ids(value, name):
    """A list of ids, or one id, as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(whole_number(each, name, 0) for each in values)


def stop_ids(defaults: Mapping[str, Any], preprocessor: Any) -> tuple[int, ...]:
    """Ids that end an answer.

    Args:
        defaults: keywords of `Seq2SeqLM.generate`.
        preprocessor: a `Seq2SeqLMPreprocessor`; `None` without text.

    Returns:
        Those of `defaults` and the one that ends a response in training, without which
        a model that was trained here would not stop; or those of the preprocessor.
    """
    given = defaults.get("stop_token_ids")
    if preprocessor is None:
        return given or (1,)
    if not given:
        return preprocessor.stop_ids
    return tuple(dict.fromkeys((*given, preprocessor.end_id)))


def write(defaults: Mapping[str, Any], preprocessor: Any = None) -> dict[str, Any]:
    """Fields of the file; `parse` makes the same defaults of them.

    Args:
        defaults: keywords of `Seq2SeqLM.generate`.
        preprocessor: see `stop_ids`.
    """
    fields = {k: v for k, v in defaults.items() if k != "stop_token_ids"} | _IDS
    fields["eos_token_id"] = list(stop_ids(defaults, preprocessor))
    if banned := fields.pop("banned_token_ids", None):
        fields["suppress_tokens"] = list(banned)
    if any(fields.get(name) is not None for name in SAMPLING):
        fields |= {"do_sample": True, "top_k": fields.get("top_k") or 0}
    return {name: value for name, value in fields.items() if value is not None}


def save(folder: Path, defaults: Mapping[str, Any], preprocessor: Any = None) -> None:
    """Write the file into a folder; see `write`."""
    text = json.dumps(write(defaults, preprocessor), indent=2, sort_keys=True)
    (folder / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")


def copy(source: Source, folder: Path, preprocessor: Any = None) -> None:
    """Write the defaults of a checkpoint, if it has any, into a folder."""
    if defaults := read(source).defaults:
        save(folder, defaults, preprocessor)
