"""generation_config.json: defaults of `generate`, read, saved and exported."""

import json
import shutil
import warnings

import numpy as np
import pytest
from helpers.models import one_block_config, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import generation_config
from keras_t5gemma.cli import commands, options

pytestmark = pytest.mark.one_backend
FIELDS = {
    "eos_token_id": [1, 107, 50],
    "max_new_tokens": 5,
    "max_length": 20,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.5,
    "suppress_tokens": [9],
    "bos_token_id": 2,
    "transformers_version": "5.23.0",
}
DEFAULTS = {
    "stop_token_ids": (1, 107, 50),
    "max_length": 6,
    "banned_token_ids": (9,),
    "repetition_penalty": 1.5,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (FIELDS, DEFAULTS),
        ({}, {}),
        ({"eos_token_id": 1}, {"stop_token_ids": (1,)}),
        ({"max_length": 20}, {"max_length": 20}),
        ({"temperature": 0.7, "top_k": 5}, {}),  # Not without `do_sample`.
        ({"temperature": 0.0, "do_sample": False}, {}),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None}, {"temperature": 1.0}),
        (
            {"num_beams": 4, "length_penalty": 0.6},
            {"num_beams": 4} | {"length_penalty": 0.6},
        ),
        ({"num_beams": 1, "repetition_penalty": 1, "min_new_tokens": None}, {}),
        (
            {"num_beams": 2, "no_repeat_ngram_size": 3},
            {"num_beams": 2} | {"no_repeat_ngram_size": 3},
        ),
    ],
)
def test_fields_become_keywords_of_generate_and_back(fields, expected):
    found = generation_config.parse(fields)
    assert found.defaults == expected and not found.unused
    written = generation_config.write(found.defaults)
    again = generation_config.parse(json.loads(json.dumps(written)))
    assert again.defaults == {"stop_token_ids": (1,), **expected}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "x"}, "`eos_token_id` must be a whole number.*'x'"),
        ({"eos_token_id": [1, -1]}, "`eos_token_id`.*-1"),
        ({"suppress_tokens": [0.5]}, "`suppress_tokens`"),
        ({"eos_token_id": [1, 480]}, r"has \(1, 480\) for `stop_token_ids`; the model"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"max_length": "20"}, "`max_length`"),
        ({"do_sample": "yes"}, "`do_sample` must be True or False"),
        ({"do_sample": True, "temperature": 0}, "`temperature`"),
        ({"temperature": "hot"}, "`temperature`"),
        ({"top_k": -1}, "`top_k`"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"num_beams": 0}, "`num_beams`"),
        ({"num_beams": True}, "`num_beams`"),
        ({"repetition_penalty": 0}, "`repetition_penalty`"),
        ({"decoder_start_token_id": 0}, "`decoder_start_token_id` must be 2"),
        ({"pad_token_id": 5}, "`pad_token_id` must be 0"),
    ],
)
def test_wrong_values_name_the_file_and_the_key(folder, fields, message):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"generation_config.json:? {message}"):
        kt.Seq2SeqLM.from_preset(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer, config=one_block_config())


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model.save_to_huggingface(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "x")
    return tmp_path / "x"


def test_defaults_of_a_folder_are_used_saved_and_exported(folder, tmp_path):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(FIELDS))
    model = kt.Seq2SeqLM.from_preset(folder)
    assert model.generation_defaults == DEFAULTS
    x = {"encoder_token_ids": [[5, 6, 7]]}
    ids = model.generate(x, seed=3)["decoder_token_ids"]
    explicit = {**DEFAULTS, "seed": 3}
    plain = kt.Seq2SeqLM.from_preset(folder)
    plain.generation_defaults = {}
    assert ids.shape == (1, 6)
    assert (ids == plain.generate(x, **explicit)["decoder_token_ids"]).all()
    assert model.generate(x, max_length=4)["decoder_token_ids"].shape == (1, 4)
    assert model.generate(x, num_beams=2)["decoder_token_ids"].shape == (1, 6)
    assert list(model.stream("a", seed=1))
    model.save_to_preset(tmp_path / "preset")
    again = kt.Seq2SeqLM.from_preset(tmp_path / "preset")
    assert again.generation_defaults == DEFAULTS
    copied = kt.Seq2SeqLM.from_config(again.get_config())
    assert copied.generation_defaults == DEFAULTS
    for i, source in enumerate((folder, tmp_path / "preset")):
        for to in ("transformers", "keras_t5gemma"):
            kt.convert(source, tmp_path / f"{to}{i}", to=to)
            found = kt.Seq2SeqLM.from_preset(tmp_path / f"{to}{i}")
            assert found.generation_defaults == DEFAULTS
    plain.save_to_preset(tmp_path / "preset")  # Nothing is left of the earlier save.
    assert kt.Seq2SeqLM.from_preset(tmp_path / "preset").generation_defaults == {}


def test_what_ends_a_response_in_training_always_stops(folder, tokenizer, tmp_path):
    """A base model whose file has eos alone, trained on turns here."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    turns = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16, template="instruction")
    model = kt.Seq2SeqLM.from_preset(folder, preprocessor=turns)
    end = tokenizer.end_of_turn_id
    forced = {"forced_token_ids": [9, end, 9, 9], "max_length": 6}
    x = {"encoder_token_ids": [[5, 6, 7]]}
    assert model.generate(x, **forced)["decoder_padding_mask"].sum() == 3
    model.save_to_huggingface(tmp_path / "reference")
    fields = json.loads((tmp_path / "reference/generation_config.json").read_text())
    assert fields["eos_token_id"] == [1, end]
    plain = kt.Seq2SeqLM.from_preset(folder)
    assert plain.generate(x, **forced)["decoder_padding_mask"].sum() > 3


def test_transformers_generates_the_same_from_the_export(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model.generation_defaults = {"max_length": 9, "repetition_penalty": 1.7}
    try:
        model.save_to_huggingface(tmp_path)
        ours = model.generate({"encoder_token_ids": [[5, 6, 7]]})["decoder_token_ids"]
    finally:
        model.generation_defaults = None
    reference = transformers.T5GemmaForConditionalGeneration.from_pretrained(tmp_path)
    out = reference.generate(torch.tensor([[5, 6, 7]])).numpy()
    assert (out == ours[:, : out.shape[1]]).all() and out.shape[1] <= 9


def test_what_is_not_implemented_is_said(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"min_p": 0.1, "num_beams": 2, "do_sample": True}))
    with pytest.warns(UserWarning, match="'min_p': 0.1, 'do_sample': True}") as found:
        model = kt.Seq2SeqLM.from_preset(folder)
    assert len(found) == 1
    assert model.generation_defaults == {"num_beams": 2}
    path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kt.Seq2SeqLM.from_preset(folder).generation_defaults == {}


def test_info_shows_the_template_and_the_defaults(folder, capsys):
    fields = {"max_new_tokens": 5, "min_p": 0.1, "eos_token_id": [1, 107]}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    commands.run_info(options.Info(str(folder)))
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert rows["template"] == "none"
    assert rows["generate: max_length"] == "6"
    assert rows["generate: stop_token_ids"] == "(1, 107)"
    assert "not implemented" in rows["generate: min_p"]


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"beams": 3}, r"unknown keywords \['beams'\]"),
        ({"seed": 3}, r"unknown keywords \['seed'\]"),  # No file can hold it.
        ({"top_p": 2}, "`top_p`"),
        ({"max_length": 1}, "`max_length`"),
        ({"stop_token_ids": 5}, "`stop_token_ids`"),
        ([1], "`generation_defaults` must be"),
    ],
)
def test_wrong_defaults_are_refused(model, defaults, message):
    with pytest.raises(ValueError, match=message):
        model.generation_defaults = defaults
    assert model.generation_defaults == {}


def test_what_is_asked_for_replaces_sampling_and_beams(model, tmp_path):
    x = {"encoder_token_ids": [[5, 6, 7]]}

    def ids(model, **options):
        return model.generate(x, 16, stop_token_ids=None, **options)[
            "decoder_token_ids"
        ].tolist()

    greedy = ids(model)
    sampling = {"temperature": 9.0, "top_k": 300}
    try:
        for defaults in (sampling, {"num_beams": 3}):
            model.generation_defaults = defaults
            plain = greedy if "num_beams" in defaults else ids(model, seed=1)
            assert ids(model, speculate="source", seed=1) == plain
            assert ids(model, seed=1) != greedy
            model.compile(sampler="greedy")
            assert ids(model, seed=1) == greedy
            copied = kt.Seq2SeqLM.from_config(model.get_config())
            copied.compile_from_config(model.get_compile_config())
            assert not copied.is_auto_sampler
            model.compile()
            copied.compile_from_config(model.get_compile_config())
            assert copied.is_auto_sampler
    finally:
        model.generation_defaults = None
        model.compile()


def test_defaults_of_numpy_are_saved(model, tmp_path):
    model.generation_defaults = {
        "temperature": np.float32(0.5),
        "banned_token_ids": np.array([5, 6]),
        "min_new_tokens": np.int32(3),
    }
    try:
        expected = {"temperature": 0.5, "banned_token_ids": (5, 6), "min_new_tokens": 3}
        assert model.generation_defaults == expected
        model.save_to_preset(tmp_path)
    finally:
        model.generation_defaults = None
    found = kt.Seq2SeqLM.from_preset(tmp_path).generation_defaults
    assert expected.items() <= found.items()


def test_a_model_that_is_not_compiled_is_greedy(model):
    x = {"encoder_token_ids": [[5, 6, 7]]}
    other = kt.Seq2SeqLM(model.backbone, model.preprocessor, compile=False)
    found = other.generate(x, 9)["decoder_token_ids"]
    assert (found == model.generate(x, 9)["decoder_token_ids"]).all()
