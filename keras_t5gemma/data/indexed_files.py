"""Random access to the lines of many files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from keras_t5gemma.utils.checks import path as checked_path
from keras_t5gemma.utils.checks import shown, string
from keras_t5gemma.utils.files import (
    MAX_RECORD,
    bounded_lines,
    open_regular,
    parse_json,
)
from keras_t5gemma.utils.texts import check_unicode, to_list

ENDINGS = (".jsonl", ".json", ".txt")


class FileRows:
    """Random access to the lines of UTF-8 files: JSON objects, or texts in `.txt`.

    Args:
        paths: of the files; a folder stands for the files in it, sorted by name.
        fields: names of the string fields that a JSON object must have.

    Attributes:
        paths: list of the files' paths.

    Raises:
        ValueError: when there is no file, one is missing, or one is of another kind.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        fields: Iterable[str],
    ) -> None:
        is_one = isinstance(paths, str | os.PathLike)
        given = [paths] if is_one else to_list(paths, "paths")
        self.paths: list[Path] = []
        self.fields = tuple(string(field, "fields") for field in fields)
        for path in (checked_path(each, "paths") for each in given):
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
            self.paths += [p for p in inside if not p.name.startswith(".")]
        kinds = ENDINGS if len(self.fields) == 1 else ENDINGS[:-1]
        wrong = [str(p) for p in self.paths if p.suffix not in kinds or not p.is_file()]
        if wrong or not self.paths:
            raise ValueError(
                f"`paths` must be files that end in one of {kinds}, or folders of "
                f"them; got {shown(wrong or given)}. Convert other files to JSON lines."
            )

    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [path.stat().st_size for path in self.paths]

    def lines(self, number: int) -> Iterator[tuple[int, tuple[str, ...]]]:
        """`(byte offset, row)` of every line of a file that is not empty."""
        path = self.paths[number]
        with open_regular(path) as file:
            offset = 0
            for line in bounded_lines(file, path):
                if line.strip():
                    yield offset, self._parse(number, offset, line)
                offset += len(line)

    def read(self, number: int, offsets: Sequence[int]) -> list[tuple[str, ...]]:
        """The rows of a file that begin at these byte offsets, in that order."""
        with open_regular(self.paths[number]) as file:
            rows = []
            for offset in offsets:
                file.seek(offset)
                rows.append(self._parse(number, offset, file.readline(MAX_RECORD)))
        return rows

    def _parse(self, number, offset, line):
        place = f"{self.paths[number]}, byte {offset}"
        try:
            text = line.decode("utf-8" if offset else "utf-8-sig")
            if self.paths[number].suffix == ".txt":
                return (text.strip(),)
            row = parse_json(text, "the line")
            found = tuple(row[field] for field in self.fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{place}: must be a JSON object in UTF-8 with {self.fields}; "
                f"{type(error).__name__} {error}."
            ) from error
        for field, value in zip(self.fields, found, strict=True):
            if isinstance(value, str):
                check_unicode(value, f"{place}: {field!r}")
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{place}: {self.fields} must be strings; got {found}.")
        return found
