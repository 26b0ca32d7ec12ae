"""Which axis of a variable is split over which axis of a mesh of devices.

A mesh has an axis `"data"`, over which batches are split, and an axis `"model"`, over
which heads, feed-forward and vocabulary are. A strategy says what becomes of the
variables:

`"data"`: every device holds all of them.
`"tensor"`: `"model"` splits those of `ROWS`, `"data"` repeats them.
`"fsdp"`: as `"tensor"`, and `"data"` splits every large one along another axis.
"""

import math
import re

import keras
import ml_dtypes  # noqa: F401  NumPy then knows bfloat16 by name.
import numpy as np

from keras_t5gemma.utils.checks import whole_number

MESH_AXES = ("data", "model")
STRATEGIES = ("data", "fsdp", "tensor")

# End of a variable's path, and what its axes are. The first row that fits counts; an
# int8 scale has one axis, a table's first or a kernel's last.
ROWS = (
    ("token_embedding/(embeddings(_scale|_zero)?|lora_embeddings_a)", ("V", None)),
    ("attention/query/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "N")),
    ("attention/(key|value)/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "K")),
    ("attention/output/(kernel|lora_kernel_a)", ("N", None)),
    ("mlp/(gate|up)/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "F")),
    ("mlp/down/(kernel|lora_kernel_a)", ("F", None)),
    # int4: one scale for a group of inputs.
    ("(output|down)/kernel_(scale|zero)", ("groups", None)),
)
# What those axes are called in an error; others stay whole where they do not divide.
NAMES = {"V": "vocabulary", "N": "query heads", "F": "feed-forward"}

# What may be large and yet the same on all devices of `"model"`: key and value heads
# fewer than these, or not a multiple of them, are not cut up, nor are int4's groups.
REPLICATED = (
    "attention/(key|value)/(kernel(_scale|_zero)?|lora_kernel_b)",
    "(output|down)/kernel_(scale|zero)",
)

# Elements from which on a variable is large: of 8 bytes each, still below 1 MB.
LARGE = 2**16
_MEGABYTE = 10**6


def partition(path, shape, mesh, strategy, config=None):
    """The mesh axis that each axis of a variable is split over.

    Args:
        path: the variable's path, e.g. `"encoder/block_0/mlp/up/kernel"`.
        shape: its shape.
        mesh: dict of `"data"` and `"model"`, how many devices each has; 1 if left out.
        strategy: `"data"`, `"fsdp"` or `"tensor"`.
        config: the model's `T5GemmaConfig`, so that heads are split whole; `None`
            asks only that the axes' sizes divide.

    Returns:
        Tuple of `"data"`, `"model"` or `None`, one for each axis.

    Raises:
        ValueError: for an unknown strategy or mesh axis, or what does not divide.
    """
    check_strategy(strategy)
    check_mesh(mesh)
    axes = [None] * len(shape)
    if strategy == "data":
        return tuple(axes)
    over_model, over_data = mesh.get("model", 1), mesh.get("data", 1)
    if over_model > 1:
        for i, kind in enumerate(_kinds(path, len(shape))):
            if kind is None:
                continue
            pieces = _heads(path, kind, config) or shape[i]
            if pieces % over_model == 0 == shape[i] % over_model:
                axes[i] = "model"
            elif kind in NAMES:
                raise ValueError(
                    f"{path} {tuple(shape)}: its {pieces} {NAMES[kind]} cannot be "
                    f"split over the mesh axis 'model' of {over_model} devices."
                )
    if strategy == "fsdp" and over_data > 1 and math.prod(shape) >= LARGE:
        free = [i for i, axis in enumerate(axes) if axis is None]
        free = [i for i in free if shape[i] % over_data == 0]
        if not free and not any(axes):
            raise ValueError(
                f"{path} {tuple(shape)}: no axis can be split over the mesh axis "
                f"'data' of {over_data} devices."
            )
        if free:
            # Rows of a table that is split by its width are found without a copy.
            is_table = "/token_embedding/" in f"/{path}"
            best = max(free, key=lambda i: (is_table and i == 1, shape[i]))
            axes[best] = "data"
    return tuple(axes)


def check_strategy(strategy):
    """Raise `ValueError` for a name that is none of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ValueError(
            f"`strategy` must be one of {list(STRATEGIES)}; got {strategy!r}."
        )


def check_mesh(mesh):
    """Raise `ValueError` for axes other than `MESH_AXES`, or sizes below 1."""
    unknown = [name for name in mesh if name not in MESH_AXES]
    if unknown:
        raise ValueError(
            f"A mesh may have the axes {list(MESH_AXES)}; got {unknown[0]!r}."
        )
    for name, size in mesh.items():
        whole_number(size, name, 1)


def _kinds(path, rank):
    """What the axes of a variable are, by `ROWS`."""
    for template, kinds in ROWS:
        if re.search(f"(^|/|_){template}$", path):
            if rank == 1:
                kinds = kinds[:1] if "V" in kinds else kinds[1:]
            return kinds
    return (None,) * rank


def _heads(path, kind, config):
    if config is None or kind not in ("N", "K"):
        return None
    in_encoder = "encoder" in path.split("/")
    stack = config.encoder if in_encoder else config.decoder
    return stack.num_query_heads if kind == "N" else stack.num_key_value_heads


def mesh_sizes(device_mesh):
    """The dict of `partition` of a `keras.distribution.DeviceMesh`."""
    sizes = map(int, device_mesh.shape)
    return dict(zip(device_mesh.axis_names, sizes, strict=True))


def make_layout_map(variables, device_mesh, strategy, config=None):
    """A `keras.distribution.LayoutMap` of variables, one pattern for all blocks.

    Args:
        variables: things with a `path` and a `shape`.
        device_mesh: a `keras.distribution.DeviceMesh` with axes `"data"`, `"model"`.
        strategy: as in `partition`.
        config: as in `partition`.

    Raises:
        ValueError: as in `partition`.
    """
    mesh = mesh_sizes(device_mesh)
    check_mesh(mesh)
    layouts = keras.distribution.LayoutMap(device_mesh)
    for variable in variables:
        axes = partition(variable.path, variable.shape, mesh, strategy, config)
        # Keras replicates what no pattern fits.
        pattern = re.sub(r"block_\d+", r"block_\\d+", re.escape(variable.path))
        if any(axes) and pattern not in set(layouts):
            layouts[pattern] = axes
    return layouts


def check_layouts(model, layout_map, may_repeat=REPLICATED):
    """Raise `ValueError` where a layout map is not made for a model.

    Args:
        model: a Keras model.
        layout_map: a `keras.distribution.LayoutMap`.
        may_repeat: ends of paths of variables that may be above 1 MB and yet the same
            on all devices.

    Raises:
        ValueError: for a pattern that fits no variable; a variable that two fit; axes
            that are not the variable's, not the mesh's, or do not divide; and a
            variable above 1 MB that is split nowhere.
    """
    mesh = mesh_sizes(layout_map.device_mesh)
    unused = set(layout_map)
    for variable in model.variables:
        path, shape = variable.path, tuple(variable.shape)
        fits = [key for key in layout_map if key == path or re.fullmatch(key, path)]
        unused -= set(fits)
        if len(fits) > 1:
            raise ValueError(f"{path} fits {len(fits)} patterns of the map: {fits}.")
        axes = layout_map[fits[0]].axes if fits else ()
        if fits and len(axes) != len(shape):
            raise ValueError(
                f"{path} has {len(shape)} axes, {shape}; its layout has {axes}."
            )
        for axis, size in zip(axes, shape, strict=False):
            if axis is not None and size % mesh[axis]:
                raise ValueError(
                    f"{path} {shape}: an axis of {size} cannot be split over the mesh "
                    f"axis {axis!r} of {mesh[axis]} devices."
                )
        is_split = any(axis is not None and mesh[axis] > 1 for axis in axes)
        listed = any(re.search(f"(^|/|_){end}$", path) for end in may_repeat)
        size = math.prod(shape) * np.dtype(variable.dtype).itemsize
        if size > _MEGABYTE and not is_split and not listed:
            raise ValueError(
                f"{path} {shape} of {size / 1e6:.1f} MB would be repeated on every "
                "device: no pattern splits it. Split it or list it in `may_repeat`."
            )
    if unused:
        raise ValueError(
            f"No variable fits the pattern {sorted(unused)[0]!r}; patterns must fit a "
            "whole path."
        )
