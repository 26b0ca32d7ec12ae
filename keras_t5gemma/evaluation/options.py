"""Options of `evaluate_encoders`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from keras_t5gemma.utils.checks import flag, number, path, string, whole_number
from keras_t5gemma.utils.options import PathOrName, PathsOrNames, check_choices

_COUNTS = (
    "seeds",
    "epochs",
    "batch_size",
    "retrieval_batch_size",
    "train_rows",
    "encoder_sequence_length",
    "lexical_dim",
)


@dataclasses.dataclass
class EvaluateOptions:
    """Options of `evaluate_encoders`."""

    tasks: PathsOrNames
    """Names among boolq, cb, copa, multirc, rte, wic, wsc (SuperGLUE), or names of
    folders in `data` whose rows have text (and text_pair) and label, or query and
    document."""
    data: PathOrName
    """Folder with one folder per task."""
    output: PathOrName
    """Folder for results.json, results.md and run.yaml; its finished runs are not
    repeated."""
    presets: PathsOrNames = ()
    """T5Gemma presets whose encoders are measured."""
    scratch: PathsOrNames = ()
    """Presets whose encoders are measured with random weights."""
    decoder_only: PathsOrNames = ()
    """KerasHub Gemma 2 presets to compare with, trained with the same head."""
    tfidf: bool = False
    """Also measure a linear model on TF-IDF features."""
    frozen: bool = False
    """Keep the encoders frozen: train a linear model on their states, and search with
    embeddings that were not trained."""
    seeds: int = 3
    """Number of trainings per model."""
    learning_rates: float | str | Sequence[float | str] = (1e-4,)
    """Learning rates to choose among."""
    epochs: int = 3
    """Maximum passes over the training rows; the epoch best on validation is kept."""
    batch_size: int = 32
    """Texts per step."""
    retrieval_batch_size: int = 64
    """Pairs per step of a retrieval task."""
    lexical_dim: int | None = None
    """Additional bag-of-tokens dimensions of the vectors in retrieval; see
    `TextEmbedder`."""
    pooling: Literal["mean", "last", "first", "weighted"] = "last"
    """Pooling of the classifiers."""
    dropout: float = 0.0
    """Dropout rate of the classifier's head."""
    encoder_sequence_length: int = 256
    """Maximum number of tokens of a text, the same for all models."""
    train_rows: int | None = None
    """Number of training rows used per task, after a shuffle that is the same for all
    models; None is all."""
    dtype: str | None = None
    """Data type of the models, e.g. bfloat16; None is Keras's default."""

    def check(self) -> None:
        """Check choices and ranges.

        Raises:
            ValueError: naming the option, its value and what is accepted.
        """
        check_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _COUNTS and not (value is None and field.default is None):
                whole_number(value, field.name, 1)
        path(self.data, "data")
        path(self.output, "output")
        for name in ("tfidf", "frozen"):
            flag(getattr(self, name), name)
        if self.dtype is not None:
            string(self.dtype, "dtype")
            if self.dtype.startswith(("int", "float8")) and not self.frozen:
                raise ValueError(
                    f"`dtype` {self.dtype!r} has quantized weights, which are not "
                    "trained: pass `frozen`, or a type of floats."
                )
        number(self.dropout, "dropout", at_least=0, below=1)
