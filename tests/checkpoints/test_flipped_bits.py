"""One flipped bit in the middle of each kind of file that this package writes."""

import dataclasses
import json
import os

import h5py
import keras
import numpy as np
import pytest
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import one_block_config, tiny_model
from helpers.teacher import make_teacher

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import h5_file, safetensors_file
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.adapt import plan_adaptation
from keras_t5gemma.conversion.average import average_presets
from keras_t5gemma.conversion.compare import check_checksums
from keras_t5gemma.conversion.convert import convert

pytestmark = pytest.mark.one_backend
TEXTS = ["a b c d", "x y"]


def flip_a_bit(path, offset, size):
    """Flip the lowest bit of the byte in the middle of a range."""
    with open(path, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def flip_in_h5(path, name=None):
    """Flip a bit of a dataset, by default the largest one; returns its name."""
    found = {}

    def note(key, item):
        if isinstance(item, h5py.Dataset):
            found[key] = item.id.get_offset(), item.nbytes

    with h5py.File(path) as file:
        file.visititems(note)
    name = name or max(found, key=lambda key: found[key][1])
    flip_a_bit(path, *found[name])
    return name


@pytest.fixture(scope="module")
def backbone():
    return kt.Backbone(one_block_config())


def is_dense(layer):
    return isinstance(layer, keras.layers.Dense)


@pytest.mark.parametrize("mode", ["int8", "int4", "int8 without embeddings"])
def test_quantized_presets(tmp_path, mode):
    backbone = kt.Backbone(one_block_config())
    filters = is_dense if "without" in mode else None
    backbone.quantize(mode.partition(" ")[0], filters=filters)
    backbone.save_to_preset(tmp_path)
    loaded = kt.Backbone.from_preset(tmp_path)
    for ours, theirs in zip(backbone.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))
    assert check_checksums(tmp_path) == len(
        open_checkpoint(tmp_path).checksums().tensors
    )
    name = "layers/decoder/blocks/decoder_block/mlp/up/vars/0"
    flip_in_h5(tmp_path / "model.weights.h5", name)
    with pytest.raises(
        ValueError, match=f"model.weights.h5 is damaged: .*'{name}' dif"
    ):
        kt.Backbone.from_preset(tmp_path)
    with pytest.raises(ValueError, match=f"damaged.*{name}"):
        check_checksums(tmp_path)
    kt.Backbone.from_preset(tmp_path, verify_checksums=False)
    kt.Backbone.from_preset(tmp_path, encoder_only=True)  # It does not read it.


def test_quantized_presets_of_earlier_versions_have_no_checksums(tmp_path):
    backbone = kt.Backbone(one_block_config())
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path)
    fields = {"algorithm": "crc32", "tensors": {}}
    (tmp_path / "checksums.json").write_text(json.dumps(fields))
    kt.Backbone.from_preset(tmp_path)


def test_task_weights(tokenizer, tmp_path):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16)
    encoder = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    task = kt.TextClassifier(encoder, preprocessor, ["a", "b"])
    task.save_to_preset(tmp_path)
    kt.TextClassifier.from_preset(tmp_path)
    fields = json.loads((tmp_path / "checksums.json").read_text())
    assert fields["tensors"] and fields["task"]
    name = flip_in_h5(tmp_path / "task.weights.h5")
    message = f"task.weights.h5 is damaged: tensor '{name}' differs"
    with pytest.raises(ValueError, match=message):
        kt.TextClassifier.from_preset(tmp_path)
    kt.TextClassifier.from_preset(tmp_path, verify_checksums=False)
    # Which keeps the checksums of the task.
    encoder.save_weights(tmp_path / "model.weights.h5", overwrite=True)
    with pytest.raises(ValueError, match=message):
        kt.TextClassifier.from_preset(tmp_path)
    task.layers[-1].bias.assign([np.nan, 0])
    task.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="task.weights.h5: tensor .*bias|vars.* NaN"):
        kt.TextClassifier.from_preset(tmp_path)


def test_adapters(tmp_path):
    path = tmp_path / "a.lora.h5"
    backbone = kt.Backbone(one_block_config())
    backbone.enable_lora(2)
    backbone.save_lora_weights(path)
    backbone.load_lora_weights(path)
    name = flip_in_h5(path)
    with pytest.raises(ValueError, match=f"a.lora.h5 is damaged: '{name}' differs"):
        backbone.load_lora_weights(path)


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


def test_backups(tokenizer, tmp_path):
    model = tiny_model(tokenizer, config=one_block_config())
    model.compile("sgd")

    def fit(*callbacks):
        backup = kt.callbacks.BackupAndRestore(tmp_path, save_freq=1)
        options = {"batch_size": 1, "verbose": 0}
        model.fit(TEXTS, TEXTS, callbacks=[*callbacks, backup], **options)

    with pytest.raises(KeyboardInterrupt):
        fit(Stop())
    before = (tmp_path / "state.h5").read_bytes()
    flip_in_h5(tmp_path / "state.h5")
    with pytest.raises(ValueError, match="state.h5 is damaged: '.*embeddings' differs"):
        fit()
    (tmp_path / "state.h5").write_bytes(before[:-100])
    with pytest.raises(ValueError, match="state.h5 is truncated or not an HDF5 file"):
        fit()
    (tmp_path / "state.h5").write_bytes(before)
    fit()


def test_a_vocabulary(tokenizer, tmp_path):
    model = tiny_model(tokenizer, config=one_block_config())
    model.save_to_preset(tmp_path)
    model.preprocessor.save_to_preset(tmp_path)
    assert kt.Tokenizer.from_preset(tmp_path).proto == tokenizer.proto
    kt.Backbone.from_preset(tmp_path).save_to_preset(tmp_path / "backbone")
    path = tmp_path / "assets/tokenizer/vocabulary.spm"
    text = path.read_bytes()
    assert text.count(b"the") > 0
    path.write_bytes(text.replace(b"the", b"thd"))
    for kind in (kt.Tokenizer, kt.Seq2SeqLMPreprocessor, kt.Seq2SeqLM):
        with pytest.raises(ValueError, match="vocabulary.spm is damaged.*checksums"):
            kind.from_preset(tmp_path)
    kt.convert(tmp_path / "backbone", tmp_path / "converted")  # Without a tokenizer.
    model.save_to_preset(tmp_path)
    assert kt.Tokenizer.from_preset(tmp_path).proto == tokenizer.proto
    kt.convert(tmp_path, tmp_path / "b")
    path = tmp_path / "b" / "assets/tokenizer/vocabulary.spm"
    path.write_bytes(text.replace(b"the", b"thd"))
    with pytest.raises(ValueError, match="vocabulary.spm is damaged"):
        kt.Tokenizer.from_preset(tmp_path / "b")


@pytest.mark.parametrize("name", ["ids.npy", "log_probs.npy"])
def test_teacher_scores(tokenizer, tmp_path, name):
    objective = kt.objectives.PrefixLM()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 16, 16, objective=objective)
    kt.write_teacher_scores(
        tmp_path, make_teacher(), preprocessor, TEXTS, top_k=4, verbose=0
    )
    flip_a_bit(tmp_path / name, 128, os.path.getsize(tmp_path / name) - 128)
    with pytest.raises(ValueError, match=f"{name} has changed: its checksum differs"):
        kt.TeacherScores(tmp_path)


def damaged_preset(backbone, folder):
    backbone.save_to_preset(folder)
    name = "layers/encoder/blocks/encoder_block/mlp/up/vars/0"
    flip_in_h5(folder / "model.weights.h5", name)
    return "damaged: tensor 'encoder/block_0/mlp/up/kernel' differs.*save it again.$"


def non_finite_folder(backbone, folder):
    backbone.save_to_huggingface(folder)
    entry = safetensors_file.read_folder(folder)["model.encoder.norm.weight"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(np.array([np.nan], "float32").tobytes())
    return "'encoder/final_norm/scale' has NaN or infinite values.$"


@pytest.mark.parametrize("damage", [damaged_preset, non_finite_folder])
def test_conversions_refuse_damaged_weights(backbone, tmp_path, damage):
    source, out = tmp_path / "source", tmp_path / "out"
    message = damage(backbone, source)
    for write in (
        lambda: convert(source, out),
        lambda: convert(source, out, to="transformers"),
        lambda: average_presets([source, source], out),
    ):
        with pytest.raises(ValueError, match=message):
            write()
        assert not out.exists()


def test_adapt_refuses_weights_that_are_not_finite(tmp_path):
    make_gemma2(**SMALL).save_to_preset(str(tmp_path))
    _, tensors, _, _ = plan_adaptation(tmp_path)
    entry = tensors["decoder/final_norm/scale"].source
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(np.array([np.inf], entry.dtype).tobytes())
    with pytest.raises(ValueError, match="tensor 'final_norm/scale' has NaN or inf"):
        kt.adapt_gemma2(tmp_path)


def test_h5_datasets_that_overlap_or_leave_the_file_are_refused(backbone, tmp_path):
    backbone.save_to_preset(tmp_path)
    path = tmp_path / "model.weights.h5"
    names = [
        f"layers/encoder/blocks/encoder_block/mlp/{n}/vars/0" for n in ("gate", "up")
    ]
    with h5py.File(path) as file:
        first, second = (file[name].id.get_offset() for name in names)
    content = path.read_bytes()
    assert content.count(second.to_bytes(8, "little")) == 1  # In the dataset's header.
    for offset, message in (
        (first, "overlaps 'layers/encoder/blocks/encoder_block/mlp/"),
        (first + 4, "overlaps 'layers/encoder/blocks/encoder_block/mlp/gate"),
        (len(content) - 4, "is truncated or not an HDF5 file"),
    ):
        headers = second.to_bytes(8, "little"), offset.to_bytes(8, "little")
        path.write_bytes(content.replace(*headers))
        with pytest.raises(ValueError, match=f"model.weights.h5.*{message}"):
            h5_file.read_folder(tmp_path)
