"""How a matrix of ours lies in other checkpoints."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a matrix of ours lies in somebody else's checkpoint.

    Our projections are `(in, out)`, heads next to each other. Theirs is ours with
    the axis `split` divided into `(heads, head size)`, and then transposed.

    Args:
        split: axis of ours, or `None`.
        permutation: of the axes after splitting, or `None`.
    """

    split: int | None = None
    permutation: tuple | None = None

    def split_shape(self, shape, head_dim):
        """Our shape with its heads apart."""
        if self.split is None:
            return tuple(shape)
        heads = (shape[self.split] // head_dim, head_dim)
        return (*shape[: self.split], *heads, *shape[self.split + 1 :])

    def their_shape(self, shape, head_dim):
        """The shape in their checkpoint of a tensor that has `shape` in ours."""
        shape = self.split_shape(shape, head_dim)
        return tuple(shape[i] for i in self.permutation) if self.permutation else shape

    def to_ours(self, array, shape):
        """Their array as ours, of `shape`; a view where possible."""
        if self.permutation:
            array = np.transpose(array, np.argsort(self.permutation))
        return array.reshape(shape)

    def to_theirs(self, array, head_dim):
        """Our array as theirs; a view where possible."""
        array = array.reshape(self.split_shape(array.shape, head_dim))
        return np.transpose(array, self.permutation) if self.permutation else array


RULES = {
    "same": Rule(),
    "transpose": Rule(permutation=(1, 0)),
    "heads_out": Rule(split=1),  # (D, N H) is their (D, N, H)
    "heads_in": Rule(split=0),  # (N H, D) is their (N, H, D)
    "heads_first": Rule(split=1, permutation=(1, 0, 2)),  # their (N, D, H)
}
