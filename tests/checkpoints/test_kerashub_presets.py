"""Presets that KerasHub wrote."""

import json

import keras
import numpy as np
import pytest
from helpers.keras_hub_models import make_kerashub
from helpers.models import forward, max_difference, numpy, random_inputs, tiny_config

import keras_t5gemma as kt

WINDOW = 8


def kerashub_logits(backbone, x):
    hidden = forward(backbone, x)["decoder_sequence_output"]
    logits = backbone.decoder_token_embedding(hidden, reverse=True)
    return keras.ops.tanh(logits / 30.0) * 30.0


def our_logits(backbone, x):
    return backbone.logits(forward(backbone, x)["decoder_sequence_output"])


@pytest.mark.parametrize(
    ("dtype", "shard", "lora"),
    [
        ("float32", None, False),
        ("float32", 1e-4, False),
        ("bfloat16", None, False),
        ("float32", None, True),
    ],
)
def test_kerashub_presets_give_kerashubs_logits(tmp_path, dtype, shard, lora):
    theirs = make_kerashub(dtype)
    if lora:
        theirs.enable_lora(2)
        for variable in theirs.trainable_variables:
            variable.assign(np.full(variable.shape, 0.1, "float32"))
    kwargs = {"max_shard_size": shard} if shard else {}
    theirs.save_to_preset(str(tmp_path), **kwargs)
    if shard:
        assert len(list(tmp_path.glob("model_*.weights.h5"))) > 1
    ours = kt.Backbone.from_preset(tmp_path, dtype=dtype)
    assert ours.config == tiny_config()
    x = random_inputs(2, WINDOW, WINDOW)
    x["encoder_padding_mask"][1, 5:] = 0
    expected = numpy(kerashub_logits(theirs, x))
    assert np.abs(expected).max() > 10
    difference = max_difference(our_logits(ours, x), expected)
    assert difference <= (1e-4 if dtype == "float32" else 1.0)
    path = "encoder/block_1/mlp/up/kernel"
    kernel = next(v for v in ours.weights if v.path == path)
    assert max_difference(kernel, theirs.encoder_layers[1].mlp.up_proj.kernel) == 0


@pytest.mark.one_backend
def test_kerashub_task_presets_bring_tokenizer_and_template(tmp_path, proto):
    make_kerashub().save_to_preset(str(tmp_path / "t5gemma_b_b_ul2_it"))
    folder = tmp_path / "t5gemma_b_b_ul2_it"
    with pytest.raises(ValueError, match="has no assets/tokenizer/vocabulary.spm"):
        kt.Seq2SeqLM.from_preset(folder)
    assets = folder / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.spm").write_bytes(proto)
    (folder / "preprocessor.json").write_text(
        json.dumps({"config": {"encoder_sequence_length": 30}})
    )
    model = kt.Seq2SeqLM.from_preset(folder)
    assert model.preprocessor.template == "instruction"
    assert model.preprocessor.encoder_sequence_length == 30
    assert model.preprocessor.decoder_sequence_length == 512
    assert isinstance(model.generate("A board", max_length=4), str)
    # KerasHub's default is not taken for a choice.
    (folder / "preprocessor.json").write_text(
        json.dumps({"config": {"encoder_sequence_length": 512}})
    )
    reader = kt.Seq2SeqLMPreprocessor.from_preset(folder).for_reading(2000)
    assert reader.encoder_sequence_length == 2000


def test_kerashub_variants_that_are_no_t5gemma_are_refused(tmp_path):
    make_kerashub().save_to_preset(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["config"]["attention_bias"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has attention_bias True"):
        kt.Backbone.from_preset(tmp_path)
    del config["config"]["encoder_head_dim"]
    config["config"]["attention_bias"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json lacks.*'encoder_head_dim'"):
        kt.Backbone.from_preset(tmp_path)
