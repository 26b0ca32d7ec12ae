"""Compare a checkpoint with another one, or with its own checksums."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.checkpoints import checkpoint, integrity
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor
from keras_t5gemma.modeling import weight_loading
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.utils.checks import renamed, whole_number

_CHUNK = 4_000_000  # Elements of a tensor that are compared at a time.


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences between two checkpoints.

    Args:
        configs: one line for each field that differs.
        only_a: paths of variables that only the first checkpoint has.
        only_b: paths of variables that only the second one has.
        tensors: `{path: max|a - b|}`, NaN where shapes differ or a value is finite
            in one checkpoint only.
        logits: max|a - b| of the logits, or `None` when they were not computed.
        note: why the logits were not computed; `""` when they were.
    """

    configs: list[str]
    only_a: list[str]
    only_b: list[str]
    tensors: dict[str, float]
    logits: float | None
    note: str

    def within(self, tolerance: float) -> bool:
        """Whether the checkpoints are the same, up to rounding.

        Args:
            tolerance: largest accepted difference of tensors and logits.

        Returns:
            `True` when no tensor is missing, no field of the configurations differs
            and no difference is larger.
        """
        differences = [*self.tensors.values()]
        differences += [] if self.logits is None else [self.logits]
        same = not (self.configs or self.only_a or self.only_b)
        return same and all(d <= tolerance for d in differences)


def verify(a: str | Path, b: str | Path, seed: int = 0) -> Comparison:
    """Compare two checkpoints of any supported formats: tensors and logits.

    Args:
        a: name, folder or handle; see `presets.resolve`.
        b: the checkpoint to compare it with, likewise.
        seed: of the random inputs of the logits, which are computed in float32 where
            memory allows it.

    Returns:
        A `Comparison`; its `within(tolerance)` is the verdict.

    Raises:
        ValueError: if one of them is not a T5Gemma checkpoint.
        OSError: when a download fails, with instructions.

    Examples:
        >>> keras_t5gemma.convert("t5gemma_mini", "folder", to="transformers")
        >>> keras_t5gemma.verify("t5gemma_mini", "folder").within(1e-5)
        True
    """
    whole_number(seed, "seed", 0)
    opened = []
    for name, preset in (("a", a), ("b", b)):
        with renamed(preset=name):
            opened.append(checkpoint.open_checkpoint(preset))
    first, second = (c.config.to_dict() for c in opened)
    configs = config_differences(first, second)
    tensors = [c.tensors() for c in opened]
    differences = {
        path: max_difference(tensor, tensors[1][path])
        for path, tensor in tensors[0].items()
        if path in tensors[1]
    }
    logits, note = None, ""
    needed = 4.5 * opened[0].config.count_params()  # float32 weights and activations.
    if configs:
        note = "the configurations differ"
    elif needed > _free_memory():
        note = f"a float32 model needs {needed / 1e9:.1f} GB of free memory"
    else:
        logits = float(np.abs(np.subtract(*(_logits(c, seed) for c in opened))).max())
    return Comparison(
        configs,
        sorted(set(tensors[0]) - set(tensors[1])),
        sorted(set(tensors[1]) - set(tensors[0])),
        differences,
        logits,
        note,
    )


def config_differences(
    a: dict[str, Any], b: dict[str, Any], prefix: str = ""
) -> list[str]:
    """One line for each field in which two configurations, as dicts, differ."""
    lines = []
    for name in a:
        if isinstance(a[name], dict) and isinstance(b[name], dict):
            lines += config_differences(a[name], b[name], f"{prefix}{name}.")
        elif a[name] != b[name]:
            lines.append(f"{prefix}{name}: {a[name]} and {b[name]}")
    return lines


def max_difference(a: LazyTensor, b: LazyTensor) -> float:
    """max|a - b| of two lazily loaded tensors; NaN when they cannot be compared."""
    if tuple(a.shape) != tuple(b.shape):
        return math.nan
    x, y = (np.ascontiguousarray(t.read()).reshape(-1) for t in (a, b))
    largest = 0.0
    for start in range(0, x.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        p, q = x[part].astype("float32"), y[part].astype("float32")
        different = p != q  # Equal infinities are equal.
        if different.any():
            delta = float(np.abs(p[different] - q[different]).max())
            largest = delta if math.isnan(delta) else max(largest, delta)
    return largest


def _logits(opened, seed):
    model = weight_loading.load_backbone(Backbone, opened, dtype="float32")
    rng = np.random.default_rng(seed)
    size = opened.config.vocabulary_size
    x = {}
    for side in ("encoder", "decoder") if model.decoder else ("encoder",):
        ids = rng.integers(4, size, (2, 12), dtype="int32")
        x[f"{side}_token_ids"] = ids
        x[f"{side}_padding_mask"] = np.ones_like(ids)
    out = model(x)
    if model.decoder is None:
        return ops.convert_to_numpy(out["encoder_sequence_output"])
    return ops.convert_to_numpy(model.logits(out["decoder_sequence_output"]))


def _free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_checksums(folder: str | Path) -> int:
    """Compare every tensor of a preset with the checksum recorded when it was saved.

    Returns:
        The number of tensors, 0 when the folder has no checksums.

    Raises:
        ValueError: if the folder holds no checkpoint, or naming the tensors that
            have changed.
    """
    opened = checkpoint.open_checkpoint(folder)
    recorded = integrity.read_checksums(Path(folder))
    if recorded is None:
        return 0
    tensors: Mapping[str, LazyTensor] = (
        opened.quantized_tensors() if opened.is_quantized else opened.tensors()
    )
    changed = sorted(set(recorded.tensors) ^ set(tensors))
    changed += [
        path
        for path, tensor in tensors.items()
        if not recorded.match(path, tensor.read())
    ]
    if changed:
        raise ValueError(
            f"{folder} is damaged: these tensors differ from their checksums: "
            f"{changed}."
        )
    return len(tensors)
