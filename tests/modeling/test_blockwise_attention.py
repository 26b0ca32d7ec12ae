"""Attention in blocks against the plain one, and what it needs."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import xla_flags
from helpers.attention import plain_attention, random_arrays, values_and_gradients
from helpers.models import (
    enlarge,
    forward,
    max_difference,
    numpy,
    one_block_config,
    random_inputs,
)
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.modeling import (
    blockwise_attention,
    flex_attention,
    splash_attention,
)
from keras_t5gemma.modeling.blockwise_attention import attend
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator
from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.utils.backends import on_cpu

# On a CPU; TensorFlow's plain attention is faster.
FASTER_FROM_512 = keras.config.backend() != "tensorflow"
# No block divides the lengths; the rows are packed, empty, and padded.
BLOCKS, QUERIES, KEYS = (8, 16), 37, 29
PACKED = np.array([[1] * 20 + [2] * 13 + [0] * 4, [0] * 37, [1] * 30 + [0] * 7])
UNORDERED = np.array([[2] * 10 + [1] * 10 + [2] * 17, [3] * 9 + [0] * 9 + [3] * 19])
UNORDERED = np.concatenate([UNORDERED, np.ones((1, 37), int)])


def plain(visibility, cap):
    return lambda *x: plain_attention(*x, visibility(), cap)


def blockwise(visibility, cap, *dropout):
    return lambda *x: attend(*x, visibility(), cap, *dropout, blocks=BLOCKS)


def compare(cases, keys=QUERIES, kv_heads=2, dtype="float32"):
    """Differences of values and gradients, relative to the largest number of each."""
    *arrays, upstream = random_arrays(3, QUERIES, keys, 4, kv_heads, 8)
    arrays = [ops.cast(x, dtype) for x in arrays]
    functions = []
    for *description, cap in cases:
        # Made inside: TensorFlow's constants belong to the function that is traced.
        visibility = functools.partial(Visibility, *description)
        functions += [plain(visibility, cap), blockwise(visibility, cap)]
    found = values_and_gradients(functions, arrays, upstream)
    for pair in zip(found[::2], found[1::2], strict=True):
        for expected, got in zip(*pair, strict=True):
            assert np.isfinite(got).all()
            yield np.abs(expected - got).max() / np.abs(expected).max()


def test_two_sided_windows_smaller_and_larger_than_blocks():
    cases = [(PACKED, PACKED, False, window, 2.0) for window in (3, 20)]
    assert max(compare(cases)) < 1e-5


def test_causal_with_windows_and_without():
    cases = [
        (PACKED, PACKED, True, window, cap)
        for window, cap in ((11, 50.0), (None, None))
    ]
    assert max(compare(cases)) < 1e-5


def test_cross_attention_to_other_lengths():
    assert max(compare([(PACKED, PACKED[:, :KEYS], False, None, 2.0)], KEYS, 1)) < 1e-5


def test_segments_in_any_order_and_full_attention():
    ones = np.ones_like(PACKED)
    cases = [(UNORDERED, UNORDERED, False, None, 100.0), (ones, ones, False, None, 5.0)]
    assert max(compare(cases, kv_heads=4)) < 1e-5


def test_bfloat16_to_its_precision():
    """Both round to 8 bits; the plain one also its logits and weights."""
    cases = [(PACKED, PACKED, True, 11, 5.0)]
    assert 1e-4 < max(compare(cases, dtype="bfloat16")) < 0.03


def test_queries_that_see_nothing_get_zero():
    *arrays, _ = random_arrays(3, QUERIES, QUERIES, 4, 2, 8)
    arrays = [ops.convert_to_tensor(x) for x in arrays]
    found = numpy(attend(*arrays, Visibility(PACKED, PACKED), 5.0, blocks=BLOCKS))
    hidden = PACKED == 0
    assert (found[hidden] == 0).all()
    assert (found[~hidden] != 0).all()


def test_dropout_is_drawn_alike_forward_and_backward():
    """The output is linear in the values: <output, u> = <values, their gradient>."""
    *arrays, upstream = random_arrays(3, QUERIES, QUERIES, 4, 2, 8)
    seed = keras.random.SeedGenerator(3).next()
    visibility = functools.partial(Visibility, PACKED, PACKED, window=20)

    def drop(seed):
        def function(*x):
            return blockwise(visibility, 5.0, 0.3, ReplayableSeedGenerator(seed))(*x)

        return function

    functions = [drop(seed), drop(seed), drop(seed + 1), blockwise(visibility, 5.0)]
    first, second, other, without = values_and_gradients(functions, arrays, upstream)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(first[0] - other[0]).max() > 0.1
    assert np.abs(first[0] - without[0]).max() > 0.1
    by_output = (first[0] * upstream).sum()
    assert abs((first[3] * arrays[2]).sum() - by_output) < 1e-4 * abs(first[0]).sum()
    # The mean of many draws is the output without dropout.
    assert 0.8 < (first[0] * without[0]).sum() / (without[0] ** 2).sum() < 1.2
    # The logits' gradient knows the same draw: that of a small step is its own.
    step = 1e-2 * first[1] / np.linalg.norm(first[1])
    (moved,) = values_and_gradients(
        [drop(seed)], [arrays[0] + step, *arrays[1:]], upstream
    )
    expected = by_output + (step * first[1]).sum()
    assert abs((moved[0] * upstream).sum() - expected) < 0.1 * (step * first[1]).sum()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Kernels of JAX.")
def test_splash_attention_is_the_same_function():
    """In the interpreter: it was not run on a TPU."""
    arguments = PACKED, PACKED[:, :KEYS], True, 20
    *arrays, upstream = random_arrays(3, QUERIES, KEYS, 4, 2, 8)

    def splash(*x):
        visibility = Visibility(*arguments)
        return splash_attention.attend(*x, visibility, 2.0, interpret=True)

    functions = [plain(functools.partial(Visibility, *arguments), 2.0), splash]
    for pair in zip(*values_and_gradients(functions, arrays, upstream), strict=True):
        assert max_difference(*pair) < 1e-5


@pytest.mark.skipif(keras.config.backend() != "torch", reason="Kernels of PyTorch.")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_same_function(monkeypatch):
    """Not compiled: `tools/check_gpu_attention.py` compares the kernel on a GPU."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex_attention._compiled.cache_clear()
    packed, unordered = (
        np.pad(np.repeat(ids, 10, axis=1), ((0, 0), (0, 30)))
        for ids in (PACKED, UNORDERED)
    )
    for ids, causal, window, keys in (
        (packed, False, 150, 400),
        (packed, True, None, 400),
        (packed, False, None, 290),
        (unordered, False, 300, 400),
    ):
        *arrays, _ = random_arrays(3, 400, keys, 4, 2, 16)
        visibility = Visibility(ids, ids[:, :keys], causal, window)
        arguments = (*map(ops.convert_to_tensor, arrays), visibility, 2.0)
        found = flex_attention.attend(*arguments)
        expected = plain_attention(*arguments)
        assert max_difference(found, expected) < 1e-5
        blocks = flex_attention.block_mask(visibility)
        if ids is packed:
            assert blocks.sparsity() > 40  # Percent of blocks that are skipped.
    flex_attention._compiled.cache_clear()


@pytest.fixture
def short_is_long(monkeypatch):
    """Blocks for the lengths of tiny models."""
    monkeypatch.setattr(blockwise_attention, "_LONG", 64)
    monkeypatch.setattr(blockwise_attention, "block_sizes", lambda *_: BLOCKS)


def weights_after(kernel, dropout=0.0, **options):
    """Of three steps on packed rows."""
    keras.utils.set_random_seed(3)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config(dropout=dropout)))
    enlarge(model.backbone, 3.0)
    model.backbone.attention_kernel = kernel
    model.compile(optimizer=keras.optimizers.SGD(1.0), **options)
    x = random_inputs()
    x["encoder_padding_mask"][0, 12:] = 2
    x["decoder_padding_mask"][0, 6:12] = 2
    x["decoder_padding_mask"][0, 12:] = 0
    y, ones = x["decoder_token_ids"], np.ones((2, 14), "float32")
    model.fit(x, y, sample_weight=ones, batch_size=2, epochs=3, verbose=0)
    return [numpy(v) for v in model.trainable_variables]


@pytest.mark.parametrize("kernel", ["plain", "portable"])
def test_training_is_the_same_with_plain_attention_and_rematerialized(
    short_is_long, kernel
):
    """With dropout, whose draws differ from the plain one's, only rematerialized."""
    dropout = 0.2 if kernel == "portable" else 0.0
    expected = weights_after(kernel, dropout)
    found = weights_after("auto", dropout, rematerialize=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


def test_reading_and_generating_are_the_same(short_is_long):
    backbone = enlarge(kt.Backbone(one_block_config()))
    x = random_inputs()
    x["encoder_padding_mask"][1, 11:] = 0
    blocks = forward(backbone, x)
    backbone.attention_kernel = "plain"
    for name, plain_states in forward(backbone, x).items():
        assert max_difference(blocks[name], plain_states) < 1e-5


@pytest.mark.skipif(keras.config.backend() != "jax", reason="It prints its programs.")
def test_no_array_of_queries_times_keys(short_is_long):
    """Largest arrays of a training step, read from the program."""
    import jax

    text = {}
    for kernel in ("plain", "auto"):
        backbone = kt.Backbone(one_block_config(dropout=0.1))
        backbone.attention_kernel = kernel
        x = random_inputs(source=52, target=44)
        variables = backbone.trainable_variables, backbone.non_trainable_variables
        values = [[v.value for v in group] for group in variables]

        def total(trained, others, backbone=backbone, x=x):
            out, _ = backbone.stateless_call(trained, others, x, training=True)
            return out["decoder_sequence_output"].sum()

        text[kernel] = str(jax.make_jaxpr(jax.grad(total))(*values))
    for queries, keys in ((52, 52), (44, 44), (44, 52)):
        assert re.search(rf"\[[\d,]*{queries},{keys}\]", text["plain"])
        assert not re.search(rf"\[[\d,]*{queries},{keys}\]", text["auto"])
    assert not re.search(r"\[[\d,]*(48|56),(48|64)\]", text["auto"])  # Padded.
    assert "[2,1,16,16]" in text["auto"]  # B K (queries G) keys of a block.


@pytest.mark.skipif(keras.config.backend() != "torch", reason="Eager arrays.")
def test_no_array_of_queries_times_keys_in_pytorch(short_is_long):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if hasattr(out, "numel"):
                self.numbers = max(self.numbers, out.numel())
            return out

    arrays = random_arrays(1, 256, 256, 2, 1, 8)[:3]
    arrays = [ops.convert_to_tensor(x).requires_grad_() for x in arrays]
    ones = np.ones((1, 256))
    with Largest() as seen:
        out = attend(*arrays, Visibility(ones, ones), 5.0, blocks=BLOCKS)
        out.sum().backward()
    assert seen.numbers == out.numel()


@pytest.mark.parametrize(
    ("queries", "keys", "blocks"),
    [
        (511, 511, False),
        (512, 512, FASTER_FROM_512),
        (128, 4096, FASTER_FROM_512),
        (2048, 2048, True),
        (32, 16384, False),
    ],
)
def test_short_sequences_are_attended_to_at_once(queries, keys, blocks):
    assert blockwise_attention.uses_blocks(queries, keys, cpu=True) == blocks
    assert blockwise_attention.uses_blocks(queries, keys) == (keys == 2048)
    if on_cpu(ops.zeros(1)):
        mask = blockwise_attention.attention_mask(
            Visibility(np.ones((1, queries)), np.ones((1, keys)))
        )
        assert isinstance(mask, blockwise_attention.BlockwiseMask) == blocks


@pytest.mark.one_backend
def test_logits_of_a_block_stay_in_the_cache():
    for heads in (1, 4, 8, 16):
        queries, keys = blockwise_attention.block_sizes(heads, True)
        assert 2**19 <= heads * queries * keys <= 2**20
    assert blockwise_attention.block_sizes(256, True) == (64, 512)


@pytest.mark.one_backend
def test_bad_input():
    ones = np.ones((1, 8))
    *arrays, _ = random_arrays(1, 8, 8, 2, 1, 8)
    arrays = [ops.convert_to_tensor(x) for x in arrays]
    with pytest.raises(
        ValueError, match="`window` must be a whole number from 1; got 0"
    ):
        Visibility(ones, ones, window=0)
    visibility = Visibility(ones, ones)
    with pytest.raises(ValueError, match=r"`blocks` must be two powers.*got \(8, 12\)"):
        attend(*arrays, visibility, blocks=(8, 12))
    for kernel, message in (
        ("flex", "CUDA"),
        ("splash", "TPU"),
        ("x", "one of 'auto'"),
    ):
        with pytest.raises(ValueError, match=f"`kernel`.*{message}"):
            attend(*arrays, visibility, kernel=kernel)
    backbone = kt.Backbone(one_block_config())
    with pytest.raises(ValueError, match="`attention_kernel` must be one of.*'fast'"):
        backbone.attention_kernel = "fast"


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Meshes are JAX's.")
def test_rows_and_heads_on_a_mesh_are_never_gathered():
    """Devices only tell each other which blocks some row sees, one bit each."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, tests / "helpers/attention_on_a_mesh.py"],
        env={
            **os.environ,
            "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
            "XLA_FLAGS": xla_flags(8),
        },
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout.split("REPORT")[1])
    assert report["difference"] < 1e-5
    assert report["communication"]
    for result, kind in report["communication"]:
        assert kind == "all-reduce"
        assert not re.search(r"f32\[\d", result), result


@pytest.mark.skipif(keras.config.backend() != "torch", reason="An exporter of PyTorch.")
def test_long_sequences_are_exported(short_is_long):
    import torch

    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    inputs = {k: torch.from_numpy(x) for k, x in random_inputs(1, 64, 48).items()}

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return self.model(inputs)

    exported = torch.export.export(Module().eval(), (inputs,), strict=False).module()
    expected = keras.ops.convert_to_numpy(model(inputs))
    np.testing.assert_allclose(exported(inputs).detach(), expected, atol=1e-5)
