"""`fit` and `evaluate` of every task: text data, resuming, reports, validation."""

import contextlib
from typing import Any

import keras

from keras_t5gemma._compat import of_any_backend
from keras_t5gemma.data.resumable import ResumableDataset, any_width, follow
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.prediction import SafeInference, exclusive_loop
from keras_t5gemma.tasks.compiled_training import CompiledTraining
from keras_t5gemma.tokenization.token_ids import check_names
from keras_t5gemma.training import accumulation
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import StopOnNaN, TrainingReport
from keras_t5gemma.training.optimizers import (
    check_trainable_dtype,
    separate_averages,
)
from keras_t5gemma.utils.checks import MAX_ROWS, flag, is_auto, shown, whole_number


class FitMixin(CompiledTraining, SafeInference):
    """`fit` and `evaluate` on text, for a task with a `preprocessor`."""

    backbone: Any
    preprocessor: Any
    optimizer: Any

    def _data(self, x: Any, y: Any = None, *args: Any, **kwargs: Any) -> dict:
        """Keyword arguments of `keras.Model.fit` for a user's data.

        The arguments are those of `data.fit_adapters.fit_arguments` from `x` on, and
        `training`, whether the data is for training. With a validation split
        `"held_out"` is the dict for validation.
        """
        raise NotImplementedError

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
        """Train; see the `fit` of the task for the arguments."""
        check_trainable_dtype(self.backbone.variable_dtype)
        check_sizes(
            batch_size=batch_size,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
        )
        callbacks = _callbacks(callbacks)
        flag(shuffle, "shuffle")
        if self.preprocessor is not None:
            self.preprocessor.check_positions(positions_of(self.backbone))
        if kwargs.get("class_weight") is not None:
            self._weights_by_class(y, kwargs["class_weight"], sample_weight)
        whole_number(kwargs.get("initial_epoch", 0), "initial_epoch", 0)
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
                if not 1 <= len(validation_data) <= 3:
                    raise ValueError(
                        "`validation_data` must be x, (x, y) or (x, y, sample_weight); "
                        f"got {shown(validation_data)}."
                    )
                size = validation_batch_size
                size = batch_size if size is None else size
                valid = self._data(
                    *validation_data,
                    batch_size=size,
                    steps=validation_steps,
                    name="validation_data",
                    batching=batching,
                    like=data["x"],
                )
        if valid:
            kwargs |= _validation_arguments(valid)
        try:
            return self._fit(data, callbacks, epochs, kwargs)
        finally:
            for backup in callbacks:
                if isinstance(backup, BackupAndRestore):
                    backup.release()

    def _fit(self, data, callbacks, epochs, kwargs):
        """`keras.Model.fit` on the result of `_data`, with backup and reports."""
        backup = next((c for c in callbacks if isinstance(c, BackupAndRestore)), None)
        if backup is not None:
            start = backup.restore(self, data["x"])
            kwargs["initial_epoch"] = start or kwargs.get("initial_epoch", 0)
            callbacks.remove(backup)
            callbacks.append(backup)  # Last: it saves the logs of the others.
        self._check_processes(data["x"])
        dataset, data["x"] = data["x"], any_width(data["x"])
        # First and last: see `ApplyRest`.
        rest = accumulation.callbacks(self)
        callbacks = [*_reports(dataset, data["x"]), *rest, *callbacks, *rest]
        with self._report_truncation(), exclusive_loop(self, lent=False):
            history = keras.Model.fit(
                self, **data, epochs=epochs, callbacks=callbacks, **kwargs
            )
        separate_averages(self.optimizer)
        if backup is not None:
            history.history = backup.history
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        steps: int | None = None,
        batching: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loss and metrics of the model on data.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            batch_size: rows per step, for in-memory data; 32 when `None`.
            sample_weight: as in `fit`.
            steps: number of batches; `None` is all.
            batching: as in `fit`.
            **kwargs: further arguments of `keras.Model.evaluate`, e.g. `return_dict`.

        Returns:
            The loss and the metrics: a list, or a dict with `return_dict=True`.

        Raises:
            ValueError: as in `fit`.
        """
        check_sizes(batch_size=batch_size, steps=steps)
        if kwargs.get("_use_cached_eval_dataset"):  # Validation inside `fit`.
            kwargs |= {"sample_weight": sample_weight, "steps": steps}
            with exclusive_loop(self):
                return keras.Model.evaluate(self, x, y, batch_size, **kwargs)
        with self._report_truncation():
            data = self._data(
                x, y, sample_weight, batch_size, steps=steps, batching=batching
            )
            del data["shuffle"]
            data["steps"] = data.pop("steps_per_epoch")
            data["x"] = any_width(data["x"])
            with exclusive_loop(self):
                return keras.Model.evaluate(self, **data, **kwargs)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """`keras.Model.train_on_batch` of a batch of the texts of `fit`, or of arrays.

        Args:
            x: see `preprocess_samples`.
            y: as there.
            sample_weight: as there.
            class_weight: of a `TextClassifier`.
            **kwargs: `return_dict`.

        Returns:
            Loss and metrics, as of Keras.

        Raises:
            ValueError: for `class_weight` without classes.
        """
        if class_weight is not None and is_arrays(x):
            kwargs["class_weight"] = self._weights_by_number(class_weight)
        elif class_weight is not None:
            sample_weight = self._weights_by_class(y, class_weight, sample_weight)
        return super().train_on_batch(x, y, sample_weight, **kwargs)  # type: ignore[misc]

    def _weights_by_class(self, y, class_weight, sample_weight):
        """Weights of texts by their labels `y`, times `sample_weight`."""
        return self._weights_by_number(class_weight)

    def _weights_by_number(self, class_weight):
        """The `class_weight` of arrays, by the number of the class."""
        raise ValueError(
            "`class_weight` must be None: only a TextClassifier has classes. Pass "
            f"`sample_weight`; got {shown(class_weight)}."
        )

    def _labels_of_arrays(self, y):
        """The labels of a batch of arrays, as arrays."""
        return y

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
        """Arrays of one batch of `train_on_batch`, `test_on_batch`, `predict_on_batch`.

        Args:
            x: a batch of the texts that `fit` takes; or of arrays of ids.
            y: targets or labels, when `x` does not have them.
            sample_weight: as in `fit`.
        """
        if is_arrays(x) or self.preprocessor is None:
            if isinstance(x, dict):
                check_names(x, list(self.input), "`x`")  # type: ignore[attr-defined]
            y = self._labels_of_arrays(y)
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        return self._text_batch(x, y, sample_weight)

    def _text_batch(self, x, y, sample_weight):
        """Arrays of one batch of texts, `(x, y, sample_weight)`."""
        raise NotImplementedError

    def compile(self, *, jit_compile: Any = "auto", **kwargs: Any) -> None:
        """`keras.Model.compile`, which `"auto"` asks what the backend does."""
        super().compile(jit_compile=jit_compile, **kwargs)  # type: ignore[misc]
        self._is_auto_jit_compile = is_auto(jit_compile)

    def get_compile_config(self) -> dict | None:
        config = super().get_compile_config()  # type: ignore[misc]
        if config:  # It is compiled.
            encoder = getattr(self.backbone, "encoder", None)
            config["rematerialize"] = getattr(encoder, "rematerialize", False)
            config["optimizer_built"] = self.optimizer.built
            config["optimizer"] = of_any_backend(config["optimizer"])
            if self._is_auto_jit_compile:  # Keras keeps the answer of this backend.
                config["jit_compile"] = "auto"
        return config

    def compile_from_config(self, config: dict) -> None:
        config = dict(config)
        is_built = config.pop("optimizer_built", False)
        config["optimizer"] = of_any_backend(config["optimizer"])
        self.compile(**self._compile_arguments(config))  # type: ignore[attr-defined]
        if is_built:  # It has a state to load.
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    def _compile_arguments(self, config):
        """Arguments of `compile` of a serialized configuration."""
        return keras.saving.deserialize_keras_object(config)

    def _check_processes(self, dataset):
        """Raise `ValueError` when processes train different models or data."""
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

    def _report_truncation(self, training=True):
        if self.preprocessor is None:
            return contextlib.nullcontext()
        return self.preprocessor.report_truncation(training, all_threads=training)


def is_arrays(x: Any) -> bool:
    """Whether a user's data is a dict of arrays of ids."""
    return isinstance(x, dict) and "encoder_token_ids" in x


def positions_of(backbone: Any) -> int | None:
    """The `max_positions` of a backbone; `None` for one of KerasHub."""
    return getattr(getattr(backbone, "config", None), "max_positions", None)


def check_sizes(epochs: Any = 1, **sizes: Any) -> None:
    """Raise `ValueError` unless numbers of batches, rows and epochs are positive.

    Args:
        epochs: of `fit`.
        **sizes: by the names of the arguments; `None` is accepted.
    """
    whole_number(epochs, "epochs", 1)
    for name, value in sizes.items():
        if value is not None:
            high = MAX_ROWS if "batch_size" in name else None
            whole_number(value, name, 1, high)


def _callbacks(callbacks):
    """The `callbacks` of `fit` as a list."""
    if callbacks is None:
        return []
    found = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in found:
        if not isinstance(callback, keras.callbacks.Callback):
            raise ValueError(
                "`callbacks` must be a keras.callbacks.Callback or a list of them; "
                f"got {shown(callbacks)}."
            )
    return list(found)


def check_backbone(task: type, backbone: Any, is_backbone: bool, rest: tuple) -> None:
    """Raise unless a task was called with a backbone.

    Args:
        task: class of the task.
        backbone: first argument of the constructor.
        is_backbone: whether it is one that the task accepts.
        rest: positional arguments that the constructor does not have. It accepts them
            because `keras.models.clone_model` passes its graph to such a constructor
            alone; of others it makes a plain model, or fails without a reason.

    Raises:
        ValueError: for anything else.
    """
    parts = backbone if isinstance(backbone, list | tuple | dict) else [backbone]
    parts = list(parts.values()) if isinstance(parts, dict) else parts
    if parts and all(isinstance(part, keras.KerasTensor) for part in parts):
        raise ValueError(
            f"`keras.models.clone_model` cannot clone a {task.__name__}. Use "
            "`copy.deepcopy(model)`, which copies the weights too, or "
            f"`{task.__name__}.from_preset(preset, load_weights=False)`."
        )
    if not is_backbone or rest:
        found = rest[0] if rest else backbone
        name = f"An argument of {task.__name__}" if rest else "`backbone`"
        needed = "passed by its keyword" if rest else "a keras_t5gemma.Backbone"
        raise ValueError(f"{name} must be {needed}; got {shown(found)}.")


def _validation_arguments(valid):
    """Keyword arguments of `keras.Model.fit` for validation."""
    return {
        "validation_data": keras.utils.pack_x_y_sample_weight(
            any_width(valid["x"]), valid.get("y"), valid.get("sample_weight")
        ),
        "validation_steps": valid.get("steps_per_epoch"),
        "validation_batch_size": valid.get("batch_size"),
    }


def _reports(dataset, adapter):
    """The callbacks of every `fit`, in front of the user's."""
    if not isinstance(dataset, ResumableDataset):
        return [StopOnNaN()]
    return [follow(dataset, adapter), TrainingReport(dataset), StopOnNaN(dataset)]
