"""Two processes train one model; one is killed; both go on to the same weights."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import TESTS, two_processes, xla_flags
from helpers.models import SENTENCES, one_block_config

import keras_t5gemma as kt

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "jax", reason="`connect` is for JAX"),
]
MODULE = "helpers.two_processes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, proto):
    """A preset and three files of pairs."""
    folder = tmp_path_factory.mktemp("two")
    keras.utils.set_random_seed(0)
    preprocessor = kt.Seq2SeqLMPreprocessor(kt.Tokenizer(proto), 32, 8)
    backbone = kt.Backbone(one_block_config(dropout=0.1))
    kt.Seq2SeqLM(backbone, preprocessor).save_to_preset(folder / "preset")
    quantized = kt.Seq2SeqLM.from_preset(folder / "preset")
    quantized.quantize("int8")
    quantized.save_to_preset(folder / "int8")
    (folder / "data").mkdir()
    rows = [
        json.dumps({"source": f"{s} {i}", "target": s.split()[-1]}) + "\n"
        for i in range(4)
        for s in SENTENCES
    ]
    for number, start in enumerate((0, 3, 15)):
        part = rows[start : (3, 15, 24)[number]]
        (folder / "data" / f"{number}.jsonl").write_text("".join(part))
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(folder, *options, devices=2):
    """Start a process for each list of options; what they print, and their codes."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
    }
    port = str(free_port())
    started = []
    for index, own in enumerate(options):
        own = [*own, f"processes={len(options)}"]
        command = [sys.executable, "-m", MODULE, port, str(index), str(folder), *own]
        started.append(
            subprocess.Popen(
                command,
                cwd=TESTS,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return texts, [process.returncode for process in started]


def results(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def interrupted(folder):
    """Trained to the end, and once more, until the second process is killed."""
    whole = ["result=whole", "errors=1"]
    return run(folder, [*whole, "kill=99"], [*whole, "kill=5"])


def test_a_missing_process_and_what_differs_is_said(interrupted):
    for index, text in enumerate(interrupted[0]):
        assert (
            "ValueError: The processes differ: model.width is 16 in process 0, 17 in "
            "process 1." in text
        )
        missing = (
            f"TimeoutError: Process {1 - index} of 2 did not connect to 127.0.0.1:"
        )
        assert missing in text, text[-2000:]


def test_a_process_whose_peer_is_killed_ends(folder, interrupted):
    texts, codes = interrupted
    assert "split 32 of 32" in texts[0], texts[0][-3000:]
    assert codes[1] == -signal.SIGKILL, texts[1][-3000:]
    assert codes[0] not in (0, -signal.SIGKILL), texts[0][-3000:]
    # Before that both have told the share of padding in the rows of both.
    first, second = (results(folder, f"whole-{i}")["padding"] for i in (0, 1))
    assert (first == second).all() and (0 < first).all()


def test_both_go_on_to_the_same_bits(folder, interrupted):
    progress = json.loads((folder / "backup" / "progress.json").read_text())
    assert (progress["epoch"], progress["batch"]) == (1, 1)
    assert len(list((folder / "backup").glob("state*.h5"))) == 2
    shutil.copytree(folder / "backup", folder / "kept")
    texts, codes = run(folder, ["result=resumed"], ["result=resumed"])
    assert codes == [0, 0], texts[0][-3000:]
    assert not (folder / "backup").exists()
    for index in (0, 1):
        expected = results(folder, f"whole-{index}")
        resumed = results(folder, f"resumed-{index}")
        assert resumed.keys() == expected.keys() and len(resumed) > 100
        for name in expected.keys() - {"padding"}:  # Of this run's batches alone.
            assert (resumed[name] == expected[name]).all(), name


def test_another_mesh_goes_on_and_one_device_loads_the_preset(folder, interrupted):
    shutil.copytree(folder / "kept", folder / "backup", dirs_exist_ok=True)
    texts, codes = run(folder, ["result=other"], devices=8)
    assert codes == [0], texts[0][-3000:]
    expected = results(folder, "whole-0")
    other = results(folder, "other-0")
    for name in expected.keys() - {"padding"}:
        assert np.abs(other[name] - expected[name]).max() < 1e-4, name
    backbone = kt.Backbone.from_preset(folder / "trained")
    weights = {name.split()[-1]: value for name, value in other.items()}
    for variable in backbone.weights:
        assert (np.asarray(variable.value) == weights[variable.path]).all()


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_all_processes_get_what_one_gets(folder):
    alone = two_processes.use(folder)
    option = ["result=together", "use=1"]
    texts, codes = run(folder, option, option, devices=1)
    assert codes == [0, 0], texts[0][-3000:]
    for index in (0, 1):
        found = json.loads((folder / f"together-{index}.json").read_text())
        assert found["texts"] == alone["texts"] and any(map(any, found["texts"]))
        for a, b in zip(found["numbers"], alone["numbers"], strict=True):
            assert np.abs(np.subtract(a, b)).max() < 1e-4 * np.abs(b).max()
        quantizing, saving = found["errors"]
        assert "`quantize` needs whole weights" in quantizing
        assert "cannot save a quantized model" in saving


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"index": 2}, "`index` must be a whole number from 0 to 1; got 2"),
        ({"processes": 0}, "`processes` must be a whole number from 1; got 0"),
        ({"address": "nowhere"}, "`address` must be 'host:port'; got 'nowhere'"),
        ({"address": "host:65536"}, "`address` must be 'host:port'"),
        ({"address": "host:²"}, "`address` must be 'host:port'"),
        ({"address": None}, "`address` must be 'host:port'; got None"),
        ({"timeout": None}, "`timeout` must be a number above 0; got None"),
        ({"timeout": float("inf")}, "`timeout` must be a number above 0; got inf"),
        ({"heartbeat": 0.5}, "`heartbeat` must be a whole number from 1; got 0.5"),
        ({"same": 5}, "`same` must be a dict or None; got 5"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kt.connect(**{"address": "127.0.0.1:9", "processes": 2, "index": 0, **changed})
