"""Read texts and text pairs from files: lines, JSON lines, CSV, TSV, Parquet."""

import contextlib
import csv
import functools
import gzip
import io
import os
import re
import zlib

from keras_t5gemma.utils import checks
from keras_t5gemma.utils.files import (
    MAX_RECORD,
    bounded_lines,
    check_regular,
    open_data,
    parse_json,
)
from keras_t5gemma.utils.texts import check_unicode

_READERS = {}


def read_pairs(
    path: str | os.PathLike, source: str = "source", target: str = "target"
) -> dict[str, list[str]]:
    """Read the text pairs of a file into memory.

    Args:
        path: a UTF-8 file: `.jsonl` or `.json` with one object per line; `.csv` with a
            header, quoted as by `csv.writer`; `.tsv` likewise, where
            quotation marks that do not enclose a cell are ordinary characters; each
            also compressed, with `.gz` appended; or `.parquet`,
            which needs pyarrow.
        source: name of the field or column with the encoder's texts.
        target: name of the field or column with the decoder's texts.

    Returns:
        `{"encoder_text": [...], "decoder_text": [...]}`, accepted by `Seq2SeqLM.fit`.

    Raises:
        ValueError: for another kind of file, an empty one, or a row in which a field
            is missing or not a string, with its line.
        ImportError: for `.parquet` without pyarrow.

    Examples:
        >>> from pathlib import Path
        >>> row = '{"source": "A game of chess.", "target": "chess game"}'
        >>> _ = Path("pairs.jsonl").write_text(row)
        >>> keras_t5gemma.read_pairs("pairs.jsonl")
        {'encoder_text': ['A game of chess.'], 'decoder_text': ['chess game']}
    """
    names = checks.string(source, "source"), checks.string(target, "target")
    columns = _read(path, names, _READERS)
    return dict(zip(("encoder_text", "decoder_text"), columns, strict=True))


def read_texts(path: str | os.PathLike, field: str = "text") -> list[str]:
    """Read the documents of a file into memory.

    Args:
        path: a UTF-8 file: `.txt` with one document per line, empty lines skipped, also
            with `.gz` appended; or a file of rows as in `read_pairs`.
        field: name of the field or column with the text, in a file of rows.

    Returns:
        A list of strings.

    Raises:
        ValueError: as `read_pairs`.
        ImportError: for `.parquet` without pyarrow.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("texts.txt").write_text("one document")
        >>> keras_t5gemma.read_texts("texts.txt")
        ['one document']
    """
    checks.string(field, "field")
    readers = {**_READERS, ".txt": functools.partial(_lines, field=field)}
    return _read(path, (field,), readers)[0]


def _read(path, names, readers):
    """The columns of these names, as lists of strings."""
    path = checks.path(path, "path")
    kind = path.with_suffix("") if path.suffix == ".gz" else path
    read = readers.get(kind.suffix.lower())
    if read is None or (read is _parquet and kind is not path):
        raise ValueError(
            f"`path` must end in one of {sorted(readers)}, text files also with .gz "
            f"appended; got {str(path)!r}."
        )
    columns = [[] for _ in names]
    with _whole(path):
        for place, row in read(path, names):
            for name, column in zip(names, columns, strict=True):
                column.append(_text(row, name, f"{path}, {place}"))
    if not columns[0]:
        raise ValueError(f"{path} has no rows.")
    return columns


def read_objects(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """Read the objects of a JSON lines file into memory, whatever their fields.

    Args:
        path: a UTF-8 file with one object per line; may be compressed, `.gz`.

    Returns:
        A list of `(place, dict)`; the place is for messages.

    Raises:
        ValueError: for an empty file, or a line that is not a JSON object.
    """
    path = checks.path(path, "path")
    with _whole(path):
        rows = [(f"{path}, {place}", row) for place, row in _json_lines(path, ())]
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


@contextlib.contextmanager
def _whole(path):
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except EOFError as error:
        raise ValueError(f"{path} ends too early: it was cut off.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a valid gzip file: {error}") from error


def _text(row, name, place):
    if name not in row:
        raise ValueError(f"{place}: no field {name!r}; there are {sorted(row)}.")
    if not isinstance(row[name], str):
        raise ValueError(
            f"{place}: {name!r} must be a string; got {type(row[name]).__name__} "
            f"{row[name]!r}."
        )
    check_unicode(row[name], f"{place}: {name!r}")
    return row[name]


@contextlib.contextmanager
def _open(path):
    """The lines of a text file, with their ends; bounded in length."""
    with (
        open_data(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
    ):
        yield bounded_lines(text, path)


def _lines(path, names, field):
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if text := line.strip():
                yield f"line {number}", {field: text}


def _json_lines(path, names):
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: must be a JSON object; got "
                    f"{type(row).__name__}."
                )
            yield f"line {number}", row


def _check_header(header, names, path):
    """Raise `ValueError` when a column that is read is there more than once."""
    for name in names:
        if header.count(name) > 1:
            raise ValueError(
                f"{path}: the header has {name!r} {header.count(name)} times; got "
                f"{header}. Rename the others."
            )


def _tsv(path, names):
    """Rows of a TSV file; a stray quotation mark never merges rows."""
    with _open(path) as file:
        lines = list(file)
    header = _cells(lines[0]) if lines else []
    _check_header(header, names, path)
    start = 1
    while start < len(lines):
        end = start + 1
        cells = _cells(lines[start])
        if any(_is_open(cell) for cell in cells) or len(cells) != len(header):
            end = _end_of_quoted_row(lines, start, len(header))
            cells = _cells("".join(lines[start:end]))
        if len(cells) != len(header) and "".join(lines[start:end]).strip():
            raise ValueError(
                f"{path}, line {start + 1}: {len(cells)} cells, but the header has "
                f"{len(header)}: {header}. Quote cells with tabs or line breaks as "
                "`csv.writer` does, or use .jsonl."
            )
        if len(cells) == len(header):
            yield f"line {end}", dict(zip(header, cells, strict=True))
        start = end


def _end_of_quoted_row(lines, start, count):
    """Where a row ends whose quoted cells hold line breaks; else the next line.

    After a line that has all cells of a row, another such line is the next row: the
    quotation mark before it was an ordinary character.
    """
    row = lines[start]
    may_be_whole = count > 1 and len(_cells(row)) == count
    for end in range(start + 1, len(lines)):
        if may_be_whole and len(_cells(lines[end])) == count:
            break
        row += lines[end]
        if len(row) > MAX_RECORD:
            break
        if '"' not in lines[end]:
            continue
        cells = _cells(row)
        if len(cells) == count and not any(map(_is_open, cells)):
            return end + 1
    return start + 1


_QUOTED = re.compile(r'"((?:[^"]|"")*)"(?=\t|$)')


def _cells(line):
    """The cells of a TSV row; quotation marks count only where they enclose a cell."""
    line, cells, position = line.rstrip("\r\n"), [], 0
    while position <= len(line):
        quoted = _QUOTED.match(line, position)
        end = line.find("\t", position)
        end = quoted.end() if quoted else len(line) if end < 0 else end
        text = quoted[1].replace('""', '"') if quoted else line[position:end]
        cells.append(text)
        position = end + 1
    return cells


def _is_open(cell):
    return cell.startswith('"')


def _csv(path, names):
    largest = csv.field_size_limit(MAX_RECORD)  # Sources may be long.
    try:
        with _open(path) as file:
            reader = csv.DictReader(file, strict=True)
            try:
                _check_header(reader.fieldnames or [], names, path)
                for row in reader:
                    if None in row:
                        raise ValueError(
                            f"{path}, line {reader.line_num}: more cells than the "
                            f"header has: {reader.fieldnames}."
                        )
                    yield f"line {reader.line_num}", row
            except csv.Error as error:
                # `DictReader` counts the rows that it has returned.
                place = f"{path}, line {reader.reader.line_num}"
                raise ValueError(f"{place}: {error}") from error
    finally:
        csv.field_size_limit(largest)


def _parquet(path, names):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    check_regular(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    with file:
        there = file.schema_arrow.names
        wanted = [name for name in names if name in there]
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                # A message about a missing column names all columns of the file.
                all_there = len(wanted) == len(names)
                yield f"row {number}", row if all_there else dict.fromkeys(there)


_READERS.update(
    {
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".csv": _csv,
        ".tsv": _tsv,
        ".parquet": _parquet,
    }
)
