"""What is measured: encoders, decoder-only models, and TF-IDF for comparison."""

import dataclasses
import gc
from pathlib import Path

import keras
import keras_hub

from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.gemma2_reader import open_gemma2
from keras_t5gemma.evaluation import measures
from keras_t5gemma.evaluation.tasks import CLASSES
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tasks.text_classifier import TextClassifier
from keras_t5gemma.tasks.text_embedder import TextEmbedder
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.tokenization.tokenizer import Tokenizer

# A decoder-only Gemma expects this before every text.
_AFTER_BOS = "<bos>{text}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained for a task.

    Attributes:
        epochs: passes over the training rows; kept is the best by validation.
        batch_size: texts a step.
        retrieval_batch_size: pairs a step; each has so many documents to choose from.
        lexical_dim: of the `TextEmbedder`.
        pooling: of the classifier; embeddings are the mean of the tokens.
        dropout: of what the classifier's head reads.
        encoder_sequence_length: tokens that are read, the same for all models.
        dtype: policy, `None` is Keras's.
        frozen: train no encoder, only a linear model on its states.
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
        kind: `"preset"`, `"scratch"` (its size, random weights) or `"decoder_only"`.
    """

    preset: str
    kind: str
    has_seeds = True

    @property
    def name(self):
        """In tables; a folder of the user's by its name, a run's by the run's."""
        folder = Path(self.preset)
        name = folder.parent.name if folder.name == "preset" else folder.name
        more = {"scratch": " from scratch", "decoder_only": " (decoder-only)"}
        return name + more.get(self.kind, "")

    def check(self):
        """Raise what loading would, before anything else is trained."""
        if self.kind == "decoder_only":
            open_gemma2(self.preset, "decoder_only")
        else:
            open_checkpoint(self.preset)

    def run(self, task, recipe, seed, learning_rate):
        """Train for a task, and measure.

        Returns:
            `(measures, valid)`, the second one what is chosen by.
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
            backbone = keras_hub.models.GemmaBackbone.from_preset(
                self.preset, dtype=recipe.dtype
            )
            file = open_gemma2(self.preset, "decoder_only").tokenizer_file
            preprocessor = Seq2SeqLMPreprocessor(
                Tokenizer(file), template=_AFTER_BOS, **lengths
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
    """AdamW, warm-up over a tenth, cosine to nothing; the best epoch's weights."""
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
    """Logistic regression of features, which are functions of texts."""
    from sklearn.linear_model import LogisticRegression

    train, test = (features[s](getattr(task, s).x) for s in ("train", "test"))
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    model = LogisticRegression(max_iter=500)
    model.fit((train - mean) / spread, task.train.y)
    predicted = model.predict((test - mean) / spread)
    return measures.of_classes(predicted.tolist(), task.test), 0.0


class TfIdf:
    """Words and pairs of words, weighed by how rare they are, and a linear model."""

    name, has_seeds = "TF-IDF, linear", False

    def check(self):
        """There is nothing to load."""

    def run(self, task, recipe, seed, learning_rate):
        """As `Model.run`; nothing is chosen, and there are no seeds."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC

        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        if task.kind == CLASSES:
            model = LinearSVC()
            model.fit(words.fit_transform(_joined(task.train.x)), task.train.y)
            predicted = model.predict(words.transform(_joined(task.test.x)))
            return measures.of_classes(predicted.tolist(), task.test), 0.0
        # Stronger here than with pairs of words, or with the training rows' rarities.
        words.set_params(ngram_range=(1, 1), min_df=1).fit(task.test.y)
        vectors = (words.transform(texts) for texts in (task.test.x, task.test.y))
        return measures.of_ranking(*vectors, task.test.y), 0.0


def _joined(texts):
    return ["\n".join(t) if isinstance(t, tuple) else t for t in texts]
