"""Evaluation refuses what would mix results, and says where a row is wrong."""

import json

import keras
import pytest
from helpers.models import one_block_config

import keras_t5gemma as kt
from keras_t5gemma.evaluation import candidates
from keras_t5gemma.evaluation.tasks import read_task

pytestmark = pytest.mark.one_backend
ROWS = [
    {"text": f"{word} {i}", "label": word} for i in range(6) for word in ("cat", "dog")
]


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture
def evaluate(tmp_path):
    pytest.importorskip("sklearn")
    write(tmp_path / "data/pets", ROWS)

    def evaluate(tasks=("pets",), output="results", **options):
        options = {"tfidf": True, "data": tmp_path / "data", **options}
        output = tmp_path / output if output else output
        return kt.evaluate_encoders(tasks=tasks, output=output, **options)

    return evaluate


def test_results_of_other_rows_are_not_shown(evaluate, tmp_path):
    first = evaluate()
    assert evaluate() == first
    write(tmp_path / "data/pets", [*ROWS, {"text": "a cow", "label": "cat"}])
    message = "results of 'pets/TF-IDF, linear/0' with other contents of the data"
    with pytest.raises(ValueError, match=message):
        evaluate()
    with pytest.raises(ValueError, match=message):  # Their table is one.
        evaluate(tfidf=False, presets=["t5gemma_mini"])
    # Files of earlier versions do not say.
    file = tmp_path / "results/results.json"
    found = json.loads(file.read_text())
    for run in found["runs"].values():
        del run["measured_on"]
    file.write_text(json.dumps(found))
    assert evaluate() == first


def test_a_model_is_known_by_its_weights(tmp_path, tokenizer, monkeypatch):
    found = {}
    for seed in (0, 1):
        keras.utils.set_random_seed(seed)
        preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 8)
        model = kt.Seq2SeqLM(
            kt.Backbone(one_block_config(), name="backbone"), preprocessor
        )
        folder = tmp_path / str(seed) / "preset"
        model.save_to_preset(folder)
        for kind in ("preset", "scratch"):
            each = candidates.Model(str(folder), kind)
            assert each.fingerprint() == each.fingerprint()
            found[seed, kind] = each.fingerprint()
    assert found[0, "preset"] != found[1, "preset"]
    assert found[0, "scratch"] == found[1, "scratch"]
    assert candidates.Model("t5gemma_mini", "preset").fingerprint() == "t5gemma_mini"
    monkeypatch.chdir(tmp_path / "1/preset")
    assert candidates.Model(".", "preset").name == "1"


def test_folders_of_other_things_are_kept(evaluate, tmp_path):
    run = tmp_path / "run"
    (run / "preset").mkdir(parents=True)
    (run / "run.yaml").write_text("epochs: 3\n")
    with pytest.raises(ValueError, match="`output` .*run must be a new folder.*preset"):
        evaluate(output="run")
    assert (run / "run.yaml").read_text() == "epochs: 3\n"
    (run / "preset").rmdir()
    evaluate(output="run")  # Interrupted early, a run has its options alone.


def test_tasks(evaluate, tmp_path):
    with pytest.raises(ValueError, match="`tasks` must name one task at least"):
        evaluate(tasks=[])
    assert not (tmp_path / "results").exists()
    write(tmp_path / "data/more/pets", ROWS)
    with pytest.raises(ValueError, match="`tasks` must have different names"):
        evaluate(tasks=["pets", "more/pets"])
    assert list(evaluate(tasks=["more/pets"])) == ["pets"]
    assert read_task(".", tmp_path / "data/pets").name == "pets"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": None}, "'label' must be a string or a whole.*None"),
        ({"text": "a", "label": 0.5}, "'label' must be a string or a whole.*0.5"),
        ({"text": 5, "label": "cat"}, "text.* must be a string; got.* 5"),
        ({"text": "a", "text_pair": 5, "label": "cat"}, "text_pair.* must be a string"),
    ],
)
def test_rows_of_wrong_types(evaluate, tmp_path, row, message):
    write(tmp_path / "data/pets", [*ROWS, row])
    with pytest.raises(ValueError, match=f"train.jsonl.*13.*{message}"):
        evaluate()


def test_quantized_weights_are_not_trained(evaluate):
    with pytest.raises(ValueError, match="`dtype` 'int8' has quantized weights"):
        evaluate(dtype="int8")
