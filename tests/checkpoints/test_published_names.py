"""The instruction template goes by exact published names, never by a likeness."""

import importlib.metadata
import json
import warnings

import pytest
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import tiny_config

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import huggingface, presets
from keras_t5gemma.conversion import adapt, gemma2_reader

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    "preset",
    [
        "t5gemma_9b_2b_ul2_it",
        "hf://google/t5gemma-b-b-prefixlm-it",
        "kaggle://keras/t5-gemma/keras/t5gemma_b_b_prefixlm_it",
        "kaggle://keras/t5-gemma/keras/t5gemma_b_b_prefixlm_it/2",
        "/models/t5gemma-b-b-prefixlm-it/",
        "/models/t5gemma_b_b_prefixlm_it",
        "/hub/models--google--t5gemma-s-s-ul2-it/snapshots/0123abc",
        "/hub/models/keras/t5-gemma/keras/t5gemma_s_s_ul2_it/1",
    ],
)
def test_published_names_are_known_in_every_form(preset):
    source = presets.Source(preset, preset, presets.HUGGING_FACE, {})
    assert source.is_instruction_tuned


@pytest.mark.parametrize(
    "preset",
    [
        "t5gemma_9b_2b_ul2",
        "t5gemma_mini_synopsis",
        "hf://somebody/t5gemma-b-b-prefixlm-it",
        "kaggle://somebody/t5-gemma/keras/t5gemma_b_b_prefixlm_it",
        "/models/mt-en-it",
        "/models/opus_en_it",
        "/models/instructor-large",
        "/models/t5gemma-b-b-prefixlm-it/checkpoint-500",
        "/models/my-t5gemma-b-b-prefixlm-it",
        "/hub/models--somebody--t5gemma-s-s-ul2-it/snapshots/0123abc",
        "/1",
    ],
)
def test_other_names_are_not_guessed_from(preset):
    source = presets.Source(preset, preset, presets.HUGGING_FACE, {})
    assert not source.is_instruction_tuned


def make_folder(folder, proto, **tokenizer_config):
    folder.mkdir()
    config = huggingface.write_config(tiny_config(), "float32")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(proto)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def test_an_unused_chat_template_is_reported(tmp_path, proto):
    folder = make_folder(tmp_path / "mt-en-it", proto, chat_template="{{ messages }}")
    load = kt.Seq2SeqLMPreprocessor.from_preset
    with pytest.warns(UserWarning, match="mt-en-it hold a chat.*template=") as found:
        assert load(folder).template is None
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder, template="instruction").template == "instruction"
        assert load(folder, template=None).template is None
        plain = make_folder(tmp_path / "instructor-large", proto)
        assert load(plain).template is None
        named = folder.rename(tmp_path / "t5gemma-b-b-ul2-it")
        assert load(named).template == "instruction"
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(UserWarning, match="instructor-large hold a chat template"):
        load(plain)


def test_adapt_goes_by_exact_names_and_needs_no_installation(tmp_path, monkeypatch):
    def refuse(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", refuse)
    folder = tmp_path / "gemma2_instruct_tuned_by_me-it"
    make_gemma2(**SMALL).save_to_preset(str(folder))
    assert not gemma2_reader.open_gemma2(folder).instruction_tuned
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    with pytest.warns(UserWarning, match="tuned_by_me-it hold a chat template"):
        _, _, lineage, _ = adapt.plan_adaptation(folder)
    assert lineage["keras_t5gemma"] == kt.__version__
    named = folder.rename(tmp_path / "gemma-2-2b-it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gemma2_reader.open_gemma2(named).instruction_tuned
