"""Queries and sharding on the current device mesh, for model, losses and generation.

Without `distribute` there is no mesh: all functions then return their input.
"""

from typing import Any

import keras
import numpy as np

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.distribute import MeshDistribution
from keras_t5gemma.distribution.shared_arrays import gathered
from keras_t5gemma.utils import buckets
from keras_t5gemma.utils.types import Tensor


def current() -> MeshDistribution | None:
    """The current `MeshDistribution`, or `None`."""
    distribution = keras.distribution.distribution()
    return distribution if isinstance(distribution, MeshDistribution) else None


def size(axis: str) -> int:
    """Number of devices of a mesh axis; 1 without a mesh.

    Args:
        axis: `"data"` or `"model"`.
    """
    mesh = current()
    return 1 if mesh is None else mesh.mesh[axis]


def shards_of_rows(count: int) -> int:
    """Number of contiguous shards of the rows of an embedding table.

    Args:
        count: number of rows of the table.
    """
    mesh = current()
    shards = 1 if mesh is None or mesh.strategy == "data" else mesh.mesh["model"]
    return shards if count % shards == 0 else 1


def pieces_of_width() -> int:
    """Number of shards of the width of embedding tables."""
    mesh = current()
    return mesh.mesh["data"] if mesh is not None and mesh.strategy == "fsdp" else 1


def prepare(config: T5GemmaConfig) -> None:
    """Set the configuration of the model whose variables are created next.

    Args:
        config: a `T5GemmaConfig`.
    """
    mesh = current()
    if mesh is not None:
        mesh.config = config


def lay_out(x: Tensor, *axes: str | None) -> Tensor:
    """Shard the axes of `x` over those of the mesh, where they divide.

    Args:
        x: an array, concrete or traced.
        *axes: `"data"`, `"model"` or `None` for each axis of `x`.
    """
    mesh = current()
    if mesh is None:
        return x
    # Keras traces with odd placeholder sizes, which the mesh does not divide.
    sizes = zip(axes, x.shape, strict=True)
    split = [a if a and size % mesh.mesh[a] == 0 else None for a, size in sizes]
    layout = keras.distribution.TensorLayout(split, mesh.device_mesh)
    return keras.distribution.distribute_tensor(x, layout)


def lay_out_table(x: Tensor) -> Tensor:
    """Shard `x` `(rows, D)` like an embedding table, e.g. its gradient."""
    mesh = current()
    if mesh is None or mesh.strategy == "data":
        return x
    return lay_out(x, "model", "data" if mesh.strategy == "fsdp" else None)


def look_up(layer: keras.layers.Layer, token_ids: Tensor) -> Tensor:
    """Embeddings `(B, T, D)` of ids `(B, T)`.

    Where `"data"` splits the width of the table, every device looks up its part of the
    width for the whole batch, followed by an all-to-all. The table is never gathered.
    """
    if pieces_of_width() == 1:
        return layer(token_ids)
    x = lay_out(layer(lay_out(token_ids, None, None)), None, None, "data")
    return lay_out(x, "data", None, None)


def split_rows(tree: Any) -> Any:
    """Shard the first axes of host arrays over `"data"`, where it divides them.

    With several processes all of them pass the same arrays.
    """
    mesh = current()
    if mesh is None:
        return tree
    import jax

    def split(x):
        x = np.asarray(x)
        over = "data" if x.ndim and len(x) % mesh.mesh["data"] == 0 else None
        axes = [over, *[None] * (x.ndim - 1)] if x.ndim else []
        layout = keras.distribution.TensorLayout(axes, mesh.device_mesh)
        return jax.make_array_from_callback(
            x.shape, layout.backend_layout, lambda index: x[index]
        )

    return keras.tree.map_structure(split, tree)


def join_rows(tree: Any) -> Any:
    """Global arrays from the `process_group.local_rows` of every process."""
    import jax

    mesh: Any = current()

    def join(x):
        layout = mesh.get_data_layout(x.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, np.asarray(x))

    return keras.tree.map_structure(join, tree)


def to_numpy(x: Tensor) -> np.ndarray:
    """NumPy array of an array that may be sharded; all processes call it."""
    whole = current() is None or isinstance(x, np.ndarray)
    return keras.ops.convert_to_numpy(x if whole else gathered(x))


def like(x: Tensor, source: Tensor) -> Tensor:
    """Shard `x` like the array `source` that it was computed from."""
    if current() is None:
        return x
    import jax

    try:
        source.sharding.shard_shape(x.shape)
    except ValueError:  # The mesh does not divide the rows that are left.
        return x
    return jax.device_put(x, source.sharding)


def round_up(rows: int) -> int:
    """A number of rows, rounded up to a multiple of `"data"`."""
    return buckets.round_up(rows, size("data"))


def rows_for(count: int) -> tuple[int, int]:
    """Rows of this process in a global array with at least `count` rows for each.

    Returns:
        `(before, rows)`: the number of rows of the processes before this one, and of
        this one; `"data"` divides the total.
    """
    held = process_group.local_rows(size("data"))
    first, last = held.start or 0, held.stop
    rows = buckets.ceil_div(count, last - first)  # For each index of the axis.
    return first * rows, (last - first) * rows


def fill_rows(tree: Any) -> Any:
    """Pad NumPy arrays to a multiple of `"data"` rows by repeating the last row."""

    def fill(x):
        more = round_up(len(x)) - len(x)
        return np.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1)), mode="edge")

    return tree if size("data") == 1 else keras.tree.map_structure(fill, tree)


def fill_batch(batch: tuple) -> tuple:
    """`(x, labels, weights)` padded by `fill_rows`, with weight 0 for added rows."""
    rows = len(batch[2])
    x, labels, weights = fill_rows(batch)
    if len(weights) > rows:
        weights[rows:] = 0
    return x, labels, weights


def check_rows(rows: int, name: str) -> None:
    """Raise `ValueError` for a number of rows that `"data"` does not divide.

    Args:
        rows: number of rows.
        name: what has them, for the message.
    """
    if rows % size("data"):
        raise ValueError(
            f"{name} has {rows} rows, which cannot be split over the mesh axis 'data' "
            f"of {size('data')} devices: use a multiple of it."
        )
