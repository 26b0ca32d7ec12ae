"""Bit-exact resume of `fit` after an interruption."""

import contextlib
import json
import math
import os
import warnings
from typing import Any

import h5py
import keras

from keras_t5gemma.checkpoints import folder_lock, h5_file, saved_files
from keras_t5gemma.checkpoints.atomic import atomic_folder, finish_interrupted_save
from keras_t5gemma.data.resumable import ResumableDataset
from keras_t5gemma.distribution import process_group
from keras_t5gemma.training import state_file
from keras_t5gemma.training.state_file import write as _write
from keras_t5gemma.utils.checks import path, whole_number
from keras_t5gemma.utils.files import read_json_file

_PROGRESS = "progress.json"


class BackupAndRestore(keras.callbacks.Callback):
    """Back up the state of `Seq2SeqLM.fit`; the same call resumes from it.

    Unlike Keras's callback of this name it also saves the position in the data, the
    random state, the metrics of the current epoch, and adapters separately from their
    base: on the same backend a resumed run ends with bit-identical weights. The backup
    is removed when training ends. Backups are atomic; when the disk is full there is a
    warning, the previous backup stays and training continues. After a NaN loss nothing
    is saved.

    With sharded state (`keras_t5gemma.distribute`) every process writes the shards of
    its own devices into a folder that all processes see; another number of devices or
    processes can resume from it.

    Other callbacks are not restored: `EarlyStopping` counts its patience from 0 again.

    Args:
        folder: path, used by this training alone. Other files in it stay.
        save_freq: `"epoch"`, or the number of batches between two backups.

    Raises:
        ValueError: for another `save_freq`. `fit` raises it for a backup of another
            model or of other data, for data that cannot be iterated again (arrays of
            ids, or a generator), and if files that are not the backup's are in the way.
    """

    def __init__(
        self, folder: str | os.PathLike, save_freq: str | int = "epoch"
    ) -> None:
        super().__init__()
        if not isinstance(save_freq, str) or save_freq != "epoch":
            save_freq = whole_number(save_freq, "save_freq", 1, other="'epoch'")
        self.folder = path(folder, "folder")
        self.save_freq = save_freq
        self.history: dict[str, list[float]] = {}
        self.data: Any = None
        self._lock: Any = None

    def restore(self, model: keras.Model, data: Any) -> int | None:
        """Restore model and data from the backup, if there is one.

        The folder is locked for other trainings until `release`.

        Args:
            model: the compiled `Seq2SeqLM`.
            data: the training data of `fit`.

        Returns:
            The epoch to start with; `None` without a backup.

        Raises:
            ValueError: for a backup of another model or other data, or data that is
                not a `ResumableDataset`.
            FolderInUseError: if another training uses the folder.
        """
        if not isinstance(data, ResumableDataset):
            raise ValueError(
                "BackupAndRestore needs a resumable dataset: text pairs, or batches "
                f"that can be iterated again; got {type(data).__name__}."
            )
        self.data = data
        self._unsaved, self._in_epoch, self._metrics = 0, 0, None
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder; {self.folder} is a file.")
        with process_group.all_or_none(f"{self.folder} was opened"):
            if process_group.process_index() == 0:
                self._lock = folder_lock.acquire(self.folder)
                finish_interrupted_save(self.folder)
        saved_files.refuse_foreign(self.folder, [*state_file.names(), _PROGRESS])
        path = self.folder / _PROGRESS
        if not path.exists():
            return None
        if not saved_files.is_marked(path):
            raise ValueError(f"{path} is damaged. Remove {self.folder} to start over.")
        progress = read_json_file(path)
        here = self._description(data)
        if progress["data"] != here:
            raise ValueError(
                f"{self.folder} is the backup of a training on other data: "
                f"{progress['data']}, here {here}. Remove the folder to start over."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        with contextlib.ExitStack() as stack:
            files = [self.folder / name for name in progress["files"]]
            files = [stack.enter_context(h5_file.open_file(path)) for path in files]
            for name, variables in self._variables(model).items():
                state_file.restore(self.folder, files, name, variables)
            self._metrics = state_file.read_values(files, "metrics")
        self.history = progress["history"]
        if hasattr(data, "seed"):
            data.seed = progress["seed"]
        data.start_at(progress["epoch"], progress["batch"])
        self._in_epoch = progress["batch"]
        return progress["epoch"]

    def release(self) -> None:
        """Unlock the folder: `fit` has ended, or was stopped."""
        if self._lock is not None:
            folder_lock.release(self._lock)
            self._lock = None
            saved_files.remove_if_empty(self.folder)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._before = epoch, self._in_epoch
        if self._metrics:  # Keras has reset them.
            variables = self.model.metrics_variables
            for variable, value in zip(variables, self._metrics, strict=True):
                variable.assign(value)
        self._metrics = None

    def on_train_batch_end(self, batch, logs=None):
        done = self._before + batch + 1
        self._unsaved += done - self._in_epoch
        self._in_epoch = done
        is_last = done >= self.data.batches_an_epoch()
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            if not is_last and _is_finite(logs):
                self._save(self._epoch, done)

    def on_epoch_end(self, epoch, logs=None):
        for key, value in (logs or {}).items():
            self.history.setdefault(key, []).append(float(value))
        self._in_epoch = 0
        due = self.save_freq == "epoch" or self._unsaved >= self.save_freq
        if due and _is_finite(logs):
            self._save(epoch + 1, 0)

    def on_train_end(self, logs=None):
        if process_group.process_index():
            return
        saved_files.remove(self.folder)
        self.release()

    def _save(self, epoch, batch):
        self._unsaved = 0
        model = self.model  # On JAX this brings the state into the variables.
        progress = {
            "epoch": epoch,
            "batch": batch,
            "seed": getattr(self.data, "seed", None),
            "data": self._description(self.data),
            "history": self.history,
            "files": state_file.names(),
        }
        try:
            with atomic_folder(self.folder, together=True, lock=False) as staging:
                own = staging / progress["files"][process_group.process_index()]
                with h5py.File(own, "w") as file:
                    for name, variables in self._variables(model).items():
                        _write(file.create_group(name), variables)
                    metrics = model.metrics_variables if batch else []
                    _write(file.create_group("metrics"), metrics)
                if process_group.process_index() == 0:
                    text = json.dumps(progress, indent=2)
                    (staging / _PROGRESS).write_text(text, encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"No backup at epoch {epoch}, batch {batch}: {error}. The previous one "
                "stays; training continues.",
                stacklevel=2,
            )

    @staticmethod
    def _variables(model):
        return {"model": model.variables, "optimizer": model.optimizer.variables}

    @staticmethod
    def _description(data):
        return {
            "batches an epoch": data.batches_an_epoch(),
            "batch size": getattr(data, "batch_size", None),
            "batching": getattr(data, "batching", None),
        }


def _is_finite(logs):
    return math.isfinite(float((logs or {}).get("loss", 0.0)))
