"""The guides run as scripts and reach what they say."""

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import sys

import keras
import pytest
from helpers import ROOT, xla_flags

import keras_t5gemma as kt

FOLDER = ROOT / "guides"
GUIDES = sorted(path.stem for path in FOLDER.glob("*.py"))
TIMEOUT = 800  # Seconds; one to two minutes on a machine that is free.

# The guides run on the backend that starts fastest, once.
runs_here = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="guides are run on PyTorch only"
)


def source(name):
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def cells(name):
    """`(kind, text)` of each cell of a guide in jupytext's percent format."""
    parts = re.split(r"^# %%(.*)\n", source(name), flags=re.M)[1:]
    kinds = ["markdown" if "[markdown]" in head else "code" for head in parts[::2]]
    return list(zip(kinds, parts[1::2], strict=True))


def run(name, folder, **environment):
    """What a guide prints."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ours, and those that tell a user to change something.
    assert "UserWarning" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def numbers(pattern, text):
    """The numbers that the groups of a pattern found."""
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in:\n{text[-2000:]}"
    return [float(group) for group in match.groups()]


@runs_here
def test_generate(tmp_path):
    printed = run("generate", tmp_path)
    assert "same answer alone and in a batch: True" in printed
    assert "best candidate: library to read and write JSON files" in printed
    for prompt in ("library to", "tool that", "C code for"):
        assert re.search(rf"^{prompt} \w+", printed, re.M)
    before, after = numbers(r"([\d.]+) MB in float32, ([\d.]+) MB in int8", printed)
    (preset,) = [row for row in kt.presets() if row.name == "t5gemma_mini_synopsis"]
    assert before == pytest.approx(4 * preset.parameters / 1e6, abs=0.1)
    assert after < 0.3 * before
    assert (tmp_path / "runs/lengths.png").exists()


@runs_here
def test_published_checkpoint_to_your_task(tmp_path):
    printed = run("published_checkpoint_to_your_task", tmp_path)
    rows = re.findall(r"ROUGE-L ([\d.]+) ± [\d.]+, ([\d.]+) nats", printed)
    (rouge, nats), (tuned_rouge, tuned_nats), (_, int8_nats) = [
        map(float, row) for row in rows
    ]
    assert tuned_rouge > rouge + 10 and tuned_nats < nats - 1
    assert int8_nats == pytest.approx(tuned_nats, abs=0.2)
    assert "batch  8, LoRA of rank 16" in printed and "does not fit" not in printed
    assert "same tensors and logits: True" in printed


@runs_here
def test_finetune_summarization(tmp_path):
    printed = run("finetune_summarization", tmp_path)
    first, best = numbers(r"validation loss: ([\d.]+) .* ([\d.]+) at best", printed)
    assert best < first
    before, after = numbers(r"in house style: (\d+) % before, (\d+) % after", printed)
    assert after >= before + 50
    folder = tmp_path / "runs/summarization"
    kept = json.loads((folder / "best/best.json").read_text())
    assert kept["value"] == pytest.approx(best, abs=0.006)  # Printed with two digits.
    assert not (folder / "backup").exists()
    assert (folder / "curves.png").exists()


@runs_here
def test_finetune_translation_lora(tmp_path):
    printed = run("finetune_translation_lora", tmp_path)
    first, last = numbers(r"training loss: ([\d.]+) .* ([\d.]+) in the last", printed)
    assert last < 0.6 * first
    assert "the preset is unchanged: True" in printed
    assert "base with adapters answers alike: True" in printed
    assert "merged preset answers alike: True" in printed
    folder = tmp_path / "runs/translation"
    assert (folder / "italian.lora.h5").stat().st_size < 10e6
    assert (folder / "merged/config.json").exists()


@runs_here
def test_adapt_gemma2(tmp_path):
    printed = run("adapt_gemma2", tmp_path)
    found = {
        name: numbers(rf"{name}: ([\d.]+) before, ([\d.]+) after", printed)
        for name in ("adapted", "scratch", "large reads, small writes")
    }
    for before, after in found.values():
        assert after < before
    assert found["adapted"][1] < found["scratch"][1] - 0.2
    assert "needs a warm-up: True" in printed
    for side in ("encoder: hidden states", "decoder: logits"):
        (difference,) = numbers(rf"{side} equal \S+ within (\S+), on 2", printed)
        assert difference < 1e-4


@runs_here
def test_continue_pretraining(tmp_path):
    printed = run("continue_pretraining", tmp_path)
    for name in ("UL2", "PrefixLM"):
        before, after = numbers(
            rf"{name}: loss ([\d.]+) before, ([\d.]+) after", printed
        )
        assert after < before - 0.3
    assert "<unused" in printed  # A sentinel, where UL2 took something out.
    numbers(r"from disk: training loss ([\d.]+)", printed)
    before, after = numbers(r"held-out loss ([\d.]+) -> ([\d.]+)", printed)
    assert after < before
    assert (tmp_path / "runs/pretraining/run/preset/README.md").exists()


@runs_here
def test_classify_and_search(tmp_path):
    printed = run("classify_and_search", tmp_path)
    before, after = numbers(r"first ten: (\d+) % before, (\d+) % after", printed)
    assert after > before + 10
    assert "loaded embedder agrees: True" in printed
    alike, chance = numbers(r"same kind: (\d+)%, by chance (\d+)%", printed)
    assert alike > 2 * chance
    right, most = numbers(r"right: (\d+) %, the most frequent kind: (\d+) %", printed)
    assert right > most + 15
    assert "states (2, 16, 192)" in printed
    assert (tmp_path / "runs/encoder/map.png").exists()


@runs_here
def test_encoder_as_text_tower(tmp_path):
    printed = run("encoder_as_text_tower", tmp_path)
    first, last = numbers(r"loss: ([\d.]+) first, ([\d.]+) last", printed)
    assert last < 0.2 * first
    known, held_out = numbers(r"right: (\d+) % of known, (\d+) % of held-out", printed)
    assert known >= 70 and held_out >= 40  # By chance 1.
    assert "states (2, 24, 192) tokens [7 0]" in printed
    assert "loaded model agrees: True" in printed
    assert "only the generator is trained: True" in printed
    assert (tmp_path / "runs/tower/painted.png").exists()


@runs_here
def test_train_on_a_pod(tmp_path):
    """On 8 simulated devices, of one process and of two."""

    def start(folder, count, index, port):
        folder.mkdir(exist_ok=True)
        pod = {"PROCESSES": count, "INDEX": index, "ADDRESS": f"127.0.0.1:{port}"}
        environment = {f"POD_{name}": str(value) for name, value in pod.items()}
        flags = xla_flags(8 // count)
        return run("train_on_a_pod", folder, XLA_FLAGS=flags, **environment)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = start(tmp_path / "alone", 1, 0, port)
    assert "one device agrees: True" in alone
    numbers(r"'model': \d+\} (\d+) GB on each device", alone)
    weights, state = numbers(r"holds (\d+) % of the weights and (\d+) %", alone)
    assert weights < 30 and state < 30
    first, last = numbers(r"loss: ([\d.]+) in the first .* ([\d.]+) in the", alone)
    assert last < first - 0.5
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        jobs = [(tmp_path / "two", 2, index, port) for index in range(2)]
        both = list(threads.map(lambda job: start(*job), jobs))
    for printed in both:
        found = numbers(r"loss: ([\d.]+) in the first .* ([\d.]+) in the", printed)
        assert found == pytest.approx([first, last], abs=2e-3)
        assert "written on the mesh: " in printed
    assert (tmp_path / "two/runs/pod/preset/config.json").exists()
    assert not (tmp_path / "two/runs/pod/backup").exists()


@runs_here
def test_switch_backends(tmp_path):
    printed = run("switch_backends", tmp_path)
    assert "torch" in printed.splitlines()[0]
    assert "answers agree: True" in printed
    (difference,) = numbers(r"loaded model differs by at most (\S+)", printed)
    assert difference < 1e-3


@pytest.mark.parametrize("name", GUIDES)
def test_cells_are_whole_and_say_what_the_guide_shows(name):
    found = cells(name)
    kinds = [kind for kind, _ in found]
    assert kinds[0] == "markdown" and {"markdown", "code"} == set(kinds)
    for kind, text in found:
        if kind == "code":
            compile(text, name, "exec")  # A cell of a notebook runs by itself.
        else:
            assert all(line.startswith("#") for line in text.split("\n") if line)
    prose = " ".join(text for kind, text in found if kind == "markdown")
    for words in ("What this shows", "2B-2B on one GPU", "9B-2B", " GB"):
        assert words in prose
    for preset in re.findall(r"t5gemma_\w+b_\w+_\w+", prose):
        assert preset in [entry.name for entry in kt.presets()]
    assert f"[{name}]({name}.ipynb)" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    "name", [name for name in GUIDES if "GUIDE_DATA" in source(name)]
)
def test_data_of_ones_own(name, tmp_path, monkeypatch, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [{"source": f"text {i}", "target": f"answer {i}"} for i in range(25)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cell,) = [text for kind, text in cells(name) if "PAIRS = " in text]
    names = {"os": os, "keras_t5gemma": kt}
    exec(cell, names)
    own = len(names["train"]["encoder_text"]) + len(names["valid"]["encoder_text"])
    assert own == names["PAIRS"].count(" => ")
    monkeypatch.setenv("GUIDE_DATA", str(file))
    exec(cell, names)
    together = names["train"]["decoder_text"] + names["valid"]["decoder_text"]
    assert together == [row["target"] for row in rows]
    held_out = names["VALID_ROWS"]
    assert f"{25 - held_out} pairs to learn, {held_out}" in capsys.readouterr().out


def test_counts_in_the_text_are_those_of_the_models():
    def billions(encoder, decoder):
        return kt.T5GemmaConfig.pair(encoder, decoder).count_params() / 1e9

    prose = {name: source(name) for name in GUIDES}
    assert round(billions("2b", "2b"), 1) == 5.6
    assert round(billions("9b", "2b"), 1) == 12.3
    for text in prose.values():
        assert "5.6" in text and "12.3" in text
