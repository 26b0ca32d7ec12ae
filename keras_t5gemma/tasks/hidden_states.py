"""Hidden states of texts: one compiled program for each set of array shapes.

N texts, T length, D width.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints.lazy_tensors import DTYPES
from keras_t5gemma.data.encoder_dataset import arrays
from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.prediction import compiled
from keras_t5gemma.modeling.encoder_states import encoder_states
from keras_t5gemma.modeling.inference import inference
from keras_t5gemma.tokenization.preprocessor import TokenRows
from keras_t5gemma.utils.buckets import (
    SHORT,
    batch_bounds,
    bucket,
    power_of_two,
    rows_of_length,
)
from keras_t5gemma.utils.checks import whole_number
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.texts import as_texts
from keras_t5gemma.utils.types import Tensor

_MANY = 2_000  # Texts; fewer are encoded without a progress bar.


def token_rows(preprocessor: Any, texts: Any, pad_to: int | None) -> TokenRows:
    """Token ids of texts; warns about truncated ones.

    Args:
        preprocessor: a `Seq2SeqLMPreprocessor`.
        texts: a list of strings, `""` too, or any container of `to_list`.
        pad_to: maximum number of tokens; `None` is the preprocessor's.

    Raises:
        ValueError: when `texts` is not a list of texts, or for a `pad_to` below 1 or
            above the preprocessor's length.
    """
    texts = as_list(texts)
    limit = preprocessor.encoder_sequence_length
    if pad_to is not None and whole_number(pad_to, "pad_to", 1) > limit:
        raise ValueError(
            f"`pad_to` must be at most {limit}, the `encoder_sequence_length` of the "
            f"preprocessor or the positions of the model; got {pad_to}."
        )
    with preprocessor.report_truncation(pad_to=pad_to):
        return preprocessor.encoder_rows(texts, pad_to)


def as_list(texts: Any) -> list[str]:
    """A list of strings; a single string raises `ValueError`."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"`texts` must be a list of texts; got {texts!r}.")
    return as_texts(texts, "texts")


def padding_mask(rows: TokenRows, width: int) -> np.ndarray:
    """Boolean mask `(N, width)` of rows of ids, False for padding."""
    lengths = np.array([len(row) for row in rows], "int64")
    return np.arange(width) < lengths[:, None]


class StatesOfRows:
    """Hidden states of rows of token ids, in batches of few shapes.

    Args:
        encoder: an `Encoder`.
        layers: see `encoder_states`.
        final_norm: see `encoder_states`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        batch_size: rows of a batch.
        pad_to: width of all batches, and of the result. With `None` batches of similar
            length are as wide as one of a few steps, and the result as its longest row.
        limit: maximum width.
    """

    def __init__(
        self,
        encoder: Any,
        layers: tuple[int, ...],
        final_norm: bool | None,
        dtype: str,
        batch_size: int,
        pad_to: int | None,
        limit: int,
    ) -> None:
        self.encoder = encoder
        self.count = len(layers)
        self.dtype = dtype
        self.batch_size = batch_size
        self.pad_to = pad_to
        self.limit = limit

        @inference()
        def states(token_ids, padding):
            found = encoder_states(encoder, token_ids, padding, layers, final_norm)
            return [ops.cast(x, dtype) for x in found]

        self._program = compiled(encoder, (layers, final_norm, dtype), states)

    def on_device(self, rows: TokenRows, width: int) -> list[Tensor]:
        """Arrays `(N, width, D)` of the backend, one for each layer."""
        parts: list[list[Tensor]] = [[] for _ in range(self.count)]
        order = []
        for chosen, found in self._batches(rows):
            order.append(chosen)
            for part, x in zip(parts, found, strict=True):
                part.append(_fit(x, len(chosen), width))
        if not order:
            shape = (0, width, self.encoder.stack.hidden_dim)
            return [ops.zeros(shape, self.dtype) for _ in parts]
        if len(order) == 1:
            return [part[0] for part in parts]
        places = np.argsort(np.concatenate(order))
        is_sorted = np.array_equal(places, np.arange(len(rows)))
        results = []
        while parts:  # Each layer's batches are freed when they are joined.
            joined = ops.concatenate(parts.pop(0))
            results.append(joined if is_sorted else ops.take(joined, places, axis=0))
        return results

    def on_host(self, rows: TokenRows, width: int) -> list[np.ndarray]:
        """NumPy arrays `(N, width, D)`, one for each layer."""
        shape = len(rows), width, self.encoder.stack.hidden_dim
        results = [np.zeros(shape, DTYPES[self.dtype]) for _ in range(self.count)]
        for chosen, found in self._batches(rows):
            for result, x in zip(results, found, strict=True):
                part = mesh.to_numpy(x)[: len(chosen), :width]
                result[chosen, : part.shape[1]] = part
        return results

    def _batches(self, rows):
        """`(row numbers, states)` of batches."""
        lengths = np.array([len(row) for row in rows], "int64")
        order = np.arange(len(rows))
        is_long = self.pad_to is None and lengths.max(initial=0) > SHORT
        if is_long or (self.pad_to is None and len(rows) > self.batch_size):
            order = np.argsort(-lengths, kind="stable")
        read = np.full(len(rows), self.pad_to) if self.pad_to else lengths[order]
        bounds = batch_bounds(read, self.batch_size, mesh.size("data"))
        show = len(rows) >= _MANY
        with progress_bar("Encoding", len(rows), verbose=show) as advance:
            for start, stop in bounds:
                chosen = order[start:stop]
                shape = self._shape(len(rows), len(chosen), int(lengths[chosen].max()))
                batch = arrays([rows[i] for i in chosen], shape)
                yield chosen, self._program(*mesh.split_rows(list(batch.values())))
                advance(len(chosen))

    def _shape(self, total: int, rows: int, longest: int) -> tuple[int, int]:
        """Rows and width of a batch: few different ones where programs are compiled."""
        # From 2 on: Keras warns of a softmax over a single key.
        if keras.config.backend() == "torch":
            return rows, max(2, self.pad_to or longest)
        width = self.pad_to or min(self.limit, bucket(longest, halves_from=16))
        most = rows_of_length(width, self.batch_size, mesh.size("data"))
        is_last = total <= self.batch_size or (width > SHORT and not self.pad_to)
        rows = min(most, power_of_two(rows)) if is_last else most
        return mesh.round_up(rows), max(2, width)


def _fit(x: Tensor, rows: int, width: int) -> Tensor:
    """The first rows, padded on the right with 0 or cut to a width."""
    if x.shape[0] > rows or x.shape[1] > width:
        x = x[:rows, :width]
    more = width - x.shape[1]
    return ops.pad(x, ((0, 0), (0, more), (0, 0))) if more else x


def hidden_states(
    encoder: Any, preprocessor: Any, texts: Sequence[str], *, as_numpy: bool, **options
) -> tuple[list, Any]:
    """States of texts, one array for each layer, and their padding mask.

    Args:
        encoder: an `Encoder`.
        preprocessor: a `Seq2SeqLMPreprocessor`.
        texts: see `token_rows`.
        as_numpy: return NumPy arrays.
        **options: of `StatesOfRows`.
    """
    pad_to = options["pad_to"]
    rows = token_rows(preprocessor, texts, pad_to)
    width = pad_to or max(map(len, rows), default=0)
    mask = padding_mask(rows, width)
    states = StatesOfRows(
        encoder, limit=preprocessor.encoder_sequence_length, **options
    )
    if as_numpy:
        return states.on_host(rows, width), mask
    return states.on_device(rows, width), ops.convert_to_tensor(mask)
