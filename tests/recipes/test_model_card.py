import re

import pytest
from huggingface_hub import ModelCard, ModelCardData

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.catalog import EMBEDDED_FOLDER
from keras_t5gemma.recipes import model_card
from keras_t5gemma.recipes.model_card import write_model_card

pytestmark = pytest.mark.one_backend


def card(folder, **changes):
    arguments = {
        "title": "Short\nsummaries",
        "base": "t5gemma_s_s_ul2",
        "data": [{"split": "test", "file": "a|b.jsonl", "rows": 12, "sha256": "ab12"}],
        "training": {"epochs": 3, "optimizer": "AdamW(1e-3)"},
        "scores": {
            "test rougeL": {"mean": 31.249, "standard_error": 0.625, "before": 20.0},
            "mine": {"mean": 2.0, "standard_error": None},
            "val_loss": 1.5,
        },
    }
    path = write_model_card(folder, **arguments | changes)
    assert path == folder / "README.md"
    return path.read_text("utf-8")


def test_model_card_states_what_it_is_given(tmp_path):
    body = ModelCard(card(tmp_path)).text
    assert body.startswith("\n# Short summaries\n")
    for row in (
        "| split | file | rows | sha256 |",
        "| test | a\\|b.jsonl | 12 | ab12 |",
        "| epochs | 3 |",
        "| test rougeL | 31.25 | 0.62 | 20 |",
        "| mine | 2 |  |  |",
        "| val_loss | 1.5 |  |  |",
    ):
        assert f"\n{row}\n" in body
    assert "trained from `t5gemma_s_s_ul2`" in body
    assert "TODO" not in body

    nothing = card(tmp_path, base=None, data=[], training={}, scores={})
    assert "trained from" not in nothing.split("## Use")[0]
    for sentence in ("None was recorded", "No settings", "None were measured"):
        assert sentence in nothing
    assert "|" not in nothing
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_hub_reads_scores_base_and_license(tmp_path):
    folder = tmp_path / "summaries"
    folder.mkdir()
    data = ModelCard(card(folder)).data
    assert data.library_name == "keras-hub"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "google/t5gemma-s-s-ul2"
    assert data.license == "gemma"
    assert data.model_name == "summaries"
    found = [
        (r.metric_type, r.metric_name, r.metric_value, r.dataset_name, r.dataset_split)
        for r in data.eval_results
    ]
    assert found == [
        ("rouge", "ROUGE-L", 31.25, "a|b.jsonl", "test"),
        ("mine", "mine", 2.0, "not named", None),
        ("val_loss", "val_loss", 1.5, "not named", None),
    ]
    # What is not known is not stated.
    nothing = card(folder, base="my_model", data=[], training={}, scores={})
    assert set(ModelCard(nothing).data.to_dict()) == {
        "library_name",
        "pipeline_tag",
        "tags",
    }


def test_hub_ids_of_names_and_handles():
    expected = "google/t5gemma-2b-2b-ul2-it"
    for preset in (
        "t5gemma_2b_2b_ul2_it",
        "hf://google/t5gemma-2b-2b-ul2-it",
        "kaggle://keras/t5-gemma/keras/t5gemma_2b_2b_ul2_it/1",
    ):
        assert model_card.hub_model_id(preset) == expected
    assert model_card.hub_model_id("hf://me/models/a/b") == "me/models"
    for preset in (None, "t5gemma_mini", "/a/folder", "kaggle://me/a/keras/b"):
        assert model_card.hub_model_id(preset) is None


def test_metadata_that_does_not_read_back_is_refused(tmp_path):
    data = ModelCardData(language=("en", "it"))  # YAML has no tuples.
    with pytest.raises(ValueError, match="does not read back"):
        model_card.save_card(tmp_path, data, "text")
    assert not list(tmp_path.iterdir())


def test_model_card_shows_how_to_load(shared_model, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    shared_model.save_to_preset(folder)
    code = re.search(r"```python\n(.*?)```", card(folder), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kt.Seq2SeqLM, "generate", lambda self, text: text.upper())
    said = []
    exec(code, {"print": said.append})
    assert said == ["A TEXT OF THE KIND IT WAS TRAINED ON"]


def test_model_card_needs_a_preset(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`folder` must be the folder of a preset"):
        card(tmp_path / "none")
    before = card(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: 1 / 0)  # As if the disk were full.
    with pytest.raises(ZeroDivisionError):
        card(tmp_path, title="Other")
    assert (tmp_path / "README.md").read_text("utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("row", kt.presets()[:2], ids=lambda row: row.name)
def test_embedded_presets_have_metadata_and_a_description(row):
    text = (EMBEDDED_FOLDER / row.name / "README.md").read_text("utf-8")
    data = ModelCard(text).data
    assert data.library_name == "keras-hub" and data.license == "apache-2.0"
    assert data.language == "en" and data.model_name == row.name
    assert all(result.dataset_split for result in data.eval_results)
    if row.name == "t5gemma_mini_synopsis":
        values = {r.metric_name: r.metric_value for r in data.eval_results}
        assert values["ROUGE-L (greedy)"] == 38.7
        assert values["ROUGE-L (5 beams)"] == 41.0
        for result in data.eval_results:  # The same numbers as in the table.
            assert re.search(rf"\| {result.metric_value} \|", text)
    assert row.description.startswith("A small T5Gemma that ")
    assert row.description.endswith(".")
