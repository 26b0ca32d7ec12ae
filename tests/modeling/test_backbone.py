import keras
import numpy as np
import pytest
from helpers.models import (
    enlarge,
    forward,
    max_difference,
    numpy,
    random_inputs,
    tiny_config,
)

import keras_t5gemma as kt
from keras_t5gemma.modeling.attention import Attention


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    return enlarge(kt.Backbone(tiny_config()))


def decoder_states(backbone, x):
    return numpy(forward(backbone, x)["decoder_sequence_output"])


def test_shapes_and_parameter_count(backbone):
    x = random_inputs()
    out = forward(backbone, x)
    assert tuple(out["encoder_sequence_output"].shape) == (2, 20, 32)
    assert tuple(out["decoder_sequence_output"].shape) == (2, 14, 24)
    assert backbone.count_params() == tiny_config().count_params()


def test_cached_equals_uncached_past_the_window(backbone):
    x = random_inputs(target=20)
    x["encoder_padding_mask"][1, 11:] = 0
    expected = decoder_states(backbone, x)
    mask = x["encoder_padding_mask"]
    memory = backbone.encode(x["encoder_token_ids"], mask)
    cache = backbone.make_cache(memory, mask, 20)
    ids, states, index = x["decoder_token_ids"], [], 0
    decode = backbone.decode
    if keras.config.backend() == "jax":
        import jax

        decode = jax.jit(decode)  # One program a length; else one an operation.
    for length in (3, 1, 1, 3, 3, 9):  # Several tokens at a time, and single ones.
        part, cache = decode(ids[:, index : index + length], cache=cache, index=index)
        states.append(numpy(part))
        index += length
    assert max_difference(np.concatenate(states, 1), expected) < 2e-5


def test_row_does_not_depend_on_its_batch_or_its_padding(backbone):
    x = random_inputs(batch=3)
    x["encoder_padding_mask"][0, 9:] = 0
    x["decoder_padding_mask"][0, 6:] = 0
    whole = decoder_states(backbone, x)[0, :6]
    short = {key: value[:1] for key, value in x.items()}
    short = {k: v[:, : 9 if "encoder" in k else 6] for k, v in short.items()}
    assert max_difference(whole, decoder_states(backbone, short)[0]) < 2e-5


def test_decoder_is_causal_and_encoder_is_not(backbone):
    x = random_inputs(source=6, target=6)
    changed = {**x, "decoder_token_ids": x["decoder_token_ids"].copy()}
    changed["decoder_token_ids"][:, 4] = 5
    a, b = decoder_states(backbone, x), decoder_states(backbone, changed)
    assert max_difference(a[:, :4], b[:, :4]) == 0
    assert max_difference(a[:, 4:], b[:, 4:]) > 1e-3
    ids = x["encoder_token_ids"].copy()
    before = numpy(backbone.encode(ids, x["encoder_padding_mask"]))
    ids[:, -1] = 5
    after = numpy(backbone.encode(ids, x["encoder_padding_mask"]))
    assert max_difference(before[:, 0], after[:, 0]) > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16", "float16"])
def test_no_nan_not_even_for_rows_that_are_all_padding(dtype):
    backbone = enlarge(kt.Backbone(tiny_config(), dtype=dtype))
    x = random_inputs()
    x["encoder_padding_mask"][1] = 0
    x["decoder_padding_mask"][1] = 0
    out = forward(backbone, x)
    logits = backbone.logits(out["decoder_sequence_output"])
    compute = keras.dtype_policies.get(dtype).compute_dtype
    for tensor in (*out.values(), logits):
        assert keras.backend.standardize_dtype(tensor.dtype) == compute
        assert np.isfinite(numpy(tensor)).all()


def test_half_precision_agrees_with_float32(backbone):
    x = random_inputs()
    expected = decoder_states(backbone, x)
    half = kt.Backbone(tiny_config(), dtype="float16")
    for ours, theirs in zip(half.weights, backbone.weights, strict=True):
        ours.assign(theirs)
    # float16 has 11 bits: 5e-4 an operation, some tens of them in a row.
    assert max_difference(decoder_states(half, x), expected) < 0.05


def test_attention_of_a_row_that_sees_nothing_is_zero():
    layer = Attention(8, 2, 1, 4, 0.5, 50.0)
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype("float32")
    mask = np.array([[[True, True, True], [False] * 3, [True] * 3]])
    out, _ = layer(x, key_value_states=x, attention_mask=keras.ops.array(mask))
    assert (numpy(out)[0, 1] == 0).all()
    assert (numpy(out)[0, 0] != 0).all()


def test_grouped_attention_equals_repeated_heads():
    """The oracle repeats keys and values for every query head."""
    layer = Attention(16, 4, 2, 8, 0.3, 2.0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 16)).astype("float32")
    out, (key, value) = layer(x, key_value_states=x)
    assert tuple(key.shape) == (2, 2, 5, 8)
    q = (x @ numpy(layer.query.kernel)).reshape(2, 5, 4, 8).transpose(0, 2, 1, 3) * 0.3
    k, v = (np.repeat(numpy(t), 2, axis=1) for t in (key, value))
    logits = 2.0 * np.tanh(q @ k.transpose(0, 1, 3, 2) / 2.0)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    joined = (weights @ v).transpose(0, 2, 1, 3).reshape(2, 5, 32)
    expected = joined @ numpy(layer.output_projection.kernel)
    assert max_difference(out, expected) < 1e-6


def test_every_layer_is_named_alike_in_every_instance():
    """Trap: checkpoints keyed by path silently skip auto-named layers."""
    first, second = (kt.Backbone(tiny_config(dropout=0.1)) for _ in range(2))
    assert [v.path for v in first.weights] == [v.path for v in second.weights]
    assert len({v.path for v in first.weights}) == len(first.weights)


def test_config_survives_serialization():
    backbone = kt.Backbone(tiny_config(dropout=0.2), dtype="mixed_bfloat16")
    config = keras.saving.serialize_keras_object(backbone)
    again = keras.saving.deserialize_keras_object(config)
    assert again.config == backbone.config
    assert again.dtype_policy.name == "mixed_bfloat16"


def test_torch_sees_the_parameters():
    """Trap: KerasHub's attribute handling hides them from torch."""
    if keras.config.backend() != "torch":
        pytest.skip("torch only")
    backbone = kt.Backbone(tiny_config())
    model = kt.Seq2SeqLM(backbone)
    for module in (backbone, model):
        count = sum(p.numel() for p in module.parameters())
        assert count == tiny_config().count_params()


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match="`config` must be a T5GemmaConfig"):
        kt.Backbone("s")
