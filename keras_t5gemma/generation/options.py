"""Options of `generate`: sampling, beam search, penalties, banned and forced ids."""

import dataclasses
import numbers
from collections.abc import KeysView, ValuesView
from typing import Any

import numpy as np

from keras_t5gemma.generation.samplers import SAMPLERS, kind_of
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization.token_ids import check_range
from keras_t5gemma.utils.buckets import power_of_two
from keras_t5gemma.utils.checks import MAX_COUNT, flag, number, shown, whole_number

# Not generators, which may be endless.
_LISTS = (list, tuple, set, frozenset, range, KeysView, ValuesView)

_MAX_SEED = 2**128 - 1
_MAX_ANSWERS = 4096  # Of a source; arrays of all of them are allocated at once.


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Options of `Seq2SeqLM.generate`, passed as keywords; the default is greedy.

    Any of `temperature`, `top_k`, `top_p` turns on sampling; `num_beams` above 1 turns
    on beam search. The penalties and the lists of ids work in all cases. Names and
    meanings are those of transformers; beam search and penalties give the same tokens.

    Args:
        num_beams: beams per source.
        length_penalty: beams are ranked by their log-probability divided by their
            length to this power; 0 favors short answers.
        temperature: divides the logits, above 0.
        top_k: sample among the k most likely tokens.
        top_p: nucleus sampling: sample among the fewest tokens whose probability
            reaches this, in (0, 1] (arXiv 1904.09751).
        repetition_penalty: divides positive and multiplies negative logits of tokens
            that occur already, in the prompt too (arXiv 1909.05858).
        no_repeat_ngram_size: no n-gram of this size occurs twice; 0 is off.
        min_new_tokens: minimum number of tokens after the prompt before a stop id.
        banned_token_ids: ids that are never generated.
        forced_token_ids: the first ids of every answer; or a dict from positions in
            the answer, counted from 0, to ids.
        num_return_sequences: answers per source; with beams the best come first.
        return_scores: also return log-probabilities.
        seed: of sampling. Row i of a request depends on the seed and on i alone, for
            every batch size; `None` draws a seed from Keras's global generator.
        max_time: seconds after which `generate` returns the tokens it has.
        speculate: `"source"` proposes tokens that followed the last ones in the source
            or in the answer, and verifies several in one pass of the decoder: the same
            answers, greedy or sampled (up to rounding in bfloat16 and int8), in less
            time where they repeat what was read. No beams. On PyTorch the passes are
            not compiled.
        draft: a smaller `Seq2SeqLM` of the same vocabulary that proposes the tokens, in
            any data type; instead of `speculate`. The model keeps it until another
            draft is used.

    Raises:
        ValueError: for a value out of range, or options that exclude each other.

    Examples:
        >>> keras_t5gemma.GenerationOptions(temperature=0.7, top_p=0.9).is_sampling
        True
        >>> keras_t5gemma.GenerationOptions(num_beams=0)
        Traceback (most recent call last):
        ValueError: ...
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
    speculate: str | None = None
    draft: Any = None

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
            high = {"seed": _MAX_SEED, "num_return_sequences": _MAX_ANSWERS}.get(name)
            store(name, whole_number(value, name, low, high))
        for name, high in (
            ("temperature", None),
            ("top_p", 1),
            ("repetition_penalty", None),
            ("max_time", None),
        ):
            value = getattr(self, name)
            if value is None and GenerationOptions.__dict__[name] is None:
                continue
            store(name, number(value, name, above=0, at_most=high))
        store("length_penalty", number(self.length_penalty, "length_penalty"))
        store("return_scores", flag(self.return_scores, "return_scores"))
        if self.is_sampling and self.num_beams > 1:
            raise ValueError(
                "`num_beams` must be 1 with `temperature`, `top_k` or `top_p`, which "
                f"sample; got {self}."
            )
        if not self.is_sampling and self.num_return_sequences > self.num_beams:
            raise ValueError(
                "`num_return_sequences` must be at most `num_beams`, unless "
                "`temperature`, `top_k` or `top_p` sample; got "
                f"{self.num_return_sequences} answers of {self.num_beams} beams."
            )

        self._check_speculation()

    def _check_speculation(self):
        is_text = isinstance(self.speculate, str)
        if self.speculate is not None and not (is_text and self.speculate == "source"):
            raise ValueError(
                f"`speculate` must be 'source' or None; got {shown(self.speculate)}."
            )
        backbone = getattr(self.draft, "backbone", None)
        is_model = isinstance(backbone, Backbone) and hasattr(self.draft, "generate")
        if self.draft is not None and not is_model:
            raise ValueError(
                f"`draft` must be a Seq2SeqLM or None; got {shown(self.draft)}."
            )
        if self.speculate and self.draft is not None:
            raise ValueError(
                f"`speculate` must be None with a `draft`; got {self.speculate!r}."
            )
        if self.speculates and self.num_beams > 1:
            name = "speculate" if self.speculate else "draft"
            raise ValueError(
                f"`{name}` needs greedy decoding or sampling: `num_beams` must be 1; "
                f"got {self.num_beams}."
            )

    @property
    def speculates(self) -> bool:
        """Whether tokens are proposed and then verified."""
        return self.speculate is not None or self.draft is not None

    @property
    def is_sampling(self) -> bool:
        """Whether the answer depends on the seed."""
        return any(x is not None for x in (self.temperature, self.top_k, self.top_p))

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the one with the largest logit of the model."""
        return self == GenerationOptions(
            length_penalty=self.length_penalty,
            seed=self.seed,
            max_time=self.max_time,
            speculate=self.speculate,
            draft=self.draft,
        )

    @property
    def rows_per_source(self) -> int:
        """Number of decoder rows per source."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    def check(self, vocabulary_size: int, max_length: int) -> None:
        """Check that the options fit a model and a request.

        Args:
            vocabulary_size: of the model.
            max_length: longest answer with start token and prompt, in tokens.

        Raises:
            ValueError: naming the option that does not fit.
        """
        forced = tuple(token for _, token in self.forced_token_ids)
        for name, ids in (
            ("banned_token_ids", self.banned_token_ids),
            ("forced_token_ids", forced),
        ):
            check_range([ids or (0,)], name, vocabulary_size)
        if len(self.banned_token_ids) == vocabulary_size:
            raise ValueError(
                f"`banned_token_ids` must leave one of {vocabulary_size} ids; got all."
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
                f"`forced_token_ids` has positions {places}, beyond the `max_length` "
                f"of {max_length}."
            )
        if self.min_new_tokens >= max_length:
            raise ValueError(
                f"`min_new_tokens` of {self.min_new_tokens} is more than the "
                f"`max_length` of {max_length} leaves."
            )

    def traced_args(self) -> dict[str, np.generic]:
        """The values that are arguments of a compiled program, not part of its code.

        Returns:
            `{option: number}`.
        """
        return {
            "length_penalty": np.float32(self.length_penalty),
            "temperature": np.float32(self.temperature or 1.0),
            "top_p": np.float32(self.top_p or 1.0),
            "repetition_penalty": np.float32(self.repetition_penalty),
            "min_new_tokens": np.int32(self.min_new_tokens),
        }

    def token_lists(
        self, stop_ids: tuple | None, vocabulary_size: int, length: int
    ) -> dict[str, np.ndarray]:
        """The lists of ids, as further arguments of a compiled program.

        Their shapes do not depend on the ids, so that all lists share a program. The
        first axis has size 1: they are not split over devices like rows.

        Args:
            stop_ids: ids that end a row, or `None`.
            vocabulary_size: of the model.
            length: of the decoder's arrays.

        Returns:
            A dict of `stop_ids`, int32 `(1, n)`, filled up with -1 to a power of two
            of at least 2; with banned ids `is_banned`, bool `(1, vocabulary_size)`;
            with forced ids `forced_ids`, int32 `(1, length)` by position in the
            answer, -1 where none is forced.
        """
        stops = np.full((1, max(2, power_of_two(len(stop_ids or ())))), -1, "int32")
        stops[0, : len(stop_ids or ())] = stop_ids or ()
        lists = {"stop_ids": stops}
        if self.banned_token_ids:
            lists["is_banned"] = np.zeros((1, vocabulary_size), bool)
            lists["is_banned"][0, list(self.banned_token_ids)] = True
        if self.forced_token_ids:
            lists["forced_ids"] = np.full((1, length), -1, "int32")
            places, ids = zip(*self.forced_token_ids, strict=True)
            lists["forced_ids"][0, list(places)] = ids
        return lists

    def static_options(self) -> "GenerationOptions":
        """These options without the values of `traced_args` and `token_lists`.

        Equal ones share compiled programs.

        Returns:
            A `GenerationOptions`.
        """
        return dataclasses.replace(
            self,
            length_penalty=1.0,
            temperature=None if self.temperature is None else 1.0,
            top_p=None if self.top_p is None else 1.0,
            repetition_penalty=1.0 if self.repetition_penalty == 1.0 else 2.0,
            min_new_tokens=min(self.min_new_tokens, 1),
            banned_token_ids=self.banned_token_ids and (0,),
            forced_token_ids=self.forced_token_ids and ((0, 0),),
            seed=None,
            max_time=None,
        )


def id_tuple(ids: Any, name: str) -> tuple[int, ...]:
    """Ids as a tuple of ints; `ValueError` unless they are a list of whole numbers."""
    found = list(ids) if isinstance(ids, _LISTS) else None
    if isinstance(ids, np.ndarray) and ids.ndim == 1:
        found = list(ids)
    if found is None or not all(
        isinstance(i, numbers.Integral) and 0 <= int(i) <= MAX_COUNT for i in found
    ):
        raise ValueError(f"`{name}` must be a list of token ids; got {shown(ids)}.")
    return tuple(int(i) for i in found)


def _places_and_ids(forced):
    """`forced_token_ids` in any of its forms as sorted pairs of position and id."""
    name = "forced_token_ids"
    if isinstance(forced, tuple) and all(isinstance(item, tuple) for item in forced):
        return forced  # Pairs already, from `dataclasses.replace`.
    if isinstance(forced, dict):
        places, ids = (id_tuple([*part], name) for part in (forced, forced.values()))
    else:
        ids = id_tuple(forced, name)
        places = range(len(ids))
    return tuple(sorted(zip(places, ids, strict=True)))


def make_options(sampler: Any, given: dict) -> GenerationOptions | None:
    """The options of a sampler, overridden by those of a user.

    Args:
        sampler: from `samplers.get`.
        given: keywords of `GenerationOptions`.

    Returns:
        A `GenerationOptions`; `None` when the sampler is of a kind that options cannot
        express.

    Raises:
        ValueError: for unknown names, values out of range, or options together with
            such a sampler.
    """
    names = [field.name for field in dataclasses.fields(GenerationOptions)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        hint = "Samplers are set with `compile(sampler=...)`."
        if "max_new_tokens" in unknown:
            hint += " `max_length` is the length with start token and prompt."
        raise ValueError(
            f"Unknown options {unknown}; those of GenerationOptions are {names}. {hint}"
        )
    base = options_of_sampler(sampler)
    if base is None:
        if given:
            raise ValueError(
                f"The sampler {type(sampler).__name__} does not support options; got "
                f"{sorted(given)}. Compile with sampler='auto', or the name of one of "
                f"{list(SAMPLERS)}."
            )
        return None
    if "num_beams" in given and whole_number(given["num_beams"], "num_beams", 1) > 1:
        base = {}
    if {"temperature", "top_k", "top_p"} & set(given):
        base.pop("num_beams", None)
    return GenerationOptions(**{**base, **given})


def options_of_sampler(sampler: Any) -> dict | None:
    """The options equivalent to a sampler, or `None` for one that runs in KerasHub.

    Args:
        sampler: from `samplers.get`.
    """
    kind = kind_of(sampler)
    if kind == "greedy" or sampler is None:  # `None` is a model that is not compiled.
        return {}
    if kind == "beam":
        if sampler.return_all_beams:
            raise ValueError(
                "BeamSampler(return_all_beams=True) is not supported; use "
                "`generate(..., num_beams=n, num_return_sequences=n)`."
            )
        return {"num_beams": sampler.num_beams}
    if kind == "random":
        return {"temperature": sampler.temperature}
    if kind == "top_k":
        return {"temperature": sampler.temperature, "top_k": sampler.k}
    if kind == "top_p":
        return {
            "temperature": sampler.temperature,
            "top_k": sampler.k,
            "top_p": sampler.p,
        }
    return None
