"""`export`: files of other runtimes give what the model gives, at every length."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers.models import tiny_model

import keras_t5gemma as kt

TORCH = keras.config.backend() == "torch"
# Beyond the windows of 8; and where attention works in blocks.
LENGTHS = [(2, 2), (5, 3), (40, 2), (1100, 9)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory, tokenizer):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("export") / "preset"
    tiny_model(tokenizer).save_to_preset(folder)
    return folder


def lora(preset):
    model = kt.Seq2SeqLM.from_preset(preset)
    model.backbone.enable_lora(2)
    for weight in model.trainable_variables:
        weight.assign(keras.random.normal(weight.shape, stddev=0.1, seed=1))
    return model


def int8(preset):
    model = kt.TextEmbedder.from_preset(preset)
    model.quantize("int8")
    return model


MODELS = {
    "Seq2SeqLM": kt.Seq2SeqLM.from_preset,
    "Backbone": kt.Backbone.from_preset,
    "TextEmbedder": lambda p: kt.TextEmbedder.from_preset(p, lexical_dim=16),
    "TextClassifier": lambda p: kt.TextClassifier.from_preset(
        p, class_names=["a", "b"]
    ),
    "lora": lora,
    "int8": int8,
}


def batch(model, lengths, rows=2):
    """Random ids by the names of the model's inputs; the second row is padded."""
    rng = np.random.default_rng(0)
    arrays = {}
    for side, length in zip(("encoder", "decoder"), lengths, strict=True):
        mask = np.ones((rows, length), "int32")
        mask[1, 3:] = 0
        arrays[f"{side}_token_ids"] = rng.integers(9, 200, mask.shape, "int32") * mask
        arrays[f"{side}_padding_mask"] = mask
    return {x.name: arrays[x.name] for x in model.inputs}


def needs_gradients(model):
    """Paths of the variables that PyTorch keeps gradients of."""
    return [v.path for v in model.variables if TORCH and v.value.requires_grad]


def exported(model, folder, **options):
    """What `export` wrote, as a function of arrays."""
    if TORCH:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        model.export(folder / "model.onnx", format="onnx", verbose=False, **options)
        session = runtime.InferenceSession(folder / "model.onnx")
        return lambda arrays: session.run(None, arrays)
    import tensorflow as tf

    model.export(folder / "model", verbose=False, **options)
    loaded = tf.saved_model.load(folder / "model")
    return lambda arrays: keras.tree.flatten(loaded.serve(arrays))


# PyTorch refuses int8; the other kinds are of the same layers and cost compilation.
KINDS = set(MODELS) - {"int8"} if TORCH else {"Seq2SeqLM", "TextEmbedder", "int8"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_gives_what_the_model_gives(preset, tmp_path, kind):
    model = MODELS[kind](preset)
    trainable = needs_gradients(model)
    function = exported(model, tmp_path)
    assert needs_gradients(model) == trainable
    for lengths in LENGTHS:
        arrays = batch(model, lengths)
        expected = keras.tree.flatten(model(arrays))
        for actual, value in zip(function(arrays), expected, strict=True):
            value = keras.ops.convert_to_numpy(value)
            np.testing.assert_allclose(np.asarray(actual), value, atol=1e-4)


@pytest.mark.skipif(not TORCH, reason="PyTorch's formats")
@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_pytorch_needs_float32(preset, tmp_path, change):
    model = kt.TextEmbedder.from_preset(preset, dtype=change.get("dtype"))
    if mode := change.get("quantize"):
        model.quantize(mode)
    with pytest.raises(ValueError, match="in float32 .* (bfloat16|int8)"):
        model.export(tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def test_formats(preset, tmp_path):
    model = kt.TextEmbedder.from_preset(preset)
    with pytest.raises(ValueError, match="`format` must be one of .*'onnx'.* got 'pt'"):
        model.export(tmp_path / "model", format="pt")
    spec = keras.InputSpec(shape=(1, None), dtype="int32")
    for signature in ([spec, spec], {"ids": spec}, {x.name: 3 for x in model.inputs}):
        with pytest.raises(ValueError, match="`input_signature` must.*encoder_token_i"):
            model.export(tmp_path / "model", "openvino", input_signature=signature)
    if TORCH:
        with pytest.raises(ValueError, match="must be 'onnx' or 'torch' on PyTorch"):
            model.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_signature_and_a_global_policy(preset, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:  # The preprocessor has this policy.
        model = kt.TextEmbedder.from_preset(preset, dtype="float32")
    finally:
        keras.config.set_dtype_policy("float32")
    spec = keras.InputSpec(shape=(2, None), dtype="int32")
    signature = [{x.name: spec for x in model.inputs}]
    function = exported(model, tmp_path, input_signature=signature)
    arrays = batch(model, (12, 1))
    expected = keras.ops.convert_to_numpy(model(arrays))
    np.testing.assert_allclose(function(arrays)[0], expected, atol=1e-5)


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="a model's variables elsewhere are its own"
)
def test_a_teacher_is_not_exported(preset, tmp_path, monkeypatch):
    model = kt.Seq2SeqLM.from_preset(preset)
    own = len(model.non_trainable_variables)
    teacher = SimpleNamespace(variables=[keras.Variable(1.0)])
    object.__setattr__(model, "chunked_loss", SimpleNamespace(teacher=teacher))
    count = []
    monkeypatch.setattr(
        keras.Model,
        "export",
        lambda self, *args, **kwargs: count.append(len(self.non_trainable_variables)),
    )
    model.export(tmp_path / "file", format="openvino")
    assert count == [own] and model.chunked_loss.teacher is teacher
