"""`fit`, `evaluate` and `predict` on pairs of texts."""

import contextlib

import keras

from keras_t5gemma.text.batches import fit_arguments
from keras_t5gemma.text.epochs import Epochs, any_width, follow
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import StopOnNaN, TrainingReport
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.training.optimizers import separate_averages
from keras_t5gemma.training.token_task import TokenTask


class TextTask(TokenTask):
    """A `TokenTask` that takes text from wherever it comes.

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

        In-memory text is tokenised once, before training. What the preprocessor's
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
        if self.backbone.variable_dtype == "float16":
            raise ValueError(
                "A float16 model cannot be trained: its gradients overflow. Load "
                "it with dtype='mixed_float16', 'bfloat16' or 'float32'."
            )
        with self._report_truncation():  # Of in-memory text, before training.
            data = self._data(
                x,
                y,
                sample_weight,
                batch_size,
                shuffle,
                steps_per_epoch,
                validation_split=validation_split,
                batching=batching,
                teacher=self._teacher(),
            )
            valid = data.pop("held_out", {})
            if validation_data is not None:
                if not isinstance(validation_data, tuple):
                    validation_data = (validation_data,)
                size = validation_batch_size or batch_size
                valid = self._data(
                    *validation_data,
                    batch_size=size,
                    steps=validation_steps,
                    name="validation_data",
                    batching=batching,
                    like=data["x"],
                )
        if valid:
            kwargs["validation_data"] = keras.utils.pack_x_y_sample_weight(
                any_width(valid["x"]), valid.get("y"), valid.get("sample_weight")
            )
            kwargs["validation_steps"] = valid.get("steps_per_epoch")
            kwargs["validation_batch_size"] = valid.get("batch_size")
        callbacks = keras.tree.flatten(callbacks or [])
        backup = next((c for c in callbacks if isinstance(c, BackupAndRestore)), None)
        if backup is not None:
            start = backup.restore(self, data["x"])
            kwargs["initial_epoch"] = start or kwargs.get("initial_epoch", 0)
            callbacks.remove(backup)
            callbacks.append(backup)  # It keeps what the others have logged.
        if isinstance(data["x"], Epochs):
            dataset, data["x"] = data["x"], any_width(data["x"])
            report = [TrainingReport(dataset), StopOnNaN(dataset)]
            callbacks = [follow(dataset, data["x"]), *report, *callbacks]
        else:
            callbacks = [StopOnNaN(), *callbacks]
        with self._report_truncation():
            history = keras.Model.fit(
                self, **data, epochs=epochs, callbacks=callbacks, **kwargs
            )
        separate_averages(self.optimizer)
        if backup is not None:
            history.history = backup.history
        return history

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        steps=None,
        batching=None,
        **kwargs,
    ):
        """Loss and metrics on pairs; the data arguments of `fit`."""
        if kwargs.get("_use_cached_eval_dataset"):  # `fit` validates, on its own data.
            return keras.Model.evaluate(
                self,
                x,
                y,
                batch_size,
                sample_weight=sample_weight,
                steps=steps,
                **kwargs,
            )
        with self._report_truncation():
            data = self._data(
                x, y, sample_weight, batch_size, steps=steps, batching=batching
            )
            del data["shuffle"]
            data["steps"] = data.pop("steps_per_epoch")
            data["x"] = any_width(data["x"])
            return keras.Model.evaluate(self, **data, **kwargs)

    def predict(self, x, y=None, batch_size=None, steps=None, **kwargs):
        """Logits `(pairs, decoder length, vocabulary)` of pairs, teacher-forced."""
        with self._report_truncation(empty_targets=False):
            data = self._data(x, y, None, batch_size, steps=steps, batching="fixed")
            return keras.Model.predict(
                self,
                any_width(data["x"]),
                batch_size=data.get("batch_size"),
                steps=data["steps_per_epoch"],
                **kwargs,
            )

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

    def _data(self, *args, **kwargs):
        """`fit_arguments` of a user's data for this model."""
        size = self.backbone.config.vocabulary_size
        return fit_arguments(self.preprocessor, size, *args, **kwargs)

    def _report_truncation(self, empty_targets=True):
        if self.preprocessor is None:
            return contextlib.nullcontext()
        return self.preprocessor.report_truncation(empty_targets)
