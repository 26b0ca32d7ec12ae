"""Replayable dropout, for blocks that are recomputed in the backward pass."""

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.utils.types import Tensor


class ReplayableSeedGenerator(keras.random.SeedGenerator):
    """Stateless sequence of seeds that are derived from one seed.

    Keras's generator changes its state at every draw, which a rematerialized block must
    not do.

    Args:
        seed: `(2,)`, from `SeedGenerator.next()`.
    """

    def __init__(self, seed: Tensor):  # Keras's `__init__` would create the state.
        _compat.mark_as_seeded(self)
        self.seed = seed
        self.count = 0

    def next(self, ordered: bool = True) -> Tensor:
        """The next seed, `(2,)`."""
        self.count += 1
        step = ops.convert_to_tensor([self.count * 1_000_003, 0], self.seed.dtype)
        return self.seed + step

    def draw(self) -> "ReplayableSeedGenerator":
        """A generator that draws the next seed of this one, each time."""
        return _OneSeed(self.next())

    def replay(self) -> "ReplayableSeedGenerator":
        """A generator of the same seeds, from the first one."""
        return ReplayableSeedGenerator(self.seed)


class _OneSeed(ReplayableSeedGenerator):
    def next(self, ordered=True):
        return self.seed


def dropout(x: Tensor, rate: float, seeds: ReplayableSeedGenerator | None) -> Tensor:
    """Dropout of `x` at `rate`; `x` itself if `seeds` is `None`."""
    return x if seeds is None else keras.random.dropout(x, rate, seed=seeds)
