"""What all writers of folders promise about other files and other writers."""

import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest
from helpers import TESTS
from helpers.models import max_difference, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import atomic, saved_files
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.evaluation.harness import Runs
from keras_t5gemma.recipes.run_directory import RunDirectory

pytestmark = pytest.mark.one_backend
FORMATS = TESTS / "fixtures" / "formats_0_1" / "formats.tar.xz"
FOREIGN = [
    "model_best.weights.h5",
    "model.epoch03.weights.h5",
    "model-old.safetensors",
    "model_ema.safetensors",
    "model_00007.weights.h5",
    "state_of_the_art.h5",
    "states_2024.h5",
    "notes.txt",
    "assets/logo.svg",
]


@pytest.fixture(scope="module")
def backbone():
    return kt.Backbone(one_block_config())


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """Folders that an earlier version has written, without manifests."""
    folder = tmp_path_factory.mktemp("formats")
    with tarfile.open(FORMATS) as tar:
        tar.extractall(folder, filter="data")
    return folder


def put_foreign(folder):
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"user's {name}")


def assert_foreign_are_whole(folder):
    for name in FOREIGN:
        assert (folder / name).read_text() == f"user's {name}"


def save(folder, *names):
    with atomic_folder(folder) as staging:
        for name in names:
            (staging / name).write_text("{}")


def weights(folder):
    found = {p.name for kind in ("h5", "safetensors") for p in folder.glob(f"*.{kind}")}
    return found - set(FOREIGN)


def test_replaced_presets_leave_other_files(backbone, tmp_path):
    put_foreign(tmp_path)
    backbone.save_to_preset(tmp_path, max_shard_size=5e-5)
    assert len(weights(tmp_path)) > 1
    backbone.save_to_huggingface(tmp_path)
    assert weights(tmp_path) == {"model.safetensors"}
    backbone.save_to_preset(tmp_path)
    assert weights(tmp_path) == {"model.weights.h5"}
    assert not (tmp_path / "model.weights.json").exists()
    assert_foreign_are_whole(tmp_path)
    loaded = kt.Backbone.from_preset(tmp_path)
    assert max_difference(loaded.weights[0], backbone.weights[0]) == 0


@pytest.mark.parametrize(
    "name", ["preset_backbone", "preset_averaged", "huggingface_encoder"]
)
def test_presets_of_earlier_versions_are_replaced(backbone, formats, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(formats / name, folder)
    put_foreign(folder)
    backbone.save_to_huggingface(folder)
    assert weights(folder) == {"model.safetensors"}
    backbone.save_to_preset(folder)
    assert weights(folder) == {"model.weights.h5"}
    assert_foreign_are_whole(folder)


def test_shards_of_earlier_versions_are_those_of_the_index(backbone, tmp_path):
    backbone.save_to_preset(tmp_path, max_shard_size=5e-5)
    (tmp_path / saved_files.MANIFEST).unlink()
    assert len(weights(tmp_path)) > 1
    put_foreign(tmp_path)
    (tmp_path / "model.safetensors").write_text("of another format")
    backbone.save_to_preset(tmp_path)
    assert weights(tmp_path) == {"model.weights.h5", "model.safetensors"}
    assert_foreign_are_whole(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_a_foreign_file_is_not_replaced(backbone, tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"has {name}, not written by keras_t5gemma"):
        backbone.save_to_preset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_preprocessor_saved_before_the_model_is_replaced(model, tmp_path):
    model.preprocessor.save_to_preset(str(tmp_path))
    model.save_to_preset(tmp_path)
    model.preprocessor.save_to_preset(str(tmp_path))
    model.save_to_preset(tmp_path)
    assert kt.Seq2SeqLM.from_preset(tmp_path).preprocessor is not None


def test_a_model_leaves_nothing_of_an_earlier_task(tokenizer, tmp_path):
    encoder = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    classifier = kt.TextClassifier(encoder, preprocessor, ["a", "b"])
    classifier.save_to_preset(tmp_path)
    assert {"task.json", "task.weights.h5"} <= {p.name for p in tmp_path.iterdir()}
    (tmp_path / "notes.txt").write_text("of the user")
    encoder.save_to_preset(tmp_path)
    assert not list(tmp_path.glob("task.*"))
    assert (tmp_path / "notes.txt").exists()
    assert kt.TextEmbedder.from_preset(tmp_path).preprocessor is not None
    with pytest.raises(ValueError, match="`num_classes` must be"):
        kt.TextClassifier.from_preset(tmp_path)


def test_a_manifest_cannot_name_files_outside(tmp_path):
    outside, folder = tmp_path / "model.weights.h5", tmp_path / "preset"
    folder.mkdir()
    outside.write_text("of the user")
    names = {"files": ["../model.weights.h5", str(outside)]}
    (folder / saved_files.MANIFEST).write_text(json.dumps(names))
    save(folder, "model.safetensors")
    saved_files.remove(folder)
    assert outside.exists() and not folder.exists()


def test_a_commit_of_an_earlier_version_is_finished(tmp_path):
    """It was killed between the rename and the moves; its manifest is a list."""
    shards = {"metadata": {}, "weight_map": {"/a": "model_00000.weights.h5"}}
    (tmp_path / "model.weights.json").write_text(json.dumps(shards))
    put_foreign(tmp_path)
    (tmp_path / "model_00000.weights.h5").write_text("old")
    saved = tmp_path / atomic.SAVED
    saved.mkdir()
    (saved / "model.weights.h5").write_text("new")
    (saved / ".manifest.json").write_text('["model.weights.h5"]')
    atomic.finish_interrupted_save(tmp_path)
    assert weights(tmp_path) == {"model.weights.h5"}
    assert not (tmp_path / "model.weights.json").exists() and not saved.exists()
    assert_foreign_are_whole(tmp_path)


def test_backups_leave_other_files(model, formats, tmp_path):
    texts, backup = ["a b", "c d"], kt.callbacks.BackupAndRestore
    put_foreign(tmp_path)
    model.compile("sgd")
    arguments = {"batch_size": 2, "verbose": 0}
    model.fit(texts, texts, callbacks=[backup(tmp_path)], **arguments)
    assert {p.name for p in tmp_path.iterdir()} == {
        name.partition("/")[0] for name in FOREIGN
    }
    assert_foreign_are_whole(tmp_path)
    for name in ("progress.json", "state.h5"):
        (tmp_path / name).write_text("not JSON")
        with pytest.raises(ValueError, match=f"has {name}, not written by"):
            model.fit(texts, texts, callbacks=[backup(tmp_path)], **arguments)
        assert (tmp_path / name).read_text() == "not JSON"
        (tmp_path / name).unlink()
    old = tmp_path / "old"
    shutil.copytree(formats / "backup", old)
    assert saved_files.find(old) == {"progress.json", "state.h5"}
    saved_files.remove(old)
    assert not old.exists()


def test_a_run_that_is_overwritten_leaves_other_files(formats, tmp_path):
    shutil.copytree(formats / "run", tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    save(run.last / "epoch-3", "config.json", "model.weights.h5")
    put_foreign(run.best)
    put_foreign(run.last / "epoch-3")
    config = json.loads(run.config.read_text())
    config["options"]["epochs"] = 7
    assert run.must_be_cleared(config, overwrite=True)
    run.begin("finetune", config, clear=True)
    names = {path.name for path in run.path.iterdir()}
    assert names == {"run.yaml", "config.json", "best", "last"}
    for folder in (run.best, run.last / "epoch-3"):
        assert_foreign_are_whole(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == len(FOREIGN)


def test_other_writers_refuse_foreign_files(tmp_path):
    for name in ("ids.npy", "teacher.json"):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "ids.npy", np.arange(3))
        (folder / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match="not written by keras_t5gemma"):
            kt.write_teacher_scores(folder, None, None, [])
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(ValueError, match="best.json that SaveBest has not written"):
        kt.callbacks.SaveBest(tmp_path)
    (tmp_path / "results.md").write_text("")
    with pytest.raises(ValueError, match="`output` .*results.md.*and no results.json"):
        Runs(tmp_path, {})
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="results.json that was not written by"):
        Runs(tmp_path, {})


def test_a_save_in_another_format_leaves_nothing_of_the_first(tokenizer, tmp_path):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 8, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)

    def files(name):
        folder = tmp_path / name
        return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}

    for writer in ("save_to_preset", "save_to_huggingface"):
        getattr(model, writer)(tmp_path / writer)
    for first, second in (
        ("save_to_preset", "save_to_huggingface"),
        ("save_to_huggingface", "save_to_preset"),
    ):
        shutil.copytree(tmp_path / first, tmp_path / "both", dirs_exist_ok=True)
        getattr(model, second)(tmp_path / "both")
        assert files("both") == files(second)
        shutil.rmtree(tmp_path / "both")
