"""Containers of text, whatever library made them, as lists of valid strings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_t5gemma.utils.checks import shown

# How the containers of other libraries become lists: pyarrow, polars, pandas and NumPy.
_TO_LIST = ("to_pylist", "to_list", "tolist")


def to_list(values: Any, name: str) -> list:
    """The elements of any in-memory sequence as a list.

    Args:
        values: a list, a tuple, a NumPy array, a tensor, a pandas Series, Index or
            array, a pyarrow array, a polars Series, a `datasets` column, or a data
            frame of one column.
        name: of the argument, for the message.

    Raises:
        ValueError: for anything else, and for data frames of several columns.
    """
    if isinstance(values, list | tuple):
        return list(values)
    if isinstance(values, str | bytes | dict | type):
        raise ValueError(_message(values, name))
    names = column_names(values)
    if names is not None:
        if len(names) != 1:
            raise ValueError(
                f"`{name}` must be one column of texts; got a "
                f"{type(values).__name__} with the columns {names}. Pass one of them, "
                f"e.g. {name}[{names[0] if names else 'text'!r}]."
            )
        return to_list(values[names[0]], name)
    if hasattr(values, "numpy") and not hasattr(values, "to_list"):  # A tensor.
        values = values.numpy()
        if isinstance(values, bytes):  # Of one string.
            raise ValueError(_message(values, name))
    for method in _TO_LIST:
        convert = getattr(values, method, None)
        if callable(convert):
            found = convert()
            if isinstance(found, list):
                return found
            break
    if isinstance(values, Sequence):  # Such as a column of `datasets`.
        return list(values)
    raise ValueError(_message(values, name))


def column_names(values: Any) -> list | None:
    """Names of the columns of a data frame, a pyarrow table or a `datasets.Dataset`.

    Returns:
        The list, or `None` for anything else, tables without a length too.
    """
    names = getattr(values, "column_names", None)
    if names is None:
        names = getattr(values, "columns", None)
    if names is None or isinstance(values, type) or not hasattr(values, "__len__"):
        return None
    try:
        return list(names)
    except TypeError:
        return None


def in_memory(values: Any, wanted: Sequence[str] = ()) -> Any:
    """Tables as dicts and columns of other libraries as lists.

    Args:
        values: anything that holds data.
        wanted: the columns of a table that are read, if it has them.

    Returns:
        A dict of columns for a table, see `column_names`; a list for a column of
        pandas, pyarrow, polars or `datasets`, an array or a tensor; lists, tuples,
        dicts and all others, such as iterables of batches, unchanged.
    """
    if isinstance(values, list | tuple | dict | str | bytes):
        return values
    names = column_names(values)
    if names is not None:
        return {name: values[name] for name in names if name in wanted}
    if getattr(values, "shape", None) == ():
        return values
    is_column = any(callable(getattr(values, method, None)) for method in _TO_LIST)
    if not is_column and isinstance(values, Sequence) and len(values):
        # Others may hold batches, and read each from a file.
        is_column = isinstance(values[0], str)
    return to_list(values, "x") if is_column or hasattr(values, "numpy") else values


def as_texts(values: Any, name: str) -> list[str]:
    """A list of `str` from any container of text; see `to_list`.

    Args:
        values: the container; its elements are `str` or UTF-8 `bytes`.
        name: of the argument, for the message.

    Raises:
        ValueError: naming the argument, the position and the value that is not text.
    """
    texts = to_list(values, name)
    for i, text in enumerate(texts):
        place = f"`{name}[{i}]`"
        if isinstance(text, bytes):
            try:
                text = texts[i] = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 text: {error}") from error
        if not isinstance(text, str):
            missing = text is None or (isinstance(text, float) and np.isnan(text))
            hint = " Drop or fill rows without text first." if missing else ""
            raise ValueError(
                f"{place} must be a string; got {type(text).__name__} {shown(text)}."
                f"{hint}"
            )
        check_unicode(text, place)
    return texts


def check_unicode(text: str, place: str) -> None:
    r"""Raise `ValueError` for text with lone surrogates, which cannot be encoded.

    They come from JSON escapes such as a single `\ud83d`.

    Args:
        text: a string.
        place: where it is, for the message.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} is not valid Unicode: character {error.start} is the lone "
            f"surrogate {text[error.start]!r}. Repair it, or replace such characters "
            "with text.encode('utf-8', 'replace').decode()."
        ) from error


def _message(values: Any, name: str) -> str:
    kind = type(values).__name__
    accepted = "a list of strings" if kind == "str" else "a string or a list of strings"
    return f"`{name}` must be {accepted}; got {kind} {shown(values)}."


def text_pairs(x: Any, decoder_optional: bool = False) -> tuple[list[str], list[str]]:
    """Sources and targets of a dict of texts.

    Args:
        x: a dict of `"encoder_text"` and `"decoder_text"`, a string or a list each.
        decoder_optional: accept a dict without targets, which are then empty.

    Returns:
        `(sources, targets)`, lists of one length.

    Raises:
        ValueError: for wrong keys, unequal lengths, or values that are not text.
    """
    known = ("encoder_text", "decoder_text")
    if not isinstance(x, dict):
        raise ValueError(
            f"`x` must be text pairs, a dict with keys {known}; got "
            f"{type(x).__name__} {shown(x)}."
        )
    required = known[:1] if decoder_optional else known
    if set(x) - set(known) or set(required) - set(x):
        raise ValueError(
            f"`x` must be text pairs, a dict with keys {known}"
            f"{' (the second is optional)' if decoder_optional else ''}; "
            f"got {shown(list(x))}."
        )
    columns = {
        key: as_texts([value] if isinstance(value, str) else value, key)
        for key, value in x.items()
    }
    sources = columns["encoder_text"]
    targets = columns.get("decoder_text", [""] * len(sources))
    if len(sources) != len(targets):
        raise ValueError(
            "`encoder_text` and `decoder_text` must have equally many rows; got "
            f"{len(sources)} and {len(targets)}."
        )
    return sources, targets
