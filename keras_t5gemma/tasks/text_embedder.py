"""Texts to vectors: pooled encoder states, for search, ranking and other models."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.data.encoder_dataset import by_length, encoder_ids
from keras_t5gemma.data.text_columns import pairs_of
from keras_t5gemma.distribution.prediction import predict_on_batch
from keras_t5gemma.modeling.heads import HybridVector, l2_normalize, pool
from keras_t5gemma.tasks.encoder_task import INPUTS, EncoderTask
from keras_t5gemma.training.contrastive import InfoNCE, in_batch_accuracy
from keras_t5gemma.utils.checks import whole_number
from keras_t5gemma.utils.progress import progress_bar

PAIR = ("anchor", "positive")
# What their arrays are called: Keras wants those of the network.
_ARRAYS = {"anchor": "encoder", "positive": "positive"}
_MANY = 2_000  # Texts that take long enough to show a bar.


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TextEmbedder(EncoderTask):
    """A vector for each text, so that texts that belong together are near.

    A pretrained encoder gives vectors that are of some use; `fit` on pairs of texts
    that belong together makes them good.

    Args:
        backbone: a `Backbone` without a decoder.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None` to work on arrays only.
        pooling: `"mean"`, `"last"`, `"first"` or `"weighted"`, see `pool`.
        projection_dim: width of a learned linear map on top, or `None` for none.
        normalize: make vectors of length 1.
        lexical_dim: so many numbers more say which tokens a text has, each weighed by
            what it says about the text, see `HybridVector`. Names and rare words are
            found by them, which a pooled state forgets, that of a small model first.
            As many as the vocabulary keep all tokens apart, a few thousand nearly so.
            `None` for none.

    Raises:
        ValueError: for a backbone with a decoder, an unknown pooling, or
            `lexical_dim` without `normalize`.
    """

    HEAD = ("projection_dim", "lexical_dim")

    def __init__(
        self,
        backbone,
        preprocessor=None,
        pooling="mean",
        projection_dim=None,
        normalize=True,
        lexical_dim=None,
        **kwargs,
    ):
        self._parts = 1
        self.projection_dim = projection_dim
        self.normalize = normalize
        if lexical_dim is not None:
            lexical_dim = whole_number(lexical_dim, "lexical_dim", 1)
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
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        gradient_cache_rows=None,
        **kwargs,
    ):
        """Configure training on pairs.

        Args:
            optimizer: `"auto"` is Adafactor at 1e-4.
            loss: `"auto"` is `InfoNCE()`. One of your own gets `(B, 2, D)`.
            weighted_metrics: `"auto"` is how often an anchor's own positive is the
                nearest of the batch.
            gradient_cache_rows: so many rows of a batch are in memory at a time: the
                others are computed again for the backward pass (arXiv 2101.06983).
                The result is the same, the batch can be as large as the negatives
                should be many. It must divide the batch size.
            **kwargs: `rematerialize`, and those of `keras.Model.compile`.
        """
        if weighted_metrics == "auto":
            metric = keras.metrics.MeanMetricWrapper(in_batch_accuracy, name="accuracy")
            weighted_metrics = [metric]
        self.gradient_cache_rows = gradient_cache_rows
        super().compile(
            optimizer=optimizer,
            loss=InfoNCE() if loss == "auto" else loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def fit(self, x=None, y=None, batch_size=None, **kwargs):
        """Train on pairs of texts that belong together.

        Args:
            x: a dict of `"anchor"` and `"positive"`, lists of texts; a list of
                `(anchor, positive)`; or a list of anchors, with `y`. All other
                positives of a batch are taken for wrong ones.
            y: the list of positives, where `x` does not hold them.
            batch_size: pairs a step, 32 when `None`. More pairs are more negatives.
            **kwargs: those of `Seq2SeqLM.fit`: `epochs`, `validation_data`,
                `validation_split`, `shuffle`, `sample_weight`, `callbacks`, ...

        Returns:
            A `keras.callbacks.History`.
        """
        rows, size = self.gradient_cache_rows, batch_size or 32
        if rows is not None and (size % rows or rows < 1):
            raise ValueError(
                f"`gradient_cache_rows` must divide `batch_size` {size}; got {rows!r}."
            )
        if rows is not None and getattr(self.backbone.config, "dropout", 0):
            raise ValueError("`gradient_cache_rows` needs a model without dropout.")
        self._parts = 1 if rows is None else size // rows
        return super().fit(x, y, batch_size, **kwargs)

    def call(self, inputs, training=None, mask=None):
        """Vectors `(B, D)`, float32; of a batch of pairs `(B, 2, D)`."""
        if "positive_token_ids" not in inputs:
            return super().call(inputs, training=training, mask=mask)
        sides = []
        for side in _ARRAYS.values():
            arrays = [inputs[f"{side}_{n}"] for n in ("token_ids", "padding_mask")]
            sides.append(self._in_parts(*arrays, training))
        return ops.stack(sides, axis=1)

    def _in_parts(self, ids, padding, training):
        def run(ids, padding):
            inputs = dict(zip(INPUTS, (ids, padding), strict=True))
            return super(TextEmbedder, self).call(inputs, training=training)

        if not training or self._parts == 1:
            return run(ids, padding)
        shape = (self._parts, -1, ops.shape(ids)[1])
        ids, padding = ops.reshape(ids, shape), ops.reshape(padding, shape)
        run = keras.remat(run)
        if keras.config.backend() == "jax":
            # A loop: XLA would compute parts that only stand in a row all at once.
            vectors = ops.map(lambda part: run(*part), (ids, padding))
            return ops.reshape(vectors, (-1, vectors.shape[-1]))
        return ops.concatenate([run(ids[i], padding[i]) for i in range(self._parts)])

    def embed(self, texts, batch_size=32, dimensions=None):
        """Vectors of texts.

        Args:
            texts: a list of strings.
            batch_size: texts at a time; those of similar length are together.
            dimensions: cut vectors to so many numbers, and give them length 1 again
                if they have it (for a model trained with `InfoNCE(dimensions=...)`).

        Returns:
            float32 `(texts, dimensions)`, in order. A text's vector does not depend
            on the others.

        Raises:
            ValueError: for what is no list of texts, empty texts, or more
                `dimensions` than there are.
        """
        size = self.output.shape[-1]
        if dimensions is not None:
            dimensions = whole_number(dimensions, "dimensions", 1, size)
        result = np.zeros((len(texts), size), "float32")
        for rows, batch in self._by_length(texts, batch_size):
            result[rows] = self._run(self, batch)[: len(rows)]
        result = result[:, :dimensions]
        if dimensions is not None and self.normalize:
            result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result

    def hidden_states(self, texts, layer=-1, batch_size=32, sequence_length=None):
        """States of every token, as text towers of generators want them.

        Args:
            texts: a list of strings.
            layer: which of the states: 0 are the embeddings, i those after block i,
                -1 the last ones after the final norm, -2 those before the last
                block, as in transformers' `hidden_states`.
            batch_size: texts at a time.
            sequence_length: tokens that the arrays are padded to; `None` is as many
                as the longest text has.

        Returns:
            `(states, padding_mask)`: float32 `(texts, tokens, width)`, 0 on padding,
            and int32 `(texts, tokens)`.

        Raises:
            ValueError: for a layer that is not there, or a text that is longer than
                `sequence_length`.
        """
        encoder = self.backbone.encoder
        count = encoder.stack.num_layers
        layer = whole_number(layer, "layer", -count - 1, count) % (count + 1)
        arrays = [self.input[name] for name in INPUTS]
        tower = encoder(*arrays, layer=None if layer == count else layer)
        model = keras.Model(self.input, tower)
        batches = list(self._by_length(texts, batch_size))
        longest = max(int(b["encoder_padding_mask"].sum(1).max()) for _, b in batches)
        length = sequence_length or longest
        if longest > length:
            raise ValueError(
                f"`sequence_length` is {length}; the longest text has {longest} tokens."
            )
        states = np.zeros((len(texts), length, encoder.stack.hidden_dim), "float32")
        padding = np.zeros((len(texts), length), "int32")
        for rows, batch in batches:
            keep = batch["encoder_padding_mask"][: len(rows), :length]
            found = self._run(model, batch)[: len(rows), :length]
            width = keep.shape[1]
            states[rows, :width] = found * keep[..., None]
            padding[rows, :width] = keep
        return states, padding

    def _by_length(self, texts, batch_size):
        preprocessor = self._need_preprocessor()
        columns = {"texts": texts}
        (ids,) = encoder_ids(preprocessor, columns, "texts", self._token_rows)
        limit = preprocessor.encoder_sequence_length
        show = len(texts) >= _MANY
        with progress_bar("Embedding", len(texts), verbose=show) as advance:
            for rows, batch in by_length(ids, batch_size, limit):
                yield rows, batch
                advance(len(rows))

    @staticmethod
    def _run(model, batch):
        return np.asarray(predict_on_batch(model, batch), "float32")

    def _columns(self, x, y, name):
        columns = pairs_of(x, y, PAIR, name)
        return {_ARRAYS[side]: column for side, column in columns.items()}, None

    def get_config(self):
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "normalize": self.normalize,
            "lexical_dim": self.lexical_dim,
        }


def cosine_similarity(a, b):
    """Cosines `(n, m)` of vectors `(n, d)` and `(m, d)`, float32."""
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    a, b = (x / np.maximum(n, 1e-12) for x, n in zip((a, b), lengths, strict=True))
    return a @ b.T


def nearest(queries, vectors, k=10, rows_at_once=1024):
    """The k vectors that are nearest to each query.

    Args:
        queries: float `(n, d)`.
        vectors: float `(m, d)`.
        k: how many.
        rows_at_once: queries that are compared at a time.

    Returns:
        `(numbers, cosines)`, int64 and float32 `(n, k)`, the nearest first.

    Raises:
        ValueError: for a `k` that is not in 1..m.
    """
    k = whole_number(k, "k", 1, len(vectors))
    numbers, found = [], []
    for start in range(0, len(queries), rows_at_once):
        near = cosine_similarity(queries[start : start + rows_at_once], vectors)
        best = np.argsort(-near, axis=1, kind="stable")[:, :k]
        numbers.append(best)
        found.append(np.take_along_axis(near, best, axis=1))
    return np.concatenate(numbers), np.concatenate(found)
