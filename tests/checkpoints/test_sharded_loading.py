"""A model whose weights many devices share is read slice by slice."""

import itertools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import TESTS, xla_flags
from helpers.keras_hub_models import make_kerashub

from keras_t5gemma.checkpoints import lazy_tensors
from keras_t5gemma.checkpoints.byte_ranges import bounds
from keras_t5gemma.checkpoints.layout_transforms import TRANSFORMS

HERE = TESTS


class Whole(lazy_tensors.LazyTensor):
    """An array as an unread tensor, and how much of it has been asked for."""

    dtype = np.dtype("float32")

    def __init__(self, shape):
        self.shape = shape
        self.array = np.random.default_rng(0).random(shape, "float32")
        self.asked = 0

    def read(self):
        return self.array

    def read_slice(self, index):
        part = self.array[tuple(index)]
        self.asked += part.size
        return part


def slices_of(shape):
    """Whole, halves and an odd part of every axis, in all combinations."""
    parts = [
        [slice(None), slice(0, size // 2), slice(size // 2, size), slice(1, size - 2)]
        for size in shape
    ]
    return list(itertools.product(*parts))


@pytest.mark.one_backend
@pytest.mark.parametrize("shape", [(), (7,), (6, 8), (4, 6, 5)])
def test_a_file_gives_a_slice_and_reads_its_bytes_alone(shape, tmp_path, monkeypatch):
    whole = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    path = tmp_path / "values"
    path.write_bytes(b"header12" + whole.tobytes())
    tensor = lazy_tensors.FileTensor(path, "t", np.dtype("float32"), shape, 8)
    read = []

    def counted(file, view, name, read_into=lazy_tensors.read_into):
        read.append((file.tell(), len(view)))
        read_into(file, view, name)

    monkeypatch.setattr(lazy_tensors, "read_into", counted)
    for index in slices_of(shape):
        read.clear()
        part = tensor.read_slice(index)
        assert (part == whole[index]).all() and part.shape == whole[index].shape
        assert part.ctypes.data % 64 == 0
        assert sum(size for _, size in read) == part.nbytes
        assert read == sorted(read)  # Through the file once, forwards.
    path.write_bytes(b"header12" + whole.tobytes()[:-1])
    with pytest.raises(ValueError, match="values ended while tensor 't'"):
        tensor.read()


@pytest.mark.one_backend
@pytest.mark.parametrize("rule", TRANSFORMS)
def test_transforms_read_the_same_part_of_the_file(rule):
    shape, head_dim = (12, 8), 4
    source = Whole(TRANSFORMS[rule].file_shape(shape, head_dim))
    ours = lazy_tensors.ImportedTensor(source, TRANSFORMS[rule], shape)
    whole = ours.read()
    assert whole.shape == shape
    for index in [(), *slices_of(shape), (slice(1, 3), slice(5, 7))]:
        source.asked = 0
        part = ours.read_slice(index)
        assert (part == whole[index]).all()
        sizes = [high - low for low, high in bounds(index, shape)]
        if TRANSFORMS[rule].split is not None:  # Of several heads whole ones are read.
            low, high = bounds(index, shape)[TRANSFORMS[rule].split]
            if low // head_dim != (high - 1) // head_dim:
                wide = -(-high // head_dim) - low // head_dim
                sizes[TRANSFORMS[rule].split] = wide * head_dim
        assert source.asked == np.prod(sizes)


@pytest.mark.one_backend
def test_tensors_of_tensors_ask_for_a_part():
    source = Whole((6, 4))
    index = (slice(2, 5), slice(1, 3))
    cast = lazy_tensors.CastTensor(source, lazy_tensors.DTYPES["bfloat16"])
    assert cast.read_slice(index).dtype == lazy_tensors.DTYPES["bfloat16"]
    assert source.asked == 6
    first = lazy_tensors.FirstRows(source, 4)
    assert (first.read_slice(index) == source.array[2:4, 1:3]).all()
    assert (first.read() == source.array[:4]).all()
    assert source.asked == 6 + 4 + 16
    fresh = lazy_tensors.FreshTensor("a/b", (6, 4), np.dtype("float32"), 0.1, 0)
    assert (fresh.read_slice(index) == fresh.read()[index]).all()


DEVICES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import keras
from helpers import models
import numpy as np
import keras_t5gemma as kt
from keras_t5gemma.checkpoints import lazy_tensors

read = [0, 0]

def counted(file, view, name, read_into=lazy_tensors.read_into):
    read[0] += len(view)
    read[1] = max(read[1], len(view))
    read_into(file, view, name)

lazy_tensors.read_into = counted
results, distribution = {}, keras.distribution
expected = {
    f: {v.path: np.asarray(v.value) for v in kt.Backbone.from_preset(f).weights}
    for f in sys.argv[2:]
}
for shape in ((8, 1), (4, 2), (2, 4)):
    mesh = distribution.DeviceMesh(shape, ("batch", "model"))
    layouts = distribution.LayoutMap(mesh)
    layouts[".*(query|output|gate|up)/kernel"] = ("batch", "model")
    layouts[".*down/kernel"] = (None, "batch")
    layouts[".*embeddings"] = ("model", None)
    parallel = distribution.ModelParallel(layout_map=layouts)
    folders = sys.argv[2:] if shape == (4, 2) else sys.argv[2:3]
    for folder in folders:
        read[:] = 0, 0
        with parallel.scope():
            backbone = kt.Backbone.from_preset(folder)
        held = 0
        for v in backbone.weights:
            assert (np.asarray(v.value) == expected[folder][v.path]).all(), v.path
            shards = {str(s.index): s.data.nbytes for s in v.value.addressable_shards}
            held += sum(shards.values())
            layout = v._layout.axes
            split = np.prod([mesh.shape[mesh.axis_names.index(a)] for a in layout if a])
            assert len(shards) == split, (v.path, layout, shards)
        shards = [v.value.addressable_shards[0] for v in backbone.weights]
        largest = max(shard.data.nbytes for shard in shards)
        assert read[1] <= largest, (read, largest)
        results[f"{folder} {shape}"] = [read[0], held]
print(json.dumps(results))
"""


def run_on_8_devices(script, *arguments):
    """What a script prints last, as JSON."""
    env = os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(8),
    }
    command = [sys.executable, "-c", script, str(HERE), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SAVING = """
import json, sys, tracemalloc
import keras, numpy as np
import keras_t5gemma as kt

stack = kt.StackConfig(4, 32, 4096, 2, 1, 8, sliding_window=8)
keras.utils.set_random_seed(0)
distribution = keras.distribution
mesh = distribution.DeviceMesh((4, 2), ("batch", "model"))
layouts = distribution.LayoutMap(mesh)
layouts[".*(gate|up)/kernel"] = ("batch", "model")
with distribution.ModelParallel(layout_map=layouts).scope():
    backbone = kt.Backbone(kt.T5GemmaConfig(stack, stack, 480), dtype=sys.argv[3])
tracemalloc.start()
backbone.save_to_preset(sys.argv[2], max_shard_size=0.002)
left, peak = tracemalloc.get_traced_memory()
again = kt.Backbone.from_preset(sys.argv[2], dtype=sys.argv[3])  # On one device.
for saved, loaded in zip(backbone.weights, again.weights, strict=True):
    assert saved.path == loaded.path and saved.dtype == loaded.dtype
    assert (np.asarray(saved.value) == np.asarray(loaded.value)).all(), saved.path
sizes = [v.value.nbytes for v in backbone.weights]
print(json.dumps([left, peak, max(sizes), sum(sizes)]))
"""


needs_jax = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="Keras's distribution is JAX's"
)


@needs_jax
def test_each_slice_is_read_once_whatever_the_mesh(model, tmp_path):
    """Our format, transformers' and KerasHub's; the values are those on one device."""
    folders = [tmp_path / name for name in ("ours", "transformers", "keras_hub")]
    model.backbone.save_to_preset(folders[0])
    model.save_to_huggingface(folders[1])
    make_kerashub().save_to_preset(str(folders[2]))
    results = run_on_8_devices(DEVICES, *folders)
    whole = sum(v.value.nbytes for v in model.backbone.weights)
    assert len(results) == 5
    for name, (read, held) in results.items():
        assert read == held == whole, name


@needs_jax
def test_saving_holds_a_few_tensors_and_one_device_loads_it(tmp_path):
    left, peak, largest, whole = run_on_8_devices(SAVING, tmp_path, "bfloat16")
    assert len(list(tmp_path.glob("model_*.weights.h5"))) > 2
    assert whole > 20 * largest
    # Beside Python's own objects; Keras's saving peaks above the whole and leaves it.
    assert peak < 4 * largest + 2**20
    assert left < largest
