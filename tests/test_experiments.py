"""Scripts in experiments/ that prepare data for the package's commands."""

import collections
import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from keras_t5gemma.evaluation.tasks import read_task

pytestmark = pytest.mark.one_backend
EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_splits(folder, rows):
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_encoder_tasks_are_read_by_evaluate(tmp_path):
    rows = [{"source": 1, "text": "a", "section": "x", "summary": "b"}] * 150
    rows += [{"source": 2, "text": "c", "section": "y", "summary": "d"}] * 150
    rare = [{"source": 3, "text": "e", "section": "z", "summary": "f"}] * 149
    write_splits(tmp_path / "data/synopsis", [*rows, *rare])
    glosses = [{"text": t, "label": f"noun.{t}"} for t in "gh"]
    write_splits(tmp_path / "data/supersense", glosses)
    load("encoder_tasks").write_tasks(tmp_path / "data", tmp_path / "tasks")
    task = read_task("section", tmp_path / "tasks")
    assert task.class_names == ["x", "y"] and len(task.test) == 300
    task = read_task("synopsis", tmp_path / "tasks")
    assert task.kind == "retrieval" and len(task.test) == 449
    assert (task.test.x[0], task.test.y[0]) == ("b", "a")
    task = read_task("supersense", tmp_path / "tasks")
    assert (task.train.x, task.train.y) == (["g", "h"], ["noun.g", "noun.h"])


def test_encoder_tasks_name_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="supersense/train.jsonl.gz"):
        load("encoder_tasks").write_tasks(tmp_path, tmp_path / "tasks")


# Package descriptions by their words; "the" is in all of them.
PACKAGES = {
    "chess": ("a chess game with the board", "chess for the board"),
    "checkers": ("a checkers game with the board", "checkers on the board"),
    "json": ("the parser of JSON files", "JSON parser"),
    "yaml": ("the parser of YAML files", "YAML parser"),
    "copy": ("the parser of copied YAML files", "yaml  parser"),
}
WORDNET = [
    "bank: sloping land beside water. they pulled the canoe up on the bank. he sat on "
    "the bank of the river.",
    "depository, bank: an institution that takes deposits. he cashed a check at the "
    "bank. that bank holds the mortgage. a bank.",
    "run, scat: to move fast by foot. she is running every day. the children ran home.",
    "runner: one who travels on foot. the runners were tired. the trunk fell.",
    "A line of documentation: not a gloss.",
]


def test_synopsis_pairs_are_balanced_and_hard():
    text_pairs = load("text_pairs")
    sklearn = pytest.importorskip("sklearn.feature_extraction.text")
    rows = [
        {"source": source, "text": text, "summary": summary}
        for source, (text, summary) in PACKAGES.items()
        for _ in range(2)  # Packages of one source: only the first is taken.
    ]
    words = sklearn.TfidfVectorizer().fit([row["text"] for row in rows])
    text_pairs.HARDEST = 1
    made = text_pairs.belongs(rows, words)
    truth = {text: summary for text, summary in PACKAGES.values()}
    partners = collections.defaultdict(set)
    for row in made:
        is_true = truth[row["text_pair"]] == row["text"]
        assert row["label"] == ("yes" if is_true else "no")
        partners[row["group"]].add(row["text"])
    for column in ("text", "text_pair"):  # As often in a positive as in a negative.
        counts = collections.Counter((row[column], row["label"]) for row in made)
        assert set(counts.values()) == {1} and len(counts) == len(made)
    # The negatives are about the same, but never the same synopsis.
    games = {PACKAGES[name][1] for name in ("chess", "checkers")}
    assert games in partners.values() and len(made) == 8
    assert {"YAML parser", "yaml  parser"} not in partners.values()


def test_word_senses_have_examples_of_the_word():
    text_pairs = load("text_pairs")
    glosses = [line.partition(": ")[2].partition(". ")[0] for line in WORDNET[:4]]
    labels = dict(zip(glosses, ["noun.x", "noun.y", "verb.z", "noun.x"], strict=True))
    senses = text_pairs.read_senses(WORDNET, labels)
    assert senses == {
        ("bank", "noun"): {
            glosses[0]: [
                "they pulled the canoe up on the bank",
                "he sat on the bank of the river",
            ],
            glosses[1]: [
                "he cashed a check at the bank",
                "that bank holds the mortgage",
            ],
        },
        ("run", "verb"): {glosses[2]: ["she is running every day"]},
        ("runner", "noun"): {glosses[3]: ["the runners were tired"]},
    }
    gloss_of = {e: g for word in senses.values() for g, es in word.items() for e in es}
    pairs, split = text_pairs.sense(senses), text_pairs.split_of("bank")
    assert [len(pairs[s]) for s in (split, *{*text_pairs.SPLITS} - {split})] == [
        4,
        0,
        0,
    ]
    for row in pairs[split]:
        word, example = row["text"].split(": ")
        is_same = gloss_of[example] == row["text_pair"]
        assert word == "bank" and row["label"] == ("yes" if is_same else "no")
    rows = text_pairs.wic(senses)[split]
    assert collections.Counter(row["label"] for row in rows) == {"yes": 2, "no": 2}
    for row in rows:
        examples = row["text"].split(": ")[1], row["text_pair"]
        is_same = len({gloss_of[e] for e in examples}) == 1
        assert len(set(examples)) == 2
        assert row["label"] == ("yes" if is_same else "no")


def test_words_of_a_lemma_are_in_one_split():
    text_pairs = load("text_pairs")
    splits = collections.Counter(text_pairs.split_of(f"word {i}") for i in range(2000))
    assert abs(splits["test"] - 500) < 80 and abs(splits["valid"] - 200) < 60
    assert text_pairs.split_of("bank") == text_pairs.split_of("bank")


def test_standard_errors_of_accuracies():
    table = load("representation_table")
    right = {"a": "2101", "b": "1100"}
    runs = {
        name: {
            "right": digits,
            "rows": "2221",
            "accuracy": 100 * sum(map(int, digits)) / 7,
        }
        for name, digits in right.items()
    }
    one, two = ([runs[name]] for name in "ab")
    # Residuals of the groups: 2 - 8/7, 1 - 8/7, -8/7 and 1 - 4/7.
    residuals = 6 / 7, -1 / 7, -8 / 7, 3 / 7
    expected = 1e4 * 4 / 3 * sum(r * r for r in residuals) / 49
    assert table.variance(one) == pytest.approx(expected)
    assert table.variance(one, one) == pytest.approx(0)
    # Differences: 1, 0, 0, 1 of 7 rows; residuals 3/7, -4/7, -4/7, 5/7.
    expected = 1e4 * 4 / 3 * (9 + 16 + 16 + 25) / 49 / 49
    assert table.variance(one, two) == pytest.approx(expected)
    seeds = table.variance([*one, *two]) - table.variance(
        [{**run, "accuracy": 50.0} for run in (*one, *two)]
    )
    spread = (runs["a"]["accuracy"] - runs["b"]["accuracy"]) ** 2 / 2
    assert seeds == pytest.approx(spread / 2)
