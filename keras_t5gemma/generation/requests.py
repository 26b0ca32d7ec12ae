"""Requests of `generate`: checked arguments, and batches for the decoding loop."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation.batch_shapes import Costs, Shape
from keras_t5gemma.generation.options import GenerationOptions, id_tuple
from keras_t5gemma.tokenization.token_ids import INPUTS, check_range, id_array, pad
from keras_t5gemma.utils.buckets import batch_bounds, bucket, power_of_two
from keras_t5gemma.utils.checks import rows_of_batch, shown, whole_number
from keras_t5gemma.utils.texts import to_list


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked inputs of `generate`.

    Args:
        arrays: from `id_prompts` or `generate_preprocess`. One row of the encoder's
            arrays with several of the decoder's: prompts for the same source.
        stop_ids: tuple of ids that end an answer, or `None`.
        vocabulary_size: of the model.
    """

    arrays: dict
    stop_ids: tuple | None
    vocabulary_size: int

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of the decoder's prompts, start token included, int `(rows,)`."""
        return self.arrays["decoder_padding_mask"].sum(axis=1)

    @property
    def max_length(self) -> int:
        """Maximum number of decoder tokens."""
        return self.arrays["decoder_token_ids"].shape[1]


def text_lists(inputs: Any) -> Any:
    """The texts in the `inputs` of `Seq2SeqLM.generate`, as strings or lists.

    Args:
        inputs: a string, any container of `to_list`, a dict of those, or a dict of
            arrays of ids, which is returned unchanged.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(inputs, str):
        return inputs
    if not isinstance(inputs, dict):
        return to_list(inputs, "inputs")
    if "encoder_token_ids" in inputs:
        return inputs
    texts = {"encoder_text", "decoder_text"}
    return {
        key: to_list(value, key)
        if key in texts and not isinstance(value, str | None)
        else value
        for key, value in inputs.items()
    }


def read_request(
    inputs: Any,
    preprocessor: Any,
    config: T5GemmaConfig,
    max_length: int | None,
    stop_token_ids: Any,
    batch_size: int,
) -> Request:
    """Check the arguments of `Seq2SeqLM.generate`.

    Args:
        inputs: see `Seq2SeqLM.generate`.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None`.
        config: the model's `T5GemmaConfig`.
        max_length: maximum number of decoder tokens, or `None`.
        stop_token_ids: ids, `"auto"` or `None`.
        batch_size: maximum number of sources in a batch.

    Returns:
        A `Request`.

    Raises:
        ValueError: see `Seq2SeqLM.generate`.
    """
    if max_length is None and preprocessor is not None:
        max_length = preprocessor.decoder_sequence_length
    max_length = whole_number(max_length, "max_length", 2, config.max_positions)
    rows_of_batch(batch_size)
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if preprocessor is None:
            raise ValueError(
                "`stop_token_ids='auto'` needs a preprocessor; pass a tuple of ids, "
                "or None to generate until `max_length`."
            )
        stop_token_ids = preprocessor.stop_ids
    if stop_token_ids is not None:
        stop_token_ids = id_tuple(stop_token_ids, "stop_token_ids") or None
        ids = [stop_token_ids or (0,)]
        check_range(ids, "stop_token_ids", config.vocabulary_size)
    if isinstance(inputs, dict) and "encoder_token_ids" in inputs:
        arrays = id_prompts(inputs, max_length, config.vocabulary_size)
    elif preprocessor is None:
        raise ValueError(
            "Without a preprocessor, `inputs` must be a dict of int arrays with "
            "`encoder_token_ids`."
        )
    else:
        reader = preprocessor.for_reading(config.max_positions)
        arrays = _text_arrays(inputs, reader, max_length)
    return Request(arrays, stop_token_ids, config.vocabulary_size)


def _text_arrays(inputs, preprocessor, max_length):
    if isinstance(inputs, dict):
        source, prompts = inputs.get("encoder_text"), inputs.get("decoder_text")
        if isinstance(source, str) and isinstance(prompts, list | tuple) and prompts:
            inputs = {**inputs, "encoder_text": [source] * len(prompts)}
            arrays = preprocessor.generate_preprocess(inputs, max_length)
            for name in ("encoder_token_ids", "encoder_padding_mask"):
                arrays[name] = arrays[name][:1]
            return arrays
    return preprocessor.generate_preprocess(inputs, max_length)


def id_prompts(
    inputs: dict, max_length: int, vocabulary_size: int
) -> dict[str, np.ndarray]:
    """The arrays of `generate_preprocess`, from a user's arrays of ids.

    Args:
        inputs: dict of `encoder_token_ids` `(batch, length)` and, optionally, the
            other three inputs of the backbone. Without a mask id 0 is padding;
            without a prompt the decoder starts from bos, id 2.
        max_length: length of the decoder arrays that are returned.
        vocabulary_size: ids must be below this.

    Returns:
        The four inputs of the backbone, int32.

    Raises:
        ValueError: for unknown keys, shapes that do not fit, ids out of range, or a
            prompt longer than `max_length`.
    """
    unknown = [key for key in inputs if key not in INPUTS]
    if unknown:
        raise ValueError(
            f"`inputs` has unknown keys {shown(unknown)}; known: {INPUTS}."
        )
    arrays = {k: id_array(v, k) for k, v in inputs.items()}
    source = arrays["encoder_token_ids"]
    arrays.setdefault("encoder_padding_mask", source != 0)
    start = np.full((len(source), 1), 2)
    prompt = arrays.get("decoder_token_ids", start)
    mask = arrays.get("decoder_padding_mask", prompt != 0).astype(bool)
    for name, array in (
        ("encoder_token_ids", source),
        ("decoder_token_ids", prompt),
    ):
        check_range(array, name, vocabulary_size)
    for name, array, ids in (
        ("encoder_padding_mask", arrays["encoder_padding_mask"], source),
        ("decoder_padding_mask", mask, prompt),
    ):
        if array.shape != ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of the ids, {ids.shape}; got "
                f"{array.shape}."
            )
    lengths = mask.sum(axis=1)
    if len(prompt) != len(source) or lengths.min(initial=1) < 1:
        raise ValueError(
            "`decoder_token_ids` must have at least the start token for each of "
            f"the {len(source)} sources; got shape {prompt.shape}."
        )
    if lengths.max(initial=1) > max_length:
        raise ValueError(
            f"`decoder_token_ids` has a prompt of {lengths.max()} tokens, more than "
            f"the `max_length` of {max_length}."
        )
    rows = [row[keep].tolist() for row, keep in zip(prompt, mask, strict=True)]
    ids, mask = pad(rows, max_length)
    return {
        "encoder_token_ids": source.astype("int32"),
        "encoder_padding_mask": arrays["encoder_padding_mask"].astype("int32"),
        "decoder_token_ids": ids,
        "decoder_padding_mask": mask,
    }


def batches(
    request: Request,
    options: GenerationOptions,
    batch_size: int,
    width: int,
    costs: Costs | None = None,
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of rows with sources, and prompts, of similar length.

    With a compiler sizes are rounded up, so that requests of all lengths need few
    programs: source lengths to a step of `bucket`, 8 steps up to 512 tokens; the
    number of rows to a power of two, 6 of them up to 32, and on a mesh of devices to a
    multiple of the devices; prompt lengths to a power of two. Batches are padded
    further where that is cheaper than another program, see `Costs.shared_shapes`.

    Args:
        request: a `Request`.
        options: a `GenerationOptions`.
        batch_size: maximum number of decoder rows in a batch, not counting
            `rows_per_source`; fewer of long sources, see `batch_bounds`.
        width: length of the decoder's arrays, at least the request's.
        costs: estimated times of a model with a compiler; `None` rounds nothing up.

    Yields:
        `(rows, inputs)`: the numbers of the rows in the request, and the arrays of
        `decoding.start`, which may repeat the last row at their end.
    """
    arrays, lengths = request.arrays, request.prompt_lengths
    source_ids = arrays["encoder_token_ids"]
    mask = np.asarray(arrays["encoder_padding_mask"]).astype("int32")
    sources = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)  # Up to the last token.
    sources = np.where(mask.any(axis=1), sources, 1)
    more = ((0, 0), (0, max(0, bucket(sources.max()) - mask.shape[1])))
    source_ids, mask = np.pad(source_ids, more), np.pad(mask, more)
    is_shared = len(mask) < len(lengths)
    decoder_ids = arrays["decoder_token_ids"]
    decoder_ids = np.pad(decoder_ids, ((0, 0), (0, width - request.max_length)))
    copies = options.rows_per_source
    seeds = _row_seeds(options, len(lengths))
    lists = options.token_lists(request.stop_ids, request.vocabulary_size, width)
    traced_args = {**options.traced_args(), **lists}
    # Longest first: a batch that does not fit into memory fails at once.
    groups = np.frexp(lengths - 1)[1]  # Prompts that differ by less than a factor 2.
    widths = np.broadcast_to(sources, len(lengths))
    order = np.lexsort((-widths, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    planned: list[tuple[np.ndarray, Shape, int]] = []
    for group in np.split(order, starts[1:]):
        # A shared source is read once: it does not bound the rows.
        read_lengths = np.ones(len(group), int) if is_shared else widths[group]
        bounds = batch_bounds(read_lengths, batch_size, mesh.size("data"))
        for start, stop in bounds:
            rows = group[start:stop]
            read = np.zeros(1, int) if is_shared else rows
            length = max(2, sources[read].max())  # Keras warns of a softmax over one.
            size, count = len(rows), lengths[rows].min() - 1
            prefix_length = count
            if costs is not None:
                length = bucket(length)
                prefix_length = min(power_of_two(count), width)
                size = mesh.round_up(min(power_of_two(size), batch_size))
            planned.append((rows, (size, int(length), int(prefix_length)), count))
    shapes = [shape for _, shape, _ in planned]
    used = costs.shared_shapes(shapes) if costs else {shape: shape for shape in shapes}
    for rows, shape, count in planned:
        size, length, prefix_length = used[shape]
        taken = np.pad(rows, (0, size - len(rows)), mode="edge")
        read = np.zeros(1, int) if is_shared else taken
        repeated = np.repeat(taken, copies)
        yield (
            rows,
            {
                "encoder_token_ids": source_ids[read, :length],
                "encoder_padding_mask": mask[read, :length],
                "decoder_token_ids": decoder_ids[repeated],
                "prefix_token_ids": decoder_ids[repeated, :prefix_length],
                "prefix_count": np.int32(count),
                "prompt_lengths": lengths[repeated].astype("int32"),
                "seeds": seeds[taken].reshape(-1),
                "max_length": np.int32(request.max_length),
                "traced_args": traced_args,
            },
        )


def _row_seeds(options, rows):
    """int32 `(rows, rows_per_source)`."""
    generator = np.random.default_rng(options.seed)
    seeds = generator.integers(0, 2**31, (rows, options.rows_per_source))
    return seeds.astype("int32")


def answer_mask(
    ids: np.ndarray,
    prompt_lengths: np.ndarray,
    ends: np.ndarray,
    stop_ids: tuple | None,
) -> np.ndarray:
    """Mask of prompts and answers: 1 up to the stop id, 0 after it.

    Args:
        ids: int `(rows, L)`.
        prompt_lengths: int `(rows,)`.
        ends: int `(rows,)`, an upper bound of the tokens written.
        stop_ids: tuple of ids, or `None`.

    Returns:
        int32 `(rows, L)`.
    """
    positions = np.arange(ids.shape[1])
    mask = positions < ends[:, None]
    if stop_ids is not None:
        stop = np.isin(ids, stop_ids) & (positions >= prompt_lengths[:, None])
        mask &= (np.cumsum(stop, axis=1) - stop) == 0
    return mask.astype("int32")
