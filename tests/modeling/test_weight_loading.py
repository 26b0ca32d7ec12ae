"""Tensors are read, cast and quantized in blocks: no whole copy in the stored dtype."""

import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import integrity, lazy_tensors
from keras_t5gemma.checkpoints.layout_transforms import TRANSFORMS
from keras_t5gemma.checkpoints.lazy_tensors import DTYPES, FileTensor, ImportedTensor
from keras_t5gemma.modeling.layer_iteration import iter_layers

BLOCK = 2**12
FORMATS = ["keras", "huggingface"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Read in blocks of 4 KiB; a list of the bytes of each."""
    monkeypatch.setattr(lazy_tensors, "_BLOCK_BYTES", BLOCK)
    sizes = []

    def noted(file, view, name, read_into=lazy_tensors.read_into):
        sizes.append(len(view))
        read_into(file, view, name)

    monkeypatch.setattr(lazy_tensors, "read_into", noted)
    return sizes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An encoder and decoder in float32, by format."""
    keras.utils.set_random_seed(0)
    backbone = enlarge(kt.Backbone(one_block_config()), 4.0)
    found = {name: tmp_path_factory.mktemp(name) / name for name in FORMATS}
    backbone.save_to_preset(found["keras"])
    backbone.save_to_huggingface(found["huggingface"])
    return found


def stored(path, array, check=None):
    path.write_bytes(array.tobytes())
    return FileTensor(path, "t", array.dtype, array.shape, 0, check)


@pytest.mark.one_backend
@pytest.mark.parametrize("rule", TRANSFORMS)
def test_blocks_make_up_the_tensor(rule, small_blocks, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.standard_normal((96, 64), "float32")
    transform = TRANSFORMS[rule]
    source = stored(tmp_path / "t", np.ascontiguousarray(transform.to_file(array, 8)))
    tensor = ImportedTensor(source, transform, array.shape)
    blocks = list(tensor.blocks())
    assert (np.concatenate(blocks) == array).all()
    assert len(blocks) == (1 if transform.permutation else 6)
    rounded = lazy_tensors.read_as(tensor, DTYPES["bfloat16"])
    assert rounded.dtype == "bfloat16"
    assert (rounded == array.astype(DTYPES["bfloat16"])).all()
    cast = lazy_tensors.CastTensor(tensor, DTYPES["float16"])
    assert (np.concatenate(list(cast.blocks())) == array.astype("float16")).all()


@pytest.mark.one_backend
@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_blocks_are_checked_together(algorithm, small_blocks, tmp_path):
    array = np.random.default_rng(0).standard_normal((96, 64), "float32")
    digest = integrity.digest(algorithm, lazy_tensors.to_bytes(array))
    checksums = integrity.Checksums(algorithm, {"p": digest})

    def read(array, **kwargs):
        tensors = {"p": stored(tmp_path / "t", array)}
        tensor = integrity.checked(tensors, **kwargs)["p"]
        return np.concatenate(list(tensor.blocks()))

    assert (read(array, checksums=checksums) == array).all()
    array[50, 3] = np.nan
    with pytest.raises(ValueError, match="tensor 'p' differs from its checksum"):
        read(array, checksums=checksums)
    with pytest.raises(ValueError, match="tensor 'p' has NaN"):
        read(array)
    with pytest.warns(UserWarning, match="tensor 'p' has NaN"):
        read(array, allow_non_finite=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_preset_is_cast_in_blocks(format, dtype, folders, small_blocks):
    exact = kt.Backbone.from_preset(folders[format], dtype="float32")
    largest = max(small_blocks)
    small_blocks.clear()
    found = kt.Backbone.from_preset(folders[format], dtype=dtype)
    assert max(small_blocks) < largest / 4
    for a, b in zip(exact.weights, found.weights, strict=True):
        assert b.dtype == dtype
        assert (numpy(a.value).astype(DTYPES[dtype]) == numpy(b.value)).all(), a.path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_preset_is_quantized_in_blocks(mode, format, folders, small_blocks):
    """Codes, scales and policies are those of `quantize`, with less in memory."""
    expected = kt.Backbone.from_preset(folders[format])
    largest = max(small_blocks)
    expected.quantize(mode)
    small_blocks.clear()
    found = kt.Backbone.from_preset(folders[format], dtype=mode)
    assert max(small_blocks) < largest / 4
    for layer, other in zip(iter_layers(expected), iter_layers(found), strict=True):
        assert layer.quantization_mode == other.quantization_mode
        if layer is not expected:
            assert layer.dtype_policy == other.dtype_policy
    weights = {variable.path: variable for variable in expected.weights}
    assert set(weights) == {variable.path for variable in found.weights}
    for variable in found.weights:
        exact = weights[variable.path]
        assert variable.dtype == exact.dtype
        assert (numpy(variable.value) == numpy(exact.value)).all(), variable.path
        assert variable.trainable == exact.trainable
