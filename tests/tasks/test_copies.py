"""Copies of a task: `.keras` files, pickles, deep copies, configurations, clones."""

import copy
import pickle

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.modeling.layer_iteration import iter_layers

KINDS = ["lm", "embedder", "classifier"]


def make(kind, tokenizer):
    config = one_block_config()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8)
    if kind == "lm":
        return kt.Seq2SeqLM(kt.Backbone(config), preprocessor)
    encoder = kt.Backbone(kt.T5GemmaConfig(config.encoder, None, 480))
    if kind == "embedder":
        return kt.TextEmbedder(encoder, preprocessor, projection_dim=8)
    return kt.TextClassifier(encoder, preprocessor, class_names=["a", "b"])


def through_file(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


def through_pickle(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def deep_copied(model, tmp_path):
    return copy.deepcopy(model)


one_backend = pytest.mark.one_backend
COPIES = [
    through_file,
    pytest.param(through_pickle, marks=one_backend),
    pytest.param(deep_copied, marks=one_backend),
]


def answer(model):
    if isinstance(model, kt.TextEmbedder):
        return model.embed(SENTENCES)
    if isinstance(model, kt.TextClassifier):
        return model.predict(SENTENCES)
    return np.array(model.score(SENTENCES, ["a"] * 6)["log_prob"])


def data(model):
    if isinstance(model, kt.TextClassifier):
        return SENTENCES[:2], ["a", "b"]
    return SENTENCES[:2], ["x", "y"]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_answers_and_is_compiled_like_the_original(
    kind, copied, tokenizer, tmp_path
):
    model = make(kind, tokenizer)
    options = {"gradient_cache_rows": 1} if kind == "embedder" else {}
    model.compile(keras.optimizers.SGD(0.125), rematerialize=True, **options)
    found = copied(model, tmp_path)
    assert type(found) is type(model)
    np.testing.assert_array_equal(answer(found), answer(model))
    assert found.optimizer.learning_rate == 0.125
    assert found.backbone.encoder.rematerialize is True
    if kind == "embedder":
        assert found.gradient_cache_rows == 1
    # Not the answer of this backend to "auto": another one may load it.
    assert found.get_compile_config()["jit_compile"] == "auto"
    model.compile("sgd", jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False
    for tower in filter(None, (found.backbone.encoder, found.backbone.decoder)):
        tower.rematerialize = False  # It compiles faster.
    assert len(found.evaluate(*data(model), verbose=0)) > 1  # Loss and metrics.


def freeze_backbone(model):
    model.backbone.trainable = False


def freeze_all(model):
    model.trainable = False


def freeze_most_of_the_encoder(model):
    model.backbone.encoder.trainable = False
    model.backbone.encoder.final_norm.trainable = True


def freeze_head(model):
    for layer in model.layers:
        layer.trainable = layer is model.backbone


def freeze_head_and_encoder(model):
    freeze_head(model)
    model.backbone.encoder.trainable = False


FREEZE = [
    freeze_backbone,
    freeze_all,
    freeze_most_of_the_encoder,
    freeze_head,
    freeze_head_and_encoder,
]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_frozen_like_the_original(kind, freeze, copied, tokenizer, tmp_path):
    model = make(kind, tokenizer)
    freeze(model)
    model.compile(keras.optimizers.AdamW(1e-2))
    model.optimizer.build(model.trainable_variables)
    found = copied(model, tmp_path)
    flags = [v.trainable for v in model.weights]
    assert not all(flags)
    assert [v.trainable for v in found.weights] == flags
    assert found.get_config() == model.get_config()
    for one, other in ((found, model), (found.backbone, model.backbone)):
        assert one.trainable == other.trainable
        assert len(one.trainable_variables) == len(other.trainable_variables)
    assert len(found.optimizer.variables) == len(model.optimizer.variables)


def test_frozen_training_goes_on_in_a_copy(tokenizer, tmp_path):
    model = make("lm", tokenizer)
    model.backbone.encoder.trainable = False
    model.compile(keras.optimizers.AdamW(1e-2))
    model.fit(*data(model), verbose=0)
    found = through_file(model, tmp_path)
    losses = [
        m.fit(*data(m), epochs=2, shuffle=False, verbose=0).history["loss"]
        for m in (model, found)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    for a, b in zip(model.get_weights(), found.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_preset_is_not_frozen(tokenizer, tmp_path):
    model = make("classifier", tokenizer)
    freeze_all(model)
    model.save_to_preset(tmp_path)
    for file in tmp_path.glob("*.json"):
        text = file.read_text()
        assert "frozen" not in text and '"trainable": false' not in text, file.name
    found = kt.TextClassifier.from_preset(tmp_path)
    assert len(found.trainable_variables) == len(model.weights)
    assert found.backbone.trainable


def test_a_backbone_alone_keeps_what_is_frozen(tokenizer, tmp_path):
    """Wherever it was made."""
    with keras.name_scope("outside"):
        backbone = make("lm", tokenizer).backbone
    backbone.decoder.trainable = False
    for found in (through_file(backbone, tmp_path), copy.deepcopy(backbone)):
        flags = [v.trainable for v in found.weights]
        assert flags == [v.trainable for v in backbone.weights] and any(flags)
        assert not found.decoder.trainable and found.encoder.trainable


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_a_quantized_model_has_its_dtypes(copied, tokenizer, tmp_path):
    """Of the layers that are not quantized, and after more of them are."""
    config, preprocessor = one_block_config(), kt.Seq2SeqLMPreprocessor(tokenizer)
    model = kt.Seq2SeqLM(kt.Backbone(config, dtype="mixed_bfloat16"), preprocessor)

    def policies(model):
        layers = [*iter_layers(model.backbone)][1:]  # Its own may be a map.
        return {x.path: x.dtype_policy.name for x in layers}

    for filters in ("query", "gate"):
        model.backbone.quantize("int8", filters=filters)
        expected = policies(model)
        assert "int8_from_mixed_bfloat16" in expected.values()
        assert expected["encoder/final_norm"] == "mixed_bfloat16"
        expected_scores = answer(model)
        found = copied(model, tmp_path)
        assert policies(model) == policies(found) == expected
        # Log probabilities of 12, in bfloat16; two programs of XLA may round otherwise.
        np.testing.assert_allclose(answer(found), expected_scores, atol=0.02)
        model = found


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_was_never_compiled_is_saved(kind, tokenizer, tmp_path):
    compiled = make(kind, tokenizer)
    model = type(compiled).from_config({**compiled.get_config(), "compile": False})
    model.set_weights(compiled.get_weights())
    model.preprocessor = compiled.preprocessor
    model.save_to_preset(tmp_path / "preset")
    for found in (
        through_file(model, tmp_path),
        copy.deepcopy(model),
        type(model).from_preset(tmp_path / "preset"),
    ):
        np.testing.assert_array_equal(answer(found), answer(model))


@pytest.mark.one_backend
def test_a_classifier_of_many_classes_is_saved(tokenizer, tmp_path):
    encoder = kt.T5GemmaConfig(one_block_config().encoder, None, 480)
    names = [f"class {i}" for i in range(300)]
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8)
    model = kt.TextClassifier(kt.Backbone(encoder), preprocessor, class_names=names)
    model.save_to_preset(tmp_path / "preset")
    copies = copy.deepcopy(model), kt.TextClassifier.from_preset(tmp_path / "preset")
    for found in copies:
        assert found.class_names == names
        np.testing.assert_array_equal(answer(found), answer(model))


@pytest.mark.one_backend
def test_a_shallow_copy_of_a_preprocessor_shares_its_vocabulary(tokenizer):
    """Every `generate` makes one for a model that reads more than it trains on."""
    preprocessor = kt.Seq2SeqLMPreprocessor(
        tokenizer, objective=kt.objectives.PrefixLM()
    )
    found = preprocessor.for_reading(8192)
    assert found is not preprocessor
    assert found.encoder_sequence_length == 8192
    assert preprocessor.encoder_sequence_length == 512
    assert found.tokenizer is preprocessor.tokenizer
    assert found.objective is preprocessor.objective


@pytest.mark.one_backend
def test_a_refused_compile_changes_nothing(tokenizer):
    model, embedder = make("lm", tokenizer), make("embedder", tokenizer)
    for wrong in ({"sampler": 5}, {"sampler": "greedy", "rematerialize": 2}):
        with pytest.raises((ValueError, TypeError), match=list(wrong)[-1]):
            model.compile(**wrong)
        assert model.is_auto_sampler
    with pytest.raises(ValueError):
        embedder.compile(optimizer=5, gradient_cache_rows=2)
    assert embedder.gradient_cache_rows is None


@pytest.mark.parametrize("copied", COPIES)
def test_adapters_are_merged_into_a_copy_with_a_warning(copied, tokenizer, tmp_path):
    model = make("lm", tokenizer)
    model.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 0.1, "float32"))
    with pytest.warns(UserWarning, match="the adapters into.*save_lora_weights"):
        found = copied(model, tmp_path)
    np.testing.assert_allclose(answer(found), answer(model), atol=1e-5)
    for part in (found, found.backbone):
        assert len(part.trainable_variables) == len(found.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_makes_a_task_without_a_vocabulary(kind, tokenizer):
    model = make(kind, tokenizer)
    found = type(model).from_config(model.get_config())
    assert found.get_config() == model.get_config()
    assert [v.path for v in found.weights] == [v.path for v in model.weights]
    with pytest.raises(ValueError, match="has no vocabulary yet"):
        answer(found)
    found.set_weights(model.get_weights())
    found.preprocessor = model.preprocessor
    np.testing.assert_array_equal(answer(found), answer(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_is_refused_with_what_to_do(kind, tokenizer):
    with pytest.raises(ValueError, match="cannot clone .*copy.deepcopy.*from_preset"):
        keras.models.clone_model(make(kind, tokenizer))


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", [kt.Seq2SeqLM, kt.TextEmbedder, kt.TextClassifier])
def test_a_backbone_that_is_none_is_refused(kind):
    for value in (5, None, {}, "t5gemma"):
        with pytest.raises(ValueError, match="`backbone` must be a .*Backbone; got"):
            kind(value)


@pytest.mark.one_backend
def test_more_positional_arguments_are_refused(tokenizer):
    model = make("lm", tokenizer)
    with pytest.raises(ValueError, match="Seq2SeqLM must be passed by its keyword"):
        kt.Seq2SeqLM(model.backbone, model.preprocessor, "name")


@pytest.mark.parametrize("loss_scale", [False, True])
def test_an_optimizer_is_read_on_every_backend(model, loss_scale):
    """On PyTorch Keras writes a private module, which others cannot import."""
    optimizer = keras.optimizers.AdamW(1e-3)
    if loss_scale:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer)
    config = model.get_compile_config()
    assert "backend" not in str(config["optimizer"])
    # As files from PyTorch have it.
    inner = config["optimizer"]["config"]["inner_optimizer"] if loss_scale else None
    written = inner or config["optimizer"]
    written["module"] = "keras.src.backend.torch.optimizers.torch_adamw"
    written["registered_name"] = "AdamW"
    model.compile_from_config(config)
    found = model.optimizer.inner_optimizer if loss_scale else model.optimizer
    assert type(found) is type(keras.optimizers.AdamW())
