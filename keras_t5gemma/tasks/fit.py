"""What `fit` and `evaluate` of every task do around Keras's."""

import contextlib

import keras

from keras_t5gemma.data.resumable import ResumableDataset, any_width, follow
from keras_t5gemma.distribution import process_group
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import StopOnNaN, TrainingReport
from keras_t5gemma.training.optimizers import separate_averages


class FitMixin:
    """`fit` and `evaluate` of a KerasHub task with a `preprocessor`, on text.

    A task says in `_data` what the arguments of a user become: keyword arguments of
    `keras.Model.fit`, and `"held_out"`, those of a validation split.
    """

    def _data(
        self,
        x,
        y=None,
        sample_weight=None,
        batch_size=None,
        shuffle=False,
        steps=None,
        name="x",
        validation_split=0.0,
        batching=None,
        like=None,
        training=False,
    ):
        raise NotImplementedError

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
        """Train; the arguments are those of the task."""
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
                training=True,
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
        self._agree(data["x"])
        if isinstance(data["x"], ResumableDataset):
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
        """Loss and metrics; the data arguments of `fit`."""
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

    def _agree(self, dataset):
        """Of several processes: all must do the same, each on its own rows."""
        distribution = keras.distribution.distribution()
        if process_group.process_count() == 1 or distribution is None:
            return
        steps = size = None
        if isinstance(dataset, ResumableDataset):
            distribution.auto_shard_dataset = False
            steps = dataset.batches_an_epoch()
            size = getattr(dataset, "batch_size", None)
        process_group.require_same(
            config=self.backbone.config.to_dict(),
            batches_an_epoch=steps,
            batch_size=size,
            optimizer=keras.optimizers.serialize(self.optimizer),
        )

    def _report_truncation(self, empty_targets=True):
        if self.preprocessor is None:
            return contextlib.nullcontext()
        return self.preprocessor.report_truncation(empty_targets)
