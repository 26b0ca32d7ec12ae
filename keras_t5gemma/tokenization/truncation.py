"""Warnings about truncated texts and empty targets."""

import contextlib
import contextvars
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Counts: TypeAlias = dict[str, tuple[int, int]]  # `(affected, total)` by kind.

# Counts of the calls that run in this thread, by the id of their preprocessor, which
# other threads use at the same time.
_running: contextvars.ContextVar[dict[int, Counts]] = contextvars.ContextVar("running")
_STACKLEVEL = 4  # The `with` block of the caller of `report_truncation`.


class _Shared:
    """Holds counts in an attribute of a layer, where Keras would replace a dict."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts


class CountsTruncation:
    """Mixin of a preprocessor: counts truncated texts, and warns once for each call."""

    encoder_sequence_length: int
    decoder_sequence_length: int
    _shared: _Shared | None = None

    @contextlib.contextmanager
    def report_truncation(
        self,
        empty_targets: bool = False,
        all_threads: bool = False,
        pad_to: int | None = None,
    ) -> Iterator[None]:
        """Warn once, with counts, about all texts that were truncated in the context.

        Args:
            empty_targets: also warn about empty targets.
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
                warn_of_truncation(counts, lengths, empty_targets, names)

    def longest_text(self) -> int:
        """Maximum number of tokens of a text of an objective."""
        raise NotImplementedError

    def silent(self) -> Any:
        """A shallow copy that does not report truncation."""
        copied = copy.copy(self)
        copied._shared = _Shared({})
        return copied

    def count(self, kind: str, truncated: int, total: int) -> None:
        """Add to the counts of `report_truncation`, in whose context it is called."""
        counts = self._counts()
        assert counts is not None
        before = counts.get(kind, (0, 0))
        counts[kind] = (before[0] + truncated, before[1] + total)

    def _counts(self) -> Counts | None:
        shared = None if self._shared is None else self._shared.counts
        return _running.get({}).get(id(self), shared)


def warn_of_truncation(
    counts: Mapping[str, tuple[int, int]],
    lengths: Mapping[str, int],
    empty_targets: bool,
    names: Mapping[str, str] | None = None,
) -> None:
    """Warn of what was truncated, with counts.

    Args:
        counts: `(affected, total)` by kind: `"encoder"` and `"decoder"` texts, `"text"`
            of an objective, and `"empty"` targets.
        lengths: maximum number of tokens by kind.
        empty_targets: also warn about empty targets.
        names: of the arguments that hold the lengths, by kind; by default those of the
            preprocessor.
    """
    for kind, (affected, total) in counts.items():
        if not affected or (kind == "empty" and not empty_targets):
            continue
        if kind == "empty":
            message = (
                f"{affected} of {total} targets are empty: they teach the model to "
                "answer nothing. Remove such pairs if that is not intended."
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
