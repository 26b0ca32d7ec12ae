"""Safe reading of untrusted files: regular files only, with size limits."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, cast

MAX_JSON_BYTES = 64 * 1024**2  # Gemma's longest, tokenizer.json, has 34 MB.
MAX_RECORD = 64 * 1024**2  # Characters or bytes of a line or a cell of a data file.
# What reading a value of a wrong type or range raises.
_WRONG_VALUES = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError),
    ArithmeticError,
)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse anything but a regular file, also at the end of a symbolic link.

    Files of other kinds can block or be endless.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        ValueError: naming the path and its kind.
    """
    _check_mode(path, os.stat(path).st_mode)


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading in binary mode; never blocks on a FIFO.

    Args:
        path: of the file, or of a symbolic link to it.
        buffering: as in `open`.

    Raises:
        OSError: if it cannot be opened.
        ValueError: for a directory, FIFO, device or socket, naming the path.
    """
    check_regular(path)
    file = cast(BinaryIO, open(path, "rb", buffering=buffering, opener=_opener))
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)  # It may have changed.
    except ValueError:
        file.close()
        raise
    return file


def _opener(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_mode(path, mode):
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of another kind")
        raise ValueError(f"{os.fspath(path)} must be a regular file; it is {kind}.")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Contents of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """Text of a regular file of at most `MAX_JSON_BYTES`, with line feeds as line ends.

    Raises:
        OSError: if it cannot be opened.
        ValueError: naming the path, for another kind of file, a larger one, or one
            with another encoding.
    """
    try:
        text = _read_bounded(path).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not text in UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_file(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file in UTF-8.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: naming the path, if it is not a regular file, larger than
            `MAX_JSON_BYTES`, not JSON, or nested too deeply.
    """
    return parse_json(_read_bounded(path), os.fspath(path))


def _read_bounded(path):
    content = bytearray()
    with open_regular(path) as file:
        # In pieces: `read` allocates what it is asked for, and the size that the file
        # system reports is 0 for files of `/proc`.
        while piece := file.read(2**20):
            content += piece
            if len(content) > MAX_JSON_BYTES:
                break
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(
            f"{os.fspath(path)} has {os.path.getsize(path)} bytes; JSON and text files "
            f"may have at most {MAX_JSON_BYTES}."
        )
    return bytes(content)


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON; every fault is a `ValueError` with `name`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply for JSON.") from error
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


@contextlib.contextmanager
def named_values(file: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what is wrong with the values of a parsed file as `ValueError` naming it.

    Args:
        file: its path, for the message.
    """
    try:
        yield
    except _WRONG_VALUES as error:
        text = str(error)
        if isinstance(error, KeyError):
            text = f"lacks the field {error}"
        elif isinstance(error, ValueError) and os.fspath(file) in text:
            raise
        raise ValueError(f"{os.fspath(file)}: {text}") from error


@contextlib.contextmanager
def open_data(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a data file in binary mode; one that ends in `.gz` is decompressed.

    Raises:
        ValueError: for anything but a regular file; see `open_regular`.
    """
    with open_regular(path) as file:
        if Path(path).suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def bounded_lines(file: IO[AnyStr], path: str | os.PathLike[str]) -> Iterator[AnyStr]:
    """Lines of an open file, in text or binary mode, each with its line end.

    Raises:
        ValueError: with the number of a line longer than `MAX_RECORD`.
    """
    number = 0
    while line := file.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            raise ValueError(
                f"{os.fspath(path)}, line {number}: longer than {MAX_RECORD} "
                f"{'bytes' if isinstance(line, bytes) else 'characters'}."
            )
        yield line
