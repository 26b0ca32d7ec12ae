"""Cross-attention warm-up of unbalanced pairs (arXiv 2504.06225, section 3.2)."""

import functools

import keras

from keras_t5gemma import _compat
from keras_t5gemma.training.accumulation import inner_optimizer
from keras_t5gemma.utils.checks import flag, whole_number


class CrossAttentionWarmUp(keras.callbacks.Callback):
    """Train only the cross-attention for the first steps of `fit`, then all weights.

    The cross-attention of an adapted pair of unequal towers starts random; the paper
    trains it alone for K = 1000 steps. Whether the two norms around it are trained with
    it is not published. One more program is compiled, once. The optimizer keeps its
    state for the cross-attention; for the other weights its state starts at step K.
    Until then they are neither updated nor decayed, and their gradients are not
    computed (on JAX and TensorFlow as far as the compiler removes them).

    Args:
        steps: K; 0 turns it off. Counted from the optimizer's first update, so that a
            resumed run continues the warm-up.
        norms: whether the two norms around the cross-attention are trained with it.

    Raises:
        ValueError: for `steps` below 0; when training begins, for a model without
            trainable cross-attention.
    """

    def __init__(self, steps: int = 1000, norms: bool = True) -> None:
        super().__init__()
        self.steps = whole_number(steps, "steps", 0)
        self.norms = flag(norms, "norms")
        self.is_on = False

    def on_train_begin(self, logs=None):
        optimizer = inner_optimizer(self.model.optimizer)
        batches = optimizer.gradient_accumulation_steps or 1  # Of an update.
        self._end_at = self.steps * batches
        self._done = int(_compat.batch_counter(optimizer))
        self._optimizer = optimizer
        if self._done < self._end_at:
            self._begin()
        else:
            self._note()

    def on_epoch_begin(self, epoch, logs=None):
        self._batch = -1

    def on_train_batch_end(self, batch, logs=None):
        self._done += batch - self._batch
        self._batch = batch
        if self.is_on and self._done >= self._end_at:
            self._note()
            self._end()

    def on_train_end(self, logs=None):
        if self.is_on:
            self._end()

    def _begin(self):
        names = ("cross_attention",) + ("cross_norm",) * self.norms
        every = self.model.trainable_variables
        alone = [v for v in every if any(name in v.path for name in names)]
        if not alone:
            raise ValueError(
                "CrossAttentionWarmUp needs trainable cross-attention; none is among "
                f"the model's {len(every)} trainable variables."
            )
        if not self.model.optimizer.built:  # One with a loss scale builds twice.
            self.model.optimizer.build(every)
        ids = {id(variable) for variable in alone}
        apply = functools.partial(_apply_to, self._optimizer, every, ids)
        _compat.replace_apply(self._optimizer, apply)
        self._frozen = [v for v in every if id(v) not in ids]
        self._switch(True)

    def _note(self):
        """Note in the model that its next training needs no warm-up."""
        if getattr(self.model.backbone, "lineage", None):
            self.model.backbone.lineage["needs_warm_up"] = False

    def _end(self):
        _compat.replace_apply(self._optimizer, None)
        self._switch(False)

    def _switch(self, is_on):
        self.is_on = is_on
        if keras.config.backend() == "torch":
            for variable in self._frozen:
                variable.value.requires_grad_(not is_on)
        self.model.make_train_function(force=True)


def _apply_to(optimizer, every, ids, grads, trainable_variables=None):
    """`optimizer.apply` for the variables with these identities only."""
    variables = every if trainable_variables is None else trainable_variables
    pairs = zip(grads, variables, strict=True)
    chosen = [(g, v) for g, v in pairs if id(v) in ids]
    type(optimizer).apply(optimizer, *map(list, zip(*chosen, strict=True)))
