"""How the next token is chosen: what a user may ask of `generate`."""

import dataclasses
import numbers

import keras_hub
import numpy as np

from keras_t5gemma.tokenization.token_ids import check_range
from keras_t5gemma.utils.checks import number, whole_number


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """What `Seq2SeqLM.generate` takes as keywords; greedy when nothing is given.

    Any of `temperature`, `top_k`, `top_p` turns sampling on; `num_beams` above 1 is
    beam search. The penalties and the lists of ids work with all three. Names and
    meanings are those of transformers; its beams and penalties give the same tokens.

    Args:
        num_beams: beams a source.
        length_penalty: beams are ranked by their log-probability over their length to
            this power; 0 favours short answers.
        temperature: logits are divided by it, above 0.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest tokens whose probability reaches this, in
            (0, 1] (arXiv 1904.09751).
        repetition_penalty: tokens that are there already, prompt included, have
            their logit divided by it, or multiplied below 0 (arXiv 1909.05858).
        no_repeat_ngram_size: no n tokens in a row come twice; 0 is off.
        min_new_tokens: no stop id before so many tokens after the prompt.
        banned_token_ids: ids that are never written.
        forced_token_ids: the first ids of every answer; or a dict from places in the
            answer, counted from 0, to ids.
        num_return_sequences: answers a source, best first with beams.
        return_scores: also return log-probabilities.
        seed: of sampling. Row i of a request depends on it and on i alone, whatever
            the batch size; `None` draws one from Keras's global seed.
        max_time: seconds after which `generate` returns what it has.

    Raises:
        ValueError: for a value out of range, or options that exclude each other.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    banned_token_ids: tuple = ()
    forced_token_ids: tuple = ()
    num_return_sequences: int = 1
    return_scores: bool = False
    seed: int | None = None
    max_time: float | None = None

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        banned = id_tuple(self.banned_token_ids, "banned_token_ids")
        store("banned_token_ids", tuple(sorted(set(banned))))
        store("forced_token_ids", _places_and_ids(self.forced_token_ids))
        for name, low in (
            ("num_beams", 1),
            ("top_k", 1),
            ("no_repeat_ngram_size", 0),
            ("min_new_tokens", 0),
            ("num_return_sequences", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is None and GenerationOptions.__dict__[name] is None:
                continue
            store(name, whole_number(value, name, low))
        for name, high in (
            ("temperature", None),
            ("top_p", 1),
            ("repetition_penalty", None),
            ("max_time", None),
        ):
            value = getattr(self, name)
            if value is None and GenerationOptions.__dict__[name] is None:
                continue
            number(value, name, above=0, at_most=high)
        number(self.length_penalty, "length_penalty")
        if self.is_sampling and self.num_beams > 1:
            raise ValueError(
                "`temperature`, `top_k`, `top_p` sample, `num_beams` searches: give "
                f"one or the other; got {self}."
            )
        if not self.is_sampling and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"`num_return_sequences` of {self.num_return_sequences} needs as many "
                f"`num_beams` (got {self.num_beams}), or sampling (`temperature`, "
                "`top_k`, `top_p`): greedy decoding has one answer."
            )

    @property
    def is_sampling(self):
        """Whether the answer depends on the seed."""
        return any(x is not None for x in (self.temperature, self.top_k, self.top_p))

    @property
    def is_greedy(self):
        """Whether the next token is the one with the largest logit of the model."""
        return self == GenerationOptions(
            length_penalty=self.length_penalty, seed=self.seed, max_time=self.max_time
        )

    @property
    def rows_per_source(self):
        """Decoder rows that a source needs."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    def check(self, vocabulary_size, max_length):
        """Raise `ValueError` for what does not fit a model and a request."""
        forced = tuple(token for _, token in self.forced_token_ids)
        for name, ids in (
            ("banned_token_ids", self.banned_token_ids),
            ("forced_token_ids", forced),
        ):
            check_range(np.asarray(ids or [0]), name, vocabulary_size)
        if len(self.banned_token_ids) == vocabulary_size:
            raise ValueError(
                f"`banned_token_ids` holds all {vocabulary_size} ids: none is left."
            )
        both = sorted(set(forced) & set(self.banned_token_ids))
        if both:
            raise ValueError(
                f"`forced_token_ids` and `banned_token_ids` share the ids {both}."
            )
        for name in ("num_beams", "top_k"):
            if (getattr(self, name) or 1) > vocabulary_size:
                raise ValueError(
                    f"`{name}` of {getattr(self, name)} is more than the "
                    f"{vocabulary_size} tokens of the vocabulary."
                )
        places = [place for place, _ in self.forced_token_ids]
        if places and not 0 <= min(places) <= max(places) < max_length - 1:
            raise ValueError(
                f"`forced_token_ids` has places {places}, beyond the `max_length` of "
                f"{max_length}."
            )
        if self.min_new_tokens >= max_length:
            raise ValueError(
                f"`min_new_tokens` of {self.min_new_tokens} is more than the "
                f"`max_length` of {max_length} leaves."
            )

    def knobs(self):
        """The values that a compiled program takes as data, not as code."""
        return {
            "length_penalty": np.float32(self.length_penalty),
            "temperature": np.float32(self.temperature or 1.0),
            "top_p": np.float32(self.top_p or 1.0),
            "repetition_penalty": np.float32(self.repetition_penalty),
            "min_new_tokens": np.int32(self.min_new_tokens),
        }

    def program(self):
        """These options less what `knobs` holds: equal ones share compiled programs."""
        return dataclasses.replace(
            self,
            length_penalty=1.0,
            temperature=None if self.temperature is None else 1.0,
            top_p=None if self.top_p is None else 1.0,
            repetition_penalty=1.0 if self.repetition_penalty == 1.0 else 2.0,
            min_new_tokens=min(self.min_new_tokens, 1),
            seed=None,
            max_time=None,
        )


def id_tuple(ids, name):
    """Ids as a tuple of ints; `ValueError` for what is no list of whole numbers."""
    is_list = not isinstance(ids, str | bytes) and hasattr(ids, "__iter__")
    ids = list(ids) if is_list else ids
    if not is_list or not all(isinstance(i, numbers.Integral) for i in ids):
        raise ValueError(f"`{name}` must be a list of token ids; got {ids!r}.")
    return tuple(int(i) for i in ids)


def _places_and_ids(forced):
    """`forced_token_ids` in any of its forms as sorted pairs of place and id."""
    name = "forced_token_ids"
    if isinstance(forced, tuple) and all(isinstance(item, tuple) for item in forced):
        return forced  # Pairs already: `dataclasses.replace` hands them back.
    if isinstance(forced, dict):
        places, ids = id_tuple(forced, name), id_tuple(forced.values(), name)
    else:
        ids = id_tuple(forced, name)
        places = range(len(ids))
    return tuple(sorted(zip(places, ids, strict=True)))


def make_options(sampler, given):
    """The options of a sampler and, on top of them, of a user.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
        given: dict of keywords of `GenerationOptions`.

    Returns:
        A `GenerationOptions`; `None` where the sampler is of a kind that options
        cannot express.

    Raises:
        ValueError: for unknown names, values out of range, or options for a sampler
            that chooses the tokens itself.
    """
    names = [field.name for field in dataclasses.fields(GenerationOptions)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(
            f"Unknown options {unknown}; those of GenerationOptions are {names}. "
            "Samplers are set with `compile(sampler=...)`."
        )
    base = options_of_sampler(sampler)
    if base is None:
        if given:
            raise ValueError(
                f"The sampler {type(sampler).__name__} chooses the tokens itself; it "
                f"takes none of {sorted(given)}."
            )
        return None
    if given.get("num_beams", 1) != 1:
        base = {}
    if {"temperature", "top_k", "top_p"} & set(given):
        base.pop("num_beams", None)
    return GenerationOptions(**{**base, **given})


def options_of_sampler(sampler):
    """The options that a KerasHub sampler stands for, or `None` for any other one.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
    """
    samplers = keras_hub.samplers
    kind = type(sampler)
    if kind is samplers.GreedySampler:
        return {}
    if kind is samplers.BeamSampler:
        if sampler.return_all_beams:
            raise ValueError(
                "BeamSampler(return_all_beams=True) is not supported; use "
                "`generate(..., num_beams=n, num_return_sequences=n)`."
            )
        return {"num_beams": sampler.num_beams}
    if kind is samplers.RandomSampler:
        return {"temperature": sampler.temperature}
    if kind is samplers.TopKSampler:
        return {"temperature": sampler.temperature, "top_k": sampler.k}
    if kind is samplers.TopPSampler:
        return {
            "temperature": sampler.temperature,
            "top_k": sampler.k,
            "top_p": sampler.p,
        }
    return None
