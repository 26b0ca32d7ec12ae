"""Evaluation candidates: encoders, decoder-only models, and a TF-IDF baseline."""

import dataclasses
import gc
import hashlib
import os
from pathlib import Path

import keras

from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.gemma2_reader import open_gemma2
from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.evaluation import measures
from keras_t5gemma.evaluation.tasks import CLASSES, Task
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tasks.text_classifier import TextClassifier
from keras_t5gemma.tasks.text_embedder import TextEmbedder
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.utils.files import read_bytes

# A decoder-only Gemma expects bos before every text.
_AFTER_BOS = "<bos>{text}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training settings of a candidate.

    Attributes:
        epochs: passes over the training rows; the epoch best on validation is kept.
        batch_size: texts per step.
        retrieval_batch_size: pairs per step, also the number of documents that a query
            is compared with.
        lexical_dim: see `TextEmbedder`.
        pooling: of the classifier; embeddings use mean pooling.
        dropout: rate of the classifier's head.
        encoder_sequence_length: maximum tokens per text.
        dtype: dtype policy; `None` is Keras's.
        frozen: train only a linear model on the states of a frozen encoder.
    """

    epochs: int = 3
    batch_size: int = 32
    retrieval_batch_size: int = 64
    lexical_dim: int | None = None
    pooling: str = "last"
    dropout: float = 0.0
    encoder_sequence_length: int = 256
    dtype: str | None = None
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """A neural candidate.

    Attributes:
        preset: of T5Gemma, or of a decoder-only Gemma 2.
        kind: `"preset"`, `"scratch"` (random weights) or `"decoder_only"`.
    """

    preset: str
    kind: str
    has_seeds = True

    @property
    def name(self) -> str:
        """Name in tables; of a run's preset the name of the run."""
        folder = Path(self.preset)
        folder = Path(os.path.abspath(folder)) if folder.exists() else folder
        name = folder.parent.name if folder.name == "preset" else folder.name
        more = {"scratch": " from scratch", "decoder_only": " (decoder-only)"}
        return name + more.get(self.kind, "")

    def fingerprint(self) -> str:
        """Hex digest that changes with the weights; the name of a published preset."""
        folder = Path(self.preset)
        if not folder.is_dir():
            return self.preset
        contents = [_read(folder / "config.json")]
        if self.kind != "scratch":
            contents.append(_read(folder / "checksums.json"))
            if not contents[-1]:
                weights = [*folder.glob("*.h5"), *folder.glob("*.safetensors")]
                stats = [(path.name, path.stat()) for path in sorted(weights)]
                times = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
                contents.append(repr(times).encode())
        return hashlib.sha256(repr(contents).encode()).hexdigest()

    def check(self) -> None:
        """Raise the errors of loading, before any training."""
        if self.kind == "decoder_only":
            open_gemma2(self.preset, "decoder_only")
        else:
            open_checkpoint(self.preset)

    def run(
        self, task: Task, recipe: Recipe, seed: int, learning_rate: float
    ) -> tuple[dict[str, float], float]:
        """Train on a task and measure on its test rows.

        Returns:
            `(measures, valid)`; `valid` is the validation accuracy to choose by.
        """
        keras.utils.set_random_seed(seed)
        try:
            if task.kind == CLASSES:
                return self._classify(task, recipe, learning_rate)
            return self._retrieve(task, recipe, learning_rate)
        finally:
            keras.backend.clear_session()
            gc.collect()

    def _load(self, recipe):
        lengths = {"encoder_sequence_length": recipe.encoder_sequence_length}
        if self.kind == "decoder_only":
            keras_hub = require_keras_hub("A decoder-only candidate")
            backbone = keras_hub.models.GemmaBackbone.from_preset(
                self.preset, dtype=recipe.dtype
            )
            vocabulary = open_gemma2(self.preset, "decoder_only").vocabulary
            preprocessor = Seq2SeqLMPreprocessor(
                Tokenizer(vocabulary), template=_AFTER_BOS, **lengths
            )
            return backbone, preprocessor
        backbone = Backbone.from_preset(
            self.preset,
            load_weights=self.kind == "preset",
            encoder_only=True,
            dtype=recipe.dtype,
        )
        return backbone, Seq2SeqLMPreprocessor.from_preset(self.preset, **lengths)

    def _classify(self, task, recipe, learning_rate):
        if recipe.frozen:
            embedder = self._embedder(recipe, recipe.pooling, normalize=False)
            vectors = {split: embedder.embed for split in ("train", "test")}
            return _linear(task, vectors)
        model = TextClassifier(
            *self._load(recipe),
            class_names=task.class_names,
            pooling=recipe.pooling,
            dropout=recipe.dropout,
        )
        history = _train(model, task, recipe.batch_size, recipe.epochs, learning_rate)
        found = measures.of_classes(model.classify(task.test.x), task.test)
        return found, max(history["val_accuracy"])

    def _embedder(self, recipe, pooling="mean", **kwargs):
        return TextEmbedder(*self._load(recipe), pooling=pooling, **kwargs)

    def _retrieve(self, task, recipe, learning_rate):
        model, valid = self._embedder(recipe, lexical_dim=recipe.lexical_dim), 0.0
        if not recipe.frozen:
            size = recipe.retrieval_batch_size
            history = _train(model, task, size, recipe.epochs, learning_rate)
            valid = max(history["val_accuracy"])
        vectors = (model.embed(texts) for texts in (task.test.x, task.test.y))
        return measures.of_ranking(*vectors, task.test.y), valid


def _train(model, task, batch_size, epochs, learning_rate):
    """Train with AdamW, warm-up over 10 %, cosine decay to 0; keep the best epoch."""
    steps = epochs * -(-len(task.train) // batch_size)
    warmup = steps // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
    )
    model.compile(keras.optimizers.AdamW(rate, global_clipnorm=1.0))

    def say(epoch, logs):
        valid = f"{100 * logs['val_accuracy']:.1f} on the validation rows"
        print(f"  epoch {epoch + 1} of {epochs}: {valid}", flush=True)

    best = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=epochs, restore_best_weights=True
    )
    return model.fit(
        task.train.x,
        task.train.y,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(task.valid.x, task.valid.y),
        callbacks=[best, keras.callbacks.LambdaCallback(on_epoch_end=say)],
        verbose=0,
    ).history


def _linear(task, features):
    """Logistic regression on features, which are functions of texts."""
    from sklearn.linear_model import LogisticRegression

    train, test = (features[s](getattr(task, s).x) for s in ("train", "test"))
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    model = LogisticRegression(max_iter=500)
    model.fit((train - mean) / spread, task.train.y)
    predicted = model.predict((test - mean) / spread)
    return measures.of_classes(predicted.tolist(), task.test), 0.0


class TfIdf:
    """TF-IDF baseline: words and bigrams, with a linear model or cosine similarity."""

    name, has_seeds = "TF-IDF, linear", False

    def fingerprint(self) -> str:
        """Its name: there is nothing to load."""
        return self.name

    def check(self) -> None:
        """Nothing to load."""

    def run(
        self, task: Task, recipe: Recipe, seed: int, learning_rate: float
    ) -> tuple[dict[str, float], float]:
        """As `Model.run`, without seeds and validation."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC

        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        if task.kind == CLASSES:
            model = LinearSVC()
            model.fit(words.fit_transform(_joined(task.train.x)), task.train.y)
            predicted = model.predict(words.transform(_joined(task.test.x)))
            return measures.of_classes(predicted.tolist(), task.test), 0.0
        # Better here than bigrams, or document frequencies of the training rows.
        words.set_params(ngram_range=(1, 1), min_df=1).fit(task.test.y)
        queries, documents = map(words.transform, (task.test.x, task.test.y))
        return measures.of_ranking(queries, documents, task.test.y), 0.0


def _joined(texts):
    return ["\n".join(t) if isinstance(t, tuple) else t for t in texts]


def _read(file):
    return read_bytes(file) if file.exists() else b""
