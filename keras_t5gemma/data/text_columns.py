"""In-memory texts and text pairs of any form, as columns."""

from pathlib import Path
from typing import Any

from keras_t5gemma.data.readers import read_pairs, read_texts
from keras_t5gemma.tokenization.token_ids import INPUTS
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.texts import as_texts, column_names, in_memory, to_list

TEXT_KEYS = ("encoder_text", "decoder_text")


def as_columns(x: Any, y: Any = None, name: str = "x") -> dict | None:
    """In-memory pairs as `{"encoder_text": [...], "decoder_text": [...]}`.

    Args:
        x: that dict; or a list of sources (with `y`); or a list of
            `(source, target)` pairs; or a list of dicts, one per pair; or a tuple of
            two lists, the sources and the targets; or a data frame, a pyarrow table or
            a `datasets.Dataset` with these columns; or a `pathlib.Path`, see
            `read_pairs`. A list may be any container of `to_list`.
        y: a list of targets, only with a list of sources.
        name: of the argument that `x` was passed as, for messages.

    Returns:
        The dict, or `None` when `x` is not in-memory text.

    Raises:
        ValueError: when `y` is missing, or passed although `x` has targets.
    """
    if isinstance(x, str | bytes):
        raise ValueError(_not_one_string(x, name))
    if isinstance(x, Path):
        x = read_pairs(x)
    _check_columns(x, TEXT_KEYS, name)
    x = in_memory(x, TEXT_KEYS)
    sides = _two_columns(x, name)
    if isinstance(x, dict) and not set(INPUTS) & set(x):
        columns = x
    elif sides is not None:
        columns = dict(zip(TEXT_KEYS, sides, strict=True))
    elif isinstance(x, list | tuple) and len(x):
        first = x[0]
        if isinstance(first, str | bytes):
            if y is None:
                raise ValueError(
                    f"`y` must be the list of targets when `{name}` is a list of "
                    "strings; got None. A dict with keys "
                    f"{TEXT_KEYS} holds both; `generate` takes sources alone."
                )
            return _lists({"encoder_text": x, "decoder_text": y})
        if isinstance(first, dict) and not set(INPUTS) & set(first):
            if all(isinstance(first.get(key), list | tuple) for key in TEXT_KEYS):
                raise ValueError(
                    f"`{name}` must have one pair in each dict of a list; got lists of "
                    "texts. Join such batches in one dict of two lists, or pass a "
                    "`keras.utils.PyDataset` of them."
                )
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
            f"`{name}` must be text pairs with keys {TEXT_KEYS}, or arrays with keys "
            f"{INPUTS}; got {shown(list(columns))}. Rename them, and drop others."
        )
    if y is not None:
        raise ValueError(f"`y` must be None when `{name}` has the targets.")
    return _lists(columns)


def as_documents(x: Any, y: Any = None, name: str = "x") -> dict | None:
    """In-memory texts for an objective as `{"text": [...]}`.

    Args:
        x: a list of strings, or any container of `to_list`; or a dict, a data frame, a
            pyarrow table or a `datasets.Dataset` with `"text"`; or a `pathlib.Path`,
            see `read_texts`.
        y: must be `None`.
        name: of the argument that `x` was passed as, for messages.

    Returns:
        The dict, or `None` when `x` is not in-memory text.

    Raises:
        ValueError: when `y` is passed, or `x` has pairs.
    """
    if y is not None:
        raise ValueError("`y` must be None: the preprocessor's objective makes it.")
    if isinstance(x, str | bytes):
        raise ValueError(_not_one_string(x, name))
    if isinstance(x, Path):
        return {"text": read_texts(x)}
    if not set(TEXT_KEYS) & set(column_names(x) or ()):
        _check_columns(x, ("text",), name)
    x = in_memory(x, ("text", *TEXT_KEYS))
    names = x if isinstance(x, dict) else ()
    if "text" in names:
        return _lists({"text": x["text"]})
    if set(TEXT_KEYS) & set(names):
        raise ValueError(
            f"`{name}` must be plain texts, a list or a column `text`, since the "
            f"preprocessor has an objective; got {sorted(names)}. For pairs set "
            "`preprocessor.objective = None`."
        )
    is_texts = isinstance(x, list | tuple) and x and isinstance(x[0], str | bytes)
    return _lists({"text": x}) if is_texts else None


def _check_columns(x, wanted, name="x"):
    """Raise `ValueError` for a table without the columns that are needed."""
    found = column_names(x)
    if found is not None and not set(wanted) <= set(found):
        raise ValueError(
            f"`{name}` must have the columns {wanted}; it has {found}. Rename them "
            "first."
        )


def _not_one_string(x, name):
    return f"`{name}` must be a list of strings; got the string {shown(x)}."


def _is_pair(row):
    return isinstance(row, list | tuple) and len(row) == 2


def _two_columns(x, name):
    """The two columns of a tuple of two lists of texts, or `None`.

    Raises:
        ValueError: for two tuples of two strings, which may be two pairs as well.
    """
    if not isinstance(x, tuple) or len(x) != 2:
        return None
    sides = [in_memory(side) for side in x]
    for side in sides:
        if not isinstance(side, list | tuple):
            return None
        if not side or not isinstance(side[0], str | bytes):
            return None
    if all(isinstance(side, tuple) and len(side) == 2 for side in sides):
        raise ValueError(
            f"`{name}` must not be a tuple of two tuples of two strings, which are two "
            "pairs or two columns: pass a list of pairs, or a tuple of two lists; got "
            f"{shown(x)}."
        )
    return sides


def _lists(columns):
    """Columns of any container as lists."""
    for key, column in columns.items():
        if isinstance(column, str | bytes):
            raise ValueError(f"{key!r} must be a list of strings; got {shown(column)}.")
    return {key: to_list(column, key) for key, column in columns.items()}


def pairs_of(x: Any, y: Any, names: tuple[str, str], name: str = "x") -> dict:
    """Pairs of texts as two columns.

    Args:
        x: a dict or a table of the two columns; a list of pairs; a tuple of two lists,
            the first and the second texts; or, with `y`, the list of the first texts.
            A list may be any container of `to_list`.
        y: the list of the second texts, or `None`.
        names: of the two columns.
        name: of the argument that `x` was passed as, for messages.

    Returns:
        `{first name: texts, second name: texts}`.

    Raises:
        ValueError: for anything else.
    """
    _check_columns(x, names, name)
    x = in_memory(x, names)
    sides = _two_columns(x, name) if y is None else None
    if y is not None and isinstance(x, list | tuple):
        columns = dict(zip(names, (x, y), strict=True))
    elif isinstance(x, dict) and y is None:
        columns = dict(x)
    elif sides is not None:
        columns = dict(zip(names, sides, strict=True))
    elif isinstance(x, list | tuple) and all(_is_pair(row) for row in x):
        columns = {key: [row[i] for row in x] for i, key in enumerate(names)}
    else:
        columns = {}
    if set(columns) != set(names):
        raise ValueError(
            f"`{name}` must be a dict with keys {names}, a list of pairs, or two lists "
            f"of texts, `x` and `y`; got {type(x).__name__}"
            f"{shown(list(x)) if isinstance(x, dict) else ''}."
        )
    return _lists({key: columns[key] for key in names})


def texts_of(x: Any, name: str) -> dict:
    """Texts as columns: `{"encoder": texts}`, and `"text_pair"` for pairs.

    Raises:
        ValueError: for anything else.
    """
    names = ("text", "text_pair")
    if isinstance(x, str | bytes):
        raise ValueError(f"`{name}` must be a list of texts; got {shown(x)}.")
    found = in_memory(x, names)
    x = found if found or column_names(x) is None else to_list(x, name)
    if isinstance(x, dict) and set(x) == {"text"}:
        x = x["text"]
    is_rows = isinstance(x, list | tuple) and len(x) and hasattr(x[0], "__len__")
    if isinstance(x, dict) or (is_rows and not isinstance(x[0], str | bytes)):
        columns = pairs_of(x, None, names, name)
        return dict(zip(("encoder", "text_pair"), columns.values(), strict=True))
    return {"encoder": as_texts(x, name)}
