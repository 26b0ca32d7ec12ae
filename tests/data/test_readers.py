import csv
import gzip
import json
import sys

import pytest

from keras_t5gemma.data.readers import read_pairs, read_texts
from keras_t5gemma.data.text_columns import as_columns

pytestmark = pytest.mark.one_backend
ROWS = [("A fox\nand a dog", 'say "hi"'), ("", "b, c\td"), ("Größe", "")]
PAIRS = {"encoder_text": [s for s, _ in ROWS], "decoder_text": [t for _, t in ROWS]}
OBJECTS = [{"source": s, "target": t, "id": i} for i, (s, t) in enumerate(ROWS)]


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    text = "\n\n".join(map(json.dumps, OBJECTS))
    path = write(tmp_path / name, text)
    assert read_pairs(path) == PAIRS
    assert read_pairs(str(path), target="source")["decoder_text"] == [
        s for s, _ in ROWS
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_tables(tmp_path, name):
    path = write(tmp_path / name, "")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if "tsv" in name else ",")
        rows.writerows([("target", "n", "source"), *((t, 1, s) for s, t in ROWS)])
    assert read_pairs(path) == PAIRS


def test_long_cells_are_no_error(tmp_path):
    limit = csv.field_size_limit()
    text = "word " * limit
    path = write(tmp_path / "a.csv", f"source,target\n{text},b\n")
    assert read_pairs(path) == {"encoder_text": [text], "decoder_text": ["b"]}
    assert csv.field_size_limit() == limit


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(OBJECTS), path)
    assert read_pairs(path) == PAIRS
    with pytest.raises(ValueError, match="no field 'text'; there are.*'source'"):
        read_pairs(path, source="text")
    with pytest.raises(ValueError, match="row 1: 'id' must be a string; got int 0"):
        read_pairs(path, target="id")
    write(path, "text")
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
        read_pairs(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_pairs(tmp_path / "a.parquet")


GOOD = '{"source": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"must end in one of \['.csv'.*'.parquet'.*got .*a.txt"),
        ("a.parquet.gz", "", "must end in one of"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.csv", "source,target\n", "a.csv has no rows"),
        ("a.jsonl", GOOD + '{"text": "a"}', r"line 2: no field 'source'.*\['text'\]"),
        ("a.jsonl", GOOD + "\n[1]", "line 3: must be a JSON object.*got list"),
        ("a.jsonl", GOOD + "{", "line 2 is not JSON: Expecting"),
        ("a.jsonl", '{"source": "a", "target": null}', "line 1: 'target'.*NoneType"),
        ("a.csv", "source;target\na;b\n", r"line 2: no field.*\['source;target'\]"),
        ("a.csv", "source,target\na,b,c\n", "line 2: more cells than the header"),
        ("a.csv", "source,target,source\na,b,c\n", "'source' 2 times.*Rename"),
        ("a.tsv", "target\tsource\ttarget\na\tb\tc\n", "'target' 2 times"),
        ("a.csv", "source,target\na\n", "line 2: 'target' must be a string.*None"),
        ("a.csv", 'source,target\na,"b\n', "line 2: unexpected end of data"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / name, text))


def test_damaged_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"source": "\xff"}')
    with pytest.raises(ValueError, match="a.jsonl is not UTF-8 text"):
        read_pairs(path)
    whole = gzip.compress(GOOD.encode() * 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="a.jsonl.gz ends too early"):
        read_pairs(path)
    with pytest.raises(FileNotFoundError, match="none.csv"):
        read_pairs(tmp_path / "none.csv")


def test_paths_and_datasets_are_data_for_fit(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, OBJECTS)))
    assert as_columns(path) == PAIRS

    class Dataset:
        """What is used of `datasets.Dataset`."""

        column_names = ["decoder_text", "encoder_text", "id"]

        def __len__(self):
            return len(ROWS)

        def __getitem__(self, key):
            return tuple(PAIRS[key])

    assert as_columns(Dataset()) == PAIRS
    Dataset.column_names = ["en", "it"]
    with pytest.raises(ValueError, match=r"columns.*it has \['en', 'it'\]"):
        as_columns(Dataset())


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    assert as_columns(datasets.Dataset.from_dict({**PAIRS, "id": [0, 1, 2]})) == PAIRS


def test_only_line_feeds_separate_lines(tmp_path):
    """`str.splitlines` would also cut at these characters."""
    separators = "a\u2028b\u2029c\x85d\x0ce\x1ef"
    path = tmp_path / "x.jsonl"
    row = json.dumps({"source": separators, "target": "t"}, ensure_ascii=False)
    path.write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert read_pairs(path)["encoder_text"] == [separators] * 2
    path = tmp_path / "x.txt"
    path.write_text(f"\ufeff{separators}\nsecond\n", encoding="utf-8")
    assert read_texts(path) == [separators, "second"]


def test_quotation_marks_in_tsv_are_characters(tmp_path):
    path = tmp_path / "x.tsv"
    rows = ['5" disk\tsmall', '"open\tb', 'c\td"', '"a ""quoted"" cell"\t"e"']
    path.write_text("\n".join(["source\ttarget", *rows]) + "\n", encoding="utf-8")
    assert read_pairs(path) == {
        "encoder_text": ['5" disk', '"open', "c", 'a "quoted" cell'],
        "decoder_text": ["small", "b", 'd"', "e"],
    }
    path.write_text('source\ttarget\n"a\tb\nc"\td\n', encoding="utf-8")
    assert read_pairs(path)["encoder_text"] == ['"a', 'c"']  # Not one merged row.
    # The first line is no row by itself: as `csv.writer` quotes a line break.
    path.write_text('source\ttarget\n"a\nb"\tc\nd\te\n', encoding="utf-8")
    assert read_pairs(path)["encoder_text"] == ["a\nb", "d"]
    path.write_text('source\ttarget\n"a\tb\nc"\td\n\te\tf\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 4: 3 cells, but the header has 2"):
        read_pairs(path)


def test_text_that_is_not_unicode_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"source": "a", "target": "b"}\n{"source": "\\ud83d", "target": ""}\n'
    )
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: 'source' is not valid Uni"):
        read_pairs(path)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"x" * 99)[:-20] + b"1" * 20]
)
def test_a_broken_gzip_file_is_named(tmp_path, content):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.txt.gz (is not a valid gzip|ends too)"):
        read_texts(path)
