"""Argument checks whose messages name the argument, what is accepted and the value."""

import contextlib
import math
import numbers
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # The command line shows its help without NumPy.
    import numpy as np

T = TypeVar("T")
_SHOWN = 200  # Characters of a value in a message.
MAX_COUNT = 2**31 - 1  # Larger numbers fit no int32 array and are mistakes.
MAX_ROWS = 2**20  # Of a batch, whose arrays are allocated at once.


def shown(value: Any) -> str:
    """`repr` of a value for a message: short, and safe for any value."""
    try:
        text = repr(value)
    except Exception:  # Nested too deeply, or an object of a user.
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole_number(
    value: Any, name: str, low: int, high: int | None = None, other: str = ""
) -> int:
    """Check a whole number and return it as a Python int.

    Args:
        value: accepted are Python and NumPy integers, but no bools.
        name: of the argument, for the message.
        low: smallest accepted value.
        high: largest accepted value; `None` is `MAX_COUNT`.
        other: what the caller accepts besides, for the message: `"'epoch'"`.

    Raises:
        ValueError: for anything else.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    most = MAX_COUNT if high is None else high
    if not is_whole or not low <= value <= most:
        end = f" to {most}" if high is not None or is_whole and value > most else ""
        raise ValueError(
            f"`{name}` must be {_or(other)}a whole number from {low}{end}; got "
            f"{shown(value)}."
        )
    return int(value)


def rows_of_batch(value: Any, name: str = "batch_size") -> int:
    """Check the number of rows of a batch; see `whole_number`."""
    return whole_number(value, name, 1, MAX_ROWS)


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
        or not _is_finite(value)
        or (above is not None and not value > above)
        or (at_least is not None and not value >= at_least)
        or (at_most is not None and not value <= at_most)
        or (below is not None and not value < below)
    ):
        bounds = {"above": above, "at least": at_least}
        bounds |= {"at most": at_most, "below": below}
        words = [f"{k} {bound}" for k, bound in bounds.items() if bound is not None]
        accepted = f"{_or(other)}a number {' and '.join(words)}".strip()
        raise ValueError(f"`{name}` must be {accepted}; got {shown(value)}.")
    return float(value)


def row_weights(value: Any, name: str, rows: int) -> "np.ndarray":
    """Check one finite weight for each row and return them as float32 `(rows,)`.

    Args:
        value: any container of numbers that NumPy reads.
        name: of the argument, for the message.
        rows: number of rows.

    Raises:
        ValueError: for another number of weights, and values that are not finite.
    """
    weights = number_array(value, name)
    if weights.size != rows:
        raise ValueError(
            f"`{name}` must have one weight for each of the {rows} rows; got shape "
            f"{weights.shape}."
        )
    return weights.reshape(rows)


def number_array(value: Any, name: str, dtype: str = "float32") -> "np.ndarray":
    """Check an array of finite numbers and return it in a dtype.

    Args:
        value: any container of numbers that NumPy reads, e.g. a list or a tensor.
        name: of the argument, for the message.
        dtype: of the result; an integer one accepts whole numbers only.

    Raises:
        ValueError: for anything else.
    """
    import numpy as np

    array = None
    try:
        array = np.asarray(value)
    except Exception:  # Whatever a tensor raises.
        pass
    # A column of numbers of other libraries may be an array of objects.
    if array is not None and array.dtype == object:
        is_numbers = all(isinstance(each, numbers.Real) for each in array.flat)
        try:
            array = array.astype("float64") if array.size and is_numbers else None
        except OverflowError:  # A whole number that no float can hold.
            array = None
    kinds = "iubf" if np.dtype(dtype).kind == "f" else "iub"
    if array is not None and not array.size:
        array = array.astype(dtype)
    if array is None or array.dtype.kind not in kinds:
        whole = "" if "f" in kinds else "whole "
        raise ValueError(
            f"`{name}` must be an array of {whole}numbers; got {shown(value)}."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite numbers; got {shown(value)}.")
    return array.astype(dtype)


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
    for each in accepted:
        # No `==` of a type that is not expected, such as an array's.
        if each is value or (isinstance(value, type(each)) and each == value):
            return value
    words = ", ".join(map(repr, accepted))
    raise ValueError(f"`{name}` must be one of {words}; got {shown(value)}.")


def keras_object(value: Any, name: str) -> Any:
    """Check the type of a loss or of metrics for `compile`, which Keras reads later."""
    is_known = value is None or isinstance(value, str | list | tuple | dict)
    if not is_known and not callable(value):
        raise ValueError(
            f"`{name}` must be a Keras object, its name, or a list or dict of those; "
            f"got {shown(value)}."
        )
    return value


def is_auto(value: Any) -> bool:
    """Whether an argument is `"auto"`; safe for arrays."""
    return isinstance(value, str) and value == "auto"


def flag(value: Any, name: str) -> bool:
    """Check a Python or NumPy bool and return it as a Python bool.

    Raises:
        ValueError: for anything else.
    """
    import numpy as np

    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False; got {shown(value)}.")
    return bool(value)


def instance(value: T, name: str, kind: Any, accepted: str) -> T:
    """Check the type of an argument and return it.

    Args:
        value: what was passed.
        name: of the argument, for the message.
        kind: a class, a union or a tuple of them, as for `isinstance`.
        accepted: description of them, e.g. `"a Tokenizer"`.

    Raises:
        ValueError: for another type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be {accepted}; got {shown(value)}.")
    return value


def string(value: Any, name: str) -> str:
    """Check a string and return it; anything else raises `ValueError`."""
    return instance(value, name, str, "a string")


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Check a parsed JSON object and return it; anything else raises `ValueError`."""
    return instance(value, name, dict, "a JSON object")


def path(value: Any, name: str) -> Path:
    """Check the path of a file or folder, and return it as a `Path`.

    Numbers are refused: `open` takes them for file descriptors, and closes those.

    Raises:
        ValueError: for anything but a string or an `os.PathLike` of one, an empty
            string, and a null character.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or not _is_utf8(text):
        raise ValueError(
            f"`{name}` must be the path of a file or folder; got {shown(value)}."
        )
    return Path(text)


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors name the caller's argument, in place of that of a function it calls.

    Args:
        names: the caller's name by the function's: `renamed(rank="lora_rank")`.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for inner, outer in names.items():
            text = text.replace(f"`{inner}`", f"`{outer}`")
        if text == str(error) or type(error) is not ValueError:
            raise
        raise ValueError(text) from error


def _is_utf8(text):
    try:
        return bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # Other lone surrogates.
        return False


def _is_finite(value):
    try:
        return math.isfinite(value)
    except OverflowError:  # A whole number that no float can hold.
        return False


def _or(other: str) -> str:
    return f"{other} or " if other else ""
