"""The cross-attention of an unbalanced pair learns first (arXiv 2504.06225, 3.2)."""

import functools

import keras

from keras_t5gemma import _compat
from keras_t5gemma.utils.checks import whole_number


class CrossAttentionWarmUp(keras.callbacks.Callback):
    """Train only the cross-attention for the first steps of `fit`, then everything.

    The cross-attention of an adapted pair of unequal towers begins at random; the paper
    trains it alone for K = 1000 steps. Whether the two norms around it train with it is
    not published. One more program is compiled, once, and the optimizer stays the same:
    what it knows of the cross-attention it keeps, of the rest it begins to learn at
    step K. Until then the rest is neither moved nor decayed, and its gradients are not
    computed (on JAX and TensorFlow as far as the compiler sees it).

    Args:
        steps: K; 0 is none. Counted from the optimizer's first step, so that a run that
            goes on after a stop goes on with it.
        norms: whether the two norms around the cross-attention train with it.

    Raises:
        ValueError: for `steps` below 0; when the training begins, for a model without
            cross-attention that learns.
    """

    def __init__(self, steps=1000, norms=True):
        super().__init__()
        self.steps = whole_number(steps, "steps", 0)
        self.norms = norms
        self.is_on = False

    def on_train_begin(self, logs=None):
        self._done = int(self.model.optimizer.iterations)
        if self._done < self.steps:
            self._begin()

    def on_epoch_begin(self, epoch, logs=None):
        self._batch = -1

    def on_train_batch_end(self, batch, logs=None):
        self._done += batch - self._batch
        self._batch = batch
        if self.is_on and self._done >= self.steps:
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
                "CrossAttentionWarmUp needs cross-attention that is trainable; the "
                f"model's {len(every)} trainable variables hold none."
            )
        optimizer = self.model.optimizer
        optimizer.build(every)
        # Mixed float16 wraps the one that moves the weights.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        ids = {id(variable) for variable in alone}
        apply = functools.partial(_apply_to, optimizer, every, ids)
        _compat.replace_apply(optimizer, apply)
        self._optimizer = optimizer
        self._frozen = [v for v in every if id(v) not in ids]
        self._switch(True)

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
    """`optimizer.apply`, of the variables with these identities alone."""
    variables = every if trainable_variables is None else trainable_variables
    pairs = zip(grads, variables, strict=True)
    chosen = [(g, v) for g, v in pairs if id(v) in ids]
    type(optimizer).apply(optimizer, *map(list, zip(*chosen, strict=True)))
