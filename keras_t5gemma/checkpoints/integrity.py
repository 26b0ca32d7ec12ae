"""Checks of weights while they are read: checksums, and values that are not finite."""

import dataclasses
import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.lazy_tensors import (
    DTYPES,
    FileTensor,
    ImportedTensor,
    LazyTensor,
    to_bytes,
)
from keras_t5gemma.utils.files import read_json_file

CHECKSUM_FILE = "checksums.json"
TENSORS, TASK = "tensors", "task"  # Keys in it: of the backbone, of `task.weights.h5`.
VOCABULARY = "vocabulary"  # Key of the CRC-32 of the tokenizer's file.
_PIECE = 2**20  # Values that are checked at a time, so that they stay in the cache.
# Bits of the exponent, all of which are set in NaN and infinity.
_EXPONENTS = {
    DTYPES["float32"]: ("uint32", 0x7F800000),
    DTYPES["bfloat16"]: ("uint16", 0x7F80),
    DTYPES["float16"]: ("uint16", 0x7C00),
}


@dataclasses.dataclass(frozen=True)
class Checksums:
    """Recorded checksums of the bytes of tensors.

    Args:
        algorithm: `"sha256"` or `"crc32"`.
        tensors: `{our variable path: hex digest}`; of quantized weights and of tasks
            the dataset path in the file.
    """

    algorithm: str
    tensors: dict[str, str]

    def match(self, path: str, array: np.ndarray) -> bool:
        """Whether an array has the recorded checksum, if there is one."""
        recorded = self.tensors.get(path)
        return recorded in (None, digest(self.algorithm, to_bytes(array)))


def digest(algorithm: str, data: np.ndarray) -> str:
    """Hex digest of flat bytes."""
    found = Digest(algorithm)
    found.update(data)
    return found.hexdigest()


class Digest:
    """Hex digest of flat bytes that come in parts.

    Args:
        algorithm: `"sha256"` or `"crc32"`.
    """

    def __init__(self, algorithm: str):
        self._crc32 = 0
        self._sha256 = None if algorithm == "crc32" else hashlib.sha256()

    def update(self, data: np.ndarray) -> None:
        """Take the next bytes."""
        if self._sha256 is None:
            self._crc32 = zlib.crc32(data.data, self._crc32)
        else:
            self._sha256.update(data.data)

    def hexdigest(self) -> str:
        """Digest of what was taken."""
        if self._sha256 is None:
            return f"{self._crc32:08x}"
        return self._sha256.hexdigest()


def read_checksums(
    folder: Path, fast: bool = False, part: str = TENSORS
) -> Checksums | None:
    """Checksums of every tensor, recorded when the folder was written.

    Args:
        folder: path of a preset.
        fast: prefer CRC-32, which detects accidental corruption, not tampering.
        part: `TENSORS` of the backbone, or those of the `TASK`.

    Returns:
        `Checksums`, or `None` if the folder has none.

    Raises:
        ValueError: if checksums.json is damaged.
    """
    path = folder / CHECKSUM_FILE
    if not path.exists():
        return None
    fields = read_json_file(path)
    try:
        if part == TASK:
            return Checksums("crc32", dict(fields[TASK])) if TASK in fields else None
        if fast and "crc32" in fields:
            return Checksums("crc32", dict(fields["crc32"]))
        if fields["algorithm"] not in ("sha256", "crc32"):
            raise ValueError(f"unknown algorithm {fields['algorithm']!r}")
        return Checksums(fields["algorithm"], dict(fields[TENSORS]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def record_vocabulary(folder: Path, data: bytes) -> None:
    """Note the checksum of a tokenizer's file, in a folder that has checksums."""
    path = folder / CHECKSUM_FILE
    if path.exists():
        fields = read_json_file(path) | {VOCABULARY: f"{zlib.crc32(data):08x}"}
        path.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")


def check_vocabulary(file: str | Path, folder: Path, data: bytes) -> None:
    """Raise `ValueError` if a tokenizer's file differs from its checksum.

    Args:
        file: path of the tokenizer's file, for the message.
        folder: of the preset.
        data: content of the file.
    """
    path = folder / CHECKSUM_FILE
    fields = read_json_file(path) if path.exists() else {}
    recorded = fields.get(VOCABULARY) if isinstance(fields, dict) else None
    if recorded not in (None, f"{zlib.crc32(data):08x}"):
        raise ValueError(
            f"{file} is damaged: it differs from its checksum in {CHECKSUM_FILE}. "
            "Download or save it again."
        )


def checked(
    tensors: Mapping[str, LazyTensor],
    checksums: Checksums | None = None,
    allow_non_finite: bool = False,
    advise: bool = True,
) -> dict[str, LazyTensor]:
    """The same tensors of files, which raise when damaged values are read.

    Args:
        tensors: `{path: tensor}`.
        checksums: by the same paths, compared with every tensor that is read whole,
            at once or by its `blocks`; slices are not.
        allow_non_finite: warn about NaN and infinite values instead of raising.
        advise: whether messages name the arguments that allow such values.

    Returns:
        `{our variable path: tensor}`, whose `read` raises `ValueError` with the name
        of the tensor.
    """
    result = {}
    for path, tensor in tensors.items():
        imported = tensor if isinstance(tensor, ImportedTensor) else None
        stored = imported.source if imported else tensor
        if isinstance(stored, FileTensor):
            check = _Check(path, stored, checksums, allow_non_finite, advise)
            tensor = dataclasses.replace(stored, check=check)
            if imported:
                tensor = dataclasses.replace(imported, source=tensor)
        result[path] = tensor
    return result


@dataclasses.dataclass(frozen=True)
class _Check:
    """Called with the values that were read of one tensor."""

    path: str
    tensor: FileTensor
    checksums: Checksums | None
    allow_non_finite: bool
    advise: bool

    def __call__(self, array: np.ndarray) -> None:
        """See `lazy_tensors.Check`."""
        whole = array.shape == tuple(self.tensor.shape)
        if whole and self.checksums and not self.checksums.match(self.path, array):
            self._raise_damaged()
        if has_non_finite(array):
            self._report_non_finite()

    def blocks(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `lazy_tensors.Check`."""
        recorded, found = None, None
        if self.checksums:
            recorded = self.checksums.tensors.get(self.path)
            found = Digest(self.checksums.algorithm)
        non_finite = False
        for array in arrays:
            if found and recorded is not None:
                found.update(to_bytes(array))
            non_finite = non_finite or has_non_finite(array)
            yield array
        if found and recorded not in (None, found.hexdigest()):
            self._raise_damaged()
        if non_finite:
            self._report_non_finite()

    def _raise_damaged(self):
        advice = "; `verify_checksums=False` loads it as it is" * self.advise
        raise ValueError(
            f"{self.tensor.file} is damaged: tensor {self.path!r} differs from "
            f"its checksum in {CHECKSUM_FILE}. Download or save it again{advice}."
        )

    def _report_non_finite(self):
        message = f"{self.tensor.file}: tensor {self.path!r} has NaN or infinite values"
        if not self.allow_non_finite:
            advice = "; `allow_non_finite=True` only warns" * self.advise
            raise ValueError(f"{message}{advice}.")
        warnings.warn(message + ".", stacklevel=3)


def has_non_finite(array: np.ndarray) -> bool:
    """Whether an array has a NaN or an infinite value; integers never have one."""
    if array.dtype not in _EXPONENTS:
        return not np.issubdtype(array.dtype, np.integer) and not (
            bool(np.isfinite(array).all())
        )
    kind, bits = _EXPONENTS[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return any(bool(((piece & bits) == bits).any()) for piece in pieces)
