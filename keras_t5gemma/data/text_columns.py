"""In-memory texts and text pairs of any form, as columns."""

from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.data.readers import read_pairs, read_texts

TEXT_KEYS = ("encoder_text", "decoder_text")


def as_columns(x: Any, y: Any = None) -> dict | None:
    """In-memory pairs as `{"encoder_text": [...], "decoder_text": [...]}`.

    Args:
        x: that dict; or a list of sources (with `y`); or a list of
            `(source, target)` pairs; or a list of dicts, one per pair; or a
            `datasets.Dataset` with these columns; or a `pathlib.Path`, see
            `read_pairs`.
        y: a list of targets, only with a list of sources.

    Returns:
        The dict, or `None` when `x` is not in-memory text.

    Raises:
        ValueError: when `y` is missing, or passed although `x` has targets.
    """
    if isinstance(x, str | bytes):
        raise ValueError(f"`x` must be a list of strings; got the string {x!r}.")
    if isinstance(x, Path):
        x = read_pairs(x)
    elif hasattr(x, "column_names") and hasattr(x, "__len__"):
        missing = [key for key in TEXT_KEYS if key not in x.column_names]
        if missing:
            raise ValueError(
                f"`x` must have the columns {TEXT_KEYS}; it has {x.column_names}. "
                "Rename them with `rename_columns` of the dataset."
            )
        x = {key: list(x[key]) for key in TEXT_KEYS}
    if isinstance(x, dict) and any("text" in str(key) for key in x):
        columns = x
    elif isinstance(x, list | tuple | np.ndarray) and len(x):
        first = x[0]
        if isinstance(first, str | bytes):
            if y is None:
                raise ValueError(
                    "`y` must be the list of targets when `x` is a list of "
                    "strings; got None. A dict with keys "
                    f"{TEXT_KEYS} holds both in `x`."
                )
            return _no_single_strings({"encoder_text": x, "decoder_text": y})
        if isinstance(first, dict) and any("text" in str(k) for k in first):
            columns = {key: [row.get(key) for row in x] for key in first}
        elif (
            isinstance(first, list | tuple)
            and len(first) == 2
            and all(isinstance(text, str) for text in first)
        ):
            columns = dict(zip(TEXT_KEYS, map(list, zip(*x, strict=True)), strict=True))
        else:
            return None
    else:
        return None
    if set(columns) != set(TEXT_KEYS):
        raise ValueError(
            f"`x` must be text pairs with keys {TEXT_KEYS}; got {sorted(columns)}."
        )
    if y is not None:
        raise ValueError("`y` must be None when `x` has the targets.")
    return _no_single_strings(columns)


def as_documents(x: Any, y: Any = None) -> dict | None:
    """In-memory texts for an objective as `{"text": [...]}`.

    Args:
        x: a list of strings; or a dict or a `datasets.Dataset` with `"text"`; or a
            `pathlib.Path`, see `read_texts`.
        y: must be `None`.

    Returns:
        The dict, or `None` when `x` is not in-memory text.

    Raises:
        ValueError: when `y` is passed, or `x` has pairs.
    """
    if y is not None:
        raise ValueError("`y` must be None: the preprocessor's objective makes it.")
    if isinstance(x, str | bytes):
        raise ValueError(f"`x` must be a list of strings; got the string {x!r}.")
    if isinstance(x, Path):
        return {"text": read_texts(x)}
    names = getattr(x, "column_names", x if isinstance(x, dict) else ())
    if "text" in names and hasattr(x, "__len__"):
        texts = x["text"] if isinstance(x, dict) else list(x["text"])
        return _no_single_strings({"text": texts})
    if set(TEXT_KEYS) & set(names):
        raise ValueError(
            "`x` must be plain texts, a list or a column `text`, since the "
            f"preprocessor has an objective; got {sorted(names)}. For pairs set "
            "`preprocessor.objective = None`."
        )
    is_list = isinstance(x, list | tuple | np.ndarray) and len(x)
    return {"text": x} if is_list and isinstance(x[0], str | bytes) else None


def _is_pair(row):
    return isinstance(row, list | tuple) and len(row) == 2


def _no_single_strings(columns):
    for key, column in columns.items():
        if isinstance(column, str | bytes):
            raise ValueError(f"{key!r} must be a list of strings; got {column!r}.")
    return columns


def pairs_of(x: Any, y: Any, names: tuple[str, str], name: str = "x") -> dict:
    """Pairs of texts as two columns.

    Args:
        x: a dict of the two columns; a list of pairs; or, with `y`, the list of the
            first texts.
        y: the list of the second texts, or `None`.
        names: of the two columns.
        name: of the argument that `x` was passed as, for messages.

    Returns:
        `{first name: texts, second name: texts}`.

    Raises:
        ValueError: for anything else.
    """
    if y is not None and isinstance(x, list | tuple | np.ndarray):
        columns = dict(zip(names, (x, y), strict=True))
    elif isinstance(x, dict) and y is None:
        columns = dict(x)
    elif isinstance(x, list | tuple) and all(_is_pair(row) for row in x):
        columns = {key: [row[i] for row in x] for i, key in enumerate(names)}
    else:
        columns = {}
    if set(columns) != set(names):
        raise ValueError(
            f"`{name}` must be a dict with keys {names}, a list of pairs, or two lists "
            f"of texts, `x` and `y`; got {type(x).__name__}"
            f"{sorted(x) if isinstance(x, dict) else ''}."
        )
    return _no_single_strings({key: columns[key] for key in names})
