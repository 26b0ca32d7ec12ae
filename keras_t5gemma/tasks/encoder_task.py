"""Base class of tasks on an encoder alone: loading, saving, `compile`, data."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma._compat import set_loss_tracker, track_parameters
from keras_t5gemma.checkpoints import keras_format, presets
from keras_t5gemma.checkpoints.preset_saving import AtomicSaveToPreset
from keras_t5gemma.data.encoder_dataset import (
    EncoderDataset,
    arrays,
    check_batching,
    check_lengths,
    encoder_arguments,
    encoder_batch,
    encoder_ids,
    unpack_batch,
)
from keras_t5gemma.data.pair_dataset import BATCHINGS
from keras_t5gemma.data.text_batches import batch_arguments, is_batches
from keras_t5gemma.distribution.prediction import predict_on_batch
from keras_t5gemma.modeling import bases
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.exportable import Exportable
from keras_t5gemma.modeling.heads import POOLINGS
from keras_t5gemma.modeling.inference import inference
from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.modeling.weight_loading import normal_tensors
from keras_t5gemma.tasks.backbone_changes import ChangesBackbone
from keras_t5gemma.tasks.encoder_loading import load_encoder
from keras_t5gemma.tasks.fit import FitMixin, is_arrays, positions_of
from keras_t5gemma.tokenization.compatibility import check_preprocessor
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.tokenization.token_ids import check_names, id_array
from keras_t5gemma.training import loss_by_weight
from keras_t5gemma.training.accumulation import weighted_batch
from keras_t5gemma.training.optimizers import prepare_optimizer
from keras_t5gemma.utils.buckets import SHORT, bucket
from keras_t5gemma.utils.checks import (
    flag,
    json_object,
    keras_object,
    number,
    one_of,
    row_weights,
)
from keras_t5gemma.utils.files import named_values

INPUTS = ("encoder_token_ids", "encoder_padding_mask")
TASK_FILE, TASK_WEIGHTS_FILE = "task.json", "task.weights.h5"


class EncoderTask(
    ChangesBackbone, FitMixin, AtomicSaveToPreset, Exportable, bases.Task
):
    """A task with one output vector per text, from an encoder alone.

    Args:
        backbone: a `Backbone` without a decoder (`from_preset(encoder_only=True)`), or
            KerasHub's `GemmaBackbone`, for a comparison with the decoder-only source.
        preprocessor: a `Seq2SeqLMPreprocessor`, of which the encoder side is used.
        pooling: see `pool`.
        head: function from states `(B, T, D)`, ids `(B, T)` and padding mask `(B, T)`
            to the output.
        **kwargs: `name`, and `compile`, whether to compile at once.

    Raises:
        ValueError: for a backbone with a decoder, an unknown pooling, or a tokenizer
            that does not fit.
    """

    backbone_cls = Backbone
    preprocessor_cls = Seq2SeqLMPreprocessor
    HEAD: tuple[str, ...] = ()  # Arguments that define the weights of the head.
    _has_labels = False
    _first_column = "text"  # As users call it; in batches it is the model's input.

    def __init__(
        self,
        backbone: Any,
        preprocessor: Seq2SeqLMPreprocessor | None,
        pooling: str,
        head: Callable,
        **kwargs: Any,
    ) -> None:
        if getattr(backbone, "decoder", None) is not None:
            raise ValueError(
                "`backbone` must be an encoder alone: load it with "
                "Backbone.from_preset(..., encoder_only=True)."
            )
        one_of(pooling, "pooling", POOLINGS)
        is_t5gemma = isinstance(backbone, Backbone)
        if preprocessor is not None:
            size = backbone.config.vocabulary_size if is_t5gemma else None
            check_preprocessor(preprocessor, type(self).__name__, size)
        self.backbone = backbone
        self.preprocessor: Any = preprocessor
        self.pooling = pooling
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name) for name in INPUTS
        }
        if is_t5gemma:
            states = backbone(inputs)["encoder_sequence_output"]
        else:
            ids, padding = (inputs[name] for name in INPUTS)
            states = backbone({"token_ids": ids, "padding_mask": padding})
        outputs = head(states, *inputs.values())
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        if is_t5gemma:
            track_parameters(self)

    @classmethod
    @normal_tensors()
    def from_preset(cls, preset: Any, load_weights: bool = True, **kwargs: Any) -> Any:
        """Load the encoder of a checkpoint, with its head if it was saved with one.

        From a T5Gemma checkpoint only the encoder is read. The head is restored from
        presets that `save_to_preset` of this class wrote; otherwise it is new.

        Args:
            preset: a name of `keras_t5gemma.presets()`, a local folder, or an
                `hf://` or `kaggle://` handle; see `Backbone.from_preset`.
            load_weights: `False` leaves the weights random.
            **kwargs: `dtype`, `verify_checksums`, `allow_non_finite` (see
                `Backbone.from_preset`), `preprocessor`, and further arguments of the
                class, which override the saved ones. Those that define the head
                (`HEAD`) make a new one.

        Returns:
            A task of this class.

        Raises:
            ValueError: for an unknown preset, or files that do not fit, named.
            OSError: when a download fails, with what to do.
        """
        preset = presets.take_location(preset, kwargs)
        if load_weights and not set(cls.HEAD) & set(kwargs):
            preset = presets.resolve(preset)
            takes_head = cls._foreign_head(preset)
            preset = dataclasses.replace(preset, takes_head=takes_head)
        source, backbone, options = load_encoder(preset, load_weights, kwargs)
        saved = {} if source is None else cls._saved_config(source)
        is_new = bool(set(cls.HEAD) & set(kwargs))
        dropped = {"backbone", "preprocessor", *(cls.HEAD if is_new else ())}
        own = {k: v for k, v in saved.items() if k not in dropped}
        # What the caller has passed is not the file's fault.
        is_saved = source is not None and own and set(kwargs) <= {"preprocessor"}
        with (
            named_values(f"{source.location}: {TASK_FILE}")
            if is_saved
            else contextlib.nullcontext()
        ):
            task = cls(backbone, **{**own, **kwargs})
        if source is not None and source.takes_head:
            task._load_foreign_head(source)
        elif saved and load_weights and not is_new and task.has_task_weights():
            path = source.download() / TASK_WEIGHTS_FILE
            keras_format.check_task(
                path,
                options.get("verify_checksums", True),
                options.get("allow_non_finite", False),
            )
            task.load_task_weights(str(path))
        return task

    @classmethod
    def _foreign_head(cls, source):
        """Whether transformers' head in a checkpoint is one of this class."""
        return False

    @classmethod
    def _saved_config(cls, source):
        """The saved arguments of a task of this class, or none."""
        if source.format != presets.KERAS:
            return {}
        saved = source.read_json(TASK_FILE, default={})
        is_this = saved.get("class_name") == cls.__name__
        with named_values(f"{source.location}: {TASK_FILE}"):
            return json_object(saved["config"], "config") if is_this else {}

    def load_task_weights(self, filepath: str) -> None:
        skipped = self._not_the_head()
        keras.saving.load_weights(self, filepath, objects_to_skip=skipped)

    def save_task_weights(self, filepath: str) -> None:
        skipped = self._not_the_head()
        keras.saving.save_weights(self, filepath, objects_to_skip=skipped)
        if Path(filepath).name == TASK_WEIGHTS_FILE:
            keras_format.write_task_checksums(Path(filepath))

    def _not_the_head(self):
        """Layers of the backbone; and the optimizer, which KerasHub never loads."""
        optimizer = getattr(self, "optimizer", None)  # There is none before `compile`.
        return [*iter_layers(self.backbone), *filter(None, [optimizer])]

    def compile(
        self, optimizer: Any = "auto", *, rematerialize: bool = False, **kwargs: Any
    ) -> None:
        """`keras.Model.compile`.

        Args:
            optimizer: `"auto"` is Adafactor at 1e-4. `gradient_accumulation_steps` as
                in `Seq2SeqLM.fit`, with the mean over rows by their weights.
            rematerialize: keep only the input of each block for the backward pass and
                recompute the rest: less memory, more time.
            **kwargs: of `keras.Model.compile`. Means, the `loss` and `metrics`, are by
                the weights of rows: those that fill up a batch have none.
        """
        rematerialize = flag(rematerialize, "rematerialize")
        keras_object(kwargs.get("weighted_metrics"), "weighted_metrics")
        kwargs["loss"] = loss_by_weight.mean_by_weight(kwargs.get("loss"))
        optimizer = prepare_optimizer(optimizer, self.backbone.variable_dtype)
        if kwargs.get("metrics") is not None:
            kwargs["weighted_metrics"] = loss_by_weight.with_metrics(
                kwargs.get("weighted_metrics"), kwargs.pop("metrics")
            )
        super().compile(optimizer=optimizer, **kwargs)
        tracker = loss_by_weight.LossByWeight()
        set_loss_tracker(self, tracker)
        self._loss_of_batch = functools.partial(tracker.of_batch, self.loss)
        if isinstance(self.backbone, Backbone):
            self.backbone.encoder.rematerialize = rematerialize

    def predict_step(self, *args: Any) -> Any:
        """Outputs of a batch; on JAX `(state, data)`, elsewhere `(data,)`."""
        with inference():
            return super().predict_step(*args)

    def test_step(self, *args: Any) -> Any:
        """Losses of a batch, computed as its outputs; arguments as above."""
        with inference(), self._loss_of_batch(args[-1]):
            return super().test_step(*args)

    def _infer(self, batch):
        """NumPy array of the outputs of a batch, in all processes."""
        with inference():
            return predict_on_batch(self, batch)

    def train_step(self, *args: Any) -> Any:
        """One step; on JAX `(state, data)`, elsewhere `(data,)`."""
        with weighted_batch(self, args[-1]), self._loss_of_batch(args[-1]):
            return super().train_step(*args)

    def enable_lora(
        self,
        rank: int,
        target_layer_names: list[str] | None = None,
        parts: list[str] | None = None,
    ) -> None:
        """Freeze the encoder and train low-rank adapters (arXiv 2106.09685).

        The head stays trainable.

        Args:
            rank: inner size of the adapters, at least 1.
            target_layer_names: names of the layers; see `Seq2SeqLM.enable_lora`.
            parts: parts of the model; see `Seq2SeqLM.enable_lora`.

        Raises:
            ValueError: for a rank below 1, or names that match no layer.
        """
        own = {} if parts is None else {"parts": parts}  # KerasHub's has no `parts`.
        self.backbone.enable_lora(rank, target_layer_names, **own)
        self._forget_compiled()

    def _columns(self, x, y, name):
        """`(columns, labels)` from a user's data, see `EncoderDataset`."""
        raise NotImplementedError

    def _token_rows(self, columns, preprocessor=None):
        """Token ids of columns of texts, a list of rows per column."""
        preprocessor = preprocessor or self.preprocessor
        return [preprocessor.encoder_rows(texts) for texts in columns.values()]

    def _reader(self):
        """The preprocessor for texts that are not trained on."""
        positions = positions_of(self.backbone)
        return self._need_preprocessor().for_reading(positions)

    def _read(self, columns, name):
        """Token ids of texts that are not trained on, and the maximum width."""
        reader = self._reader()
        token_rows = functools.partial(self._token_rows, preprocessor=reader)
        (ids,) = encoder_ids(reader, columns, name, token_rows)
        return ids, reader.encoder_sequence_length

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
        """See `FitMixin`."""
        if isinstance(x, EncoderDataset):
            return {"x": x, "shuffle": False, "steps_per_epoch": None}
        number(validation_split, "validation_split", at_least=0, below=1)
        if batching is not None:
            one_of(batching, "batching", BATCHINGS)
        if is_batches(x):
            check_batching(batching)
            return batch_arguments(
                self._arrays_of_batch,
                x,
                y,
                sample_weight,
                shuffle,
                steps,
                name,
                validation_split,
                batching,
            )
        columns, labels = self._columns(x, y, name)
        make = functools.partial(
            EncoderDataset,
            self._need_preprocessor(),
            token_rows=self._token_rows,
            batch_size=32 if batch_size is None else batch_size,
            batching=batching or "bucketed",
            name=name,
        )
        check_lengths(columns, labels, f"`{name}`", self._first_column)
        training = {"shuffle": shuffle, "steps": steps}
        return encoder_arguments(
            make, columns, labels, sample_weight, validation_split, like, training
        )

    def _arrays_of_batch(self, batch, name, batching):
        """Arrays of a batch that a user makes, see `MappedBatches`."""
        x, y, weights = unpack_batch(batch, name)
        if is_arrays(x):
            check_names(x, list(self.input), f"A batch of `{name}`")
            if y is None and self._has_labels:
                raise ValueError(f"A batch of `{name}` must have labels: (arrays, y).")
            x = {key: id_array(ids, f"{key} of `{name}`") for key, ids in x.items()}
            if weights is not None:
                weights = row_weights(weights, "sample_weight", len(x[INPUTS[0]]))
            return keras.utils.pack_x_y_sample_weight(
                x, self._labels_of_arrays(y), weights
            )
        columns, labels = self._columns(x, y, name)
        check_lengths(columns, labels, f"a batch of `{name}`", self._first_column)
        return encoder_batch(
            self._need_preprocessor(),
            columns,
            labels,
            weights,
            self._token_rows,
            name,
            batching,
        )

    def predict_on_batch(self, x: Any) -> Any:
        """Outputs of one batch: of the texts of `fit` without labels, or of arrays."""
        columns = self._unlabeled(x)
        if columns is None:
            return super().predict_on_batch(x)
        ids, limit = self._read(columns, "x")
        longest = int(ids.lengths.max())
        width = min(limit, SHORT if longest <= SHORT else bucket(longest))
        return super().predict_on_batch(
            arrays([ids[i] for i in range(len(ids))], (len(ids), width))
        )

    def _unlabeled(self, x):
        """Columns of the texts of `predict_on_batch`; `None` for arrays and pairs."""
        raise NotImplementedError

    def _text_batch(self, x, y, sample_weight):
        """See `FitMixin`."""
        columns, _ = self._columns(x, y, "x")
        count = len(next(iter(columns.values())))
        return self._data(x, y, sample_weight, count, batching="fixed")["x"][0]

    def _need_preprocessor(self):
        if self.preprocessor is None:
            raise ValueError(f"{type(self).__name__} needs a `preprocessor` for text.")
        return self.preprocessor

    def get_config(self) -> dict:
        return {**super().get_config(), "pooling": self.pooling}
