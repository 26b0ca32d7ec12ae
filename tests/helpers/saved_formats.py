"""The files of `fixtures/formats_0_1` and what is expected of them.

The same functions have made `expected.json`.
"""

import hashlib
import json
import tarfile

import keras
import numpy as np

from helpers import TESTS

FIXTURES = TESTS / "fixtures" / "formats_0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A small tool that shows the free space of a disk.",
    "Library to read and write tables of numbers.",
    "Games for two players, with a board and ten stones.",
    "Fonts of the old kind, in three weights.",
    "Documentation of the server, in plain text.",
]
SOURCES = [f"{s} {i}" for i in range(2) for s in SENTENCES[:5]]
TARGETS = [s.split()[-1] for _ in range(2) for s in SENTENCES[:5]]


def unpack(folder, *names):
    """All of them, or those of some names."""
    with tarfile.open(FIXTURES / "formats.tar.xz") as tar:
        members = [m for m in tar if not names or m.name.partition("/")[0] in names]
        tar.extractall(folder, members, filter="data")
    return folder


def digest(value):
    """Shape and half of the sha256 of a variable or an array.

    Floats are taken as float32, integers as int64: random states and quantised weights
    are not of the same type on every backend.
    """
    value = getattr(value, "value", value)
    if keras.ops.is_tensor(value):
        if "float" in keras.backend.standardize_dtype(value.dtype):
            value = keras.ops.cast(value, "float32")
        value = keras.ops.convert_to_numpy(value)
    value = np.asarray(value)
    value = value.astype("int64" if value.dtype.kind in "iu" else "float32")
    value = np.ascontiguousarray(value)
    return f"{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:32]}"


def state(model):
    """Of a training. Keras numbers models and optimizers: that folder is left out."""
    variables = [*model.variables, *model.optimizer.variables]
    return [[v.path.partition("/")[2], digest(v)] for v in variables]
