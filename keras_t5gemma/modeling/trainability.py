"""Which layers are frozen, kept by `.keras` files, pickles and deep copies."""

import warnings
from typing import Any

import keras

from keras_t5gemma.checkpoints.preset_saving import FROZEN
from keras_t5gemma.modeling.layer_iteration import iter_layers, path_of, sublayers


class KeepsTrainability:
    """Mixin of a model that is saved by the arguments of its constructor.

    Keras saves `trainable` with each layer of a functional model. Here the layers are
    made by the constructor, so the configuration lists those that are frozen.
    """

    def get_config(self) -> dict:
        return self._with_frozen_layers(super().get_config())  # type: ignore[misc]

    def _with_frozen_layers(self, config):
        """A configuration, and the paths of the frozen layers if there are any."""
        if _has_adapters(self):  # They are merged; all else was frozen for them.
            return {**config, **({"trainable": True} if "trainable" in config else {})}
        layers = _own_layers(self)
        frozen = sorted(_path(layer, self) for layer in layers if not layer.trainable)
        return {**config, FROZEN: frozen} if frozen else config

    @classmethod
    def from_config(cls, config: dict) -> Any:
        """Make an instance from the dict of `get_config`."""
        frozen = set(config.get(FROZEN, ()))
        config = {name: value for name, value in config.items() if name != FROZEN}
        model = super().from_config(config)  # type: ignore[misc]
        if frozen:
            layers = _parents_first(model)
            wanted = [layer.trainable for layer in layers]  # Those of a backbone.
            own = {id(layer) for layer in _own_layers(model)}
            for i, layer in enumerate(layers):
                if id(layer) in own:
                    wanted[i] = _path(layer, model) not in frozen
            for layer, value in zip(layers, wanted, strict=True):
                layer.trainable = value
        return model

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.save`: the model, how it is compiled, its optimizer's state.

        Adapters are merged into the weights, with a warning: the loaded model has none.

        Args:
            filepath: ending in `.keras`.
            *args: those of `keras.Model.save`.
            **kwargs: those of `keras.Model.save`.
        """
        warn_of_adapters(self, "`save` merges")
        super().save(filepath, *args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        warn_of_adapters(self, "A pickle or a deep copy merges")
        return super().__reduce__()


def _parents_first(model):
    """All layers, each after those that contain it.

    Assigning `trainable` changes all layers below, too.
    """
    seen = set()
    order: list[keras.layers.Layer] = []

    def visit(layer):
        if id(layer) not in seen:
            seen.add(id(layer))
            for below in sublayers(layer):
                visit(below)
            order.append(layer)

    visit(model)
    return order[::-1]


def _own_layers(model):
    """Layers with weights, without those that the configuration of a backbone lists."""
    backbone = getattr(model, "backbone", None)
    others = set()
    if isinstance(backbone, KeepsTrainability):
        others = {id(layer) for layer in iter_layers(backbone)}
    layers = iter_layers(model)
    return [layer for layer in layers if layer.weights and id(layer) not in others]


def _path(layer, model):
    """Of a layer in its model, whatever the name of the model is."""
    return "" if layer is model else path_of(layer)


def _has_adapters(model):
    return any(getattr(layer, "lora_enabled", False) for layer in iter_layers(model))


def warn_of_adapters(model: keras.layers.Layer, what: str) -> None:
    """Warn of adapters in a model that is saved.

    Args:
        model: that may have adapters.
        what: what merges them, the start of the message.
    """
    if _has_adapters(model):
        warnings.warn(
            f"{what} the adapters into the weights: the new model has none, and its "
            "training would go on with all weights. `save_lora_weights` saves "
            "adapters, `keras_t5gemma.callbacks.BackupAndRestore` a training that is "
            "to go on.",
            stacklevel=3,
        )
