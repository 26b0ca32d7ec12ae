"""Dropout that can be drawn a second time, when a block is computed anew."""

import keras
from keras import ops

from keras_t5gemma import _compat


class ReplayableSeedGenerator(keras.random.SeedGenerator):
    """Seeds that follow from one drawn before, in the order they are asked for.

    Keras's own generator changes its state at every draw, which a rematerialized
    block may not do.

    Args:
        seed: `(2,)`, of `SeedGenerator.next()`.
    """

    def __init__(self, seed):  # Not Keras's: there is no state.
        _compat.mark_as_seeded(self)
        self.seed = seed
        self.asked = 0

    def next(self, ordered=True):
        """The next seed, `(2,)`."""
        self.asked += 1
        step = ops.convert_to_tensor([self.asked * 1_000_003, 0], self.seed.dtype)
        return self.seed + step

    def again(self):
        """The same seeds from the first one on."""
        return ReplayableSeedGenerator(self.seed)


def dropout(x, rate, seeds):
    """`x` with a share `rate` of zeros; `x` itself when `seeds` is `None`."""
    return x if seeds is None else keras.random.dropout(x, rate, seed=seeds)
