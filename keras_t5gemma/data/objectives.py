"""Pretraining objectives: PrefixLM and UL2, from plain text to training pairs.

NumPy only, vectorized over the rows of a batch. The random draws of a row depend on its
seed alone: they are the same in every batch, in every order, on every machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keras_t5gemma.data import objective_pairs, span_sampling
from keras_t5gemma.data.mixtures import MIXTURES as MIXTURES
from keras_t5gemma.data.mixtures import Spans as Spans
from keras_t5gemma.data.mixtures import Suffix as Suffix
from keras_t5gemma.data.mixtures import mixture_rows
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.utils import seeded_random
from keras_t5gemma.utils.checks import (
    instance,
    number_array,
    one_of,
    shown,
    whole_number,
)
from keras_t5gemma.utils.ragged import Ragged
from keras_t5gemma.utils.texts import to_list


def _ragged(token_ids):
    """Rows of ids in a list or an array as a `Ragged`."""
    rows = to_list(token_ids, "token_ids")
    try:
        arrays = [np.asarray(row) for row in rows]
    except ValueError:  # Lists of unequal lengths inside a row.
        arrays = []
    if len(arrays) != len(rows) or not all(
        array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
        for array in arrays
    ):
        raise ValueError(
            "`token_ids` must be rows of whole numbers, a list of lists or an array "
            f"(rows, length); got {shown(token_ids)}."
        )
    return Ragged.from_rows(arrays)


class Objective:
    """A mixture of denoisers: tokens removed from a text become the decoder's target.

    Args:
        mixture: rows of `(weight, Spans or Suffix)`.
        sentinels: ids of the sentinels, in the order in which a text uses them.
        mode_tokens: `{name: id}` of the modes in the mixture.

    Raises:
        ValueError: for an empty or malformed mixture, spans without sentinels, modes
            without ids, or an id that is used twice.
    """

    def __init__(
        self,
        mixture: Iterable[tuple[float, Spans | Suffix]],
        sentinels: Sequence[int] = (),
        mode_tokens: dict[str, int] | None = None,
    ) -> None:
        self.mixture = mixture = mixture_rows(mixture)
        ids = to_list(sentinels, "sentinels")
        ids = [whole_number(each, "sentinels", 0) for each in ids]
        self.sentinels = np.array(ids, "int32")
        mode_tokens = {} if mode_tokens is None else mode_tokens
        instance(mode_tokens, "mode_tokens", Mapping, "a dict of names and ids")
        self.mode_tokens = {
            name: whole_number(id, "mode_tokens", 0) for name, id in mode_tokens.items()
        }
        weights, denoisers = zip(*mixture, strict=True)
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._is_spans = np.array([isinstance(d, Spans) for d in denoisers])
        self._rates = np.array([d.rate or np.nan for d in denoisers])
        self._means = np.array([getattr(d, "mean_length", np.inf) for d in denoisers])
        modes = {d.mode for d in denoisers} - {None}
        if missing := sorted(modes - set(self.mode_tokens)):
            raise ValueError(f"`mode_tokens` must have an id for {missing}.")
        self._modes = np.array([self.mode_tokens.get(d.mode, -1) for d in denoisers])
        ids = [*self.sentinels.tolist(), *self.mode_tokens.values()]
        if len(set(ids)) < len(ids):
            raise ValueError("`sentinels` and `mode_tokens` must be different ids.")
        if self._is_spans.any() and not len(self.sentinels):
            raise ValueError("`sentinels` must not be empty: the mixture has spans.")

    def __call__(
        self, token_ids: Any, seeds: ArrayLike, epoch: int = 0
    ) -> tuple[Ragged, Ragged]:
        """Training pairs from texts.

        Args:
            token_ids: rows of ids, at least 2 each: a list of lists, an int array
                `(rows, length)` or a `Ragged`.
            seeds: int `(rows,)`, at least 0, the random seed of each row.
            epoch: number of the epoch; it changes which tokens are removed.

        Returns:
            `(sources, targets)`, the encoder's input and the decoder's target, a
            `Ragged` with the same rows each. Without bos and eos.

        Raises:
            ValueError: for a row below 2 tokens, or one with more spans than there
                are sentinels.
        """
        if not isinstance(token_ids, Ragged):
            token_ids = _ragged(token_ids)
        whole_number(epoch, "epoch", 0)
        lengths = token_ids.lengths
        kind, taken, spans = self._sizes(lengths, seeds)
        marked = self._is_spans[kind]  # Rows whose spans have sentinels.
        draws = Ragged(lengths, seeded_random.draws(seeds, lengths, epoch + 1))
        span = span_sampling.compose(taken, spans, draws)
        gap = span_sampling.gaps(
            lengths - taken, spans, draws, taken - 1, at_end=~marked
        )
        out, first = span_sampling.lay_out(gap, span)

        row = span.row_numbers()
        number = np.arange(len(row)) - span.starts[row]
        has = marked[row]
        sentinel = self.sentinels[number[has]]
        targets = token_ids.values[out].astype("int32")
        targets = np.insert(
            targets, (np.cumsum(span.values) - span.values)[has], sentinel
        )
        # A sentinel takes the place of the first token of its span.
        sources = token_ids.values.astype("int32")
        sources[first[has]] = sentinel
        out[first[has]] = False
        sentinels = np.where(marked, spans, 0)
        sources = Ragged(lengths - taken + sentinels, sources[~out])
        mode = self._modes[kind]
        has = mode >= 0
        sources = Ragged(
            sources.lengths + has,
            np.insert(sources.values, sources.starts[has], mode[has]),
        )
        return sources, Ragged(taken + sentinels, targets)

    def lengths(
        self, lengths: ArrayLike, seeds: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the pairs, computed without building them.

        Args:
            lengths: int `(rows,)`, tokens of the texts.
            seeds: as in the call.

        Returns:
            `(sources, targets)`, int `(rows,)` each; the same in every epoch.

        Raises:
            ValueError: as in the call.
        """
        lengths = np.asarray(lengths)
        kind, taken, spans = self._sizes(lengths, seeds)
        sentinels = np.where(self._is_spans[kind], spans, 0)
        mode = self._modes[kind] >= 0
        return lengths - taken + sentinels + mode, taken + sentinels

    def pairs(self, preprocessor: Any, rows: list[list[int]]) -> list[list[list[int]]]:
        """Pairs of single texts, truncated to fit, drawn from a hash of the text.

        Args:
            preprocessor: a `Seq2SeqLMPreprocessor` with this objective.
            rows: lists of ids; fewer than two tokens give an empty pair.

        Returns:
            `[sources, targets]`, a list of ids for each row.
        """
        return objective_pairs.of_rows(preprocessor, rows)

    def ends_with_the_text(self, seeds: ArrayLike) -> np.ndarray:
        """Whether the target of a row ends where its text ends.

        Args:
            seeds: as in the call.

        Returns:
            bool `(rows,)`.
        """
        return ~self._is_spans[self._kinds(seeded_random.draws(seeds, 3, 0))]

    def longest_text(self, encoder_length: int, decoder_length: int) -> int:
        """Longest text whose pair always fits the lengths.

        Args:
            encoder_length: maximum length of the source, in tokens.
            decoder_length: maximum length of the target, in tokens.

        Returns:
            A number of tokens.
        """
        low, high = 1, encoder_length + decoder_length + 1
        while high - low > 1:
            middle = (low + high) // 2
            source, target = self._longest_pair(middle)
            fits = source <= encoder_length and target <= decoder_length
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _longest_pair(self, length):
        kinds = np.arange(len(self.mixture))
        lengths = np.full(len(kinds), length)
        sources, targets = [], []
        for low in (0.0, 1.0 - 1e-6):
            for high in (0.0, 1.0 - 1e-6):
                taken, spans = self._round(kinds, lengths, low, high)
                sentinels = np.where(self._is_spans, spans, 0)
                sources.append(lengths - taken + sentinels + (self._modes >= 0))
                targets.append(taken + sentinels)
        return np.max(sources), np.max(targets)

    def _kinds(self, draws):
        return np.searchsorted(self._shares, draws.reshape(-1, 3)[:, 0], side="right")

    def _sizes(self, lengths, seeds):
        """Row of the mixture, tokens removed and spans, int `(rows,)` each."""
        if len(lengths) and lengths.min() < 2:
            raise ValueError(
                f"Every row of `token_ids` must have at least 2 tokens; row "
                f"{lengths.argmin()} has {lengths.min()}."
            )
        seeds = number_array(seeds, "seeds", "int64")
        if seeds.shape != np.shape(lengths):
            raise ValueError(
                f"`seeds` must have {len(lengths)} numbers, one per row; got "
                f"{seeds.size}."
            )
        if len(seeds) and seeds.min() < 0:
            raise ValueError(f"`seeds` must be whole numbers >= 0; got {shown(seeds)}.")
        draws = seeded_random.draws(seeds, 3, 0)
        kind = self._kinds(draws)
        taken, spans = self._round(kind, lengths, *draws.reshape(-1, 3)[:, 1:].T)
        most = np.where(self._is_spans[kind], spans, 0).max(initial=0)
        if most > len(self.sentinels):
            raise ValueError(
                f"A text of {lengths.max()} tokens has up to {most} spans, and there "
                f"are {len(self.sentinels)} `sentinels`. Pass more of them, a mixture "
                "of longer spans, or shorter texts."
            )
        return kind, taken, spans

    def _round(self, kind, lengths, draw, other):
        """Tokens and spans to remove; draws round their fractions up or down."""
        rate = self._rates[kind]
        drawn = 1 + np.floor((lengths - 1) * draw)  # Every split equally likely.
        taken = np.where(np.isnan(rate), drawn, np.floor(lengths * rate + draw))
        taken = np.clip(taken, 1, lengths - 1).astype("int64")
        spans = np.floor(taken / self._means[kind] + other).astype("int64")
        return taken, np.clip(spans, 1, np.minimum(taken, lengths - taken + 1))


class PrefixLM(Objective):
    """Prefix language modeling: the encoder reads the start of a text.

    The decoder writes the rest. T5Gemma cuts texts into two equal halves
    (arXiv 2504.06225, section 3.3).

    Args:
        split: `"half"`, where the seed decides the side of an odd token; or
            `"random"`, at a uniformly drawn position.

    Raises:
        ValueError: for another `split`.

    Examples:
        >>> sources, targets = PrefixLM()([[5, 6, 7, 8]], seeds=[0])
        >>> sources[0].tolist(), targets[0].tolist()
        ([5, 6], [7, 8])
    """

    def __init__(self, split: str = "half") -> None:
        rates = {"half": 0.5, "random": None}
        one_of(split, "split", rates)
        super().__init__([(1, Suffix(rates[split]))])
        self.split = split


class UL2(Objective):
    """UL2, a mixture of denoisers (arXiv 2205.05131).

    Spans of the text are removed, a sentinel takes the place of each, and the decoder
    writes sentinels and spans.

    Args:
        mixture: `"t5gemma2"`, `"ul2"`, or rows of `(weight, Spans or Suffix)`; see
            `MIXTURES`.
        sentinels: ids of the sentinels, in the order in which a text uses them.
        mode_tokens: `{name: id}` of the modes in the mixture; `"ul2"` has `[NLU]`,
            `[NLG]` and `[S2S]`.

    Raises:
        ValueError: as `Objective`, or for an unknown mixture.

    Examples:
        >>> ul2 = UL2([(1, Spans(2, 0.4))], sentinels=[99, 98, 97])
        >>> sources, targets = ul2([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]], seeds=[0])
        >>> sources[0].tolist(), targets[0].tolist()
        ([5, 99, 8, 9, 10, 98, 13, 14], [99, 6, 7, 98, 11, 12])
    """

    def __init__(
        self,
        mixture: str | Iterable[tuple[float, Spans | Suffix]] = "t5gemma2",
        sentinels: Sequence[int] = (),
        mode_tokens: dict[str, int] | None = None,
    ) -> None:
        super().__init__(mixture_rows(mixture), sentinels, mode_tokens)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        mixture: str | Iterable[tuple[float, Spans | Suffix]] = "t5gemma2",
    ) -> "UL2":
        """UL2 with the unused tokens of a vocabulary as sentinels, as in T5Gemma 2.

        The sentinels are the unused tokens from the highest number downwards. Mode
        tokens, which T5Gemma 2 does not use, are the lowest ones.

        Args:
            tokenizer: a `Tokenizer`.
            mixture: as in `UL2`.

        Returns:
            A `UL2`.

        Raises:
            ValueError: when there are too few unused tokens, or as `UL2`.
        """
        instance(tokenizer, "tokenizer", Tokenizer, "a keras_t5gemma.Tokenizer")
        unused = tokenizer.unused_ids
        rows = mixture_rows(mixture)
        names = dict.fromkeys(d.mode for _, d in rows if d.mode is not None)
        if len(unused) <= len(names):
            raise ValueError(
                f"`tokenizer` must have more than {len(names)} pieces <unused0>, "
                f"<unused1>, ... for sentinels and modes; it has {len(unused)}."
            )
        modes = dict(zip(names, unused, strict=False))
        return cls(rows, unused[len(modes) :][::-1], modes)
