"""The planner: independent arithmetic, the compiler's own account, bad input."""

import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys

import keras
import pytest
from helpers import ROOT

import keras_t5gemma as kt
from keras_t5gemma.cli import main
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.planning import activations
from keras_t5gemma.planning.abstract_variables import (
    model_variables,
    optimizer_variables,
)
from keras_t5gemma.planning.options import PlanOptions
from keras_t5gemma.planning.planner import plan, read_memory

PARAMETERS = 20_333_401_088  # docs/facts.md, section 2: 9B-9B.
# Norm scales of 9B-9B, which no layout splits: 4 an encoder block, 6 a decoder block,
# and two final ones, each as wide as the model.
SCALES = (42 * 4 + 42 * 6 + 2) * 3584
STACK = StackConfig(3, 16, 32, 4, 2, 8)
TINY = T5GemmaConfig(STACK, dataclasses.replace(STACK, hidden_dim=24), 64)
TALL = ("t5gemma_9b_9b", 16, "80GB", 64, 4096)


@pytest.mark.parametrize(
    "devices", [16, pytest.param(64, marks=pytest.mark.one_backend)]
)
def test_9b_9b_takes_its_share_of_weights_and_moments_and_allocates_nothing(devices):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan(
        "t5gemma_9b_9b",
        devices,
        "80GB",
        64,
        4096,
        strategy="fsdp",
        mesh={"data": devices, "model": 1},
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1e9  # One of the tables alone has 3.7 GB.
    weights = 4 * ((PARAMETERS - SCALES) // devices + SCALES)
    assert found.weights == weights
    assert found.gradients == weights
    assert found.optimizer == 2 * weights
    assert found.total == 3 * weights + found.step
    assert found.fits
    if keras.config.backend() == "jax":
        import jax

        big = [a for a in jax.live_arrays() if a.size > 10_000_000]
        assert not big


@pytest.mark.one_backend
def test_data_parallel_repeats_everything():
    found = plan(*TALL, strategy="data")
    assert found.weights == 4 * PARAMETERS
    assert found.optimizer == 8 * PARAMETERS
    assert not found.fits


@pytest.mark.parametrize(
    "dtype, lora_rank, quantize",
    [
        ("float32", None, None),
        ("mixed_bfloat16", 2, None),
        ("float32", 2, "int8"),
        ("bfloat16", None, "int8"),
    ],
)
def test_variables_are_those_of_the_model(dtype, lora_rank, quantize):
    backbone = kt.Backbone(TINY, dtype=dtype)
    if quantize:
        backbone.quantize(quantize)
    if lora_rank:
        backbone.enable_lora(lora_rank)

    def described(variables):
        return {(v.path, tuple(v.shape), v.dtype, v.trainable) for v in variables}

    found = model_variables(TINY, dtype, lora_rank, quantize)
    if not lora_rank and quantize:
        backbone.trainable = False
    assert described(found) == described(backbone.weights)
    assert len(found) == len(backbone.weights)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Lion", "Muon"])
def test_optimizer_state_is_that_of_the_optimizer(name):
    backbone = kt.Backbone(TINY, dtype="float32")
    optimizer = getattr(keras.optimizers, name)(1e-3, use_ema=True)
    abstract = optimizer_variables(optimizer, model_variables(TINY, "float32"))
    assert not optimizer.built
    optimizer.build(backbone.trainable_variables)
    real = [v for v in optimizer.variables if tuple(v.shape)]
    shapes = sorted((tuple(v.shape), v.dtype) for v in abstract)
    assert shapes == sorted((tuple(v.shape), v.dtype) for v in real)


@pytest.mark.one_backend
def test_adapters_alone_have_gradients_and_moments():
    found = plan(*TALL, lora_rank=8, strategy="data")
    # Query and value in three attentions: A (width, rank), B (rank, heads x 256).
    adapters = 3 * 42 * 8 * (3584 + 16 * 256 + 3584 + 8 * 256)
    assert found.gradients == 4 * adapters
    assert found.optimizer == 8 * adapters
    assert found.weights == 4 * (PARAMETERS + adapters)


@pytest.mark.one_backend
def test_int8_weights_take_a_byte_each_and_a_scale_a_row():
    found = plan(*TALL, lora_rank=8, quantize="int8", strategy="data")
    kernels = PARAMETERS - SCALES
    attention = 3 * 42 * 256 * (16 + 8 + 8) + 3 * 42 * 3584  # Rows of q k v, of o.
    feed_forward = 2 * 42 * (2 * 14336 + 3584)
    scales = attention + feed_forward + 2 * 256_000
    adapters = 3 * 42 * 8 * (3584 + 16 * 256 + 3584 + 8 * 256)
    assert found.weights == kernels + 4 * (SCALES + scales + adapters)


@pytest.mark.one_backend
def test_cache_has_two_arrays_a_layer_of_own_and_of_source_tokens():
    stack = dataclasses.replace(STACK, sliding_window=4)
    config = T5GemmaConfig(stack, stack, 64)
    shape = activations.Shape(batch=5, source=11, target=7, itemsize=2)
    slots = (4 + 7 + 4) + 3 * 11  # Layers 0 and 2 have a window.
    expected = 2 * 5 * 2 * slots * 8 * 2
    assert activations.cache_bytes(config, shape) == expected


@pytest.mark.one_backend
def test_attention_in_blocks_grows_with_the_length():
    def kept(length, cpu=False):
        shape = activations.Shape(1, length, 64, itemsize=4, cpu=cpu)
        return activations.kept_by_block(STACK, shape, length)

    assert kept(4096) == 2 * kept(2048)
    if keras.config.backend() != "tensorflow":
        assert kept(1000) > 4 * kept(1000, cpu=True)  # There in blocks already.


@pytest.mark.one_backend
def test_rematerialization_and_split_heads_take_less():
    config = T5GemmaConfig(STACK, STACK, 64)
    kept = plan(config, 1, "1GB", 4, (64, 32), rematerialize=False)
    again = plan(config, 1, "1GB", 4, (64, 32))
    assert again.activations_rematerialized < kept.activations == again.activations
    assert again.step < kept.step
    split = plan(config, 2, "1GB", 4, (64, 32), mesh={"data": 1, "model": 2})
    assert split.activations < again.activations


@pytest.mark.one_backend
def test_layout_is_the_one_that_fits_with_least_communication():
    config = T5GemmaConfig(STACK, STACK, 2**16)
    roomy = plan(config, 4, "10GB", 8, 32)
    everything = [
        plan(
            config,
            4,
            "10GB",
            8,
            32,
            strategy=strategy,
            mesh={"data": 4 // m, "model": m},
        )
        for strategy, m in (("data", 1), ("fsdp", 1), ("fsdp", 2), ("tensor", 2))
    ]
    received = [p.received for p in everything]
    assert roomy.fits and roomy.received <= min(received) < max(received)
    memory = min(p.total for p in everything)
    tight = plan(config, 4, memory, 8, 32)
    assert tight.fits and roomy.fits
    for other in everything:
        assert other.total > memory or tight.received <= other.received


@pytest.mark.one_backend
def test_advice_when_nothing_fits_does_fit():
    found = plan("t5gemma_9b_9b", 4, "80GB", 16, 2048)
    assert not found.fits
    assert any("LoRA" in line for line in found.advice)
    devices = next(line for line in found.advice if "devices" in line)
    assert plan("t5gemma_9b_9b", int(devices.split()[0]), "80GB", 16, 2048).fits
    assert not plan("t5gemma_9b_9b", 4, "1MB", 16, 2048).fits


@pytest.mark.one_backend
def test_global_clipping_holds_all_gradients():
    config = T5GemmaConfig(STACK, STACK, 2**16)
    free = keras.optimizers.AdamW(1e-3)
    clipped = keras.optimizers.AdamW(1e-3, global_clipnorm=1.0)
    one, both = (
        plan(config, 1, "1GB", 1, 8, optimizer=o, dtype="float32")
        for o in (free, clipped)
    )
    assert one.gradients == both.gradients == both.weights
    assert both.step >= both.gradients
    # The logit table's gradient is there in two parts either way.
    assert one.weights == both.weights and both.step >= one.step


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "memory, count",
    [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("1.5TB", 1.5e12), (1024, 1024)],
)
def test_memory_is_read(memory, count):
    assert read_memory(memory) == count


BAD = [
    ({"memory": "80 bananas"}, "`memory` must be .*'80 bananas'"),
    ({"memory": "-1GB"}, "`memory` must be .*'-1GB'"),
    ({"memory": "nan"}, "`memory` must be"),
    ({"preset": "t5gemma_9b_3b"}, "`preset` must be .*'t5gemma_9b_3b'"),
    ({"strategy": "pipeline"}, "`strategy` must be one of .*'pipeline'"),
    ({"mesh": {"data": 5, "model": 2}}, "`mesh` .* has 10 devices; .* is 16"),
    ({"strategy": "tensor", "mesh": {"data": 16}}, "'tensor' splits nothing"),
    ({"mesh": {"rows": 16}}, "'rows'"),
    ({"mesh": (16, 1, 1)}, "`mesh` must be the devices along.*(16, 1, 1)"),
    ({"devices": 0}, "`devices` must be a whole number from 1 to 1048576; got 0"),
    ({"devices": 7}, "No layout of 7 devices divides"),
    ({"batch": 2.5}, "`batch` must be"),
    ({"length": (1, 2, 3)}, "`length` must be"),
    ({"length": 0}, "`length` must be"),
    ({"dtype": "float12"}, "`dtype` must be one of .*'float12'"),
    ({"optimizer": "newton"}, "`optimizer` must be one of .*'newton'"),
    ({"quantize": "int8"}, "`quantize` 'int8' needs `lora_rank`"),
    ({"quantize": "int2", "lora_rank": 2}, "`quantize` must be one of"),
    ({"lora_rank": 0}, "`lora_rank` must be"),
]


@pytest.mark.one_backend
@pytest.mark.parametrize("change, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_input_is_named(change, message):
    names = ("preset", "devices", "memory", "batch", "length")
    arguments = {**dict(zip(names, TALL, strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def rows(text):
    """Cells of the aligned text that `plan` prints outside a terminal, by name."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


@pytest.mark.one_backend
def test_command_prints_a_table_and_json(capsys):
    command = ["plan", "--preset", "t5gemma_9b_9b", "--devices", "16"]
    command += ["--memory", "80GB", "--batch", "64", "--length", "4096"]
    assert main.main(command) == 0
    text = capsys.readouterr().out
    table, found = rows(text), plan(*TALL)
    assert "20,333,401,088 parameters" in text and "positions" not in text
    assert f"16 devices, mesh data {found.mesh['data']} x model" in text
    assert "batch 64 " in text and "length 4096 + 4096 tokens, mixed_bfloat16" in text
    assert table["weights"][0] == f"{found.weights / 1e9:,.2f} GB"
    inputs = f"{found.activations_rematerialized / 1e9:,.2f} GB"
    assert table["step: activations"][0] == inputs
    assert "rematerialized" in table["step: activations"][1]
    assert table["limit"] == ["80.00 GB", "fits"]
    headroom = (found.memory - found.total) / 1e9
    assert table["headroom"][0] == f"{headroom:,.2f} GB"
    assert main.main([*command, "--no-rematerialize", "--devices", "64"]) == 1
    table = rows(capsys.readouterr().out)
    assert table["step: activations"][1].startswith("all kept")
    assert "step: recomputation" not in table and "missing" in table
    assert main.main([*command, "--json", "--mesh", "16", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == {"data": 16, "model": 1}
    command[command.index("80GB")], command[-1] = "8GB", "9000"
    assert main.main(command) == 1
    text = capsys.readouterr().out
    assert "Would fit" in text and "model's 8192 positions" in text
    command[command.index("8GB")] = "much"
    assert main.main(command) == 1
    assert "--memory must be" in capsys.readouterr().err


def test_the_parts_of_a_step_are_at_least_its_peak():
    config = T5GemmaConfig(STACK, STACK, 2**10)
    for options in (
        {"rematerialize": True},
        {"rematerialize": False},
        {"mesh": (1, 2)},
        {"mesh": (2, 1), "strategy": "fsdp"},
    ):
        options = PlanOptions(config, 2, "1GB", 4, (64, 32), **options)
        found = plan(**vars(options))
        copies = found.copies
        parts = found.gradients + found.working + found.logits
        if options.rematerialize:
            parts += found.activations_rematerialized + found.recomputed
            copies = found.copies_rematerialized
        else:
            parts += found.activations
        assert found.step <= parts + copies
    assert found.mesh == {"data": 2, "model": 1}


@pytest.mark.one_backend
def test_within_15_percent_of_the_compiler():
    # Without rematerialization on the mesh: XLA for CPUs then keeps everything.
    cases = ("long target", "weights, clipped", "fsdp 8 x 1")
    command = [sys.executable, ROOT / "benchmarks" / "planner.py", "--json", "--cases"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *cases], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line[0] == "{"]
    assert len(rows) == 2 * len(cases)
    for row in rows:
        assert math.isclose(row["planned state"], row["compiled state"], rel_tol=0.01)
        if row["case"].startswith("fsdp") and row["rematerialized"]:
            continue
        ratio = row["planned step"] / row["compiled step"]
        assert 0.85 < ratio < 1.15, row
