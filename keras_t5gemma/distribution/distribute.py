"""The one switch: after it, models are made, trained and run on several devices."""

import keras

from keras_t5gemma import _compat
from keras_t5gemma.distribution.layouts import (
    MESH_AXES,
    check_mesh,
    check_strategy,
    mesh_sizes,
    partition,
)

_RECIPES = {
    "torch": "DistributedDataParallel does, see tools/train_ddp.py",
    "tensorflow": "tf.distribute.MirroredStrategy does, see tools/train_mirrored.py",
}


def distribute(strategy="fsdp", data=None, model=None, devices=None):
    """Put what is made from now on onto a mesh of devices; call it before loading.

    Batches are split over the mesh axis `"data"`, so batch sizes must be multiples of
    it; what the strategy splits over which axis, `layouts` says. Weights, adapters,
    quantized weights and optimizer state are all made split, by `from_preset` too.

    Args:
        strategy: `"fsdp"`: every large variable is split over `"data"`, and gathered
            where it is needed; with `model` above 1 over that too, as follows. What is
            gathered stays for the backward pass, unless
            `compile(rematerialize=True)`, which gathers a block's anew.
            `"tensor"`: heads, feed-forward and vocabulary are split over `"model"`,
            and never gathered. `"data"`: every device holds all.
        data: devices of the axis `"data"`; `None` is all that `model` leaves, or 1 for
            `"tensor"`.
        model: devices of the axis `"model"`; `None` is all that `data` leaves for
            `"tensor"`, else 1.
        devices: their names, e.g. `["gpu:0", "gpu:1"]`; `None` is all there are.

    Returns:
        The `MeshDistribution`, which is Keras's distribution from now on where there
        is more than one device. `undo()` of it, or the end of a `with` block, brings
        back the one before.

    Raises:
        ValueError: on another backend than JAX, whose devices Keras does not use; for
            an unknown strategy; a mesh that has not as many places as there are
            devices. Heads, feed-forward or vocabulary that the mesh does not divide
            are an error when a model is made.
    """
    backend = keras.config.backend()
    if backend != "jax":
        raise ValueError(
            f"`distribute` works on the JAX backend; this is {backend}, where Keras's "
            f"distribution would split nothing. There {_RECIPES[backend]}."
        )
    check_strategy(strategy)
    check_mesh({k: v for k, v in (("data", data), ("model", model)) if v is not None})
    devices = keras.distribution.list_devices() if devices is None else list(devices)
    count = len(devices)
    if strategy == "tensor":
        data = (1 if model is None else count // model) if data is None else data
        model = max(1, count // data) if model is None else model
    else:
        model = 1 if model is None else model
        data = max(1, count // model) if data is None else data
    if data * model != count:
        raise ValueError(
            f"A mesh of data={data} x model={model} has {data * model} places; there "
            f"are {count} devices."
        )
    if strategy == "data" and model > 1:
        raise ValueError(
            f"`model` must be 1 for strategy 'data', which splits nothing; got {model}."
        )
    if strategy == "tensor" and model == 1 < count:
        raise ValueError(
            "`model` must be above 1 for strategy 'tensor': it splits nothing over "
            f"'data'; got data={data}, model=1. Take 'fsdp' or 'data'."
        )
    mesh = keras.distribution.DeviceMesh((data, model), MESH_AXES, devices)
    distribution = MeshDistribution(mesh, strategy)
    distribution.before = keras.distribution.distribution()
    if count > 1:  # One has nothing to share, and Keras would warn.
        keras.distribution.set_distribution(distribution)
    return distribution


class MeshDistribution(keras.distribution.ModelParallel):
    """Keras's `ModelParallel` with the layouts of `partition` in place of patterns.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh` of axes `"data"`, `"model"`.
        strategy: as in `partition`.
    """

    def __init__(self, device_mesh, strategy):
        no_patterns = keras.distribution.LayoutMap(device_mesh)
        super().__init__(layout_map=no_patterns, batch_dim_name="data")
        self.strategy = strategy
        self.mesh = mesh_sizes(device_mesh)
        self.config = None  # Of the model that variables are being made for.
        self.before = None

    def get_variable_layout(self, variable):
        layout = _compat.assigned_layout(variable)
        if layout is not None:
            return layout
        axes = partition(
            variable.path, variable.shape, self.mesh, self.strategy, self.config
        )
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def undo(self):
        """Bring back the distribution before this one, or none."""
        keras.distribution.set_distribution(self.before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def __repr__(self):
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"<MeshDistribution {self.strategy}: {sizes}>"


def bytes_per_device(variables):
    """Bytes that variables take on the device that holds most of them.

    Args:
        variables: those of a model or an optimizer, on the JAX backend.
    """
    totals = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return max(totals.values(), default=0)
