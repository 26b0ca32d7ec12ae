import dataclasses
import json

import pytest

import keras_t5gemma as kt
from keras_t5gemma.config import STACKS

PUBLISHED = {  # docs/facts.md, section 2: totals of the released checkpoints
    ("s", "s"): 312_517_632,
    ("b", "b"): 591_490_560,
    ("l", "l"): 1_241_761_792,
    ("ml", "ml"): 2_200_345_344,
    ("xl", "xl"): 3_766_980_608,
    ("2b", "2b"): 5_596_853_760,
    ("9b", "2b"): 12_292_375_296,
    ("9b", "9b"): 20_333_401_088,
}


@pytest.mark.parametrize(("pair", "total"), PUBLISHED.items())
def test_formula_gives_every_published_total(pair, total):
    assert kt.T5GemmaConfig.pair(*pair).count_params() == total


def test_round_trip_through_json():
    config = kt.T5GemmaConfig.pair("9b", "2b", dropout=0.1)
    again = kt.T5GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.encoder.layer_types == config.encoder.layer_types
    assert isinstance(again.encoder.layer_types, tuple)


def test_layers_alternate_starting_with_sliding():
    assert STACKS["s"].layer_types[:3] == (
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    )


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STACKS["s"].num_layers = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers.*whole number from 1 to 10000; got 0"),
        ({"hidden_dim": 2.5}, "hidden_dim"),
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`; got 8 and 3"),
        ({"head_dim": 7}, "head_dim.*even; got 7"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"attention_soft_cap": 0.0}, "soft_cap` must be None or a number above 0"),
        ({"attention_soft_cap": -1}, "attention_soft_cap"),
        ({"query_scale": 0}, "query_scale"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"layer_types": ("full_attention",)}, "layer_types.*8 of"),
        ({"layer_types": ("full",) * 8}, "layer_types"),
    ],
)
def test_bad_stack_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STACKS["s"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size"),
        ({"final_soft_cap": -30.0}, "final_soft_cap"),
        ({"dropout": 1.0}, "dropout"),
        ({"encoder": "s"}, "encoder.*StackConfig"),
        ({"max_positions": 0}, "max_positions"),
    ],
)
def test_bad_pair_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(kt.T5GemmaConfig.pair("s", "s"), **change)


def test_unknown_size_and_unknown_field():
    with pytest.raises(ValueError, match="`decoder` must be one of s, b.*'xxl'"):
        kt.T5GemmaConfig.pair("s", "xxl")
    with pytest.raises(ValueError, match=r"unknown fields \['vocab'\]"):
        kt.T5GemmaConfig.from_dict({"vocab": 3})
