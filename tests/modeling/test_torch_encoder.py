"""The blocks of an encoder on PyTorch without Keras layers, against the layers."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import enlarge, tiny_config, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.modeling.inference import inference

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's encoder"
)


@pytest.fixture
def runs(monkeypatch):
    """The results of `torch_encoder.run`."""
    from keras_t5gemma.modeling import torch_encoder

    results = []
    run = torch_encoder.run
    monkeypatch.setattr(
        torch_encoder, "run", lambda *args: results.append(run(*args)) or results[-1]
    )
    return results


def through_layers(function, *args, **kwargs):
    """The result without the fast path, with rounded activations all the same."""
    import torch

    from keras_t5gemma.modeling import torch_encoder

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), inference():
        patch.setattr(torch_encoder, "is_supported", lambda *_: False)
        return function(*args, **kwargs)


def in_inference(function, *args, **kwargs):
    import torch

    with torch.inference_mode(), inference():
        return function(*args, **kwargs)


def batch(length=12):
    import torch

    mask = torch.ones(3, length, dtype=torch.int32)
    mask[1, 4:] = 0
    mask[2, :] = 0  # Nothing but padding.
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 480, (3, length)))
    return ids, mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 24, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_it_equals_the_layers(dtype, tokens, causal, monkeypatch, runs):
    """Grouped heads, local and global layers, padding; in parts of 1, 2, all rows."""
    from keras_t5gemma.modeling import torch_encoder

    monkeypatch.setattr(torch_encoder, "_tokens_at_once", lambda stack: tokens)
    encoder = enlarge(kt.Backbone(tiny_config(), dtype=dtype)).encoder
    assert encoder.stack.sliding_window < 9
    tolerance = 2e-5 if dtype == "float32" else 0.1
    for inputs in (batch(), tuple(x[:1] for x in batch())):
        for layers in (None, (0, 1, len(encoder.blocks)), (1,)):
            kwargs = {"layers": layers, "causal": causal}
            plain = through_layers(encoder, *inputs, **kwargs)
            assert not runs
            fast = in_inference(encoder, *inputs, **kwargs)
            assert runs.pop()
            if layers is None:
                fast, plain = [fast], [plain]
            for a, b in zip(fast, plain, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                difference = float((a - b).abs().max())
                assert difference < tolerance * float(b.abs().max())


@pytest.mark.parametrize("cap", [50.0, 1e8, None])
def test_int8_rounds_as_the_layers_do(cap, runs):
    """Nearer to the layers in int8 than these are to float32."""
    from keras_t5gemma import _compat

    if not _compat.torch_has_int8_products():
        pytest.skip("needs VNNI")
    stacks = tiny_config()
    config = dataclasses.replace(
        stacks, encoder=dataclasses.replace(stacks.encoder, attention_soft_cap=cap)
    )
    backbone = enlarge(kt.Backbone(config))
    ids, mask = batch()
    exact = through_layers(backbone.encode, ids, mask)
    backbone.quantize("int8")
    states = through_layers(backbone.encode, ids, mask)
    fast = in_inference(backbone.encode, ids, mask)
    assert len(runs) == 1

    def distance(a, b):
        return float((a - b).square().mean().sqrt())

    assert distance(fast, states) < 0.3 * distance(exact, states)


def test_what_goes_through_the_layers(runs):
    """LoRA, float64, layers of several dtypes, other layers, sequences in blocks."""
    import torch

    class Other(type(kt.Backbone(tiny_config()).encoder.blocks[0].mlp)):
        """A feed-forward layer that is not of this package."""

    ids, mask = batch()
    mixed = keras.dtype_policies.DTypePolicyMap(default_policy="bfloat16")
    mixed[".*mlp.*"] = keras.DTypePolicy("float32")
    dtypes = {"float64": "float64", "mixed": mixed}
    for change in ("lora", "float64", "mixed", "other", "long"):
        backbone = enlarge(
            kt.Backbone(tiny_config(), dtype=dtypes.get(change, "float32"))
        )
        if change == "lora":
            backbone.enable_lora(2)
        if change == "other":
            backbone.encoder.blocks[0].mlp.__class__ = Other
        if change == "long":
            ids, mask = (x.repeat(1, 64)[:1] for x in (ids, mask))
        plain = through_layers(backbone.encode, ids, mask)
        assert torch.equal(in_inference(backbone.encode, ids, mask), plain), change
        assert not runs, change


def test_gradients_and_programs_of_a_user_go_through_the_layers(runs):
    import torch

    encoder = enlarge(kt.Backbone(tiny_config())).encoder
    ids, mask = batch()
    with inference():
        assert encoder(ids, mask).requires_grad
    with torch.no_grad():
        encoder(ids, mask)  # Not in the context.
        with inference():
            torch.func.vmap(lambda m: encoder(ids, m))(mask[None])
    assert not runs


def test_hooks_are_called(runs):
    """Those of a block and of a projection; afterwards it is fast again."""
    encoder = enlarge(kt.Backbone(tiny_config())).encoder
    ids, mask = batch()
    for layer in (encoder.blocks[0], encoder.blocks[-1].self_attention.query):
        seen = []
        for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
            handle = register(lambda *args, seen=seen: seen.append(args))
            in_inference(encoder, ids, mask)
            handle.remove()
        assert len(seen) == 2 and not runs
    in_inference(encoder, ids, mask)
    assert runs


def test_tasks_use_it(tokenizer, runs):
    """Generation, plain, speculative and streamed; vectors, states and classes."""
    model = tiny_model(tokenizer)
    texts = ["a quick fox", "a dog"]
    for options in ({}, {"speculate": "source"}):
        model.generate(texts, max_length=6, **options)
        assert runs
        runs.clear()
    list(model.stream(texts[0], max_length=4))
    assert runs
    backbone = kt.Backbone(dataclasses.replace(tiny_config(), decoder=None))
    args = enlarge(backbone), model.preprocessor
    embedder = kt.TextEmbedder(*args)
    classifier = kt.TextClassifier(*args, class_names=["one", "two"])
    classifier.compile()
    for run in (
        embedder.embed,
        embedder.predict,
        embedder.predict_on_batch,
        lambda texts: embedder.hidden_states(texts, layers=[0, -1], as_numpy=True)[0],
        classifier.predict,
        lambda texts: classifier.evaluate(texts, ["one", "two"], verbose=0),
    ):
        runs.clear()
        fast = run(texts)
        assert runs
        slow = through_layers(run, texts)
        for a, b in zip(np.atleast_1d(fast), np.atleast_1d(slow), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_new_weights_are_read_at_once(tokenizer, runs):
    model = tiny_model(tokenizer)
    model.generate("a quick fox", max_length=6)
    (before,) = runs.pop().values()
    enlarge(model.backbone, 2.0)
    model.generate("a quick fox", max_length=6)
    (after,) = runs.pop().values()
    assert float((after - before).abs().max()) > 1e-3


def test_norms_of_mixed_precision_are_not_rounded(runs):
    """A tower that is called alone is in Keras's scope of the compute dtype."""
    encoder = enlarge(kt.Backbone(tiny_config(), dtype="mixed_bfloat16")).encoder
    rng = np.random.default_rng(0)
    for block in encoder.blocks:
        norm = block.pre_self_norm
        norm.scale.assign(rng.normal(size=norm.scale.shape))
    plain = through_layers(encoder, *batch())
    fast = in_inference(encoder, *batch())
    assert runs and float((fast - plain).abs().max()) < 1e-2 * float(plain.abs().max())


def test_what_a_user_changed_in_layers_counts(runs):
    encoder = enlarge(kt.Backbone(tiny_config())).encoder
    before = in_inference(encoder, *batch())
    attention = encoder.blocks[0].self_attention
    attention.soft_cap, attention.query_scale = None, 3 * attention.query_scale
    fast, plain = in_inference(encoder, *batch()), through_layers(encoder, *batch())
    assert len(runs) == 2 and float((fast - before).abs().max()) > 1e-3
    assert float((fast - plain).abs().max()) < 2e-5 * float(plain.abs().max())
    norm, calls = encoder.blocks[1].pre_mlp_norm, []
    call = norm.call
    norm.call = lambda x: calls.append(1) or call(x)
    in_inference(encoder, *batch())
    assert calls and len(runs) == 2
