"""The encoder alone: what is read of a pair, and what leaves for transformers."""

import keras
import numpy as np
import pytest
from helpers.models import max_difference, numpy, random_inputs, tiny_config

import keras_t5gemma as kt


def make_backbone(**kwargs):
    keras.utils.set_random_seed(0)
    return kt.Backbone(tiny_config(**kwargs))


def encoder_inputs():
    x = random_inputs(source=7)  # Inside the window: see `save_to_huggingface`.
    return {name: x[name] for name in ("encoder_token_ids", "encoder_padding_mask")}


def states(backbone):
    return numpy(backbone.encode(*encoder_inputs().values()))


@pytest.mark.one_backend
def test_a_loaded_int8_pair_can_be_saved_again(tmp_path):
    backbone = make_backbone()
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path / "first")
    kt.Backbone.from_preset(tmp_path / "first").save_to_preset(tmp_path / "second")
    again = kt.Backbone.from_preset(tmp_path / "second")
    assert np.array_equal(states(again), states(backbone))


@pytest.mark.parametrize("shards", ["whole", "in shards"])
def test_of_a_quantized_pair(shards, tmp_path):
    backbone = make_backbone()
    backbone.quantize("int8")
    size = 10 if shards == "whole" else 2e-5
    backbone.save_to_preset(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.h5"))) > 1) == (shards == "in shards")
    tower = kt.Backbone.from_preset(tmp_path, encoder_only=True)
    assert tower.decoder is None
    assert tower.encoder.blocks[0].self_attention.query.quantization_mode == "int8"
    assert np.array_equal(states(tower), states(backbone))
    tower.save_to_preset(tmp_path / "tower")
    again = kt.Backbone.from_preset(tmp_path / "tower")
    assert np.array_equal(states(again), states(backbone))


def test_to_transformers_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tower = make_backbone()
    tower.save_to_preset(tmp_path / "pair")
    tower = kt.Backbone.from_preset(tmp_path / "pair", encoder_only=True)
    tower.save_to_huggingface(tmp_path / "ours")
    theirs, found = transformers.T5GemmaEncoderModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values())  # No tensor missing, none left over.
    x = {name: torch.tensor(array) for name, array in encoder_inputs().items()}
    with torch.no_grad():
        out = theirs(x["encoder_token_ids"], x["encoder_padding_mask"])
    keep = encoder_inputs()["encoder_padding_mask"].astype(bool)
    expected = out.last_hidden_state.numpy()[keep]
    assert max_difference(states(tower)[keep], expected) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again = kt.Backbone.from_preset(tmp_path / name)
        assert again.decoder is None
        assert np.array_equal(states(again), states(tower))
