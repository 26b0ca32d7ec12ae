"""Datasets that know their epoch, and that can resume in the middle of one."""

import contextlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_t5gemma import _compat
from keras_t5gemma.distribution import process_group

MASK = "_padding_mask"  # The end of the names of such arrays.


class ResumableDataset(keras.utils.PyDataset):
    """A dataset that knows its epoch, and that can resume in the middle of one.

    Keras calls `on_epoch_begin` also for an epoch that it only uses to build a model.
    So a callback, `follow(dataset)`, sets the number of the epoch, and batch i of epoch
    e is the same at every time and in every thread.

    Attributes:
        epoch: the current epoch, from 0.
        skipped: number of batches that the current epoch leaves out at its start.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epoch = self.skipped = 0
        self._start: tuple[int | None, int] = (None, 0)
        self._counts: dict[int, tuple[int, int]] = {}
        self._quiet = contextlib.ExitStack()

    def batches_an_epoch(self) -> int:
        """Batches of a whole epoch."""
        raise NotImplementedError

    @property
    def num_batches(self) -> int:
        """Batches of the current epoch."""
        return self.batches_an_epoch() - self.skipped

    def start_at(self, epoch: int, batch: int) -> None:
        """Resume in the middle of an epoch, after the batches of an earlier run.

        Args:
            epoch: the epoch that `fit` starts with, its `initial_epoch`.
            batch: number of batches to leave out at its start.

        Raises:
            ValueError: for a batch that the epoch does not have.
        """
        if not 0 <= batch < self.batches_an_epoch():
            raise ValueError(
                f"`batch` must be in [0, {self.batches_an_epoch()}), the batches of an "
                f"epoch; got {batch!r}."
            )
        self._start = (epoch, batch)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, before any batch of it is read."""
        self.epoch = epoch
        self.skipped = self._start[1] if epoch == self._start[0] else 0

    def on_epoch_begin(self):
        if self.skipped:
            # Keras expects every epoch to have the same length.
            self._quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Your input ran out of data")

    def on_epoch_end(self):
        self._quiet.close()
        self.skipped = 0

    def counts(self, step: int) -> tuple[int, int]:
        """Number of tokens in a batch of the current epoch.

        Args:
            step: Keras's number of the batch, from 0, not counting skipped batches.

        Returns:
            `(tokens, positions)` of encoder and decoder together, without and with
            padding; `(0, 0)` for a batch without padding masks.
        """
        return self._counts.get(step, (0, 0))

    def rows(self, step: int) -> list[int] | None:
        """Numbers of the pairs in a batch of the current epoch, `None` if unknown."""
        return None

    def _position(self, index):
        """Number of a batch, counted from the first epoch."""
        return self.epoch * self.batches_an_epoch() + self.skipped + index

    def _count(self, step, batch):
        """Record the `counts` of a batch, and return the batch."""
        x = batch[0] if isinstance(batch, tuple) else batch
        names = [name for name in x if name.endswith(MASK)] if _is_dict(x) else []
        if names:
            masks = [keras.ops.convert_to_numpy(x[name]) for name in names]
            tokens = sum(int((mask > 0).sum()) for mask in masks)
            self._counts[step] = (tokens, sum(mask.size for mask in masks))
        return batch


def _is_dict(x):
    return isinstance(x, dict) and all(isinstance(name, str) for name in x)


def draw_seed() -> int:
    """A seed that `keras.utils.set_random_seed` makes repeatable.

    All processes call it and get the seed of the first one.
    """
    return process_group.from_first(int(np.random.randint(2**31)))


def follow(dataset: ResumableDataset, adapter: Any = None) -> keras.callbacks.Callback:
    """The callback of `fit` that sets the epoch of a dataset.

    Args:
        dataset: a `ResumableDataset`.
        adapter: what `any_width` returned for it.
    """
    return _Follow(dataset, adapter)


class _Follow(keras.callbacks.Callback):
    def __init__(self, dataset, adapter):
        super().__init__()
        self.dataset = dataset
        self.adapter = None if adapter is dataset else adapter
        self.has_stopped = False

    def on_epoch_begin(self, epoch, logs=None):
        self.dataset.set_epoch(epoch)

    def on_train_batch_end(self, batch, logs=None):
        # On TensorFlow Keras asks for the skipped batches too, and what it gets at the
        # end of the data would update the weights once more.
        is_short = self.dataset.skipped and self.adapter is not None
        if is_short and batch + 1 >= self.dataset.num_batches:
            self.has_stopped = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self.has_stopped:
            self.model.stop_training = self.has_stopped = False
            self.adapter.on_epoch_end()


def any_width(dataset: Any) -> Any:
    """Data for `keras.Model.fit` from a dataset whose batches differ in shape.

    On TensorFlow Keras takes the widths of the first batches for those of all, unless
    the adapter has a signature with unknown dimensions.
    """
    if keras.config.backend() != "tensorflow" or not isinstance(
        dataset, ResumableDataset
    ):
        return dataset
    import tensorflow as tf

    batch = dataset[0]
    if not all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(batch)):
        return dataset

    def spec(array):
        dtype = keras.backend.standardize_dtype(array.dtype)
        return tf.TensorSpec([None] * len(array.shape), dtype)

    return _compat.dataset_adapter(dataset, keras.tree.map_structure(spec, batch))
