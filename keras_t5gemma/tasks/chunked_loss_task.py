"""Training steps of a task with a chunked loss: no array of all logits."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.modeling import bases
from keras_t5gemma.training.accumulation import weighted_batch
from keras_t5gemma.training.chunked_cross_entropy import token_losses
from keras_t5gemma.training.distillation import INPUTS as TEACHER_INPUTS
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.training.loss_by_weight import mean_by_weight
from keras_t5gemma.training.losses import Perplexity, TokenCrossEntropy
from keras_t5gemma.utils.backends import replica_count
from keras_t5gemma.utils.checks import is_auto, keras_object
from keras_t5gemma.utils.types import Tensor


class ChunkedLossTask(bases.Seq2SeqLMTask):
    """A task whose training loss is computed by `token_losses`.

    A training step passes the labels to `call`, which then returns the losses and the
    values for the metrics in place of the logits. Other losses and metrics of a user
    get the logits, as in any Keras model.
    """

    chunked_loss: TokenCrossEntropy | None = None  # Set by `compile`.

    def compile(
        self,
        *,
        loss: Any,
        metrics: Any = None,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """`keras.Model.compile`; `weighted_metrics="auto"` is accuracy, perplexity."""
        loss = mean_by_weight(loss)
        keras_object(weighted_metrics, "weighted_metrics")
        own = is_auto(weighted_metrics)
        known = type(loss) in (TokenCrossEntropy, Distillation)
        # Keras applies `loss_weights`, to losses of logits only.
        has_defaults = metrics is None and kwargs.get("loss_weights") is None
        chunked = own and has_defaults and known
        chunked = chunked and loss.reduction == "mean_with_sample_weight"
        if isinstance(loss, Distillation) and not chunked:
            raise ValueError(
                "`metrics`, `weighted_metrics` and `loss_weights` must have their "
                "defaults with `Distillation`, which is computed without logits."
            )
        if own:
            accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
            weighted_metrics = None if chunked else [accuracy]
        super().compile(
            loss=loss, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs
        )
        # Not tracked: `metrics` lists them.
        object.__setattr__(self, "chunked_loss", loss if chunked else None)
        means = [keras.metrics.Mean(name) for name in ("loss", "accuracy")]
        token_metrics = [*means, Perplexity()]
        object.__setattr__(self, "token_metrics", token_metrics)

    def get_compile_config(self) -> dict | None:
        config = super().get_compile_config()
        if config and self.chunked_loss is not None:
            config["weighted_metrics"] = "auto"
        return config

    @property
    def metrics(self) -> list:
        """The metrics of Keras, or those of the chunked loss.

        The latter are means over the tokens of an epoch, while Keras's loss is the
        mean of the means of batches, regardless of their numbers of tokens.
        """
        return super().metrics if self.chunked_loss is None else self.token_metrics

    @property
    def non_trainable_variables(self) -> list:
        """Keras's; on JAX with the variables of a teacher in memory.

        Keras passes these to a compiled step, which would make others constants.
        """
        own = super().non_trainable_variables
        teacher: Any = getattr(self.chunked_loss, "teacher", None)
        if keras.config.backend() != "jax" or not hasattr(teacher, "variables"):
            return own
        return [*own, *teacher.variables]

    def export(self, *args: Any, **kwargs: Any) -> None:
        """See `modeling.exportable`; without the variables of a teacher."""
        loss = self.chunked_loss
        object.__setattr__(self, "chunked_loss", None)
        try:
            super().export(*args, **kwargs)
        finally:
            object.__setattr__(self, "chunked_loss", loss)

    def train_step(self, *args: Any) -> Any:
        """One step; on JAX `(state, data)`, elsewhere `(data,)`."""
        if keras.config.backend() == "torch":
            self.zero_grad()  # Frees the gradients before activations are allocated.
        with weighted_batch(self, args[-1]):
            return super().train_step(*self._with_labels(args))

    def test_step(self, *args: Any) -> Any:
        """As `train_step`, without an update."""
        return super().test_step(*self._with_labels(args))

    def _with_labels(self, args):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(args[-1])
        if self.chunked_loss is not None and y is not None:
            x = {**x, "labels": y}
        return *args[:-1], (x, y, weights)

    def call(
        self, inputs: dict, training: bool | None = None, mask: Any = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits `(B, T, V)`, or the results of `token_losses`.

        Args:
            inputs: those of the backbone; with `"labels"` `(B, T)` the results are a
                dict of `losses`, `log_probs` and `hits`, `(B, T)` each.
            training: turns dropout on.
            mask: not used.

        Raises:
            ValueError: for distillation into a model with int4 embeddings.
        """
        inputs = dict(inputs)
        names = [name for name in inputs if name.startswith(TEACHER_INPUTS)]
        seen_by_teacher = {name: inputs.pop(name) for name in names}
        if "labels" not in inputs:
            return super().call(inputs, training=training, mask=mask)
        labels = inputs.pop("labels")
        shape = ops.shape(labels)
        states = self.backbone(inputs, training=training)["decoder_sequence_output"]
        decoder, loss = self.backbone.decoder, self.chunked_loss or TokenCrossEntropy()
        table = decoder.logit_table()
        teacher = loss.targets(seen_by_teacher) if seen_by_teacher else None
        if table is None and teacher is not None:
            raise ValueError("A model with int4 embeddings cannot be distilled into.")
        if table is None:
            logits = ops.cast(self.backbone.logits(states), "float32")
            results = (
                loss.call(labels, logits),
                -TokenCrossEntropy().call(labels, logits),
                ops.cast(ops.argmax(logits, axis=-1) == labels, "float32"),
            )
        else:
            results = token_losses(
                ops.reshape(states, (-1, states.shape[-1])),
                table,
                ops.reshape(labels, (-1,)),
                self.backbone.config.final_soft_cap,
                loss.label_smoothing,
                loss.z_loss,
                learn_table=bool(decoder.token_embedding.trainable_variables),
                teacher=teacher,
            )
        keys = ("losses", "log_probs", "hits")
        return {k: ops.reshape(r, shape) for k, r in zip(keys, results, strict=True)}

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The weighted mean over tokens, plus the losses of layers.

        In a replica of a `tf.distribute` strategy it is divided by their number, since
        gradients are summed: as in Keras, the mean of the replicas' means.
        """
        if not isinstance(y_pred, dict):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        losses = y_pred["losses"]
        weights = _weights(losses, sample_weight)
        total = ops.sum(losses * weights) / ops.maximum(ops.sum(weights), 1e-30)
        total += sum(ops.cast(ops.sum(x), total.dtype) for x in self.losses)
        count = replica_count()
        return total if count == 1 else total / count

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict:
        """Loss, accuracy and perplexity of the epoch so far."""
        if not isinstance(y_pred, dict):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        weights = ops.reshape(_weights(y_pred["losses"], sample_weight), (-1,))
        values = (y_pred["losses"], y_pred["hits"], -y_pred["log_probs"])
        for metric, value in zip(self.token_metrics, values, strict=True):
            # One row: Keras would take the mean of each row first.
            metric.update_state(ops.reshape(value, (-1,)), weights)
        return self.get_metrics_result()


def _weights(losses, sample_weight):
    """float32 `(B, T)` from one weight per token, one per row, or none."""
    if sample_weight is None:
        return ops.ones_like(losses)
    weights = ops.cast(sample_weight, losses.dtype)
    if len(weights.shape) < len(losses.shape):
        weights = weights[:, None]
    return ops.broadcast_to(weights, ops.shape(losses))
