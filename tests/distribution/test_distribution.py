"""Layouts, the switch, and 8 simulated devices beside one."""

import json
import math
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import TESTS, xla_flags

import keras_t5gemma as kt
from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.layouts import (
    REPLICATED,
    check_layouts,
    make_layout_map,
    partition,
)

IS_JAX = keras.config.backend() == "jax"
on_jax = pytest.mark.skipif(not IS_JAX, reason="elsewhere Keras splits nothing")
PAIR = kt.T5GemmaConfig.pair("9b", "2b")  # 8 key/value heads, and 4.
BOTH = {"data": 2, "model": 4}
WIDE = kt.StackConfig(2, 256, 1024, 8, 4, 16)


def device_mesh(data=2, model=4, names=("data", "model")):
    devices = [f"cpu:{i}" for i in range(data * model)]  # They need not exist.
    return keras.distribution.DeviceMesh((data, model), names, devices)


def wide_backbone():
    """A model of which some variables are above 1 MB."""
    return kt.Backbone(kt.T5GemmaConfig(WIDE, WIDE, vocabulary_size=2048))


@pytest.mark.parametrize(
    "path, shape, tensor, fsdp",
    [
        (
            "encoder/token_embedding/embeddings",
            (256000, 3584),
            ("model", None),
            ("model", "data"),
        ),
        (
            "encoder/token_embedding/embeddings_scale",
            (256000,),
            ("model",),
            ("model",),
        ),
        (
            "decoder/block_0/self_attention/query/kernel",
            (2304, 2048),
            (None, "model"),
            ("data", "model"),
        ),
        (
            "decoder/block_0/cross_attention/key/kernel",
            (3584, 1024),
            (None, "model"),
            ("data", "model"),
        ),
        (
            "decoder/block_0/cross_attention/output/kernel",
            (2048, 2304),
            ("model", None),
            ("model", "data"),
        ),
        (
            "encoder/block_1/mlp/up/kernel",
            (3584, 14336),
            (None, "model"),
            ("data", "model"),
        ),
        (
            "encoder/block_1/mlp/down/kernel",
            (14336, 3584),
            ("model", None),
            ("model", "data"),
        ),
        ("encoder/block_1/mlp/down/kernel_scale", (3584,), (None,), (None,)),
        ("encoder/block_1/mlp/up/kernel_scale", (14336,), ("model",), ("model",)),
        (
            "encoder/block_1/mlp/up/lora_kernel_a",
            (3584, 32),
            (None, None),
            ("data", None),
        ),
        (
            "encoder/block_1/mlp/up/lora_kernel_b",
            (16, 14336),
            (None, "model"),
            ("data", "model"),
        ),
        (
            "encoder/block_1/mlp/down/lora_kernel_a",
            (14336, 4),
            ("model", None),
            ("model", None),
        ),
        ("encoder/final_norm/scale", (3584,), (None,), (None,)),
    ],
)
def test_partition(path, shape, tensor, fsdp):
    assert partition(path, shape, BOTH, "tensor", PAIR) == tensor
    found = partition(path, shape, BOTH, "fsdp", PAIR)
    if math.prod(shape) < 2**17:
        assert [a for a in found if a == "model"] == [a for a in tensor if a]
    else:
        assert found == fsdp
    assert partition(path, shape, BOTH, "data", PAIR) == (None,) * len(shape)


def test_fsdp_splits_the_largest_axis_and_tables_by_width():
    mesh = {"data": 8}
    found = partition("decoder/block_0/mlp/down/kernel", (9216, 2304), mesh, "fsdp")
    assert found == ("data", None)
    # 9217 is not a multiple of 8: then the other one.
    found = partition("decoder/block_0/mlp/down/kernel", (9217, 2304), mesh, "fsdp")
    assert found == (None, "data")
    found = partition("decoder/token_embedding/embeddings", (2048, 256), mesh, "fsdp")
    assert found == (None, "data")


def test_key_value_heads_stay_whole():
    path = "decoder/block_0/self_attention/key/kernel"
    shape = (2304, 1024)  # 4 heads of 256.
    assert partition(path, shape, {"model": 4}, "tensor", PAIR) == (None, "model")
    assert partition(path, shape, {"model": 8}, "tensor", PAIR) == (None, None)
    found = partition(path, shape, {"data": 2, "model": 8}, "fsdp", PAIR)
    assert found == ("data", None)


@pytest.mark.parametrize(
    "path, shape, model, words",
    [
        ("self_attention/query/kernel", (2304, 2048), 16, "8 query heads"),
        ("mlp/gate/kernel", (2304, 9216), 5, "9216 feed-forward"),
    ],
)
def test_what_does_not_divide_is_named(path, shape, model, words):
    path = f"decoder/block_0/{path}"
    with pytest.raises(ValueError, match=f"{path}.*{words}.*'model' of {model}"):
        partition(path, shape, {"model": model}, "tensor", PAIR)
    with pytest.raises(ValueError, match="vocabulary.*'model' of 3"):
        partition("encoder/token_embedding/embeddings", (256, 8), {"model": 3}, "fsdp")
    with pytest.raises(ValueError, match="odd/kernel.*'data' of 8"):
        partition("odd/kernel", (999, 999), {"data": 8}, "fsdp")


def test_unknown_names():
    with pytest.raises(ValueError, match="`strategy` must be one of.*'zero'"):
        partition("kernel", (4, 4), {"data": 2}, "zero")
    with pytest.raises(ValueError, match="axes.*got 'batch'"):
        partition("kernel", (4, 4), {"batch": 2}, "fsdp")
    with pytest.raises(ValueError, match="axes.*got 'batch'"):
        make_layout_map([], device_mesh(names=("batch", "model")), "fsdp")


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_the_layout_map_is_the_rule(mode):
    backbone = wide_backbone()
    if mode:
        backbone.quantize(mode)
    backbone.enable_lora(2, parts=["encoder", "cross_attention", "mlp", "embeddings"])
    for strategy in ("fsdp", "tensor"):
        layouts = backbone.get_layout_map(device_mesh(), strategy)
        for variable in backbone.variables:
            layout = layouts[variable.path]
            axes = layout.axes if layout else (None,) * len(variable.shape)
            args = variable.path, variable.shape, BOTH, strategy, backbone.config
            assert axes == partition(*args)
    assert len(backbone.get_layout_map(device_mesh(), "data")) == 0


def test_a_map_that_does_not_fit_is_an_error():
    backbone, mesh = wide_backbone(), device_mesh()

    def layouts(rows=(), without=None):
        found = make_layout_map(backbone.variables, mesh, "tensor", backbone.config)
        if without:
            del found[without]
        for pattern, axes in rows:
            found[pattern] = axes
        return found

    check_layouts(backbone, layouts())
    down = r"encoder/block_\d+/mlp/down/kernel"
    for rows, without, words in [
        ([("mlp/up/kernel", (None, "model"))], None, "No variable matches.*up/kernel"),
        ([(".*encoder.*up.*", (None, "model"))], None, "up/kernel matches 2 patterns"),
        ([(down, ("model",))], down, "down/kernel has 2 axes"),
        ([], down, "encoder/block_0/mlp/down/kernel.* 1.0 MB would be replicated"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_layouts(backbone, layouts(rows, without))
    check_layouts(backbone, layouts([], down), (*REPLICATED, "mlp/down/kernel"))
    three = keras.distribution.LayoutMap(device_mesh(1, 3))
    three[down] = ("model", None)
    with pytest.raises(ValueError, match="down/kernel.*1024.*'model' of 3 devices"):
        check_layouts(backbone, three, may_replicate=[".*"])


@on_jax
def test_what_distribute_refuses(monkeypatch):
    for arguments, words in [
        ({"strategy": "pipeline"}, "`strategy` must be one of.*'pipeline'"),
        ({"data": 2, "model": 3}, "2 x model=3 has 6 devices; there are 1 devices"),
        ({"data": 0}, "`data` must be a whole number from 1; got 0"),
        ({"model": "all"}, "`model` must be a whole number from 1; got 'all'"),
        ({"devices": 1}, "`devices` must be a string or a list of strings; got int"),
        ({"devices": "cpu"}, "`devices` must be one of 'cpu:0'; got 'cpu'"),
        ({"devices": []}, "`devices` must be one or more different devices"),
        ({"devices": ["cpu:0"] * 2}, "`devices` must be one or more different devices"),
        ({"devices": ["gpu:7"]}, "`devices` must be one of 'cpu:0'; got 'gpu:7'"),
    ]:
        with pytest.raises(ValueError, match=words):
            kt.distribute(**arguments)
    names = lambda: ["cpu:0", "cpu:1"]  # noqa: E731
    monkeypatch.setattr(keras.distribution, "list_devices", names)
    for arguments, words in [
        ({"strategy": "data", "model": 2}, "must be 1 for strategy 'data'"),
        ({"strategy": "tensor", "model": 1}, "must be above 1 for strategy 'tensor'"),
    ]:
        with pytest.raises(ValueError, match=words):
            kt.distribute(**arguments)
    assert keras.distribution.distribution() is None


@on_jax
def test_one_device_shares_nothing():
    with kt.distribute() as distribution:
        assert repr(distribution) == "<MeshDistribution fsdp: data=1, model=1>"
        assert mesh.current() is None and mesh.round_up(3) == 3
        assert keras.distribution.distribution() is None


@pytest.mark.skipif(IS_JAX, reason="there it works")
def test_distribute_says_so_where_keras_splits_nothing():
    with pytest.raises(ValueError, match="needs the JAX backend.*tools/train_"):
        kt.distribute()


@pytest.fixture(scope="module")
def whole_report():
    if not IS_JAX:
        pytest.skip("elsewhere Keras splits nothing")
    script = ["-m", "helpers.eight_devices"]
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(8),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, *script],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("REPORT"))
    return json.loads(line.removeprefix("REPORT "))


@pytest.fixture
def report(whole_report):
    """By case."""
    others = ("text", "communication")
    return {name: case for name, case in whole_report.items() if name not in others}


def test_ten_steps_equal_one_devices(report):
    for name, case in report.items():
        assert case["loss"] < 1e-5, name
        assert case["weights"] < 1e-5, name
        assert case["gradients"] < 1e-5, name
        assert case["moved"] > 1e-2, name  # They did learn.


def test_every_token_is_one_devices(report):
    assert all(case["same_tokens"] for case in report.values())


def test_what_is_large_is_split(report):
    for name, case in report.items():
        assert bool(case["repeated"]) == ("data 8x1" in name), name


def test_bytes_a_device(report):
    """At least all but the norms and small kernels is an eighth, a quarter, a half."""
    shares = {name: case["bytes"] / case["all_bytes"] for name, case in report.items()}
    assert shares["full data 8x1"] == 1
    assert shares["full fsdp 8x1"] < 0.25  # Kernels below 2**16 elements stay whole.
    assert shares["full fsdp 4x2"] < 0.2
    assert shares["full tensor 2x4"] < 0.3
    assert shares["full tensor 1x8"] < 0.15
    for name, case in report.items():
        share = case["optimizer_bytes"] / case["all_optimizer_bytes"]
        if "full" in name:
            assert np.isclose(share, shares[name], rtol=1e-3), name
        if "fsdp 2x4" in name or "tensor 4x2" in name:
            assert share < 0.75, name  # Adapters: half of each pair is split.


def test_texts_on_a_mesh_are_one_devices(whole_report):
    text = whole_report["text"]
    assert all(text["same_texts"]), text["same_texts"]
    assert text["score"] < 1e-5 and text["predict"] < 1e-4
    assert len(text["fit"]) == 7 and max(text["fit"]) < 1e-5
    assert text["encoder"] < 1e-5 and text["learned"] > 1e-3
    assert "batch_size has 6 rows" in text["errors"][0]
    assert "last batch of `x` has 3 rows" in text["errors"][1]
    words = "decoder/block_0/self_attention/query/kernel.*3 query heads.*'model' of 2"
    assert re.search(words, text["errors"][2])


def test_planned_communication_is_that_of_the_compiled_step(whole_report):
    """XLA leaves a small weight whole where moving what it is multiplied by is less."""
    for name, (found, planned) in whole_report["communication"].items():
        if name in ("data", "tensor"):
            of = {"data": "gradients", "tensor": "states"}[name]
            share = found["all-reduce"] / planned[f"all-reduce of {of}"]
            assert 1 <= share < {"data": 1.1, "tensor": 1.3}[name]
            continue
        share = found["all-gather"] / planned["all-gather of weights"]
        assert 0.75 < share <= 1, name
        exchanged = planned["exchange of embedded tokens"]
        assert found["all-to-all"] == pytest.approx(exchanged), name


def test_no_step_gathers_an_embedding_table(report):
    for name in ("full fsdp 8x1", "full fsdp 4x2", "full tensor 2x4"):
        found = report[name]["collectives"]
        gathered = [math.prod(s) for kind, s in found if kind == "all-gather"]
        assert gathered and max(gathered) < 2048 * 256 / 2, name
