"""Argument checks whose messages name the argument, what is accepted and the value."""

import math
import numbers
from collections.abc import Iterable
from typing import Any


def whole_number(
    value: Any, name: str, low: int, high: int | None = None, other: str = ""
) -> int:
    """Check a whole number and return it as a Python int.

    Args:
        value: accepted are Python and NumPy integers, but no bools.
        name: of the argument, for the message.
        low: smallest accepted value.
        high: largest accepted value; `None` for no bound.
        other: what the caller accepts besides, for the message: `"'epoch'"`.

    Raises:
        ValueError: for anything else.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        end = "" if high is None else f" to {high}"
        raise ValueError(
            f"`{name}` must be {_or(other)}a whole number from {low}{end}; got "
            f"{value!r}."
        )
    return int(value)


def number(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    other: str = "",
) -> float:
    """Check a finite number and return it as a Python float.

    Args:
        value: accepted are Python and NumPy integers and floats, but no bools.
        name: of the argument, for the message.
        above: the number must be larger than this.
        at_least: the number must not be smaller than this.
        at_most: the number must not be larger than this.
        below: the number must be smaller than this.
        other: as in `whole_number`.

    Raises:
        ValueError: for anything else, infinite values and NaN too.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or (above is not None and not value > above)
        or (at_least is not None and not value >= at_least)
        or (at_most is not None and not value <= at_most)
        or (below is not None and not value < below)
    ):
        bounds = {"above": above, "at least": at_least}
        bounds |= {"at most": at_most, "below": below}
        words = [f"{k} {bound}" for k, bound in bounds.items() if bound is not None]
        accepted = f"{_or(other)}a number {' and '.join(words)}".strip()
        raise ValueError(f"`{name}` must be {accepted}; got {value!r}.")
    return float(value)


def one_of(value: Any, name: str, accepted: Iterable[Any]) -> Any:
    """Check that a value is among the accepted ones and return it.

    Args:
        value: what was passed.
        name: of the argument, for the message.
        accepted: the values to choose from.

    Raises:
        ValueError: for another value.
    """
    accepted = list(accepted)
    if value not in accepted:
        words = ", ".join(map(repr, accepted))
        raise ValueError(f"`{name}` must be one of {words}; got {value!r}.")
    return value


def _or(other: str) -> str:
    return f"{other} or " if other else ""
