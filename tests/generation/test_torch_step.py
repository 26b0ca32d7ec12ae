"""PyTorch's decoding step, eager and compiled, against the layers."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import enlarge, tiny_config, tiny_model
from helpers.oracles import SOURCES, generated_ids

import keras_t5gemma as kt

LENGTH = 16
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's step"
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_step_equals_the_layers(dtype):
    """Unequal towers, grouped heads, padding, several rows a source, the window."""
    import torch

    from keras_t5gemma.generation.decoding import plain_step
    from keras_t5gemma.generation.torch_step import TorchStep

    backbone = enlarge(kt.Backbone(tiny_config(), dtype=dtype))
    mask = torch.ones(2, 9, dtype=torch.int32)
    mask[1, 4:] = 0
    ids = torch.randint(4, 480, (2, 9))
    rows = torch.randint(4, 480, (6, 20))
    tolerance = 1e-4 if dtype == "float32" else 0.5
    with torch.inference_mode():
        caches = [
            backbone.make_cache(backbone.encode(ids, mask), mask, 20, rows=6)
            for _ in range(2)
        ]
        fast, plain = TorchStep(backbone), plain_step(backbone)
        for index in range(20):
            a, caches[0] = fast(rows[:, index], caches[0], index)
            b, caches[1] = plain(rows[:, index], caches[1], index, True)
            assert float((a.float() - b.float()).abs().max()) < tolerance
            uncapped, _ = fast(rows[:, index], caches[0], index, capped=False)
            if dtype == "float32":
                assert (uncapped.argmax(-1) == a.argmax(-1)).all()
            assert float((uncapped - a).abs().max()) > 0


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("self_attention", {"query_scale": 0.1}),
        ("self_attention", {"soft_cap": 0.5}),
        ("cross_attention", {"query_scale": 0.1}),
        ("cross_attention", {"soft_cap": 0.5}),
        ("pre_mlp_norm", {"epsilon": 1.0}),
    ],
)
def test_what_a_user_changes_in_a_layer_counts(tokenizer, part, change):
    """The step had the numbers of the config, whatever the layers had."""
    model = tiny_model(tokenizer)
    enlarge(model.backbone, 8.0)
    options = {"stop_token_ids": None, "max_length": LENGTH, "return_scores": True}
    before = model.generate(SOURCES, **options)["log_prob"]
    for block in model.backbone.decoder.blocks:
        vars(getattr(block, part)).update(change)
    found = model.generate(SOURCES, **options)
    assert not np.allclose(found["log_prob"], before, atol=0.05)
    ids = np.stack(found["token_ids"])
    arrays = model.preprocessor.generate_preprocess(SOURCES, LENGTH)
    start = model.preprocessor.tokenizer.start_token_id
    decoder = np.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    arrays["decoder_token_ids"] = decoder
    arrays["decoder_padding_mask"] = np.ones_like(decoder)
    logits = keras.ops.log_softmax(keras.ops.cast(model(arrays), "float32"))
    expected = np.take_along_axis(
        keras.ops.convert_to_numpy(logits), ids[..., None], axis=2
    )[..., 0].sum(1)
    assert np.allclose(found["log_prob"], expected, atol=1e-3)


def test_hooks_of_projections_run_at_every_token(tokenizer):
    model = tiny_model(tokenizer)
    model.generate(SOURCES, max_length=LENGTH, stop_token_ids=None)
    calls = []
    layer = model.backbone.decoder.blocks[0].mlp.down
    hook = layer.register_forward_hook(lambda *args: calls.append(1))
    model.generate(SOURCES, max_length=LENGTH, stop_token_ids=None)
    assert len(calls) == LENGTH - 1
    hook.remove()
    model.generate(SOURCES, max_length=LENGTH, stop_token_ids=None)
    assert len(calls) == LENGTH - 1


def test_int8_product_keeps_seven_bits_of_each_row():
    """Weights that copy: what comes out is the input, rounded to 1 / 63 at most."""
    import torch

    from keras_t5gemma.generation.torch_step import _Int8

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs FBGEMM")
    copy = _Int8(torch.eye(64, dtype=torch.int8) * 127, torch.full((64,), 127.0))
    x = torch.linspace(-1, 1, 192).reshape(3, 64) * torch.tensor([[1.0], [9], [1e-3]])
    error = (copy(x) - x).abs() / x.abs().amax(1, keepdim=True)
    assert 0 < float(error.max()) < 0.51 / 63


def test_torch_compiled_step_and_its_absence(tokenizer, monkeypatch):
    """`jit_compile=True` gives the same tokens; without a compiler it says so."""
    import torch

    model = tiny_model(tokenizer)
    expected = generated_ids(model, SOURCES, LENGTH, stop_token_ids=None)
    model.compile(jit_compile=True)
    compiled = []
    compile = torch.compile

    def spy(function, **kwargs):
        def run(*args):
            compiled.append(args[0].shape[0])
            return compiled_function(*args)

        compiled_function = compile(function, **kwargs)
        return run

    monkeypatch.setattr(torch, "compile", spy)
    for sources in (SOURCES, SOURCES[:1]):
        rows = generated_ids(model, sources, LENGTH, stop_token_ids=None)
        assert rows == expected[: len(sources)]
    assert set(compiled) == {4, 1}
    # Weights change: the compiled step must not go on with the old ones.
    enlarge(model.backbone, 11.0)
    rows = generated_ids(model, SOURCES[:1], LENGTH, stop_token_ids=None)
    model.compile()
    assert rows == generated_ids(model, SOURCES[:1], LENGTH, stop_token_ids=None)
    assert rows != expected[:1]

    def broken(function, **kwargs):
        def run(*args):
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model.compile(jit_compile=True)
    model._generator().engines.clear()
    with pytest.warns(UserWarning, match="decoding continues uncompiled.*no compiler"):
        got = generated_ids(model, SOURCES[:1], LENGTH, stop_token_ids=None)
    assert got == rows


def test_steps_of_keras_are_not_compiled(tokenizer, monkeypatch):
    """Inductor cannot compile the fused Adam, and takes minutes for a step."""
    import torch

    def compile(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny_model(tokenizer)
    model.compile("adamw", jit_compile=True)
    pairs = {"encoder_text": SOURCES, "decoder_text": SOURCES}
    history = model.fit(pairs, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert np.isfinite(model.evaluate(pairs, verbose=0)).all()
    config = dataclasses.replace(model.backbone.config, decoder=None)
    embedder = kt.TextEmbedder(kt.Backbone(config), model.preprocessor)
    embedder.compile(jit_compile=True)
    assert embedder.embed(SOURCES).shape == embedder.predict_on_batch(SOURCES).shape
    assert model.jit_compile is True


def test_a_model_that_was_loaded_in_inference_mode(model, tmp_path):
    """Its tensors are normal ones, so that it can be trained, too."""
    import torch

    model.save_to_preset(tmp_path / "preset")
    expected = model.generate("a fox", max_length=6)
    with torch.inference_mode():
        loaded = kt.Seq2SeqLM.from_preset(tmp_path / "preset")
        embedder = kt.TextEmbedder.from_preset(tmp_path / "preset", projection_dim=4)
        built = kt.Backbone(model.backbone.config)
        built.set_weights(model.backbone.get_weights())
    assert loaded.generate("a fox", max_length=6) == expected
    built = kt.Seq2SeqLM(built, model.preprocessor)
    assert built.generate("a fox", max_length=6) == expected
    for task in (loaded, embedder):
        before = task.get_weights()
        task.fit([("a", "b"), ("c", "d")], verbose=0)
        assert np.abs(task.get_weights()[1] - before[1]).max() > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 0.1}])
def test_float64_generates_as_float32(model, tokenizer, options):
    options = {"max_length": 8, "seed": 3, **options}
    if "temperature" not in options:
        del options["seed"]
    expected = model.generate("a fox", **options)
    exact = tiny_model(tokenizer, dtype="float64")
    assert exact.generate("a fox", **options) == expected
    exact.enable_lora(2)  # Decoded by the layers of Keras.
    assert exact.generate("a fox", **options) == expected
