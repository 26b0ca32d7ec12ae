import warnings

import numpy as np
import pytest
from helpers.models import SENTENCES

import keras_t5gemma as kt

PAIRS = {
    "encoder_text": ["The quick fox", "A board"],
    "decoder_text": ["fox", "The old board"],
}


@pytest.fixture
def preprocessor(tokenizer):
    return kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)


def test_arrays_of_a_batch(preprocessor, tokenizer):
    x, y, weights = preprocessor(PAIRS)
    source, target = (
        tokenizer.tokenize(PAIRS[k][1]) for k in ("encoder_text", "decoder_text")
    )
    n = len(target) + 1
    assert x["encoder_token_ids"].shape == (2, 24)
    assert x["encoder_token_ids"][1].tolist() == source + [0] * (24 - len(source))
    assert x["encoder_padding_mask"][1].sum() == len(source)
    assert x["decoder_token_ids"][1].tolist() == [2, *target] + [0] * (16 - n)
    assert y[1].tolist() == [*target, 1] + [0] * (16 - n)
    assert weights[1].tolist() == [1.0] * n + [0.0] * (16 - n)
    assert {a.dtype.name for a in x.values()} == {"int32"}
    assert (y.dtype, weights.dtype) == ("int32", "float32")


@pytest.mark.parametrize("template", [None, "instruction"])
def test_encoder_tokens_are_the_same_in_fit_and_generate(tokenizer, template):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 16, template=template)
    trained, _, _ = preprocessor(PAIRS)
    served = preprocessor.generate_preprocess(PAIRS["encoder_text"])
    for name in ("encoder_token_ids", "encoder_padding_mask"):
        assert (trained[name] == served[name]).all()


def test_instruction_template(tokenizer):
    """No bos or eos, control tokens single: docs/facts.md, section 6."""
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 16, template="instruction")
    text = "Say <end_of_turn> twice"
    row = preprocessor.generate_preprocess(text)["encoder_token_ids"][0]
    row = row[row != 0].tolist()
    assert (row[0], row.count(107), row.count(106)) == (106, 1, 2)
    assert not {1, 2} & set(row)
    shown = tokenizer.detokenize(row, skip_control_tokens=False)
    expected = f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
    assert shown == expected
    _, y, _ = preprocessor({"encoder_text": ["a"], "decoder_text": ["b"]})
    assert 107 in y and 1 not in y


def test_truncation_cuts_the_text_not_the_template(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 30, 4, template="instruction")
    with pytest.warns(UserWarning, match="1 of 2 encoder texts were longer") as seen:
        x, y, _ = preprocessor(
            {"encoder_text": [" ".join(SENTENCES), "a"], "decoder_text": ["a", "b"]}
        )
    assert len(seen) == 1
    row = x["encoder_token_ids"][0].tolist()
    assert len(row) == 30 and row.count(106) == 2 and row.count(107) == 1


def test_truncation_is_reported_once_with_counts(preprocessor):
    long = {"encoder_text": [" ".join(SENTENCES)] * 3, "decoder_text": ["fox"] * 3}
    with pytest.warns(UserWarning) as seen, preprocessor.report_truncation():
        preprocessor(long)
        preprocessor(PAIRS)
        preprocessor(long)
    assert [str(w.message) for w in seen] == [
        "6 of 8 encoder texts were longer than 24 tokens and were truncated; increase "
        "`preprocessor.encoder_sequence_length` to keep them whole."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessor(PAIRS)


def test_rows_of_one_side_alone(preprocessor):
    """Nothing is counted outside `report_truncation`."""
    (row,) = preprocessor.encoder_rows([" ".join(SENTENCES)])
    assert len(row) == 24


def test_pad_to_multiple_of(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16, pad_to_multiple_of=4)
    x, y, weights = preprocessor(PAIRS)
    longest = int(x["encoder_padding_mask"].sum(1).max())
    assert x["encoder_token_ids"].shape[1] == -(-longest // 4) * 4
    assert y.shape == weights.shape == x["decoder_token_ids"].shape


def test_sample_weight_is_one_a_pair(preprocessor):
    _, _, weights = preprocessor(PAIRS, sample_weight=[0.5, 2.0])
    assert set(np.unique(weights[0])) == {0.0, 0.5}
    assert set(np.unique(weights[1])) == {0.0, 2.0}


def test_empty_strings_are_rows_of_padding(preprocessor):
    x, y, weights = preprocessor({"encoder_text": [""], "decoder_text": [""]})
    assert x["encoder_padding_mask"].sum() == 0
    assert y[0, 0] == 1 and weights.sum() == 1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"encoder_txt": ["a"], "decoder_text": ["b"]}, "keys.*got.*encoder_txt"),
        ({"encoder_text": ["a"]}, r"keys.*got \['encoder_text'\]"),
        ({"encoder_text": ["a"], "decoder_text": ["a", "b"]}, "equally many.*1 and 2"),
        ({"encoder_text": [1], "decoder_text": ["a"]}, r"`encoder_text\[0\]`.*int 1"),
        (["a"], "`x` must be text pairs, a dict.*list"),
    ],
)
def test_bad_pairs(preprocessor, x, message):
    with pytest.raises(ValueError, match=message):
        preprocessor(x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder_sequence_length": 0}, "encoder_sequence_length.*from 1; got 0"),
        ({"decoder_sequence_length": 1}, "decoder_sequence_length.*from 2; got 1"),
        ({"template": "Summarize"}, "template.*'{text}'"),
        ({"pad_to_multiple_of": -2}, "pad_to_multiple_of"),
    ],
)
def test_bad_settings(tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kt.Seq2SeqLMPreprocessor(tokenizer, **kwargs)


def test_template_without_room_is_refused(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 5, 16, template="instruction")
    with pytest.raises(ValueError, match="leaves no room"):
        preprocessor.generate_preprocess("a")


def test_configuration_round_trips(tokenizer, tmp_path):
    backbone = kt.Backbone(
        kt.T5GemmaConfig(
            kt.StackConfig(1, 8, 8, 1, 1, 8),
            kt.StackConfig(1, 8, 8, 1, 1, 8),
            vocabulary_size=480,
        )
    )
    preprocessor = kt.Seq2SeqLMPreprocessor(
        tokenizer, 20, 10, template="Shorten: {text}", pad_to_multiple_of=8
    )
    kt.Seq2SeqLM(backbone, preprocessor).save_to_preset(str(tmp_path))
    again = kt.Seq2SeqLMPreprocessor.from_preset(str(tmp_path))
    for name in ("encoder_sequence_length", "template", "pad_to_multiple_of"):
        assert getattr(again, name) == getattr(preprocessor, name)
    x, y, _ = again(PAIRS)
    expected, expected_y, _ = preprocessor(PAIRS)
    assert (y == expected_y).all()
    assert (x["encoder_token_ids"] == expected["encoder_token_ids"]).all()
    changed = kt.Seq2SeqLMPreprocessor.from_preset(str(tmp_path), template=None)
    assert changed.template is None
    with pytest.raises(ValueError, match=r"unknown keywords \['lenght'\]"):
        kt.Seq2SeqLMPreprocessor.from_preset(str(tmp_path), lenght=3)
