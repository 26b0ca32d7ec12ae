"""Measures by hand, tasks from files, and the harness on models that must differ."""

import gzip
import json

import numpy as np
import pytest
from helpers.gemma2 import make_gemma2
from helpers.models import numpy, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.cli import main
from keras_t5gemma.evaluation import candidates, measures, superglue
from keras_t5gemma.evaluation.tasks import Examples, read_task

pytestmark = pytest.mark.one_backend


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_splits(folder, rows, suffix=".jsonl"):
    for split in ("train", "valid", "test"):
        write(folder / f"{split}{suffix}", rows)


def test_measures_of_classes_by_hand():
    examples = Examples(list("abcde"), ["1", "1", "0", "0", "0"], list("ppqqr"))
    found = measures.of_classes(["1", "0", "0", "1", "0"], examples)
    # Class 1: one of two said, one of two true; class 0: two of three, both ways.
    assert found == {
        "accuracy": 60.0,
        "macro_f1": pytest.approx(100 * (1 / 2 + 2 / 3) / 2, abs=1e-3),
        "f1_of_1": 50.0,
        "exact_match": pytest.approx(100 / 3, abs=1e-3),  # Only "r" is right.
    }
    alone = Examples(["a", "b"], ["x", "y"])
    assert measures.of_classes(["x", "x"], alone) == {
        "accuracy": 50.0,
        "macro_f1": pytest.approx(100 / 3, abs=1e-3),  # "y" was never said.
    }


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_measures_of_rankings_by_hand(rows_at_once):
    documents = np.eye(4)[[0, 1, 2, 2]]
    queries = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])
    # Ranks 1, 2, and 1.5 twice, since two documents are alike; none if they are one.
    found = measures.of_ranking(queries, documents, list("abcd"), rows_at_once)
    mrr = 100 * (1 + 1 / 2 + 2 / 1.5) / 4
    assert found == {
        "recall@1": 25.0,
        "recall@10": 100.0,
        "mrr": pytest.approx(mrr, abs=1e-3),
    }
    found = measures.of_ranking(queries, documents, list("abcc"), rows_at_once)
    assert found["recall@1"] == 75.0
    many = measures.of_ranking(np.ones((30, 2)), np.ones((30, 2)), range(30))
    assert many["recall@10"] == 0.0  # All alike is no answer.


def test_errors_over_seeds():
    mean, error = measures.mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / np.sqrt(3)))
    assert measures.mean_and_error([5.0]) == (5.0, None)


ROWS = {
    "boolq": {"question": "is it", "passage": "It is.", "label": True},
    "cb": {"premise": "It is.", "hypothesis": "It was.", "label": "neutral"},
    "copa": {
        "premise": "It rained.",
        "choice1": "I got wet.",
        "choice2": "I sang.",
        "question": "effect",
        "label": 0,
    },
    "multirc": {
        "idx": 7,
        "passage": {
            "text": "It rained.",
            "questions": [
                {
                    "question": "What?",
                    "idx": 3,
                    "answers": [
                        {"text": "rain", "label": 1},
                        {"text": "sun", "label": 0},
                    ],
                }
            ],
        },
    },
    "rte": {"premise": "It is.", "hypothesis": "It was.", "label": "entailment"},
    "wic": {
        "word": "bank",
        "sentence1": "A river bank.",
        "sentence2": "A bank loan.",
        "label": False,
    },
    "wsc": {
        "text": "The old clock stopped because it broke.",
        "target": {
            "span1_index": 0,
            "span1_text": "The old clock",
            "span2_index": 5,
            "span2_text": "it",
        },
        "label": True,
    },
}
TEXTS = {
    "boolq": [(("is it", "It is."), "True", None)],
    "cb": [(("It is.", "It was."), "neutral", None)],
    "copa": [
        (
            ("It rained. What happened as a result?", "0: I got wet.\n1: I sang."),
            "0",
            None,
        )
    ],
    "multirc": [
        (("What?\nrain", "It rained."), "1", "7/3"),
        (("What?\nsun", "It rained."), "0", "7/3"),
    ],
    "rte": [(("It is.", "It was."), "entailment", None)],
    "wic": [(("bank: A river bank.", "A bank loan."), "False", None)],
    "wsc": [("[The old clock] stopped because *it* broke.", "True", None)],
}


@pytest.mark.parametrize("name", superglue.TASKS)
def test_superglue(name, tmp_path):
    folder, examples, chosen = superglue.TASKS[name]
    assert examples(ROWS[name]) == TEXTS[name]
    other = {"cb": "contradiction", "rte": "not_entailment", "copa": 1, "boolq": False}
    rows = [ROWS[name], {**ROWS[name], "label": other.get(name, True)}] * 20
    if name == "wsc":
        rows[1::2] = [{**ROWS[name], "label": False}] * 20
    write(tmp_path / folder / "train.jsonl", rows)
    write(tmp_path / folder / "val.jsonl", rows[:2])
    task = read_task(name, tmp_path)
    a_row = len(TEXTS[name])
    assert (len(task.train), len(task.valid)) == (36 * a_row, 4 * a_row)
    assert list(zip(task.test.x, task.test.y, strict=True))[:a_row] == [
        row[:2] for row in TEXTS[name]
    ]
    assert len(task.class_names) == 2 and task.measures == chosen
    found = measures.of_classes(task.test.y, task.test)
    assert all(found[measure] == 100 for measure in task.measures)
    broken = {key: value for key, value in rows[0].items() if key == "label"}
    write(tmp_path / folder / "train.jsonl", [*rows, broken])
    with pytest.raises(ValueError, match=f"line 41: not a row of {name}"):
        read_task(name, tmp_path)
    (tmp_path / folder / "val.jsonl").unlink()
    write(tmp_path / folder / "train.jsonl", rows)
    with pytest.raises(FileNotFoundError, match="val.jsonl.*SuperGLUE"):
        read_task(name, tmp_path)


def test_tasks_of_a_user(tmp_path):
    pairs = [{"text": "a", "text_pair": "b", "label": n} for n in (0, 1)]
    write_splits(tmp_path / "mine", pairs)
    task = read_task("mine", tmp_path)
    assert task.test.x == [("a", "b")] * 2 and task.class_names == ["0", "1"]
    write_splits(tmp_path / "search", [{"query": "q", "document": "d"}])
    task = read_task("search", tmp_path)
    assert task.kind == "retrieval" and (task.test.x, task.test.y) == (["q"], ["d"])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`tasks` must be of boolq.*'nothing'"):
        read_task("nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty/train.jsonl"):
        read_task("empty", tmp_path)
    write_splits(tmp_path / "odd", [{"a": 1}])
    with pytest.raises(ValueError, match="fields 'text' and 'label'"):
        read_task("odd", tmp_path)
    write_splits(tmp_path / "one", [{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match="a single class in train: \\['x'\\]"):
        read_task("one", tmp_path)
    rows = [{"text": "a", "label": x} for x in "xy"]
    write_splits(tmp_path / "one", rows)
    write(tmp_path / "one/test.jsonl", [{"text": "a", "label": "z"}])
    with pytest.raises(ValueError, match="in test that no training row has: .'z'"):
        read_task("one", tmp_path)
    write(tmp_path / "one/test.jsonl", [*rows, {"text": "a"}])
    with pytest.raises(ValueError, match="line 3: no field 'label'"):
        read_task("one", tmp_path)
    write_splits(tmp_path / "one", rows)
    tfidf = {"tasks": ["one"], "data": tmp_path, "output": tmp_path, "tfidf": True}
    for options, message in (
        ({"tfidf": False}, "nothing to measure"),
        ({"seeds": 0}, "`seeds` must be a whole number from 1; got 0"),
        ({"learning_rates": ["fast"]}, "`learning_rates` must be one or more .*'fast'"),
        ({"learning_rates": [0]}, "`learning_rates` must be .* above 0"),
        ({"train_rows": 1}, "`train_rows` must be 2 or more.*got 1"),
        ({"train_rows": 0}, "`train_rows` must be a whole number from 1; got 0"),
        ({"lexical_dim": 0}, "`lexical_dim` must be a whole number from 1; got 0"),
        ({"pooling": "max"}, "`pooling` must be one of.*'max'"),
        ({"tasks": "nothing"}, "`tasks` must be of boolq.*'nothing'"),
        # Before anything is measured: there is no results.json.
        ({"presets": "no_such_preset"}, "no_such_preset"),
        ({"decoder_only": ["no_such_gemma"]}, "no_such_gemma"),
        ({"presets": ["a/x", "b/x"]}, "different names"),
    ):
        with pytest.raises(ValueError, match=message):
            kt.evaluate_encoders(**{**tfidf, **options})
    assert not (tmp_path / "results.json").exists()


WORDS = {"games": "chess cards board dice", "tools": "copy move delete list"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks that a model can learn in seconds: by words, and by equal words."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows, pairs = [], []
    for i in range(48):
        label = sorted(WORDS)[i % 2]
        words = rng.permutation(WORDS[label].split())
        rows.append({"text": " ".join(words[:3]), "label": label})
        pairs.append({"query": " ".join(words[:2]), "document": f"{words[1]} {i}"})
    write_splits(folder / "kinds", rows)
    write_splits(folder / "search", pairs)
    return folder


@pytest.fixture(scope="module")
def presets(tokenizer, tmp_path_factory):
    """A pair's preset, and a Gemma 2's of KerasHub."""
    folder = tmp_path_factory.mktemp("presets")
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    pair = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    pair.save_to_preset(folder / "pair")
    source = make_gemma2(hidden_dim=16, intermediate_dim=64, num_layers=1)
    source.save_to_preset(str(folder / "gemma"))
    assets = folder / "gemma/assets/tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.spm").write_bytes(tokenizer.proto)
    return folder


def test_a_table_that_goes_on(data, presets, tmp_path, capsys):
    options = {
        "data": data,
        "output": tmp_path / "results",
        "presets": [str(presets / "pair")],
        "seeds": 2,
        "epochs": 6,
        "batch_size": 8,
        "retrieval_batch_size": 8,
        "learning_rates": ["1e-9", "1e-2"],
    }
    found = kt.evaluate_encoders(["kinds"], **options)
    assert found["kinds"]["pair"]["accuracy"] == {"mean": 100.0, "standard_error": 0.0}
    kept = json.loads((tmp_path / "results/results.json").read_text())
    # The rate that learns was chosen by the first seed, and taken by the second.
    assert [run["learning_rate"] for run in kept["runs"].values()] == [1e-2, 1e-2]
    capsys.readouterr()
    more = {"scratch": options["presets"], "decoder_only": [str(presets / "gemma")]}
    found = kt.evaluate_encoders(["kinds", "search"], **options, **more, tfidf=True)
    printed = capsys.readouterr().out
    assert "kinds/pair/0" not in printed and "kinds/gemma (decoder-only)/1" in printed
    table = (tmp_path / "results/results.md").read_text()
    assert printed.endswith(table)
    rows = [line.split(" | ") for line in table.strip("\n|").split("\n")]
    heads = ["", "kinds (accuracy)", "search (recall@10)"]
    assert [cell.strip("| ") for cell in rows[0]] == heads
    assert [row[0].strip("| ") for row in rows[2:]] == [
        "pair",
        "pair from scratch",
        "gemma (decoder-only)",
        "TF-IDF, linear",
    ]
    assert rows[2][1] == "100.0 ± 0.0"
    assert found["kinds"]["TF-IDF, linear"]["accuracy"]["standard_error"] is None
    for model in found["search"].values():
        assert set(model) == {"recall@1", "recall@10", "mrr"}
    again = kt.evaluate_encoders(["kinds", "search"], **options, **more, tfidf=True)
    assert again == found
    capsys.readouterr()
    repeat = ["evaluate", "--config", str(tmp_path / "results/run.yaml")]
    assert main.main(repeat) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(ValueError, match="results with other options: {'epochs': 6}"):
        kt.evaluate_encoders(["kinds"], **{**options, "epochs": 5})


def test_from_scratch_has_the_size_and_not_the_weights(presets):
    def kernel(backbone):
        return numpy(backbone.encoder.blocks[0].mlp.up.kernel)

    preset = str(presets / "pair")
    saved = kernel(kt.Backbone.from_preset(preset, encoder_only=True))
    loaded, scratch = (
        kernel(candidates.Model(preset, kind)._load(candidates.Recipe())[0])
        for kind in ("preset", "scratch")
    )
    assert np.array_equal(loaded, saved)
    assert scratch.shape == saved.shape and not np.isclose(scratch, saved).any()


def test_frozen_encoders(data, presets, tmp_path):
    options = {"data": data, "presets": [str(presets / "pair")], "seeds": 1}
    options |= {"frozen": True, "pooling": "mean"}
    found = kt.evaluate_encoders(["kinds", "search"], output=tmp_path / "a", **options)
    # Which words there are shows in the mean of any embeddings.
    assert found["kinds"]["pair"]["accuracy"]["mean"] == 100
    options["decoder_only"] = [str(presets / "gemma")]
    with_words = kt.evaluate_encoders(
        ["search"], output=tmp_path / "b", lexical_dim=480, **options
    )["search"]
    mrr = [table["pair"]["mrr"]["mean"] for table in (found["search"], with_words)]
    assert mrr[0] < mrr[1] and len(with_words) == 2
