"""Distillation: cross-entropy against a teacher's distribution of the next token."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.training.chunked_cross_entropy import TeacherTargets, top_choices
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.teacher_in_memory import TeacherInMemory
from keras_t5gemma.training.teacher_scores import TeacherScores
from keras_t5gemma.utils.backends import no_gradients
from keras_t5gemma.utils.checks import number, shown, whole_number

INPUTS = "teacher_"  # Prefix of the names of a teacher's arrays in a batch.


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Distillation(TokenCrossEntropy):
    """Cross-entropy against a teacher's distribution of the next token.

    `-sum(P_teacher log P_student)`, as Gemma 2 and T5Gemma were trained
    (arXiv 2408.00118, section 3.2). The teacher is a decoder-only model that reads the
    text from its start; the student sees the encoder's part of it and the target so
    far. A target token that is not in the text, such as a sentinel or the end of a list
    of spans, is trained on its label.

    For `Seq2SeqLM.fit` on plain text, with an objective. Validation and `evaluate` use
    the labels, so that their loss is comparable with other runs.

    Args:
        teacher: a KerasHub `CausalLM` with the same vocabulary, which runs in each
            step and is not trained; or `TeacherScores`, precomputed log-probabilities.
        temperature: t, above 0. Both distributions are those of `logits / t`, and the
            loss has a factor of `t^2` (arXiv 1503.02531).
        top_k: use only the teacher's k most likely tokens, their probabilities scaled
            to a sum of 1; `None` uses the whole vocabulary, or all tokens of
            `TeacherScores`.
        label_weight: share of the label in the target, in `[0, 1]`.
        label_smoothing: see `TokenCrossEntropy`; of the label's share.
        z_loss: see `TokenCrossEntropy`.
        name: of the loss.
        dtype: of `keras.losses.Loss`.

    Raises:
        ValueError: for a number out of its range, or an unsupported teacher.
    """

    def __init__(
        self,
        teacher: Any,
        temperature: float = 1.0,
        top_k: int | None = None,
        label_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        name: str = "distillation",
        dtype: Any = None,
    ) -> None:
        super().__init__(label_smoothing, z_loss, name=name, dtype=dtype)
        if isinstance(teacher, keras.Model):
            teacher = TeacherInMemory(teacher)
        if not isinstance(teacher, TeacherInMemory | TeacherScores | None):
            raise ValueError(
                "`teacher` must be a keras_hub.models.CausalLM or TeacherScores; got "
                f"{shown(teacher)}."
            )
        number(temperature, "temperature", above=0)
        number(label_weight, "label_weight", at_least=0, at_most=1)
        if top_k is not None:
            stored = None if teacher is None else teacher.top_k
            top_k = whole_number(top_k, "top_k", 1, stored)
        self.teacher: Any = teacher
        self.temperature = temperature
        self.top_k = top_k
        self.label_weight = label_weight

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["reduction"]
        return {
            **config,
            "teacher": None,  # Not saved with the student.
            "temperature": self.temperature,
            "top_k": self.top_k,
            "label_weight": self.label_weight,
        }

    def targets(self, inputs: dict) -> TeacherTargets:
        """Targets of a batch, from the arrays of the teacher's `inputs`.

        Args:
            inputs: dict of arrays `teacher_...`, as the teacher's `inputs` returns.

        Returns:
            A `TeacherTargets`, one row for each token of the flattened batch.
        """
        places = ops.reshape(inputs["teacher_places"], (-1,))
        share = ops.where(places < 0, 1.0, self.label_weight)
        share = ops.cast(share, "float32")
        if "teacher_ids" in inputs:
            # TensorFlow does not know the last dimension of its arrays.
            stored = self.teacher.top_k
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
