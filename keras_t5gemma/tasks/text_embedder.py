"""Text embeddings: pooled encoder states, for search, ranking and other models."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.data.encoder_dataset import by_length
from keras_t5gemma.data.text_batches import is_batches
from keras_t5gemma.data.text_columns import pairs_of
from keras_t5gemma.modeling import bases
from keras_t5gemma.modeling.encoder_states import (
    STATE_DTYPES,
    check_final_norm,
    layer_numbers,
)
from keras_t5gemma.modeling.heads import HybridVector, l2_normalize, pool
from keras_t5gemma.tasks.encoder_task import INPUTS, EncoderTask
from keras_t5gemma.tasks.fit import check_backbone, check_sizes, is_arrays
from keras_t5gemma.tasks.hidden_states import as_list, hidden_states
from keras_t5gemma.training.contrastive import InfoNCE, in_batch_accuracy
from keras_t5gemma.utils.checks import (
    flag,
    is_auto,
    one_of,
    rows_of_batch,
    whole_number,
)
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.texts import as_texts
from keras_t5gemma.utils.types import Tensor

PAIR = ("anchor", "positive")
# Names of their arrays in a batch: Keras needs those of the network's inputs.
_ARRAYS = {"anchor": "encoder", "positive": "positive"}
_MANY = 2_000  # Texts; fewer are embedded without a progress bar.


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TextEmbedder(EncoderTask):
    """Embed texts: one vector per text, near for matching texts.

    The pooled states of a pretrained encoder are weak embeddings; `fit` on pairs of
    matching texts trains them with a contrastive loss.

    Args:
        backbone: a `Backbone` without a decoder.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None` for arrays only, in
            `train_on_batch`, `predict_on_batch` and `predict`.
        pooling: `"mean"`, `"last"`, `"first"` or `"weighted"`, see `pool`.
        projection_dim: width of a learned linear map on top, or `None` for none.
        normalize: scale vectors to length 1.
        lexical_dim: number of additional dimensions with weights of the text's tokens,
            see `HybridVector`. They match names and rare words, which pooled states
            lose, those of small models first. With the size of the vocabulary all
            tokens are distinct, with a few thousand almost all. `None` for none.
        *rest: must be empty: what follows is passed by name.
        **kwargs: `name`, and `compile`, whether to compile at once.

    Raises:
        ValueError: for a backbone with a decoder, an unknown pooling, or
            `lexical_dim` without `normalize`.

    Examples:
        >>> embedder = keras_t5gemma.TextEmbedder.from_preset("t5gemma_mini")
        >>> vectors = embedder.embed(["a game of chess", "a mail server", "chess"])
        >>> numbers, cosines = keras_t5gemma.nearest(vectors[:1], vectors[1:], k=1)
        >>> numbers.shape
        (1, 1)
    """

    HEAD = ("projection_dim", "lexical_dim")
    _first_column = "anchor"

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        pooling: str = "mean",
        projection_dim: int | None = None,
        normalize: bool = True,
        lexical_dim: int | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        check_backbone(type(self), backbone, bases.is_backbone(backbone), rest)
        self._parts = 1
        if projection_dim is not None:
            projection_dim = rows_of_batch(projection_dim, "projection_dim")
        self.projection_dim = projection_dim
        self.normalize = flag(normalize, "normalize")
        if lexical_dim is not None:
            lexical_dim = rows_of_batch(lexical_dim, "lexical_dim")
            if not normalize:
                raise ValueError(
                    f"`normalize` must be True with `lexical_dim`; got {normalize!r}."
                )
        self.lexical_dim = lexical_dim

        def head(states, token_ids, padding):
            pooled = pool(states, padding, pooling)
            if projection_dim is not None:
                projection = keras.layers.Dense(
                    projection_dim, use_bias=False, dtype="float32", name="projection"
                )
                pooled = projection(pooled)
            if lexical_dim is not None:
                hybrid = HybridVector(lexical_dim, dtype="float32", name="hybrid")
                return hybrid(pooled, states, token_ids, padding)
            return l2_normalize(pooled) if normalize else pooled

        super().__init__(backbone, preprocessor, pooling, head, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        gradient_cache_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training on pairs.

        Args:
            optimizer: `"auto"` is Adafactor at 1e-4.
            loss: `"auto"` is `InfoNCE()`. Others get `(B, 2, D)`.
            weighted_metrics: `"auto"` is the in-batch accuracy: how often an anchor's
                own positive is the nearest of the batch.
            gradient_cache_rows: rows of a batch whose activations are in memory at a
                time; they are recomputed for the backward pass (arXiv 2101.06983).
                The result is the same, and large batches give many negatives. It must
                divide the batch size of `fit`.
            **kwargs: `rematerialize`, and those of `keras.Model.compile`.

        Raises:
            ValueError: for `gradient_cache_rows` below 1, or of a model with dropout.
        """
        if is_auto(weighted_metrics):
            metric = keras.metrics.MeanMetricWrapper(in_batch_accuracy, name="accuracy")
            weighted_metrics = [metric]
        if gradient_cache_rows is not None:
            rows_of_batch(gradient_cache_rows, "gradient_cache_rows")
            if getattr(self.backbone.config, "dropout", False):
                raise ValueError("`gradient_cache_rows` needs a model without dropout.")
        super().compile(
            optimizer=optimizer,
            loss=InfoNCE() if is_auto(loss) else loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.gradient_cache_rows, self._parts = gradient_cache_rows, 1

    def get_compile_config(self) -> dict | None:
        config = super().get_compile_config()
        if config:  # It is compiled.
            config["gradient_cache_rows"] = self.gradient_cache_rows
        return config

    def fit(  # type: ignore[override]
        self, x: Any = None, y: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> keras.callbacks.History:
        """Train on pairs of matching texts with in-batch negatives.

        Args:
            x: a dict of `"anchor"` and `"positive"`, lists of texts; a list of
                `(anchor, positive)`; or a list of anchors, with `y`; or batches as in
                `TextClassifier.fit`, `(anchors, positives)` or such a dict. The other
                positives of a batch are the negatives of an anchor.
            y: the list of positives, when `x` does not have them.
            batch_size: pairs per step, 32 when `None`; more pairs give more negatives.
            **kwargs: those of `Seq2SeqLM.fit`: `epochs`, `validation_data`,
                `validation_split`, `shuffle`, `sample_weight`, `callbacks`, ...

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for data that is not pairs of texts, or `gradient_cache_rows`
                that does not fit the batch size.
        """
        rows, size = self.gradient_cache_rows, 32 if batch_size is None else batch_size
        if rows is not None and is_batches(x):
            raise ValueError(
                "`gradient_cache_rows` needs data in memory, whose batches have one "
                f"size; got `x` of type {type(x).__name__}."
            )
        if rows is not None and (size % rows or rows < 1):
            raise ValueError(
                f"`gradient_cache_rows` must divide `batch_size` {size}; got {rows!r}."
            )
        self._parts = 1 if rows is None else size // rows
        return super().fit(x, y, batch_size, **kwargs)

    def call(
        self, inputs: dict, training: bool | None = None, mask: Any = None
    ) -> Tensor:
        """Vectors, float32 `(B, D)`; `(B, 2, D)` for a batch of pairs."""
        if "positive_token_ids" not in inputs:
            return super().call(inputs, training=training, mask=mask)
        sides = []
        for side in _ARRAYS.values():
            ids, padding = inputs[f"{side}_token_ids"], inputs[f"{side}_padding_mask"]
            sides.append(self._in_parts(ids, padding, training))
        return ops.stack(sides, axis=1)

    def _in_parts(self, ids, padding, training):
        def run(ids, padding):
            inputs = dict(zip(INPUTS, (ids, padding), strict=True))
            return super(TextEmbedder, self).call(inputs, training=training)

        parts = self._parts_of(ids.shape[0])
        if not training or parts == 1:
            return run(ids, padding)
        shape = (parts, -1, ops.shape(ids)[1])
        ids, padding = ops.reshape(ids, shape), ops.reshape(padding, shape)
        run = keras.remat(run)
        if keras.config.backend() == "jax":
            # A loop: XLA would run unrolled parts at the same time.
            vectors = ops.map(lambda part: run(*part), (ids, padding))
            return ops.reshape(vectors, (-1, vectors.shape[-1]))
        return ops.concatenate([run(ids[i], padding[i]) for i in range(parts)])

    def _parts_of(self, count):
        """The fewest equal parts of so many rows that the gradient cache allows."""
        rows = getattr(self, "gradient_cache_rows", None)
        if rows is None or count is None:  # `None`: in a program for all batches.
            return self._parts
        few = range(-(-count // rows), count + 1)
        return next((parts for parts in few if count % parts == 0), 1)

    def embed(
        self, texts: Sequence[str], batch_size: int = 32, dimensions: int | None = None
    ) -> np.ndarray:
        """Embed texts.

        JAX and TensorFlow compile one program for each shape of a batch: one of a few
        widths, and for fewer than `batch_size` texts their number, rounded up to a
        power of two.

        Args:
            texts: a list of strings, or any container of `to_list`; it may be empty.
            batch_size: maximum number of texts in a batch, for texts above 512 tokens
                also of `batch_size` x 512 tokens; texts of similar length share one.
            dimensions: cut vectors to this length, and normalize them again if they
                were (for a model trained with `InfoNCE(dimensions=...)`).

        Returns:
            float32 `(texts, dimensions)`, in the input order. A vector does not depend
            on the other texts, but for rounding; with int8 weights on a CPU activations
            are rounded to 8 bits.

        Raises:
            ValueError: when `texts` is not a list of texts, for empty texts, or more
                `dimensions` than the vectors have.
        """
        size = self.output.shape[-1]
        if dimensions is not None:
            dimensions = whole_number(dimensions, "dimensions", 1, size)
        texts = as_list(texts)
        result = np.zeros((len(texts), size), "float32")
        for rows, batch in self._by_length(texts, batch_size):
            result[rows] = self._infer(batch)[: len(rows)]
        result = result[:, :dimensions]
        if dimensions is not None and self.normalize:
            result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result

    def hidden_states(
        self,
        texts: Sequence[str],
        layers: int | Sequence[int] = -1,
        batch_size: int = 32,
        pad_to: int | None = None,
        *,
        final_norm: bool | None = None,
        dtype: str | None = None,
        as_numpy: bool = False,
    ) -> tuple[Any, Any]:
        """Encoder states of every token, e.g. for image, audio or video generators.

        JAX and TensorFlow compile one program for each shape of a batch: its number of
        texts, rounded up to a power of two, and `pad_to` or one of a few widths.

        Args:
            texts: a list of strings, or any container of `to_list`; it may be empty,
                and hold `""`, a row of padding.
            layers: one layer or a list of them, numbered as in transformers'
                `hidden_states`: 0 are the embeddings, i the states after block i, -1
                the last ones, -2 those before the last block. Blocks after the last
                layer do not run.
            batch_size: maximum number of texts in a batch, as in `embed`.
            pad_to: number of tokens that every text is padded to on the right, or
                truncated to; `None` is the length of the longest text.
            final_norm: `None` applies the encoder's final norm to the states after the
                last block only, as transformers does; `True` to those of every layer,
                `False` to none.
            dtype: of the states: `"float32"`, `"bfloat16"` or `"float16"` (whose
                largest number, 65504, states without the final norm may exceed);
                `None` is the compute dtype of the encoder.
            as_numpy: return NumPy arrays, copied from the device batch by batch.

        Returns:
            `(states, padding_mask)`: `(texts, tokens, width)`, 0 on padding, or a list
            of such arrays for a list of layers; and bool `(texts, tokens)`, `False` on
            padding. Both are arrays of the backend, on its device. With int8 weights on
            a CPU activations are rounded to 8 bits, which a `TextTower` does not.

        Raises:
            ValueError: for a layer that does not exist, a `pad_to` below 1 or above
                the limit of the texts, see `Seq2SeqLMPreprocessor`; an unknown dtype.
        """
        encoder = getattr(self.backbone, "encoder", None)
        if encoder is None:
            raise ValueError(
                "`hidden_states` needs a Backbone of keras_t5gemma; this task has a "
                f"{type(self.backbone).__name__}."
            )
        dtype = encoder.compute_dtype if dtype is None else dtype
        states, mask = hidden_states(
            encoder,
            self._reader(),
            texts,
            layers=layer_numbers(layers, len(encoder.blocks)),
            batch_size=rows_of_batch(batch_size),
            pad_to=pad_to,
            final_norm=check_final_norm(final_norm),
            dtype=one_of(dtype, "dtype", STATE_DTYPES),
            as_numpy=flag(as_numpy, "as_numpy"),
        )
        return (states if isinstance(layers, Sequence) else states[0]), mask

    def _by_length(self, texts, batch_size):
        self._need_preprocessor()
        rows_of_batch(batch_size)
        if not texts:
            return
        ids, limit = self._read({"texts": texts}, "texts")
        show = len(texts) >= _MANY
        with progress_bar("Embedding", len(texts), verbose=show) as advance:
            for rows, batch in by_length(ids, batch_size, limit):
                yield rows, batch
                advance(len(rows))

    def predict(self, x: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Vectors of texts, as `embed`; or of arrays, by `keras.Model.predict`.

        Args:
            x: a list of strings; or arrays of ids, without a preprocessor also a
                dataset of them.
            batch_size: maximum number of rows in a batch, 32 when `None`.
            **kwargs: for arrays those of `keras.Model.predict`.

        Returns:
            float32 `(rows, dimensions)`, in the input order.
        """
        check_sizes(batch_size=batch_size, steps=kwargs.get("steps"))
        columns = self._unlabeled(x)
        if columns is None:
            return super().predict(x, batch_size, **kwargs)
        size = 32 if batch_size is None else batch_size
        return self.embed(columns["encoder"], size)

    def _unlabeled(self, x):
        if self.preprocessor is None or is_arrays(x):
            return None
        return {"encoder": as_texts(x, "x")}

    def _columns(self, x, y, name):
        columns = pairs_of(x, y, PAIR, name)
        return {_ARRAYS[side]: column for side, column in columns.items()}, None

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "normalize": self.normalize,
            "lexical_dim": self.lexical_dim,
        }
