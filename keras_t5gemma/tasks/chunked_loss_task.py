"""Training steps of a task whose logits are never whole."""

import functools

import keras
import keras_hub
from keras import ops

from keras_t5gemma.training.chunked_cross_entropy import token_losses
from keras_t5gemma.training.distillation import INPUTS as TEACHER_INPUTS
from keras_t5gemma.training.distillation import Distillation
from keras_t5gemma.training.losses import Perplexity, TokenCrossEntropy


class ChunkedLossTask(keras_hub.models.Seq2SeqLM):
    """A KerasHub task whose training loss is computed by `token_losses`.

    A training step passes the labels to `call`, which then returns what the loss and
    the metrics need in place of the logits. A loss or metrics of the user's own get
    the logits, as in any Keras model.
    """

    loss_in_parts = None  # A `TokenCrossEntropy`, once compiled with one.

    def compile(self, *, loss, metrics=None, weighted_metrics="auto", **kwargs):
        """`keras.Model.compile`; `weighted_metrics="auto"` is accuracy, perplexity."""
        own = weighted_metrics == "auto"
        known = type(loss) in (TokenCrossEntropy, Distillation)
        in_parts = own and metrics is None and known
        in_parts = in_parts and loss.reduction == "mean_with_sample_weight"
        if isinstance(loss, Distillation) and not in_parts:
            raise ValueError(
                "`Distillation` is computed without logits: `metrics` and "
                "`weighted_metrics` must be left as they are."
            )
        if own:
            accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
            weighted_metrics = None if in_parts else [accuracy]
        super().compile(
            loss=loss, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs
        )
        # Not tracked: `metrics` lists them.
        object.__setattr__(self, "loss_in_parts", loss if in_parts else None)
        means = [keras.metrics.Mean(name) for name in ("loss", "accuracy")]
        token_metrics = [*means, Perplexity()]
        object.__setattr__(self, "token_metrics", token_metrics)

    def get_compile_config(self):
        config = super().get_compile_config()
        if config is not None and self.loss_in_parts is not None:
            config["weighted_metrics"] = "auto"
        return config

    @property
    def metrics(self):
        """Those of Keras, or those that come with `token_losses`.

        The latter are means over the tokens of an epoch. Keras's loss is the mean of
        the batches' means, however many tokens those have.
        """
        return super().metrics if self.loss_in_parts is None else self.token_metrics

    @property
    def non_trainable_variables(self):
        """Keras's; on JAX with those of a teacher in memory.

        Keras hands these to a compiled step. It would take others for constants.
        """
        own = super().non_trainable_variables
        teacher = getattr(self.loss_in_parts, "teacher", None)
        if keras.config.backend() != "jax" or not hasattr(teacher, "variables"):
            return own
        return [*own, *teacher.variables]

    def make_train_function(self, force=False):
        """Keras's; on JAX, of arrays that a step may overwrite, and traced anew."""
        if keras.config.backend() != "jax":
            return super().make_train_function(force)
        if self.train_function is None:
            for variable in self.trainable_variables:
                # A loaded array is NumPy's memory: JAX would keep it beside the next.
                variable.assign(variable.value.copy())
        # A model's method is always the same function to JAX, which would take the
        # program it has although `CrossAttentionWarmUp` wants another.
        step = functools.partial(type(self).train_step, self)
        object.__setattr__(self, "train_step", step)
        try:
            return super().make_train_function(force)
        finally:
            object.__delattr__(self, "train_step")

    def train_step(self, *args):
        """One step; on JAX `(state, data)`, elsewhere `(data,)`."""
        if keras.config.backend() == "torch":
            self.zero_grad()  # Before there are activations beside the gradients.
        return super().train_step(*self._with_labels(args))

    def test_step(self, *args):
        """As `train_step`, without learning."""
        return super().test_step(*self._with_labels(args))

    def _with_labels(self, args):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(args[-1])
        if self.loss_in_parts is not None and y is not None:
            x = {**x, "labels": y}
        return *args[:-1], (x, y, weights)

    def call(self, inputs, training=None, mask=None):
        """Logits `(B, T, V)`; with `"labels"` `(B, T)` in the inputs, a dict.

        Its entries are those of `token_losses`, `(B, T)` each.
        """
        inputs = dict(inputs)
        names = [name for name in inputs if name.startswith(TEACHER_INPUTS)]
        seen_by_teacher = {name: inputs.pop(name) for name in names}
        if "labels" not in inputs:
            return super().call(inputs, training=training, mask=mask)
        labels = inputs.pop("labels")
        shape = ops.shape(labels)
        states = self.backbone(inputs, training=training)["decoder_sequence_output"]
        decoder, loss = self.backbone.decoder, self.loss_in_parts or TokenCrossEntropy()
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
        names = ("losses", "log_probs", "hits")
        return {n: ops.reshape(r, shape) for n, r in zip(names, results, strict=True)}

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The weighted mean over tokens, and the layers' own losses."""
        if not isinstance(y_pred, dict):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        losses = y_pred["losses"]
        weights = _weights(losses, sample_weight)
        total = ops.sum(losses * weights) / ops.maximum(ops.sum(weights), 1e-30)
        return total + sum(ops.cast(ops.sum(x), total.dtype) for x in self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Loss, accuracy and perplexity so far."""
        if not isinstance(y_pred, dict):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        weights = ops.reshape(_weights(y_pred["losses"], sample_weight), (-1,))
        values = (y_pred["losses"], y_pred["hits"], -y_pred["log_probs"])
        for metric, value in zip(self.token_metrics, values, strict=True):
            # One row: Keras would take the mean of each row first.
            metric.update_state(ops.reshape(value, (-1,)), weights)
        return self.get_metrics_result()


def _weights(losses, sample_weight):
    """float32 `(B, T)` of one weight a token, a row, or none."""
    if sample_weight is None:
        return ops.ones_like(losses)
    weights = ops.cast(sample_weight, losses.dtype)
    if len(weights.shape) < len(losses.shape):
        weights = weights[:, None]
    return ops.broadcast_to(weights, ops.shape(losses))
