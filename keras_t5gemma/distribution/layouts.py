"""Sharding rules: the mesh axis that each axis of a variable is split over.

A mesh has an axis `"data"`, over which batches are split, and an axis `"model"`, over
which heads, feed-forward and vocabulary are split. The strategies for variables:

`"data"`: every device holds all variables.
`"tensor"`: `"model"` splits those of `ROWS`, `"data"` replicates them.
`"fsdp"`: like `"tensor"`, and `"data"` splits every large variable along another axis.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import ml_dtypes  # noqa: F401  Registers bfloat16 with NumPy.
import numpy as np

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.utils.checks import one_of, whole_number

MESH_AXES = ("data", "model")
STRATEGIES = ("data", "fsdp", "tensor")

# Suffix of a variable's path, and names of its axes. The first row that matches counts;
# an int8 scale has one axis, the first of a table or the last of a kernel.
ROWS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("token_embedding/(embeddings(_scale|_zero)?|lora_embeddings_a)", ("V", None)),
    ("attention/query/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "N")),
    ("attention/(key|value)/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "K")),
    ("attention/output/(kernel|lora_kernel_a)", ("N", None)),
    ("mlp/(gate|up)/(kernel(_scale|_zero)?|lora_kernel_b)", (None, "F")),
    ("mlp/down/(kernel|lora_kernel_a)", ("F", None)),
    # int4: one scale for a group of inputs.
    ("(output|down)/kernel_(scale|zero)", ("groups", None)),
)
# Names of those axes in errors; other axes stay whole if the mesh does not divide them.
NAMES = {"V": "vocabulary", "N": "query heads", "F": "feed-forward"}

# Large variables that may be replicated over `"model"`: key/value heads whose number is
# not a multiple of the devices, and the groups of int4, are not split.
REPLICATED = (
    "attention/(key|value)/(kernel(_scale|_zero)?|lora_kernel_b)",
    "(output|down)/kernel_(scale|zero)",
)

# Elements of a large variable. Smaller ones are below 1 MB, even with 8 bytes each.
LARGE = 2**16
_MEGABYTE = 10**6


def partition(
    path: str,
    shape: Sequence[int],
    mesh: Mapping[str, int],
    strategy: str,
    config: T5GemmaConfig | None = None,
) -> tuple[str | None, ...]:
    """The mesh axis that each axis of a variable is split over.

    Args:
        path: of the variable, e.g. `"encoder/block_0/mlp/up/kernel"`.
        shape: of the variable.
        mesh: number of devices of `"data"` and `"model"`, 1 if left out.
        strategy: `"data"`, `"fsdp"` or `"tensor"`.
        config: the model's `T5GemmaConfig`, so that no head is split; `None` only
            requires that the mesh divides the axes.

    Returns:
        `"data"`, `"model"` or `None` for each axis.

    Raises:
        ValueError: for an unknown strategy or mesh axis, or an axis that the mesh does
            not divide.
    """
    check_strategy(strategy)
    check_mesh(mesh)
    axes: list[str | None] = [None] * len(shape)
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
            # A table that is split along its width is looked up without a copy.
            is_table = "/token_embedding/" in f"/{path}"
            best = max(free, key=lambda i: (is_table and i == 1, shape[i]))
            axes[best] = "data"
    return tuple(axes)


def check_strategy(strategy: str) -> None:
    """Raise `ValueError` for a name that is not in `STRATEGIES`."""
    one_of(strategy, "strategy", STRATEGIES)


def check_mesh(mesh: Mapping[str, int]) -> None:
    """Raise `ValueError` for axes other than `MESH_AXES`, or sizes below 1."""
    unknown = [name for name in mesh if name not in MESH_AXES]
    if unknown:
        raise ValueError(
            f"A mesh may have the axes {list(MESH_AXES)}; got {unknown[0]!r}."
        )
    for name, size in mesh.items():
        whole_number(size, name, 1)


def _kinds(path, rank):
    """Names of the axes of a variable, from `ROWS`."""
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


def mesh_sizes(device_mesh: keras.distribution.DeviceMesh) -> dict[str, int]:
    """`{axis: number of devices}` of a `keras.distribution.DeviceMesh`."""
    sizes = map(int, device_mesh.shape)
    return dict(zip(device_mesh.axis_names, sizes, strict=True))


def make_layout_map(
    variables: Iterable[Any],
    device_mesh: keras.distribution.DeviceMesh,
    strategy: str,
    config: T5GemmaConfig | None = None,
) -> keras.distribution.LayoutMap:
    """A `keras.distribution.LayoutMap` of variables, one pattern for all blocks.

    Args:
        variables: objects with a `path` and a `shape`.
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
        # Keras replicates variables that no pattern matches.
        pattern = re.sub(r"block_\d+", r"block_\\d+", re.escape(variable.path))
        if any(axes) and pattern not in set(layouts):
            layouts[pattern] = axes
    return layouts


def check_layouts(
    model: keras.Model,
    layout_map: keras.distribution.LayoutMap,
    may_replicate: Sequence[str] = REPLICATED,
) -> None:
    """Raise `ValueError` if a layout map does not fit a model.

    Args:
        model: a Keras model.
        layout_map: a `keras.distribution.LayoutMap`.
        may_replicate: suffixes of the paths of variables above 1 MB that may be
            replicated.

    Raises:
        ValueError: for a pattern that matches no variable; a variable that two
            patterns match; axes that the variable or the mesh does not have, or that do
            not divide; or a variable above 1 MB that is replicated.
    """
    mesh = mesh_sizes(layout_map.device_mesh)
    unused = set(layout_map)
    for variable in model.variables:
        path, shape = variable.path, tuple(variable.shape)
        fits = [key for key in layout_map if key == path or re.fullmatch(key, path)]
        unused -= set(fits)
        if len(fits) > 1:
            raise ValueError(f"{path} matches {len(fits)} patterns: {fits}.")
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
        listed = any(re.search(f"(^|/|_){end}$", path) for end in may_replicate)
        size = math.prod(shape) * np.dtype(variable.dtype).itemsize
        if size > _MEGABYTE and not is_split and not listed:
            raise ValueError(
                f"{path} {shape} of {size / 1e6:.1f} MB would be replicated on every "
                "device: no pattern splits it. Split it or list it in `may_replicate`."
            )
    if unused:
        raise ValueError(
            f"No variable matches the pattern {sorted(unused)[0]!r}; patterns must "
            "match a whole path."
        )
