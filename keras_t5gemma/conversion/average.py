"""Average checkpoints, from file to file (arXiv 2203.05482)."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints import atomic, generation_config, keras_format
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor
from keras_t5gemma.checkpoints.presets import PresetLike
from keras_t5gemma.conversion.compare import config_differences
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.utils.checks import path, shown
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.texts import to_list


def average_presets(
    presets: Sequence[PresetLike],
    folder: str | Path,
    weights: Iterable[float] | None = None,
    overwrite: bool = False,
) -> None:
    """Average checkpoints of one configuration into a preset of keras_t5gemma.

    For example the last checkpoints of a training, or the best of several trainings.
    Two float32 tensors are in memory at a time; the folder appears as a whole or not
    at all.

    Args:
        presets: names, folders or handles, of any supported format; see
            `presets.resolve`.
        folder: path to write. Tokenizer, lengths, dtype and defaults of generation are
            the first preset's.
        weights: one number for each preset, not negative; `None` weighs all equally.
        overwrite: replace a checkpoint in `folder`.

    Raises:
        ValueError: without presets, for weights that do not fit, a folder that exists,
            or configurations that differ, naming the fields.
        OSError: when there is not enough space on the disk.

    Examples:
        >>> names = ["t5gemma_mini", "t5gemma_mini_synopsis"]
        >>> keras_t5gemma.average_presets(names, "mean", weights=[3, 1])
    """
    if not isinstance(presets, list | tuple) or not presets:
        raise ValueError(
            f"`presets` must be a list of at least one preset; got {shown(presets)}."
        )
    shares = _check_weights([1.0] * len(presets) if weights is None else weights)
    if len(shares) != len(presets):
        raise ValueError(
            f"`weights` must be one number for each of the {len(presets)} presets; "
            f"got {len(shares)}."
        )
    folder = path(folder, "folder")
    atomic.check_overwrite(folder, overwrite)
    opened = [open_checkpoint(preset) for preset in presets]
    first = opened[0]
    for other in opened[1:]:
        lines = config_differences(first.config.to_dict(), other.config.to_dict())
        if lines:
            raise ValueError(
                f"`presets` must have one configuration; {first.location} and "
                f"{other.location} differ in {'; '.join(lines)}."
            )
    sources = [checkpoint.checked_tensors() for checkpoint in opened]
    tensors = {
        path: MeanTensor(tuple(source[path] for source in sources), shares)
        for path in sources[0]
    }
    dtype = sources[0]["encoder/final_norm/scale"].dtype
    total = dtype.itemsize * sum(math.prod(t.shape) for t in tensors.values())
    atomic.check_free_space(folder, total)
    try:
        preprocessor = Seq2SeqLMPreprocessor.from_preset(first.source)
    except ValueError:  # Without a tokenizer in the source none is written.
        preprocessor = None
    lineage = first.lineage
    if any(checkpoint.lineage != lineage for checkpoint in opened):
        lineage = None
    with progress_bar("Averaging", total, is_bytes=True) as progress:
        with atomic_folder(folder) as staging:
            keras_format.write(
                staging,
                first.config,
                tensors,
                dtype,
                lineage,
                preprocessor,
                progress=progress,
            )
            generation_config.copy(first.source, staging, preprocessor)


def _check_weights(weights):
    try:
        array = np.asarray(to_list(weights, "weights"), "float64")
        fits = np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"`weights` must be numbers >= 0, not all of them 0; got {shown(weights)}."
        )
    return tuple(array.tolist())


@dataclasses.dataclass(frozen=True)
class MeanTensor(LazyTensor):
    """Weighted mean of lazily loaded tensors, computed in float32.

    Args:
        sources: tensors of one shape.
        weights: one number for each of them.
    """

    sources: tuple[LazyTensor, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every source."""
        return self.sources[0].shape

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype("float32")

    def read(self) -> np.ndarray:
        """The mean."""
        total: Any = None
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not weight:
                continue
            part = source.read().astype("float32", copy=False)
            if weight != 1:
                part *= np.float32(weight)
            if total is None:
                total = part
            else:
                total += part
        total /= np.float32(sum(self.weights))
        return total
