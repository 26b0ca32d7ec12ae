"""`fit`, `evaluate` and `predict` on pairs of texts."""

from typing import Any

import keras
import numpy as np

from keras_t5gemma.data.fit_adapters import fit_arguments
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.resumable import any_width
from keras_t5gemma.data.text_columns import TEXT_KEYS, as_columns, as_documents
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.prediction import exclusive_loop, predict_on_batch
from keras_t5gemma.modeling.exportable import Exportable
from keras_t5gemma.tasks.chunked_loss_task import ChunkedLossTask
from keras_t5gemma.tasks.fit import FitMixin, check_sizes
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.utils.texts import in_memory


class TextPairTask(FitMixin, Exportable, ChunkedLossTask):
    """A `ChunkedLossTask` with `fit`, `evaluate` and `predict` on text of any form.

    Those of KerasHub's tasks accept fewer kinds of data, and never shuffle.
    """

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        validation_data: Any = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        sample_weight: Any = None,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        batching: str | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train on text pairs, or on arrays of ids.

        In-memory text is tokenized once, before training. Sources are truncated to the
        preprocessor's `encoder_sequence_length`, 512 tokens unless it was set. A
        warning counts truncated and empty texts: pairs with an empty source or target
        are kept, and teach the model to answer without reading, or nothing.

        With `gradient_accumulation_steps=k` of the optimizer an update has the gradient
        of one batch as large as k: the mean over all their tokens. Batches left at the
        end of each `fit` make one more, smaller update: without it their data would be
        lost, and fewer than k batches would train nothing. After an exception the next
        `fit` continues the accumulation. Schedules and averages count updates.

        Args:
            x: a list of source strings (with `y`), a list of `(source, target)`
                pairs or of dicts, a dict of `"encoder_text"` and
                `"decoder_text"` lists, a `datasets.Dataset` with these columns, a
                `pathlib.Path` (see `read_pairs`); or batches of such: a generator,
                a `keras.utils.PyDataset` (read in one thread, in its order),
                `tf.data.Dataset`, Grain dataset or loader, PyTorch `DataLoader`; or the
                arrays that `preprocessor(...)` returns. With an objective in the
                preprocessor, plain text instead of pairs: a list of strings, a dict or
                `datasets.Dataset` with `"text"`, a `pathlib.Path` (see
                `read_texts`), or batches of such.
            y: the list of target strings, or target ids.
            batch_size: pairs per step, for in-memory data; 32 when `None`.
            epochs: passes over the data.
            validation_data: `x`, `(x, y)`, or batches, as above.
            validation_split: share of in-memory pairs kept for validation,
                taken from the end before shuffling.
            shuffle: a new order in every epoch, for in-memory data.
            sample_weight: one weight per pair, or per target token with arrays.
            steps_per_epoch: batches per epoch, required for an iterator, which may be
                endless; or for a part of the pairs. The next epoch continues where
                this one ends.
            validation_steps: batches of a validation, always the first ones; those of
                an iterator are kept in memory.
            validation_batch_size: `batch_size` when `None`.
            batching: how in-memory text fills batches. `"bucketed"`: pairs of
                similar length together, padded to at most four different shapes,
                so at most four programs are compiled for training. `"packed"`:
                several pairs in a row of the preprocessor's lengths, which do not
                attend to each other. `"fixed"`: every batch padded to the
                preprocessor's lengths. The loss is the same. `None`: packed with an
                objective, else bucketed. Batches that you make keep their rows: each
                side is padded to an eighth, a quarter or half of the preprocessor's
                length, or to all of it (few shapes, each a compiled program); always
                to all of it if `"fixed"`, for training on iterators on TensorFlow, and
                with several processes.
            callbacks: of `keras.Model.fit`, or of `keras_t5gemma.callbacks`. A NaN loss
                always stops the training, see `StopOnNaN`.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for data that is not text pairs, ids outside the vocabulary, or
                a model in pure float16, whose gradients overflow.
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

    def predict(
        self,
        x: Any,
        y: Any = None,
        batch_size: int | None = None,
        steps: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Logits of pairs, teacher-forced.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            batch_size: pairs per step, for in-memory data; 32 when `None`.
            steps: number of batches; `None` is all.
            **kwargs: further arguments of `keras.Model.predict`.

        Returns:
            `(pairs, decoder length, vocabulary)`; no pairs, `[]`, give an array of no
            rows.

        Raises:
            ValueError: as in `fit`.
        """
        check_sizes(batch_size=batch_size, steps=steps)
        is_empty = _is_empty(x) and (y is None or _is_empty(y))
        if self.preprocessor is not None and is_empty:
            length = self.preprocessor.decoder_sequence_length
            return np.zeros((0, length, self.output.shape[-1]), self.compute_dtype)
        with self._report_truncation(training=False):
            data = self._data(x, y, None, batch_size, steps=steps, batching="fixed")
            if process_group.process_count() > 1 and isinstance(data["x"], PairDataset):
                return self._predict_together(data["x"])
            kwargs |= {"batch_size": data.get("batch_size")}
            kwargs |= {"steps": data["steps_per_epoch"]}
            with exclusive_loop(self):
                logits = keras.Model.predict(self, any_width(data["x"]), **kwargs)
        # On a mesh the last batch may have filler rows.
        rows = len(data["x"].packs) if isinstance(data["x"], PairDataset) else None
        return logits[:rows]

    def _predict_together(self, dataset):
        """Logits of all pairs in every process; each process reads its own rows."""
        own = [dataset[i][0] for i in range(dataset.batches_an_epoch())]
        logits = [predict_on_batch(self, x, is_local=True) for x in own]
        return np.concatenate(logits)[: len(dataset.packs)]

    def _teacher(self):
        """The teacher of a `Distillation` loss, or `None`."""
        if not isinstance(self.chunked_loss, Distillation):
            return None
        if self.chunked_loss.teacher is None:
            raise ValueError(
                "A saved `Distillation` loss has no teacher: compile the model again "
                "with one."
            )
        return self.chunked_loss.teacher

    def _text_batch(self, x, y, sample_weight):
        """See `FitMixin`."""
        read = as_columns if self.preprocessor.objective is None else as_documents
        columns = read(x, y)
        if columns is None:
            raise ValueError(
                "`x` must be a batch of texts or of arrays of ids, as in `fit`; got "
                f"{type(x).__name__}."
            )
        return self.preprocessor.call(columns, sample_weight=sample_weight)

    def _data(self, *args, training=False, **kwargs):
        """See `FitMixin`."""
        size = self.backbone.config.vocabulary_size
        teacher = self._teacher() if training else None
        return fit_arguments(self.preprocessor, size, *args, teacher=teacher, **kwargs)


def _is_empty(x):
    """Whether columns in memory have no rows."""
    columns = in_memory(x, TEXT_KEYS)
    columns = list(columns.values()) if isinstance(columns, dict) else [columns]
    columns = [in_memory(column) for column in columns]
    return bool(columns) and all(isinstance(c, list | tuple) and not c for c in columns)
