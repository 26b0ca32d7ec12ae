"""Layout transforms between our kernels and another format's."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayoutTransform:
    """Layout of a kernel in another format, relative to ours.

    Our projections are `(in, out)` with the heads concatenated. In the file the axis
    `split` is divided into `(heads, head size)`, and the axes are then permuted.

    Args:
        split: axis of our kernel, or `None`.
        permutation: of the axes after splitting, or `None`.
    """

    split: int | None = None
    permutation: tuple[int, ...] | None = None

    def split_shape(self, shape: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
        """Our shape with the heads on an axis of their own."""
        if self.split is None:
            return tuple(shape)
        heads = (shape[self.split] // head_dim, head_dim)
        return (*shape[: self.split], *heads, *shape[self.split + 1 :])

    def file_shape(self, shape: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
        """Shape in the file of a variable of `shape`."""
        shape = self.split_shape(shape, head_dim)
        return tuple(shape[i] for i in self.permutation) if self.permutation else shape

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Array of a file in our layout, of `shape`; a view where possible."""
        if self.permutation:
            array = np.transpose(array, np.argsort(self.permutation))
        return array.reshape(shape)

    def to_file(self, array: np.ndarray, head_dim: int) -> np.ndarray:
        """Array in our layout in that of the file; a view where possible."""
        array = array.reshape(self.split_shape(array.shape, head_dim))
        return np.transpose(array, self.permutation) if self.permutation else array


TRANSFORMS = {
    "same": LayoutTransform(),
    "transpose": LayoutTransform(permutation=(1, 0)),
    "heads_out": LayoutTransform(split=1),  # (D, N H) is (D, N, H) in the file.
    "heads_in": LayoutTransform(split=0),  # (N H, D) is (N, H, D).
    "heads_first": LayoutTransform(split=1, permutation=(1, 0, 2)),  # (N, D, H).
}
