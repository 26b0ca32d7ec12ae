"""What Keras and the datasets of this package must agree on: which epoch it is."""

import contextlib
import warnings

import keras
import numpy as np

from keras_t5gemma.distribution import process_group

MASKS = ("encoder_padding_mask", "decoder_padding_mask")


class ResumableDataset(keras.utils.PyDataset):
    """A dataset that is told its epoch, and that can start in the middle of one.

    Keras tells a dataset when epochs begin and end, also of ones it only looks at to
    build a model. So the number comes from a callback, `follow(dataset)`, and batch i
    of epoch e is the same whenever and by whatever thread it is asked for.

    Attributes:
        epoch: the current epoch, from 0.
        skipped: how many batches at the start of the current epoch are left out.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.epoch = self.skipped = 0
        self._start = (None, 0)
        self._counts = {}
        self._quiet = contextlib.ExitStack()

    def batches_an_epoch(self):
        """Batches of a whole epoch."""
        raise NotImplementedError

    @property
    def num_batches(self):
        """Batches of the current epoch."""
        return self.batches_an_epoch() - self.skipped

    def start_at(self, epoch, batch):
        """Leave out the first batches of one epoch, which a run before this one had.

        Args:
            epoch: the epoch that `fit` starts with, its `initial_epoch`.
            batch: how many of its batches to leave out.

        Raises:
            ValueError: for a batch that the epoch does not have.
        """
        if not 0 <= batch < self.batches_an_epoch():
            raise ValueError(
                f"`batch` must be in [0, {self.batches_an_epoch()}), the batches of an "
                f"epoch; got {batch!r}."
            )
        self._start = (epoch, batch)

    def set_epoch(self, epoch):
        """Come to an epoch, before any batch of it is asked for."""
        self.epoch = epoch
        self.skipped = self._start[1] if epoch == self._start[0] else 0

    def on_epoch_begin(self):
        if self.skipped:
            # Keras expects all epochs to be equally long.
            self._quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Your input ran out of data")

    def on_epoch_end(self):
        self._quiet.close()
        self.skipped = 0

    def counts(self, step):
        """Tokens of a batch of the current epoch.

        Args:
            step: Keras's number of the batch, from 0; those left out have none.

        Returns:
            `(tokens, positions)` of encoder and decoder together: without padding,
            and with it. `(0, 0)` for a batch that has no padding masks.
        """
        return self._counts.get(step, (0, 0))

    def rows(self, step):
        """The numbers of the pairs in a batch of the current epoch, if known."""
        return None

    def _position(self, index):
        """The number of a batch, when epochs go on where the one before ended."""
        return self.epoch * self.batches_an_epoch() + self.skipped + index

    def _count(self, step, batch):
        """Remember the `counts` of a batch that passes."""
        x = batch[0] if isinstance(batch, tuple) else batch
        if isinstance(x, dict) and all(name in x for name in MASKS):
            masks = [keras.ops.convert_to_numpy(x[name]) for name in MASKS]
            tokens = sum(int((mask > 0).sum()) for mask in masks)
            self._counts[step] = (tokens, sum(mask.size for mask in masks))
        return batch


def draw_seed():
    """A seed that `keras.utils.set_random_seed` makes repeatable.

    Of several processes all call it, and have the first one's.
    """
    return process_group.from_first(int(np.random.randint(2**31)))


def follow(dataset, adapter=None):
    """The callback of `fit` that tells a dataset which epoch comes.

    Args:
        dataset: a `ResumableDataset`.
        adapter: what `any_width` made of it.
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
        # On TensorFlow Keras asks for the batches that are left out, and what it gets
        # at the end of the data moves the weights once more.
        is_short = self.dataset.skipped and self.adapter is not None
        if is_short and batch + 1 >= self.dataset.num_batches:
            self.has_stopped = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self.has_stopped:
            self.model.stop_training = self.has_stopped = False
            self.adapter.on_epoch_end()


def any_width(dataset):
    """What to hand to Keras for a dataset whose batches differ in shape.

    On TensorFlow Keras takes the widths of the first two batches for those of all,
    unless it is told otherwise.
    """
    if keras.config.backend() != "tensorflow" or not isinstance(
        dataset, ResumableDataset
    ):
        return dataset
    import tensorflow as tf
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

    batch = dataset[0]
    if not all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(batch)):
        return dataset
    adapter = PyDatasetAdapter(dataset)

    def spec(array):
        dtype = keras.backend.standardize_dtype(array.dtype)
        return tf.TensorSpec([None] * len(array.shape), dtype)

    adapter._output_signature = keras.tree.map_structure(spec, batch)
    return adapter
