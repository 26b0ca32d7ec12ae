"""What the network, its losses and `generate` ask about the mesh they run on.

Without `distribute` there is none: all functions then give back what they got.
"""

import keras
import numpy as np

from keras_t5gemma.distribution import process_group
from keras_t5gemma.distribution.distribute import MeshDistribution
from keras_t5gemma.distribution.shared_arrays import gathered
from keras_t5gemma.utils import buckets


def current():
    """The `MeshDistribution` that is in force, or `None`."""
    distribution = keras.distribution.distribution()
    return distribution if isinstance(distribution, MeshDistribution) else None


def size(axis):
    """How many devices a mesh axis has; 1 without a mesh.

    Args:
        axis: `"data"` or `"model"`.
    """
    mesh = current()
    return 1 if mesh is None else mesh.mesh[axis]


def shards_of_rows(count):
    """In how many pieces, one after the other, the rows of an embedding table lie.

    Args:
        count: how many rows the table has.
    """
    mesh = current()
    shards = 1 if mesh is None or mesh.strategy == "data" else mesh.mesh["model"]
    return shards if count % shards == 0 else 1


def pieces_of_width():
    """In how many pieces the width of embedding tables is cut."""
    mesh = current()
    return mesh.mesh["data"] if mesh is not None and mesh.strategy == "fsdp" else 1


def prepare(config):
    """Say which model the next variables are made for.

    Args:
        config: a `T5GemmaConfig`.
    """
    mesh = current()
    if mesh is not None:
        mesh.config = config


def lay_out(x, *axes):
    """`x`, with its axes split over those of the mesh, where they divide.

    Args:
        x: an array, or a traced one.
        *axes: `"data"`, `"model"` or `None` for each axis of `x`.
    """
    mesh = current()
    if mesh is None:
        return x
    # Keras traces with odd sizes in place of those it does not know.
    sizes = zip(axes, x.shape, strict=True)
    axes = [a if a and size % mesh.mesh[a] == 0 else None for a, size in sizes]
    layout = keras.distribution.TensorLayout(axes, mesh.device_mesh)
    return keras.distribution.distribute_tensor(x, layout)


def lay_out_table(x):
    """`(rows, D)`, laid out as an embedding table, whose gradient it may be."""
    mesh = current()
    if mesh is None or mesh.strategy == "data":
        return x
    return lay_out(x, "model", "data" if mesh.strategy == "fsdp" else None)


def look_up(layer, token_ids):
    """Rows `(B, T, D)` of an embedding layer for ids `(B, T)`.

    Where `"data"` splits the width of the table, every device finds its part of the
    width for all of the batch; then they change places. The table is never whole.
    """
    if pieces_of_width() == 1:
        return layer(token_ids)
    x = lay_out(layer(lay_out(token_ids, None, None)), None, None, "data")
    return lay_out(x, "data", None, None)


def split_rows(tree):
    """Arrays of the host, their first axes split over `"data"` where it divides them.

    Where there are several processes, all of them have the same arrays.
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


def join_rows(tree):
    """Arrays of all processes, made of the `processes.local_rows` of each."""
    import jax

    def join(x):
        layout = current().get_data_layout(x.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, np.asarray(x))

    return keras.tree.map_structure(join, tree)


def to_numpy(x):
    """A NumPy array of one that the mesh may share; all processes call it."""
    whole = current() is None or isinstance(x, np.ndarray)
    return keras.ops.convert_to_numpy(x if whole else gathered(x))


def like(x, source):
    """`x`, laid out as the array `source` that it was made from."""
    if current() is None:
        return x
    import jax

    try:
        source.sharding.shard_shape(x.shape)
    except ValueError:  # It does not divide what is left.
        return x
    return jax.device_put(x, source.sharding)


def round_up(rows):
    """A number of rows, rounded up to what `"data"` divides."""
    return buckets.round_up(rows, size("data"))


def rows_for(count):
    """Room for `count` rows of this process, so that `"data"` divides that of all.

    Returns:
        `(before, rows)`: the rows of the processes before this one, and its own.
    """
    held = process_group.local_rows(size("data"))
    first, last = held.start or 0, held.stop
    rows = buckets.ceil_div(count, last - first)  # Of a place on the axis.
    return first * rows, (last - first) * rows


def fill_rows(tree):
    """NumPy arrays, their last rows repeated until `"data"` divides their number."""

    def fill(x):
        more = round_up(len(x)) - len(x)
        return np.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1)), mode="edge")

    return tree if size("data") == 1 else keras.tree.map_structure(fill, tree)


def fill_batch(batch):
    """`(x, labels, weights)` with `fill_rows`; the rows that are added weigh 0."""
    rows = len(batch[2])
    x, labels, weights = fill_rows(batch)
    if len(weights) > rows:
        weights[rows:] = 0
    return x, labels, weights


def check_rows(rows, name):
    """Raise `ValueError` for a number of rows that `"data"` does not divide.

    Args:
        rows: how many.
        name: what has them, for the message.
    """
    if rows % size("data"):
        raise ValueError(
            f"{name} has {rows} rows, which cannot be split over the mesh axis 'data' "
            f"of {size('data')} devices: take a multiple of it."
        )
