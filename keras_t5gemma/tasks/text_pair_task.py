"""`fit`, `evaluate` and `predict` on pairs of texts."""

import keras
import numpy as np

from keras_t5gemma.data.fit_adapters import fit_arguments
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.resumable import any_width
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.prediction import predict_on_batch
from keras_t5gemma.tasks.chunked_loss_task import ChunkedLossTask
from keras_t5gemma.tasks.fit import FitMixin
from keras_t5gemma.training.distillation import Distillation


class TextPairTask(FitMixin, ChunkedLossTask):
    """A `ChunkedLossTask` that takes text from wherever it comes.

    KerasHub's own methods take fewer kinds of data, and never shuffle.
    """

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        validation_data=None,
        validation_split=0.0,
        shuffle=True,
        sample_weight=None,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        batching=None,
        callbacks=None,
        **kwargs,
    ):
        """Train on text pairs, or on arrays of ids.

        In-memory text is tokenized once, before training. What the preprocessor's
        lengths cut is counted in a warning, and so are empty targets: those pairs
        stay, and teach the model to answer nothing.

        Args:
            x: a list of source strings (with `y`), a list of `(source, target)`
                pairs or of dicts, a dict of `"encoder_text"` and
                `"decoder_text"` lists, a `datasets.Dataset` with these columns, a
                `pathlib.Path` (see `read_pairs`); or batches of such: a generator,
                a `keras.utils.PyDataset`, `tf.data.Dataset`, Grain dataset or
                loader, PyTorch `DataLoader`; or the arrays that
                `preprocessor(...)` returns. With an objective in the preprocessor
                plain text in place of pairs: a list of strings, a dict or
                `datasets.Dataset` with `"text"`, a `pathlib.Path` (see
                `read_texts`), or batches of such.
            y: the list of target strings, or target ids.
            batch_size: pairs a step, for in-memory data; 32 when `None`.
            epochs: passes over the data.
            validation_data: `x`, `(x, y)`, or batches, as above.
            validation_split: share of in-memory pairs kept for validation,
                taken from the end before shuffling.
            shuffle: a new order every epoch, for in-memory data.
            sample_weight: one weight a pair, or one a target token with arrays.
            steps_per_epoch: batches an epoch, for endless data, or for less than all
                of the pairs; the next epoch goes on where this one ends.
            validation_steps: batches of a validation, always the first ones.
            validation_batch_size: `batch_size` when `None`.
            batching: how in-memory text fills batches. `"bucketed"`: pairs of
                similar length together, padded to at most four different shapes,
                so at most four programs are compiled for training. `"packed"`:
                several pairs in a row of the preprocessor's lengths, which do not
                see each other. `"fixed"`: every batch padded to the preprocessor's
                lengths. The loss is the same. `None`: packed with an objective, else
                bucketed.
            callbacks: of `keras.Model.fit`, or of `keras_t5gemma.callbacks`. A NaN loss
                stops the training always, see `StopOnNaN`.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for data that is no pairs, ids outside the vocabulary, or
                a model in pure float16, whose gradients are NaN.
        """
        return super().fit(
            x,
            y,
            batch_size,
            epochs,
            validation_data,
            validation_split,
            shuffle,
            sample_weight,
            steps_per_epoch,
            validation_steps,
            validation_batch_size,
            batching,
            callbacks,
            **kwargs,
        )

    def predict(self, x, y=None, batch_size=None, steps=None, **kwargs):
        """Logits `(pairs, decoder length, vocabulary)` of pairs, teacher-forced."""
        with self._report_truncation(empty_targets=False):
            data = self._data(x, y, None, batch_size, steps=steps, batching="fixed")
            if process_group.process_count() > 1 and isinstance(data["x"], PairDataset):
                return self._predict_together(data["x"])
            logits = keras.Model.predict(
                self,
                any_width(data["x"]),
                batch_size=data.get("batch_size"),
                steps=data["steps_per_epoch"],
                **kwargs,
            )
        # A mesh may have asked for a few rows more.
        rows = len(data["x"].packs) if isinstance(data["x"], PairDataset) else None
        return logits[:rows]

    def _predict_together(self, dataset):
        """The logits of all pairs in all processes, each of which reads its own."""
        own = [dataset[i][0] for i in range(dataset.batches_an_epoch())]
        logits = [predict_on_batch(self, x, is_local=True) for x in own]
        return np.concatenate(logits)[: len(dataset.packs)]

    def _teacher(self):
        """That of a `Distillation` loss, or `None`."""
        if not isinstance(self.loss_in_parts, Distillation):
            return None
        if self.loss_in_parts.teacher is None:
            raise ValueError(
                "The `Distillation` that this model was saved with has lost its "
                "teacher: compile again, with one."
            )
        return self.loss_in_parts.teacher

    def _data(self, *args, training=False, **kwargs):
        """`fit_arguments` of a user's data for this model."""
        size = self.backbone.config.vocabulary_size
        teacher = self._teacher() if training else None
        return fit_arguments(self.preprocessor, size, *args, teacher=teacher, **kwargs)
