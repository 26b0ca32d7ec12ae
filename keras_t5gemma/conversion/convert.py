"""A checkpoint in another format, from file to file."""

import math
from pathlib import Path

from keras_t5gemma.checkpoints import atomic, huggingface, keras_format, presets
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.checkpoints.lazy_tensors import parse_dtype
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.utils.progress import progress_bar


def convert(
    preset, folder, to=presets.KERAS, dtype=None, max_shard_size=5e9, overwrite=False
):
    """Write a checkpoint of any format as ours or transformers'.

    One tensor is in memory at a time; the folder appears as a whole or not at all.

    Args:
        preset: name, folder or handle; see `presets.resolve`.
        folder: path to write.
        to: `"keras_t5gemma"` or `"transformers"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps the stored one.
        max_shard_size: bytes of the largest weight file.
        overwrite: replace a checkpoint that is there.

    Raises:
        ValueError: naming the argument, or the file and the tensors that do not fit.
        OSError: when there is not enough room on the disk.
    """
    folder = Path(folder)
    formats = (presets.KERAS, presets.HUGGING_FACE)
    if to not in formats:
        raise ValueError(f"`to` must be one of {formats}; got {to!r}.")
    atomic.check_is_new(folder, overwrite)
    opened = open_checkpoint(preset)
    tensors = opened.tensors()
    stored = tensors["encoder/final_norm/scale"].dtype
    dtype = stored if dtype is None else parse_dtype(dtype)
    total = dtype.itemsize * sum(math.prod(t.shape) for t in tensors.values())
    atomic.check_room(folder, total)
    try:
        preprocessor = Seq2SeqLMPreprocessor.from_preset(preset)
    except ValueError:  # It has no tokenizer: then neither has the result.
        preprocessor = None
    kwargs = {"max_shard_size": max_shard_size}
    with progress_bar("Writing", total, is_bytes=True) as progress:
        kwargs["progress"] = progress
        if to == presets.KERAS:
            with atomic_folder(folder) as staging:
                keras_format.write(
                    staging,
                    opened.config,
                    tensors,
                    dtype,
                    opened.lineage,
                    preprocessor,
                    **kwargs,
                )
            return
        if preprocessor is not None:
            kwargs["tokenizer"] = preprocessor.tokenizer
            kwargs["stop_ids"] = preprocessor.stop_ids
        huggingface.save(folder, opened.config, tensors, dtype, **kwargs)
