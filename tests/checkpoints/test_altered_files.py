"""Damaged or crafted files are refused with an error that names them."""

import gzip
import json
import os
import struct
import time

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import tiny_config

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import (
    h5_file,
    huggingface,
    integrity,
    presets,
    safetensors_file,
    weight_maps,
)
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.checkpoints.lazy_tensors import DTYPES, LazyTensor
from keras_t5gemma.conversion import adapt
from keras_t5gemma.conversion.compare import check_checksums
from keras_t5gemma.data.indexed_files import FileRows
from keras_t5gemma.data.readers import read_pairs, read_texts
from keras_t5gemma.utils import files

pytestmark = pytest.mark.one_backend
DEEP = "[" * 200_000


@pytest.fixture(scope="module")
def backbone():
    return kt.Backbone(tiny_config())


@pytest.fixture(params=["FIFO", "device", "directory"])
def irregular(request):
    """Puts something else than a file at a path, a device behind a link."""

    def make(path):
        if request.param == "FIFO":
            os.mkfifo(path)
        elif request.param == "device":
            os.symlink("/dev/zero", path)
        else:
            os.mkdir(path)

    make.kind = request.param
    return make


@pytest.mark.parametrize(
    "name", ["config.json", "model.weights.h5", "model.weights.json"]
)
def test_presets_are_read_from_regular_files(irregular, backbone, tmp_path, name):
    backbone.save_to_preset(tmp_path)
    if name == "model.weights.json":
        (tmp_path / "model.weights.h5").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    irregular(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} must be a regular.*{irregular.kind}"):
        kt.Backbone.from_preset(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"]
)
def test_data_is_read_from_regular_files(irregular, tmp_path, name):
    irregular(tmp_path / name)
    read = read_texts if "txt" in name else read_pairs
    with pytest.raises(ValueError, match=f"{name} must be a regular.*{irregular.kind}"):
        read(tmp_path / name)


def test_vocabulary_and_safetensors_are_regular_files(irregular, tmp_path):
    irregular(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model must be a regular file"):
        kt.Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model must be a regular file"):
        presets.tokenizer_file(str(tmp_path), presets.HUGGING_FACE)
    irregular(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors must be a regular file"):
        safetensors_file.read_folder(tmp_path)


def test_json_files_have_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 1000}))
    assert files.read_json_file(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match="config.json has 1009 bytes.*at most 100"):
        kt.Backbone.from_preset(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv"])
def test_lines_have_a_bound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_RECORD", 100)
    long = "x" * 500
    text = f'{{"source": "a", "target": "b"}}\n{{"source": "{long}"}}\n'
    if name in ("a.csv", "a.tsv"):
        text = f"source,target\n{long},b\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if ".gz" in name else text.encode())
    with pytest.raises(ValueError, match=f"{name}, line 2: longer than 100 char"):
        read_pairs(path)
    if name == "a.jsonl":
        rows = FileRows(path, ("source", "target"))
        with pytest.raises(ValueError, match="a.jsonl, line 2: longer than 100 bytes"):
            list(rows.lines(0))


def test_deep_json_is_a_value_error(backbone, tmp_path):
    (tmp_path / "a.jsonl").write_text(DEEP)
    with pytest.raises(ValueError, match="a.jsonl, line 1 is nested too deeply"):
        read_pairs(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl, byte 0.*nested too deeply"):
        list(FileRows(tmp_path / "a.jsonl", ("source",)).lines(0))
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(ValueError, match="config.json is nested too deeply"):
        kt.Backbone.from_preset(tmp_path)
    header = DEEP.encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header
    )
    with pytest.raises(ValueError, match="model.safetensors is nested too deeply"):
        safetensors_file.read_folder(tmp_path)


def write_safetensors(path, entries, size):
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for name, (shape, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": ([2], [0, 8]), "b": ([2], [4, 12])}, 12, "'b' .*overlaps 'a'"),
        ({"a": ([2], [0, 8]), "b": ([2], [0, 8])}, 8, "'b' .*overlaps 'a'"),
        ({"a": ([2], [0, 8]), "b": ([2], [12, 20])}, 20, "'b' .*a gap after 'a'"),
        ({"a": ([2], [4, 12])}, 12, "'a' .*a gap after the header"),
        ({"a": ([2], [0, 8])}, 20, "has 12 bytes after its last tensor"),
        ({"a": ([2], [8, 0])}, 8, "'a' is -8 bytes"),
        ({"a": ([2.0], [0, 8])}, 8, "'a' has shape .2.0.*whole numbers"),
        ({"a": ([2], [0, 8.0])}, 8, "'a' has .*8.0.*whole numbers"),
        ({"a": ([-1, -2], [0, 8])}, 8, "'a' has shape .-1, -2.*whole numbers"),
        ({"a": ([True, 2], [0, 8])}, 8, "'a' has shape .True, 2.*whole numbers"),
    ],
)
def test_safetensors_offsets_cover_the_file_once(tmp_path, entries, size, message):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, entries, size)
    with pytest.raises(ValueError, match=message):
        safetensors_file.read_header(path)


def test_safetensors_in_any_order_of_names_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    entries = {"b": ([2], [4, 12]), "a": ([1], [0, 4]), "empty": ([0], [4, 4])}
    write_safetensors(path, entries, 12)
    assert set(safetensors_file.read_header(path)) == set(entries)


def test_the_walk_through_an_h5_file_is_bounded(tmp_path):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(300):
            group = group.create_group("g")
        group.create_dataset("0", data=np.zeros(2, "float32"))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="groups deeper than 32 levels"):
        h5_file.read_folder(tmp_path)
    assert time.perf_counter() - start < 1
    with h5py.File(path, "w") as file:
        file["self"] = h5py.SoftLink("/")
        file["away"] = h5py.ExternalLink("other.h5", "/")
        file.create_dataset("a/0", data=np.zeros(2, "float32"))
    assert set(h5_file.read_folder(tmp_path)) == {"a/0"}


def test_a_number_of_layers_is_refused_before_memory_is_taken():
    sizes = dict.fromkeys(("hidden_dim", "intermediate_dim", "num_query_heads"), 8)
    sizes |= {"num_key_value_heads": 8, "head_dim": 8}
    with pytest.raises(ValueError, match="`num_layers` must be .* to 10000; got 2147"):
        kt.StackConfig(num_layers=2**31, **sizes)
    with pytest.raises(ValueError, match="`layer_types` must be 2 of"):
        kt.StackConfig(num_layers=2, layer_types=[{}, 1], **sizes)
    with pytest.raises(ValueError, match="`hidden_dim` must be"):
        kt.StackConfig(num_layers=2, **{**sizes, "hidden_dim": 2**62})


def write_hugging_face(folder, change=None):
    """A transformers folder of a tiny model; `change` edits config and arrays."""
    config = tiny_config()
    fields = huggingface.write_config(config, "float32")
    shapes = weight_maps.model_shapes(config)
    rng = np.random.default_rng(0)
    tensors = weight_maps.export_tensors(
        weight_maps.HUGGING_FACE,
        config,
        {
            path: Array(rng.normal(size=shape).astype("float32"))
            for path, shape in shapes.items()
        },
    )
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    if change is not None:
        change(fields, arrays)
    (folder / "config.json").write_text(json.dumps(fields))
    entries = {name: Array(array) for name, array in arrays.items()}
    safetensors_file.write_folder(folder, entries, 1e9, lambda names, data: None)
    return folder


class Array(LazyTensor):
    """A lazy tensor of an array in memory."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self):
        return self.array


TABLE, HEAD = "model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"


def test_a_separate_logit_table_is_refused(tmp_path):
    def copied(fields, arrays):
        arrays[HEAD] = arrays[TABLE].copy()

    def changed(fields, arrays):
        arrays[HEAD] = arrays[TABLE].copy()
        arrays[HEAD][-1, -1] += 1

    kt.Backbone.from_preset(write_hugging_face(tmp_path, copied))
    write_hugging_face(tmp_path, changed)
    with pytest.raises(ValueError, match=f"'{HEAD}' differs from '{TABLE}'"):
        kt.Backbone.from_preset(tmp_path)
    kt.Backbone.from_preset(tmp_path, encoder_only=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("partial_rotary_factor", 0.5),
        ("mlp_bias", True),
        ("use_bidirectional_attention", True),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("attention_bias", True),
        ("hidden_activation", "silu"),
        ("tie_word_embeddings", False),
    ],
)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_variants_that_are_not_implemented_are_refused(tmp_path, side, field, value):
    fields = huggingface.write_config(tiny_config(), "float32")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    kt.Backbone.from_preset(tmp_path, load_weights=False)
    fields[side][field] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"has {field} "):
        kt.Backbone.from_preset(tmp_path)
    gemma2 = {**fields[side], "model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(gemma2))
    with pytest.raises(ValueError, match=f"has {field} "):
        adapt.plan_adaptation(tmp_path)


def test_adapt_refuses_a_separate_logit_table(tmp_path):
    def change(fields, arrays):
        stack = fields.pop("decoder")
        fields |= {**stack, "model_type": "gemma2"}
        rows = weight_maps.expand(
            weight_maps.GEMMA2_HUGGING_FACE, stack["num_hidden_layers"]
        )
        shapes = weight_maps.tower_shapes(tiny_config().decoder, stack["vocab_size"])
        arrays.clear()
        for path, (name, transform) in rows.items():
            shape = transform.file_shape(shapes[path], stack["head_dim"])
            arrays[name] = np.ones(shape, "float32")
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * 2

    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'model.embed"):
        adapt.plan_adaptation(write_hugging_face(tmp_path, change))


def flip_a_bit(folder, path):
    tensors = open_checkpoint(folder).tensors()
    entry = tensors[path].source
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset + entry.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("shard", [10, "80KB"])
def test_a_flipped_bit_is_found_while_loading(backbone, tmp_path, shard):
    backbone.save_to_preset(tmp_path, max_shard_size=shard)
    kt.Backbone.from_preset(tmp_path)
    assert check_checksums(tmp_path) == len(backbone.weights)
    path = "decoder/block_1/mlp/up/kernel"
    flip_a_bit(tmp_path, path)
    with pytest.raises(ValueError, match=f"damaged: tensor '{path}' differs"):
        kt.Backbone.from_preset(tmp_path)
    kt.Backbone.from_preset(tmp_path, verify_checksums=False)
    kt.Backbone.from_preset(tmp_path, encoder_only=True)  # It does not read it.
    backbone.save_to_preset(tmp_path)
    kt.Backbone.from_preset(tmp_path)


def test_adapted_presets_are_verified_and_can_be_saved_over(tmp_path):
    make_gemma2(**SMALL).save_to_preset(str(tmp_path / "gemma"))
    folder = tmp_path / "adapted"
    adapt.adapt_to_folder(tmp_path / "gemma", folder=folder, check=False)
    loaded = kt.Backbone.from_preset(folder)
    loaded.weights[0].assign(loaded.weights[0] + 1)
    loaded.save_to_preset(folder)
    kt.Backbone.from_preset(folder)
    path = "encoder/token_embedding/embeddings"
    flip_a_bit(folder, path)
    with pytest.raises(ValueError, match=f"damaged: tensor '{path}' differs"):
        kt.Backbone.from_preset(folder, encoder_only=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    def change(fields, arrays):
        arrays["model.encoder.norm.weight"][3] = value

    write_hugging_face(tmp_path, change)
    with pytest.raises(ValueError, match="'encoder/final_norm/scale' has NaN or inf"):
        kt.Backbone.from_preset(tmp_path)
    with pytest.warns(UserWarning, match="'encoder/final_norm/scale' has NaN or inf"):
        kt.Seq2SeqLM.from_preset(tmp_path, preprocessor=None, allow_non_finite=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_non_finite_value_is_seen(dtype):
    dtype = DTYPES[dtype]
    largest = float(ml_dtypes.finfo(dtype).max)
    finite = np.array([0, -1, largest, -largest, 1e-8], dtype)
    assert not integrity.has_non_finite(finite)
    for value in (np.nan, np.inf, -np.inf):
        array = np.array([[1, 2], [3, value]], dtype).T
        assert integrity.has_non_finite(array)
