"""Entry point for distributed training and inference."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_t5gemma import _compat
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution.layouts import (
    MESH_AXES,
    check_mesh,
    check_strategy,
    mesh_sizes,
    partition,
)
from keras_t5gemma.utils.checks import one_of, shown
from keras_t5gemma.utils.texts import to_list

_ALTERNATIVES = {
    "torch": "DistributedDataParallel, see tools/train_ddp.py",
    "tensorflow": "tf.distribute.MirroredStrategy, see tools/train_mirrored.py",
}


def distribute(
    strategy: str = "fsdp",
    data: int | None = None,
    model: int | None = None,
    devices: str | Sequence[str] | None = None,
) -> "MeshDistribution":
    """Distribute models over a mesh of devices; call it before a model is built.

    Batches are split over the mesh axis `"data"`, so batch sizes must be multiples of
    its size; `layouts` defines which variables a strategy splits over which axis.
    Weights, adapters, quantized weights and optimizer state are created split, also by
    `from_preset`.

    Args:
        strategy: `"fsdp"` splits every large variable over `"data"` and gathers it
            where it is used; with `model` above 1 it also splits as `"tensor"` does.
            Gathered weights are kept for the backward pass, unless
            `compile(rematerialize=True)`, which gathers those of a block again.
            `"tensor"` splits heads, feed-forward and vocabulary over `"model"`, without
            gathering them. `"data"` replicates everything.
        data: devices of the axis `"data"`; `None` is all devices divided by `model`, or
            1 for `"tensor"`.
        model: devices of the axis `"model"`; `None` is all devices divided by `data`
            for `"tensor"`, else 1.
        devices: names, e.g. `["gpu:0", "gpu:1"]`, or one; `None` is all devices.

    Returns:
        The `MeshDistribution`, which becomes Keras's global distribution if there is
        more than one device. Its `undo()`, or the end of a `with` block, restores the
        previous one.

    Raises:
        ValueError: on another backend than JAX, for an unknown strategy or device, or
            a mesh whose size is not the number of devices. Heads, feed-forward or
            vocabulary that the mesh does not divide raise when a model is built.
    """
    backend = keras.config.backend()
    if backend != "jax":
        raise ValueError(
            f"`distribute` needs the JAX backend; this is {backend}, where Keras's "
            f"distribution splits nothing. Use {_ALTERNATIVES[backend]}."
        )
    check_strategy(strategy)
    check_mesh({k: v for k, v in (("data", data), ("model", model)) if v is not None})
    names = _names_of_devices(devices)
    count = len(names)
    if strategy == "tensor":
        data = (1 if model is None else count // model) if data is None else data
        model = max(1, count // data) if model is None else model
    else:
        model = 1 if model is None else model
        data = max(1, count // model) if data is None else data
    if data * model != count:
        raise ValueError(
            f"A mesh of data={data} x model={model} has {data * model} devices; there "
            f"are {count} devices."
        )
    if strategy == "data" and model > 1:
        raise ValueError(
            f"`model` must be 1 for strategy 'data', which splits nothing; got {model}."
        )
    if strategy == "tensor" and model == 1 < count:
        raise ValueError(
            "`model` must be above 1 for strategy 'tensor': it splits nothing over "
            f"'data'; got data={data}, model=1. Use 'fsdp' or 'data'."
        )
    mesh = keras.distribution.DeviceMesh((data, model), MESH_AXES, names)
    distribution = MeshDistribution(mesh, strategy)
    distribution.before = keras.distribution.distribution()
    if count > 1:  # Keras would warn about a single device.
        keras.distribution.set_distribution(distribution)
    return distribution


def _names_of_devices(devices):
    """All devices for `None`; else the list, checked."""
    known = keras.distribution.list_devices()
    if devices is None:
        return known
    given = [devices] if isinstance(devices, str) else to_list(devices, "devices")
    names = [one_of(name, "devices", known) for name in given]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`devices` must be one or more different devices; got {shown(names)}."
        )
    return names


class MeshDistribution(keras.distribution.ModelParallel):
    """Keras's `ModelParallel` with layouts from `partition` instead of patterns.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh` of axes `"data"`, `"model"`.
        strategy: as in `partition`.
    """

    def __init__(self, device_mesh: keras.distribution.DeviceMesh, strategy: str):
        no_patterns = keras.distribution.LayoutMap(device_mesh)
        super().__init__(layout_map=no_patterns, batch_dim_name="data")
        self.strategy = strategy
        self.mesh = mesh_sizes(device_mesh)
        self.config: T5GemmaConfig | None = None  # Of the model that is being built.
        self.before: Any = None

    def get_variable_layout(self, variable):
        layout = _compat.assigned_layout(variable)
        if layout is not None:
            return layout
        axes = partition(
            variable.path, variable.shape, self.mesh, self.strategy, self.config
        )
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def undo(self) -> None:
        """Restore the previous distribution, or none."""
        keras.distribution.set_distribution(self.before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def __repr__(self):
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"<MeshDistribution {self.strategy}: {sizes}>"


def bytes_per_device(variables: Iterable[keras.Variable]) -> int:
    """Bytes of variables on the device that holds most of them.

    Args:
        variables: of a model or an optimizer, on the JAX backend.
    """
    totals: dict[Any, int] = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return max(totals.values(), default=0)
