"""Readers and writers of our format; nothing half done."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import keras
import keras_hub
import numpy as np
import pytest
from helpers import TESTS
from helpers.keras_hub_models import make_kerashub
from helpers.models import (
    enlarge,
    max_difference,
    random_inputs,
    tiny_config,
)

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import atomic, lazy_tensors
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.checkpoints.weight_maps import model_shapes
from keras_t5gemma.conversion.compare import check_checksums, verify


@pytest.fixture
def backbone():
    return enlarge(kt.Backbone(tiny_config()))


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", ["ours", "ours sharded", "kerashub", "huggingface"])
def test_encoder_alone_reads_only_its_bytes(backbone, tmp_path, kind, monkeypatch):
    if kind == "kerashub":
        make_kerashub().save_to_preset(str(tmp_path))
    elif kind == "huggingface":
        backbone.save_to_huggingface(tmp_path, max_shard_size=5e-5)
    else:
        size = 1e-4 if "sharded" in kind else 10
        backbone.save_to_preset(tmp_path, max_shard_size=size)
    expected = kt.Backbone.from_preset(tmp_path)
    read = []
    original = lazy_tensors.FileTensor.read

    def counted(self):
        read.append(lazy_tensors.nbytes(self))
        return original(self)

    monkeypatch.setattr(lazy_tensors.FileTensor, "read", counted)
    if kind in ("ours sharded", "huggingface"):  # The last shard is all decoder.
        files = sorted([*tmp_path.glob("*.h5"), *tmp_path.glob("*.safetensors")])
        files[-1].unlink()
    tower = kt.Backbone.from_preset(tmp_path, encoder_only=True)
    parts = tiny_config().count_params_by_part()
    count = parts["encoder embedding"] + parts["encoder blocks"]
    assert sum(read) == 4 * count == 4 * tower.count_params()
    x = {k: v for k, v in random_inputs().items() if k.startswith("encoder")}
    states = expected.encode(x["encoder_token_ids"], x["encoder_padding_mask"])
    assert max_difference(tower(x)["encoder_sequence_output"], states) == 0


@pytest.mark.one_backend
def test_an_encoder_alone_is_a_preset_of_its_own(backbone, tmp_path):
    backbone.save_to_preset(tmp_path / "pair")
    tower = kt.Backbone.from_preset(tmp_path / "pair", encoder_only=True)
    tower.save_to_preset(tmp_path / "tower")
    again = kt.Backbone.from_preset(tmp_path / "tower")
    assert again.decoder is None and again.config.decoder is None
    for a, b in zip(again.weights, tower.weights, strict=True):
        assert max_difference(a, b) == 0
    with pytest.raises(ValueError, match="an encoder alone.*not `decode`"):
        again.decode(np.ones((1, 2), "int32"))
    with pytest.raises(ValueError, match="`backbone` must have a decoder"):
        kt.Seq2SeqLM(again)


def test_shapes_of_the_tables_are_the_models(backbone):
    shapes = {v.path: tuple(v.shape) for v in backbone.weights}
    assert model_shapes(backbone.config) == shapes


@pytest.mark.one_backend
def test_built_models_count_what_is_published():
    """S-S and B-B, built without values: only shapes are counted."""
    for size, total in (("s", 312_517_632), ("b", 591_490_560)):
        with keras.StatelessScope(initialize_variables=False):
            model = kt.Backbone(kt.T5GemmaConfig.pair(size, size))
        assert sum(int(np.prod(v.shape)) for v in model.weights) == total
    keras.src.backend.common.global_state.set_global_attribute(
        "uninitialized_variables", []
    )


def test_own_presets_load_without_random_values(backbone, tmp_path, monkeypatch):
    backbone.save_to_preset(tmp_path, max_shard_size=1e-4)
    assert len(list(tmp_path.glob("model_*.weights.h5"))) > 1

    def refuse(self, shape, dtype=None):
        raise AssertionError("a weight was drawn at random")

    from keras.src.backend.common.symbolic_scope import in_symbolic_scope

    def checked(self, shape, dtype=None):
        return keras.ops.zeros(shape, dtype) if in_symbolic_scope() else refuse()

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", checked)
    loaded = kt.Backbone.from_preset(tmp_path)
    for a, b in zip(loaded.weights, backbone.weights, strict=True):
        assert max_difference(a, b) == 0


@pytest.mark.one_backend
def test_saving_again_replaces_and_keeps_what_is_not_its_own(backbone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    backbone.save_to_preset(tmp_path, max_shard_size=1e-4)
    for variable in backbone.weights:
        variable.assign(variable + 1)
    backbone.save_to_preset(tmp_path)
    assert not list(tmp_path.glob("model_*.weights.h5"))
    assert not (tmp_path / "model.weights.json").exists()
    loaded = kt.Backbone.from_preset(tmp_path)
    assert max_difference(loaded.weights[0], backbone.weights[0]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_checkpoint(backbone, tmp_path, monkeypatch):
    backbone.save_to_preset(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for variable in backbone.weights:
        variable.assign(variable + 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save_weights", fail)
    with pytest.raises(OSError, match="Nothing was kept; free disk space"):
        backbone.save_to_preset(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(OSError, match="free disk space"):
        backbone.save_to_preset(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.one_backend
def test_a_full_disk_while_adapting_leaves_nothing(tmp_path):
    """The kernel's own refusal, by a limit on the size of files."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from helpers.gemma2 import make_gemma2, SMALL
from keras_t5gemma.conversion import adapt
make_gemma2(**SMALL).save_to_preset({str(tmp_path / "source")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    adapt.adapt_to_folder({str(tmp_path / "source")!r}, folder={str(tmp_path / "o")!r})
except OSError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "could not be written" in result.stdout, result.stderr[-2000:]
    assert not (tmp_path / "o").exists()


@pytest.mark.one_backend
def test_an_interrupted_commit_is_finished_by_the_next_reader(backbone, tmp_path):
    """Die between the rename that decides and the moves that follow."""
    backbone.save_to_preset(tmp_path)
    for variable in backbone.weights:
        variable.assign(variable + 1)
    moves = []
    original = os.replace

    def die(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        original(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            backbone.save_to_preset(tmp_path)
    assert (tmp_path / atomic.SAVED).is_dir()
    loaded = kt.Backbone.from_preset(tmp_path)
    assert not (tmp_path / atomic.SAVED).exists()
    assert max_difference(loaded.weights[0], backbone.weights[0]) == 0


KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
from keras_t5gemma.conversion import adapt

def run():
    adapt.adapt_to_folder({source!r}, folder={out!r}, check=False, overwrite=True)

run()
start = time.perf_counter()
run()
print(time.perf_counter() - start, flush=True)
for line in sys.stdin:  # One child a line, killed by the parent.
    child = os.fork()
    if not child:
        run()
        time.sleep(60)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_at_random_moments_it_is_complete_or_refuses(tmp_path):
    """At least 20 kills; the source is large enough to be hit while writing."""
    if keras.config.backend() != "torch":
        pytest.skip("files only: the same on every backend")
    from helpers.gemma2 import BIG, make_gemma2

    source, out = tmp_path / "source", tmp_path / "out"
    wide = {**BIG, "hidden_dim": 512, "intermediate_dim": 4096}
    make_gemma2(**wide).save_to_preset(str(source))
    code = KILLED.format(tests=str(TESTS), source=str(source), out=str(out))
    rng = random.Random(0)
    outcomes = {"complete": 0, "refused": 0, "old": 0}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        duration = float(process.stdout.readline())
        shutil.copytree(out, tmp_path / "good")
        for attempt in range(24):
            shutil.rmtree(out)
            fresh = attempt % 2 == 0  # Half of them where nothing was before.
            if not fresh:
                shutil.copytree(tmp_path / "good", out)
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            try:
                count = check_checksums(out)
            except ValueError as error:
                assert fresh, "the old checkpoint was lost"
                message = str(error)
                assert "interrupted. Run it again" in message or (
                    "is neither a name nor a folder" in message  # Nothing was begun.
                )
                outcomes["refused"] += 1
            else:
                assert count == len(open_checkpoint(out).tensors())
                outcomes["complete" if fresh else "old"] += 1
        process.stdin.close()
    assert outcomes["refused"] >= 2 and outcomes["old"] == 12, outcomes
    from keras_t5gemma.conversion import adapt

    adapt.adapt_to_folder(source, folder=out, overwrite=True)
    assert check_checksums(out)
    assert not (out / atomic.SAVING).exists()


@pytest.mark.one_backend
def test_compare_finds_what_differs(backbone, tmp_path):
    backbone.save_to_preset(tmp_path / "a")
    backbone.save_to_huggingface(tmp_path / "b")
    same = verify(tmp_path / "a", tmp_path / "b")
    assert same.within(0) and same.logits == 0 and same.note == ""
    kernel = backbone.decoder.blocks[1].cross_attention.key.kernel
    kernel.assign(kernel + 0.01)
    backbone.save_to_preset(tmp_path / "c")
    other = verify(tmp_path / "a", tmp_path / "c")
    changed = [path for path, d in other.tensors.items() if d]
    assert changed == ["decoder/block_1/cross_attention/key/kernel"]
    assert abs(other.tensors[changed[0]] - 0.01) < 1e-6
    assert other.logits > 0 and not other.within(1e-3)
    kt.Backbone(tiny_config(vocabulary_size=100)).save_to_preset(tmp_path / "d")
    small = verify(tmp_path / "a", tmp_path / "d")
    assert small.configs == ["vocabulary_size: 480 and 100"]
    assert np.isnan(small.tensors["encoder/token_embedding/embeddings"])
    assert small.logits is None and not small.within(1e9)


def test_upload_goes_through_kerashub(model, tmp_path, monkeypatch):
    from keras_hub.src.utils import preset_utils

    model.save_to_preset(tmp_path / "preset")
    uploaded = {}

    class Hub:
        @staticmethod
        def create_repo(repo_id, exist_ok):
            return type("Url", (), {"repo_id": repo_id})

        @staticmethod
        def file_exists(repo_id, filename):
            return False

        @staticmethod
        def upload_folder(repo_id, folder_path):
            uploaded[repo_id] = set(os.listdir(folder_path))

    monkeypatch.setattr(preset_utils, "huggingface_hub", Hub)
    keras_hub.upload_preset("hf://me/model", str(tmp_path / "preset"))
    assert uploaded["me/model"] >= {"config.json", "model.weights.h5", "task.json"}


@pytest.mark.one_backend
def test_files_that_lie_about_themselves_are_refused(backbone, tmp_path):
    backbone.save_to_preset(tmp_path, max_shard_size=1e-4)
    index = tmp_path / "model.weights.json"
    content = json.loads(index.read_text())
    shard = tmp_path / "model_00001.weights.h5"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model_00001.weights.h5 is truncated or not"):
        kt.Backbone.from_preset(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="names the shard model_00001.*missing"):
        kt.Backbone.from_preset(tmp_path)
    group = next(iter(content["weight_map"]))
    content["weight_map"][group] = "../elsewhere.h5"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        kt.Backbone.from_preset(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="model.weights.json is not a Keras weight"):
        kt.Backbone.from_preset(tmp_path)


@pytest.mark.one_backend
def test_a_tensor_of_another_type_is_named(tmp_path, backbone):
    import h5py

    backbone.save_to_preset(tmp_path)
    name = "layers/encoder/final_norm/vars/0"
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        shape = file[name].shape
        del file[name]
        file.create_dataset(name, data=np.zeros(shape, "float64"))
    with pytest.raises(ValueError, match=f"weights.h5: tensor '{name}' has dtype fl"):
        kt.Backbone.from_preset(tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(ValueError, match=f"missing tensors \\['{name}'\\]"):
        kt.Backbone.from_preset(tmp_path)
