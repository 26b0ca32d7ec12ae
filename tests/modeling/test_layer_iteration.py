"""Own iteration over layers, against Keras's private one."""

import keras
import pytest
from helpers.models import tiny_config

import keras_t5gemma as kt
from keras_t5gemma.modeling.layer_iteration import iter_layers


@pytest.mark.parametrize("kind", ["Backbone", "Seq2SeqLM", "Classifier", "Embedder"])
@pytest.mark.parametrize(
    "change",
    [
        None,
        pytest.param("lora", marks=pytest.mark.one_backend),
        pytest.param("int8", marks=pytest.mark.one_backend),
    ],
)
def test_iter_layers_finds_what_keras_does(kind, change, tokenizer):
    if not hasattr(keras.layers.Layer, "_flatten_layers"):
        pytest.fail("Only this test uses _flatten_layers: compare with a list by hand.")
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16)
    if kind in ("Backbone", "Seq2SeqLM"):
        backbone = kt.Backbone(tiny_config())
        model = backbone
        if kind == "Seq2SeqLM":
            model = kt.Seq2SeqLM(backbone, preprocessor)
    else:
        config = tiny_config()
        backbone = kt.Backbone(kt.T5GemmaConfig(config.encoder, None))
        model = kt.TextEmbedder(backbone, None)
        if kind == "Classifier":
            model = kt.TextClassifier(backbone, None, num_classes=2)
    if change == "lora":
        model.enable_lora(2)
    elif change == "int8":
        backbone.quantize("int8")
    theirs = {id(layer) for layer in model._flatten_layers()}
    ours = [id(layer) for layer in iter_layers(model)]
    assert len(ours) == len(set(ours)) > 40
    # On PyTorch Keras loses sight of a KerasHub task's preprocessor.
    text = {id(preprocessor), id(preprocessor.tokenizer)}
    assert theirs | text == set(ours) | text
    assert {id(layer) for layer in backbone._flatten_layers()} <= set(ours)
