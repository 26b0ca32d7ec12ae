"""Learning from what another model would write."""

import keras
from keras import ops

from keras_t5gemma.training.chunked_cross_entropy import TeacherTargets, top_choices
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.teacher_in_memory import TeacherInMemory, no_gradients
from keras_t5gemma.training.teacher_scores import TeacherScores
from keras_t5gemma.utils.checks import number, whole_number

INPUTS = "teacher_"  # What the names of a teacher's arrays in a batch start with.


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Distillation(TokenCrossEntropy):
    """Cross-entropy against a teacher's distribution of the next token.

    `-sum(P_teacher log P_student)`, as Gemma 2 and T5Gemma were trained
    (arXiv 2408.00118, section 3.2). The teacher is a decoder-only model that reads the
    text from its start; the student sees the part that its encoder reads, and what it
    has written. A token that is not of the text, as a sentinel or the end of a list of
    spans, has its label as target.

    For `Seq2SeqLM.fit` on plain text, with an objective. Validation and `evaluate` are
    against the labels, so that their loss compares with that of other runs.

    Args:
        teacher: a KerasHub `CausalLM` of the same vocabulary, which runs beside each
            step; or `TeacherScores`, what one has written to disk. It does not learn.
        temperature: t, above 0. Both distributions are those of `logits / t`, and the
            loss has a factor of `t^2` (arXiv 1503.02531).
        top_k: only so many of the teacher's most likely tokens, whose probabilities are
            scaled up to a sum of 1; `None` is the whole vocabulary, or all that a
            `TeacherScores` has.
        label_weight: share of the target that is the label, in `[0, 1]`.
        label_smoothing: see `TokenCrossEntropy`; of the label's share.
        z_loss: see `TokenCrossEntropy`.
        name: of the loss.
        dtype: of `keras.losses.Loss`.

    Raises:
        ValueError: for a number out of its range, or what is no teacher.
    """

    def __init__(
        self,
        teacher,
        temperature=1.0,
        top_k=None,
        label_weight=0.0,
        label_smoothing=0.0,
        z_loss=0.0,
        name="distillation",
        dtype=None,
    ):
        super().__init__(label_smoothing, z_loss, name=name, dtype=dtype)
        if isinstance(teacher, keras.Model):
            teacher = TeacherInMemory(teacher)
        if not isinstance(teacher, TeacherInMemory | TeacherScores | None):
            raise ValueError(
                "`teacher` must be a keras_hub.models.CausalLM or TeacherScores; got "
                f"{type(teacher).__name__}."
            )
        number(temperature, "temperature", above=0)
        number(label_weight, "label_weight", at_least=0, at_most=1)
        if top_k is not None:
            most = None if teacher is None else teacher.most_choices
            top_k = whole_number(top_k, "top_k", 1, most)
        self.teacher = teacher
        self.temperature = temperature
        self.top_k = top_k
        self.label_weight = label_weight

    def get_config(self):
        config = super().get_config()
        del config["reduction"]
        return {
            **config,
            "teacher": None,  # It is not saved with its student.
            "temperature": self.temperature,
            "top_k": self.top_k,
            "label_weight": self.label_weight,
        }

    def targets(self, inputs):
        """`TeacherTargets` of a batch with the arrays of the teacher's `inputs`."""
        places = ops.reshape(inputs["teacher_places"], (-1,))
        share = ops.where(places < 0, 1.0, self.label_weight)
        share = ops.cast(share, "float32")
        if "teacher_ids" in inputs:
            # TensorFlow does not know the last dimension of its arrays.
            stored = self.teacher.most_choices
            ids, log_probs = (
                ops.reshape(inputs[name], (-1, stored))[:, : self.top_k]
                for name in ("teacher_ids", "teacher_log_probs")
            )
            return self._few(share, ids, log_probs)
        states, table, cap = self.teacher.read(
            inputs["teacher_token_ids"], inputs["teacher_padding_mask"]
        )
        states = ops.take(
            ops.reshape(states, (-1, states.shape[-1])),
            ops.maximum(places, 0),
            axis=0,
        )
        if self.top_k is None:
            return TeacherTargets(share, self.temperature, states, table, cap)
        with no_gradients():
            return self._few(share, *top_choices(states, table, cap, self.top_k))

    def _few(self, share, ids, log_probs):
        log_probs = ops.cast(log_probs, "float32") / self.temperature
        shares = ops.softmax(log_probs, axis=-1)
        return TeacherTargets(share, self.temperature, ids=ids, shares=shares)
