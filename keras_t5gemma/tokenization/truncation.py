"""Length of encoder texts; warnings about truncated and empty texts."""

import contextlib
import contextvars
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from keras_t5gemma.utils.buckets import SHORT
from keras_t5gemma.utils.checks import whole_number

Counts: TypeAlias = dict[str, tuple[int, int]]  # `(affected, total)` by kind.

# Counts of the calls that run in this thread, by the id of their preprocessor, which
# other threads use at the same time.
_running: contextvars.ContextVar[dict[int, Counts]] = contextvars.ContextVar("running")
_STACKLEVEL = 4  # The `with` block of the caller of `report_truncation`.

# What pairs with an empty text teach.
_TAUGHT = {"empty sources": "without reading", "empty targets": "nothing"}


class _Shared:
    """Holds counts in an attribute of a layer, where Keras would replace a dict."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts


class CountsTruncation:
    """Mixin of a preprocessor: counts truncated texts, and warns once for each call."""

    decoder_sequence_length: int
    _shared: _Shared | None = None
    _encoder_length: int | None = None
    _reported_length: int | None = None

    @property
    def encoder_sequence_length(self) -> int:
        """Maximum number of encoder tokens in training; 512 unless set."""
        return self._encoder_length or SHORT

    @encoder_sequence_length.setter
    def encoder_sequence_length(self, length: int | None) -> None:
        if length is not None:
            whole_number(length, "encoder_sequence_length", 1, other="None")
        self._encoder_length = length

    def __copy__(self) -> Any:
        """A shallow copy; Keras would save and load the vocabulary, 50 ms for 8,192."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def for_reading(self, positions: int | None) -> Any:
        """Preprocessor for texts that are read, not trained on.

        Args:
            positions: `max_positions` of the model: the maximum number of encoder
                tokens unless `encoder_sequence_length` was set. With `None` it is the
                same as in training.

        Returns:
            This preprocessor, or a shallow copy with another length.
        """
        self.check_positions(positions)
        if positions is None or self._encoder_length is not None:
            return self
        copied = copy.copy(self)
        copied._shared = None  # It has another length to report.
        copied._encoder_length = positions
        return copied

    def check_positions(self, positions: int | None) -> None:
        """Warn once when `encoder_sequence_length` is above a model's positions."""
        length = self._encoder_length
        if length is None or length == self._reported_length:
            return
        if positions is not None and length > positions:
            self._reported_length = length
            warnings.warn(
                f"`preprocessor.encoder_sequence_length` is {length}, but training "
                f"covered positions up to {positions} (`config.max_positions`). Longer "
                "texts are read whole, with results that training did not cover.",
                stacklevel=_STACKLEVEL,
            )

    @contextlib.contextmanager
    def report_truncation(
        self,
        empty: bool = False,
        all_threads: bool = False,
        pad_to: int | None = None,
    ) -> Iterator[None]:
        """Warn once, with counts, about all texts that were truncated in the context.

        Args:
            empty: also warn about empty sources and targets.
            all_threads: include other threads, such as those that read data for `fit`.
            pad_to: the argument of this name that encoder texts are truncated to, for
                the message; `None` is `encoder_sequence_length`.
        """
        outer = self._counts()  # It reports.
        counts: Counts = {} if outer is None else outer
        token = _running.set({**_running.get({}), id(self): counts})
        shares = outer is None and all_threads
        if shares:
            self._shared = _Shared(counts)
        try:
            yield
        finally:
            _running.reset(token)
            if shares:
                self._shared = None
            if outer is None:
                lengths = {
                    "encoder": pad_to or self.encoder_sequence_length,
                    "decoder": self.decoder_sequence_length,
                }
                if "text" in counts:
                    lengths["text"] = self.longest_text()
                names = {} if pad_to is None else {"encoder": "pad_to"}
                warn_of_truncation(counts, lengths, empty, names)

    def longest_text(self) -> int:
        """Maximum number of tokens of a text of an objective."""
        raise NotImplementedError

    def silent(self) -> Any:
        """A shallow copy that does not report truncation."""
        copied = copy.copy(self)
        copied._shared = _Shared({})
        return copied

    def count(self, kind: str, truncated: int, total: int) -> None:
        """Add to the counts of `report_truncation`; outside its context to none."""
        counts = self._counts()
        if counts is None:
            return
        before = counts.get(kind, (0, 0))
        counts[kind] = (before[0] + truncated, before[1] + total)

    def count_empty(self, **texts: list[str]) -> None:
        """Add texts that are blank to the counts, by the name of the argument."""
        for name, column in texts.items():
            self.count(f"empty {name}", sum(map(_is_blank, column)), len(column))

    def _truncate(self, rows, length, side):
        self.count(side, sum(len(row) > length for row in rows), len(rows))
        return [row[:length] for row in rows]

    def _counts(self) -> Counts | None:
        shared = None if self._shared is None else self._shared.counts
        return _running.get({}).get(id(self), shared)


def _is_blank(text):
    return not text.strip()


def warn_of_truncation(
    counts: Mapping[str, tuple[int, int]],
    lengths: Mapping[str, int],
    empty: bool,
    names: Mapping[str, str] | None = None,
) -> None:
    """Warn of what was truncated, with counts.

    Args:
        counts: `(affected, total)` by kind: `"encoder"` and `"decoder"` texts, `"text"`
            of an objective, `"empty sources"` and `"empty targets"`.
        lengths: maximum number of tokens by kind.
        empty: also warn about empty sources and targets.
        names: of the arguments that hold the lengths, by kind; by default those of the
            preprocessor.
    """
    for kind, (affected, total) in counts.items():
        if not affected or (kind in _TAUGHT and not empty):
            continue
        if kind in _TAUGHT:
            message = (
                f"{affected} of {total} {kind.removeprefix('empty ')} are empty: they "
                f"teach the model to answer {_TAUGHT[kind]}. Remove such pairs if that "
                "is not intended."
            )
        elif kind == "text":
            message = (
                f"{affected} of {total} texts were longer than {lengths[kind]} tokens "
                "and were truncated. `fit` uses whole texts if they are in memory."
            )
        else:
            name = (names or {}).get(kind, f"preprocessor.{kind}_sequence_length")
            message = (
                f"{affected} of {total} {kind} texts were longer than {lengths[kind]} "
                f"tokens and were truncated; increase `{name}` to keep them whole."
            )
        warnings.warn(message, stacklevel=_STACKLEVEL)
