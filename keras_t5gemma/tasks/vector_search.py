"""Nearest vectors by cosine similarity, in memory."""

import numpy as np

from keras_t5gemma.utils.checks import number_array, rows_of_batch, whole_number


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the angles between vectors.

    Args:
        a: vectors `(n, d)`.
        b: vectors `(m, d)`.

    Returns:
        float32 `(n, m)`.

    Raises:
        ValueError: for arrays that are not vectors of one length.

    Examples:
        >>> keras_t5gemma.cosine_similarity(np.eye(2), np.array([[2.0, 0.0]])).tolist()
        [[1.0], [0.0]]
    """
    a, b = _vectors(a=a, b=b)
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    a, b = (x / np.maximum(n, 1e-12) for x, n in zip((a, b), lengths, strict=True))
    return a @ b.T


def _vectors(**arrays):
    """Two arrays of vectors of the same width, float32 `(n, width)`."""
    found = {name: number_array(value, name) for name, value in arrays.items()}
    shapes = [array.shape for array in found.values()]
    if not all(len(shape) == 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        names = " and ".join(f"`{name}`" for name in found)
        raise ValueError(
            f"{names} must be (n, width) and (m, width); got {shapes[0]} and "
            f"{shapes[1]}."
        )
    return found.values()


def nearest(
    queries: np.ndarray, vectors: np.ndarray, k: int = 10, rows_at_once: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest vectors of each query by cosine similarity.

    Args:
        queries: float `(n, d)`.
        vectors: float `(m, d)`.
        k: number of neighbors.
        rows_at_once: queries to compare at a time.

    Returns:
        `(numbers, cosines)`, int64 and float32 `(n, k)`, the nearest first.

    Raises:
        ValueError: for a `k` that is not in 1..m.

    Examples:
        >>> numbers, _ = keras_t5gemma.nearest(np.array([[1.0, 0.1]]), np.eye(2), k=2)
        >>> numbers.tolist()
        [[0, 1]]
    """
    queries, vectors = _vectors(queries=queries, vectors=vectors)
    k = whole_number(k, "k", 1, len(vectors))
    rows_of_batch(rows_at_once, "rows_at_once")
    if not len(queries):
        return np.zeros((0, k), "int64"), np.zeros((0, k), "float32")
    numbers, found = [], []
    for start in range(0, len(queries), rows_at_once):
        near = cosine_similarity(queries[start : start + rows_at_once], vectors)
        best = np.argsort(-near, axis=1, kind="stable")[:, :k]
        numbers.append(best)
        found.append(np.take_along_axis(near, best, axis=1))
    return np.concatenate(numbers), np.concatenate(found)
