"""Convert a checkpoint to another format, from file to file."""

import math
from pathlib import Path
from typing import Any

from keras_t5gemma.checkpoints import (
    atomic,
    generation_config,
    huggingface,
    keras_format,
    preset_saving,
    presets,
)
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.checkpoints.lazy_tensors import DTYPES
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.quantized_loading import QUANTIZED
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.utils.checks import flag, one_of, path
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.sizes import parse_shard_size


def convert(
    preset: presets.PresetLike,
    folder: str | Path,
    to: str = presets.KERAS,
    dtype: str | None = None,
    max_shard_size: float | str = 5,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint of any supported format to another one.

    One float tensor is in memory at a time; the folder is complete or not there at all.

    Args:
        preset: name, folder or handle; see `presets.resolve`.
        folder: path to write.
        to: `"keras_t5gemma"` or `"transformers"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps the stored one.
            `"int8"` and `"int4"` quantize the weights as `from_preset` does, for a
            preset of this package; all of them are then in memory, quantized.
        max_shard_size: of the largest weight file: a number of GB, or a size with a
            unit, e.g. `"500MB"`.
        overwrite: replace a checkpoint in `folder`.

    Raises:
        ValueError: naming the argument, or the file and the tensors that do not fit.
        OSError: when there is not enough space on the disk.

    Examples:
        >>> keras_t5gemma.convert("t5gemma_mini", "converted", dtype="float32")
        >>> keras_t5gemma.Backbone.from_preset("converted").count_params() > 1e6
        True
    """
    folder = path(folder, "folder")
    one_of(to, "to", (presets.KERAS, presets.HUGGING_FACE))
    if dtype is not None:
        one_of(dtype, "dtype", (*DTYPES, *QUANTIZED))
    overwrite = flag(overwrite, "overwrite")
    shard_bytes = parse_shard_size(max_shard_size)
    atomic.check_overwrite(folder, overwrite)
    opened = open_checkpoint(preset)
    tensors = opened.checked_tensors()
    if dtype in QUANTIZED:
        return _quantize(opened, tensors, folder, to, dtype, shard_bytes)
    stored = tensors["encoder/final_norm/scale"].dtype
    written = stored if dtype is None else DTYPES[dtype]
    total = written.itemsize * sum(math.prod(t.shape) for t in tensors.values())
    atomic.check_free_space(folder, total)
    preprocessor = _preprocessor(opened)
    kwargs: dict[str, Any] = {"max_shard_bytes": shard_bytes}
    with progress_bar("Writing", total, is_bytes=True) as progress:
        kwargs["progress"] = progress
        if to == presets.KERAS:
            with atomic_folder(folder) as staging:
                keras_format.write(
                    staging,
                    opened.config,
                    tensors,
                    written,
                    opened.lineage,
                    preprocessor,
                    **kwargs,
                )
                generation_config.copy(opened.source, staging, preprocessor)
            return
        defaults = generation_config.read(opened.source).defaults
        kwargs |= {"preprocessor": preprocessor, "generation_defaults": defaults}
        huggingface.save(folder, opened.config, tensors, written, **kwargs)


def _quantize(opened, tensors, folder, to, mode, shard_bytes):
    """Write a preset of quantized weights."""
    if to != presets.KERAS:
        raise ValueError(
            f"`dtype` {mode!r} is for presets of this package, to={presets.KERAS!r}; "
            f"got to={to!r}."
        )
    # Scales and norms are a hundredth of it.
    atomic.check_free_space(folder, sum(math.prod(t.shape) for t in tensors.values()))
    encoder_only = opened.config.decoder is None
    backbone = Backbone.from_preset(
        opened.source, encoder_only=encoder_only, dtype=mode
    )
    preprocessor = _preprocessor(opened)
    with atomic_folder(folder) as staging:
        preset_saving.write_backbone(backbone, staging, shard_bytes)
        if preprocessor is not None:
            preset_saving.save_preprocessor(preprocessor, staging)
        generation_config.copy(opened.source, staging, preprocessor)


def _preprocessor(opened):
    try:
        return Seq2SeqLMPreprocessor.from_preset(opened.source)
    except ValueError:  # Without a tokenizer in the source none is written.
        return None
