"""Our own preset folders, written from unread tensors."""

import hashlib
import json

import keras

from keras_t5gemma.checkpoints import h5_file, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import CastTensor

CHECKSUM_FILE = "checksums.json"


def write(
    folder,
    config,
    tensors,
    dtype,
    lineage=None,
    preprocessor=None,
    max_shard_bytes=5_000_000_000,
    progress=None,
):
    """Write weights, checksums, tokenizer and, last, config.json.

    Args:
        folder: an existing folder, as `atomic_folder` gives it.
        config: `T5GemmaConfig`.
        tensors: `{our variable path: unread tensor}`; one is in memory at a time.
        dtype: numpy dtype that the weights are written in.
        lineage: dict, or `None`.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None`.
        max_shard_bytes: size of the largest weight file.
        progress: called with the number of bytes of each tensor when it is written.
    """
    names = dataset_names(config)
    paths = {name: path for path, name in names.items()}
    digests = {}

    def written(places, data):
        digest = hashlib.sha256(data).hexdigest()
        digests.update((paths[name], digest) for name in places)
        if progress is not None:
            progress(data.nbytes * len(places))

    entries = {names[path]: CastTensor(t, dtype) for path, t in tensors.items()}
    h5_file.write_folder(folder, entries, max_shard_bytes, written)
    _write_json(folder / CHECKSUM_FILE, {"algorithm": "sha256", "tensors": digests})
    if preprocessor is not None:
        preprocessor.save_to_preset(str(folder))
    _write_json(folder / "config.json", serialize(config, dtype.name, lineage))


def dataset_names(config):
    """`{our variable path: its name in a weight file of Keras}`."""
    names = {}
    for side, rows in weight_maps.KERAS.items():
        stack = getattr(config, side)
        if stack is not None:
            expanded = weight_maps.expand(rows, stack.num_layers)
            names |= {ours: name for ours, (name, _) in expanded.items()}
    return names


def serialize(config, dtype, lineage=None):
    """What `keras.saving.serialize_keras_object` gives for a built `Backbone`."""
    policy = keras.dtype_policies.DTypePolicy(dtype)
    return {
        "module": "keras_t5gemma.modeling.backbone",
        "class_name": "Backbone",
        "config": {
            "name": "backbone",
            "trainable": True,
            "dtype": keras.saving.serialize_keras_object(policy),
            "config": config.to_dict(),
            "lineage": lineage,
        },
        "registered_name": "keras_t5gemma>Backbone",
    }


def read_checksums(folder):
    """The sha256 of every tensor's bytes, noted when the folder was written.

    Returns:
        `{our variable path: hex digest}`, or `None` when there are none.
    """
    path = folder / CHECKSUM_FILE
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["tensors"]


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
