"""Text classification and regression with a head on the encoder."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import huggingface_names, presets
from keras_t5gemma.data.class_labels import LabelReader
from keras_t5gemma.data.encoder_dataset import by_length
from keras_t5gemma.data.text_batches import is_batches
from keras_t5gemma.data.text_columns import texts_of
from keras_t5gemma.modeling import bases
from keras_t5gemma.modeling.heads import pool
from keras_t5gemma.tasks.encoder_task import EncoderTask
from keras_t5gemma.tasks.fit import check_backbone, is_arrays
from keras_t5gemma.utils.checks import (
    MAX_ROWS,
    instance,
    is_auto,
    number,
    one_of,
    row_weights,
    rows_of_batch,
    shown,
    string,
    whole_number,
)
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.ragged import Ragged
from keras_t5gemma.utils.texts import to_list

KINDS = ("single_label", "multi_label", "regression")
_MANY = 2_000  # Texts; fewer are classified without a progress bar.


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TextClassifier(EncoderTask):
    """Classification or regression of texts, or of pairs of texts.

    As in the paper (arXiv 2504.06225, section 4) a linear head reads the encoder state
    of the last token, and all weights are trained; `enable_lora` trains adapters.

    Args:
        backbone: a `Backbone` without a decoder; or KerasHub's `GemmaBackbone`, the
            same head on a decoder-only model.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None` for arrays only, in
            `train_on_batch`, `test_on_batch` and `predict_on_batch`.
        class_names: names of the classes, two or more; labels are these names.
        num_classes: number of classes, when labels are numbers from 0.
        kind: `"single_label"`, `"multi_label"` (any number of classes per text) or
            `"regression"`, one number per text.
        pooling: see `pool`.
        dropout: dropout rate of the pooled states in training.
        separator: between the texts of a pair.
        *rest: must be empty: what follows is passed by name.
        **kwargs: `name`, and `compile`, whether to compile at once.

    Raises:
        ValueError: for fewer than two classes, duplicate names, or arguments out of
            range.

    Examples:
        >>> classifier = keras_t5gemma.TextClassifier.from_preset(
        ...     "t5gemma_mini", class_names=["game", "library"]
        ... )
        >>> classifier.compile(keras.optimizers.AdamW(1e-3))
        >>> texts = ["A game of chess for two.", "Functions to read JSON files."]
        >>> history = classifier.fit(texts, ["game", "library"], epochs=1, verbose=0)
        >>> classifier.classify(["A board game."])[0] in classifier.class_names
        True
    """

    HEAD = ("class_names", "num_classes", "kind")
    _has_labels = True

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        class_names: Iterable[str] | None = None,
        num_classes: int | None = None,
        kind: str = "single_label",
        pooling: str = "last",
        dropout: float = 0.0,
        separator: str = "\n",
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        check_backbone(type(self), backbone, bases.is_backbone(backbone), rest)
        one_of(kind, "kind", KINDS)
        number(dropout, "dropout", at_least=0, below=1)
        string(separator, "separator")
        if class_names is not None:
            class_names = _names(class_names)
        outputs = 1
        if kind != "regression":
            outputs = 0 if class_names is None else len(list(class_names))
            if class_names is None:
                outputs = whole_number(
                    num_classes,
                    "num_classes",
                    2,
                    MAX_ROWS,
                    other="None with `class_names`,",
                )
            elif outputs < 2:
                raise ValueError(
                    f"`class_names` must be two classes at least; got {class_names!r}."
                )
            if num_classes is not None and outputs != whole_number(
                num_classes, "num_classes", 2, MAX_ROWS
            ):
                raise ValueError(
                    f"`num_classes` must be None or the number of `class_names`, "
                    f"{outputs}; got {shown(num_classes)}."
                )
            if class_names is not None and len(set(class_names)) < outputs:
                raise ValueError(f"`class_names` has a name twice: {class_names}.")
        self.class_names = class_names
        self.num_classes = None if kind == "regression" else outputs
        self.kind = kind
        self.dropout = dropout
        self.separator = separator

        def head(states, token_ids, padding):
            dtype = "float32"
            pooled = pool(states, padding, pooling)
            pooled = keras.layers.Dropout(dropout, dtype=dtype, name="dropout")(pooled)
            initializer = keras.initializers.RandomNormal(stddev=0.02)
            return keras.layers.Dense(
                outputs, kernel_initializer=initializer, dtype=dtype, name="classes"
            )(pooled)

        super().__init__(backbone, preprocessor, pooling, head, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Configure training.

        Args:
            optimizer: `"auto"` is Adafactor at 1e-4.
            loss: `"auto"` is the cross-entropy of the classes, the binary one of each
                class with `"multi_label"`, or the squared error. Others get logits; the
                mean of all is by the weights of rows.
            weighted_metrics: `"auto"` is the accuracy, or the absolute error.
            **kwargs: `rematerialize`, and those of `keras.Model.compile`.
        """
        losses, metrics = keras.losses, keras.metrics
        auto = {
            "single_label": (
                losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics.SparseCategoricalAccuracy("accuracy"),
            ),
            "multi_label": (
                losses.BinaryCrossentropy(from_logits=True),
                metrics.BinaryAccuracy("accuracy", threshold=0.0),
            ),
            "regression": (
                losses.MeanSquaredError(),
                metrics.MeanAbsoluteError("absolute_error"),
            ),
        }[self.kind]
        if is_auto(weighted_metrics):
            weighted_metrics = [auto[1]]
        super().compile(
            optimizer=optimizer,
            loss=auto[0] if is_auto(loss) else loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def fit(  # type: ignore[override]
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *,
        class_weight: dict | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train on texts and labels.

        Args:
            x: a list of texts, or of pairs of texts; or a dict or a table of `"text"`
                and, for pairs, `"text_pair"`. A list may be any container of `to_list`.
                Or batches `(x, y)` or `(x, y, sample_weight)`, in which pairs are a
                dict: a generator, a `keras.utils.PyDataset`, `tf.data.Dataset`, PyTorch
                `DataLoader`; see `batching` of `Seq2SeqLM.fit`.
            y: one label per text: a name, or a number from 0 without names; with
                `"regression"` a number. With `"multi_label"` a list of labels per text,
                or a row with a zero or one for each class: rows of exactly
                `num_classes` zeros and ones are read as such, `[0, 1]` of two classes
                is the second one. A table has a column of them for each class.
            batch_size: texts per step, 32 when `None`.
            class_weight: dict of labels and the weights of their texts, 1 for others,
                for `"single_label"`; multiplied with `sample_weight`. As in Keras it
                does not weigh the texts that `validation_split` holds out.
            **kwargs: those of `Seq2SeqLM.fit`: `epochs`, `validation_data`,
                `validation_split`, `shuffle`, `sample_weight`, `callbacks`, ...

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for unknown labels, rows that may be labels or zeros and ones,
                NaN, or empty texts.
        """
        if class_weight is not None and is_batches(x):
            raise ValueError(
                "`class_weight` needs data in memory; batches hold weights of rows: "
                "(texts, labels, weights)."
            )
        if class_weight is not None:
            held_out = kwargs.get("validation_split", 0.0)
            number(held_out, "validation_split", at_least=0, below=1)
            kwargs["sample_weight"] = self._weights_by_class(
                y, class_weight, kwargs.get("sample_weight"), held_out
            )
        return super().fit(x, y, batch_size, **kwargs)

    def _weights_by_class(self, y, class_weight, sample_weight, held_out=0.0):
        """See `FitMixin`; those of the share that is held out, from the end, are 1."""
        weights = self._label_reader().weights(y, class_weight)
        weights[len(weights) - int(len(weights) * held_out) :] = 1
        if sample_weight is None:
            return weights
        return weights * row_weights(sample_weight, "sample_weight", len(weights))

    def _weights_by_number(self, class_weight):
        return self._label_reader().weights_by_number(class_weight)

    def _labels_of_arrays(self, y):
        return self._label_reader().beside_arrays(y)

    def predict(self, x: Any, batch_size: int = 32) -> np.ndarray:
        """Probabilities of the classes.

        Args:
            x: texts, or pairs of texts, as in `fit`.
            batch_size: maximum number of texts in a batch, for texts above 512 tokens
                also of `batch_size` x 512 tokens; texts of similar length share one.

        Returns:
            float32 `(texts, classes)`, with sum 1 except for `"multi_label"`; with
            `"regression"` the numbers, `(texts,)`. With int8 weights on a CPU
            activations are rounded to 8 bits.
        """
        columns = texts_of(x, "x")
        self._need_preprocessor()
        ids, limit = Ragged.from_rows([]), 0
        rows_of_batch(batch_size)
        if any(columns.values()):
            ids, limit = self._read(columns, "x")
        logits = np.zeros((len(ids), self.output.shape[-1]), "float32")
        with progress_bar(
            "Classifying", len(ids), verbose=len(ids) >= _MANY
        ) as advance:
            for rows, batch in by_length(ids, batch_size, limit):
                found = self._infer(batch)
                logits[rows] = found[: len(rows)]
                advance(len(rows))
        if self.kind == "regression":
            return logits[:, 0]
        if self.kind == "multi_label":
            return 1 / (1 + np.exp(-logits))
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        return logits / logits.sum(axis=1, keepdims=True)

    def classify(self, x: Any, batch_size: int = 32, threshold: float = 0.5) -> list:
        """The class of each text.

        Args:
            x: as in `predict`.
            batch_size: as in `predict`.
            threshold: with `"multi_label"`, minimum probability of a class.

        Returns:
            A name per text, or a number without names; with `"multi_label"` a list of
            them per text.

        Raises:
            ValueError: for `"regression"`, which has no classes, or a threshold outside
                of 0 to 1.
        """
        if self.kind == "regression":
            raise ValueError("A regression has no classes: use `predict`.")
        number(threshold, "threshold", at_least=0, at_most=1)
        names: Any = self.class_names or range(self.num_classes or 0)
        shares = self.predict(x, batch_size)
        if self.kind == "single_label":
            return [names[i] for i in shares.argmax(axis=1)]
        return [[names[i] for i in np.flatnonzero(row > threshold)] for row in shares]

    @classmethod
    def _foreign_head(cls, source):
        config = source.config
        return (
            source.format == presets.HUGGING_FACE
            and config.get("architectures") == ["T5GemmaForSequenceClassification"]
            and config.get("is_encoder_decoder") is False
        )

    @classmethod
    def _saved_config(cls, source):
        """The saved arguments; those of transformers' config if its head is taken."""
        if not source.takes_head:
            return super()._saved_config(source)
        labels = source.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        names = [name for _, name in sorted((int(i), n) for i, n in labels.items())]
        found = source.config.get("problem_type")
        if len(names) == 1 or found == "regression":
            return {"kind": "regression"}
        is_multi = found == "multi_label_classification"
        kind = "multi_label" if is_multi else "single_label"
        return {"class_names": names, "kind": kind}

    def _load_foreign_head(self, source):
        layer = self.get_layer("classes")
        width, classes = layer.kernel.shape
        kernel, bias = huggingface_names.read_head(source, width, classes)
        layer.kernel.assign(kernel.T.astype("float32"))
        if bias is not None:
            layer.bias.assign(bias.astype("float32"))

    def _columns(self, x, y, name):
        if y is None:
            raise ValueError(
                f"`{name}` must come with labels: as `y`, or in batches (texts, "
                f"labels) of an iterable; got none with {type(x).__name__}."
            )
        return texts_of(x, name), self._labels(y)

    def _unlabeled(self, x):
        if is_arrays(x) or self.preprocessor is None:
            return None
        return texts_of(x, "x")

    def _labels(self, y):
        return self._label_reader().read(y)

    def _label_reader(self):
        return LabelReader(self.kind, self.class_names, self.num_classes)

    def _token_rows(self, columns, preprocessor=None):
        """Token ids of texts, or of pairs, truncating the longer text first."""
        if len(columns) == 1:
            return super()._token_rows(columns, preprocessor)
        preprocessor = preprocessor or self.preprocessor
        if preprocessor.template is not None:
            joined = map(self.separator.join, zip(*columns.values(), strict=True))
            return [preprocessor.encoder_rows(list(joined))]
        limit = preprocessor.encoder_sequence_length
        between = preprocessor.tokenizer.tokenize(self.separator)
        first, second = (preprocessor.tokenizer.tokenize(c) for c in columns.values())
        room = max(2, limit - len(between))
        rows, cut = [], 0
        for a, b in zip(first, second, strict=True):
            keep = min(len(a), max(room - len(b), room // 2))
            rows.append([*a[:keep], *between, *b[: room - keep]])
            cut += len(a) + len(b) > room
        preprocessor.count("encoder", cut, len(rows))
        return [rows]

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "class_names": self.class_names,
            "num_classes": self.num_classes,
            "kind": self.kind,
            "dropout": self.dropout,
            "separator": self.separator,
        }


def _names(class_names):
    """Names of classes as a list of strings or numbers."""
    names = to_list(class_names, "class_names")
    for name in names:
        instance(name, "class_names", str | int, "strings or whole numbers")
    return names
