"""The recipes for several devices on PyTorch and TensorFlow, on two and on one."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import ROOT, TESTS

import keras_t5gemma as kt

TOOLS = ROOT / "tools"
BACKEND = keras.config.backend()
PAIRS = [
    ("A game of chess for two players.", "chess game"),
    ("A tool that shows free disk space.", "disk space viewer"),
    ("Fonts.", "some fonts"),
    ("Library to read JSON files, and to write them too.", "JSON library for files"),
    ("Shows the weather of the day.", "weather viewer for the panel"),
]


@pytest.fixture
def arguments(tmp_path):
    """Of the tools: 5 pairs in batches of 4, so that the last one has empty rows."""
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"source": s, "target": t}) for s, t in PAIRS]
    file.write_text("\n".join(lines), encoding="utf-8")
    return ["--pairs", str(file), "--batch-size", "4", "--learning-rate", "1e-3"]


def start(tool, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, TOOLS / tool, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def check_equal(one, two):
    before, one, two = (
        kt.Backbone.from_preset(preset).weights
        for preset in ("t5gemma_mini", str(one), str(two))
    )
    moved = 0
    for start, a, b in zip(before, one, two, strict=True):
        start, a, b = (keras.ops.convert_to_numpy(v.value) for v in (start, a, b))
        # AdamW moves each weight by about 1e-3 a step, and divides by gradients, of
        # which the smallest are the rounding errors of a sum.
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=str(start.shape))
        moved = max(moved, np.abs(a - start).max())
    assert moved > 1e-3


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own")
def test_two_ddp_processes_are_one(arguments, tmp_path):
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = ["--output", str(tmp_path / str(count))]
        finish(
            [
                start(
                    "train_ddp.py",
                    *arguments,
                    *output,
                    RANK=str(rank),
                    WORLD_SIZE=str(count),
                    **address,
                )
                for rank in range(count)
            ]
        )
    check_equal(tmp_path / "1", tmp_path / "2")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")
def test_two_mirrored_devices_are_one(arguments, tmp_path):
    for count in ("1", "2"):
        output = ["--output", str(tmp_path / count), "--cpus", count]
        finish([start("train_mirrored.py", *arguments, *output)])
    check_equal(tmp_path / "1", tmp_path / "2")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")
def test_fit_in_the_scope_of_a_strategy_takes_the_same_step():
    command = [sys.executable, "-m", "helpers.mirrored_fit"]
    done = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("REPORT"))
    report = json.loads(line.removeprefix("REPORT "))
    error = report.pop("error")
    assert error.startswith("`gradient_accumulation_steps` must be None with a st")
    assert len(report) == 2
    for task, found in report.items():
        assert found["moved"] > 1e-3, task
        assert found["update"] < 1e-6 and found["loss"] < 1e-5, task
